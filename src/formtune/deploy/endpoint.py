"""An OpenAI-compatible server, which must show that it renders the prompts that the model was trained on.

A second BOS, thinking left on or another version of the template gives no error, only worse answers. So every reply's
`usage.prompt_tokens` must equal formtune's own count; where the server has `/tokenize` (vLLM), so must every token.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from formtune.base.row import Message, Row
from formtune.errors import UserError, first_line

TIMEOUT = 120  # seconds for an answer
RETRIES = 2  # of a request that fails because of the server or the network
KEY, MODEL = "set OPENAI_API_KEY", "--served_model names a model there"
REMEDY = (
    "serve the tokenizer and the chat template of the exported folder, add no second BOS, and switch thinking off "
    "(transformers: --reasoning off; vLLM: --default-chat-template-kwargs '{\"enable_thinking\": false}')"
)


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer to a row."""

    text: str
    finished: bool  # False if it was cut for length
    tokens: int | None  # of the answer, None where the server does not say
    seconds: float  # from sending the request to having the whole answer


class Endpoint:
    """A server and a model on it; the key, where one is needed, is read from OPENAI_API_KEY.

    `date` is the day that the rows' prompts write, None where they write none.
    """

    def __init__(self, url: str, model: str, max_tokens: int, date: str | None = None) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("formtune check-endpoint needs the extra: pip install -e '.[synthesize]'") from None
        self._openai = openai
        key = os.environ.get("OPENAI_API_KEY", "none")  # local servers take any
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)
        self.url, self.model, self.max_tokens = url, model, max_tokens
        self.gives_ids = False
        self._remedy = REMEDY
        if date is not None:
            self._remedy += (
                f"; the template writes the date, which is {date} in formtune's prompts and today in the server's: "
                "--data.date sets it for this check"
            )

    def open(self, row: Row) -> None:
        """Ask once, so that what is wrong for all rows is found first and loading the model is not timed."""
        with contextlib.suppress(self._openai.APIError, ValueError):  # most servers have no such route
            self.gives_ids = bool(self._ids(_question(row)))
        self.ask(row)

    def ask(self, row: Row) -> Reply:
        """The greedy answer to a row, if its prompt is the one that formtune renders."""
        messages, started = _question(row), time.perf_counter()
        try:
            completion: Any = self._client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_tokens=self.max_tokens,  # type: ignore[arg-type]
            )  # fmt: skip
            seconds = time.perf_counter() - started
            ids = self._ids(messages) if self.gives_ids else None
        except self._openai.APIError as error:
            raise UserError(f"{self.url}: {self._reason(error)}") from None
        except ValueError:
            completion, ids = None, None
        choices, usage = getattr(completion, "choices", None), getattr(completion, "usage", None)
        if not choices:
            raise UserError(f"{self.url}: the reply is not a chat completion; such a URL usually ends in /v1")
        message = choices[0].message
        if not message.content and any(getattr(message, name, None) for name in ("reasoning_content", "reasoning")):
            raise UserError(f"{row.where}: the server took the answer for reasoning; {REMEDY}")
        _prove(row, getattr(usage, "prompt_tokens", None), ids, self._remedy)
        tokens = getattr(usage, "completion_tokens", None)
        return Reply(message.content or "", choices[0].finish_reason != "length", tokens, seconds)

    def _ids(self, messages: list[Message]) -> list[int]:
        """The prompt's tokens by the server's own account; ValueError if it answers with something else."""
        reply: Any = self._client.post(
            f"{self.url.rstrip('/').removesuffix('/v1')}/tokenize",
            cast_to=object,
            body={"model": self.model, "messages": messages, "add_generation_prompt": True},
            options={"max_retries": 0},
        )
        ids = reply.get("tokens") if isinstance(reply, dict) else None
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ValueError("no token ids")
        return ids

    def _reason(self, error: Exception) -> str:
        openai, body = self._openai, getattr(error, "body", None)
        detail = body.get("message") or body.get("detail") if isinstance(body, dict) else None
        detail = " ".join(str(detail or first_line(error)).split())
        cause = first_line(error.__cause__ or error)
        reasons = (
            (openai.APITimeoutError, f"no answer within {TIMEOUT} s; lower --at_once, or wait for the model to load"),
            (openai.APIConnectionError, f"no connection ({cause}); start the server, or fix the URL"),
            ((openai.AuthenticationError, openai.PermissionDeniedError), f"the key was refused ({detail}); {KEY}"),
            (openai.NotFoundError, f"not found ({detail}); such a URL usually ends in /v1, and {MODEL}"),
            (openai.BadRequestError, f"asked for {self.model!r}, it refused ({detail}); {MODEL}"),
        )
        return next((reason for kind, reason in reasons if isinstance(error, kind)), detail)


def _question(row: Row) -> list[Message]:
    """The turns before the answer."""
    messages = list(row.messages)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _prove(row: Row, count: int | None, ids: Sequence[int] | None, remedy: str) -> None:
    """Show that the server's prompt is formtune's, by its token ids or at least by their number."""
    counts = f"the server's prompt has {{:,}} tokens and formtune's {len(row.prompt_ids):,}"
    if ids is not None and list(ids) != row.prompt_ids:
        differing = (i for i, (a, b) in enumerate(zip(ids, row.prompt_ids, strict=False)) if a != b)
        at = next(differing, min(len(ids), len(row.prompt_ids)))
        raise UserError(f"{row.where}: {counts.format(len(ids))}, differing from token {at} on; {remedy}")
    if count is None and ids is None:
        raise UserError(
            f"{row.where}: the server does not say how many tokens the prompt has (usage.prompt_tokens), so nothing "
            "shows that it renders the prompt that the model was trained on; have it report usage"
        )
    if count is not None and count != len(row.prompt_ids):
        raise UserError(f"{row.where}: {counts.format(count)}; {remedy}")

"""An endpoint of OpenAI's chat completions, made to prove that it renders the prompts that the model was trained on.

A server has a tokenizer and a chat template of its own. One BOS more, thinking switched on or another version of the
template, and the model answers a prompt that it was never trained on: no error, only worse answers. Every reply's
`usage.prompt_tokens` is therefore held against formtune's own rendering of the row, and where the server has a
`/tokenize` of conversations (vLLM), every token is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from formtune.base.row import Message, Row
from formtune.errors import UserError, first_line

TIMEOUT = 120  # seconds for an answer
RETRIES = 2  # of a request that fails for the server's or the network's reasons

REMEDY = (
    "serve the tokenizer and the chat template of the exported folder, add no second BOS, and switch thinking off "
    "(transformers: --reasoning off; vLLM: --default-chat-template-kwargs '{\"enable_thinking\": false}')"
)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server said to a row.

    Args:
        text: The answer.
        finished: False if it was cut for length.
        tokens: Tokens of the answer, None where the server does not say.
        seconds: From sending the request to having the whole answer.
    """

    text: str
    finished: bool
    tokens: int | None
    seconds: float


class Endpoint:
    """A server and the name of a model on it.

    Args:
        url: Base URL, such as http://127.0.0.1:8000/v1; the key, where one is needed, is read from OPENAI_API_KEY.
        model: The model to ask for.
        max_tokens: Tokens that an answer may have.
        date: Day that the rows' prompts write, None where they write none.
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
        """Ask once, so that what is wrong for all rows is said at once and loading the model is not measured.

        Raises:
            UserError: As in `ask`.
        """
        try:
            self.gives_ids = bool(self._ids(question(row)))
        except (self._openai.APIError, ValueError):
            self.gives_ids = False  # most servers have no such route
        self.ask(row)

    def ask(self, row: Row) -> Reply:
        """The greedy answer to a row, once its prompt is shown to be the one that formtune renders.

        Raises:
            UserError: The server gives no answer, or renders another prompt.
        """
        messages, started = question(row), time.perf_counter()
        try:
            found: Any = self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=self.max_tokens,
            )
            seconds = time.perf_counter() - started
            ids = self._ids(messages) if self.gives_ids else None
        except self._openai.APIError as error:
            raise UserError(f"{self.url}: {self._reason(error)}") from None
        except ValueError:
            found, ids = None, None
        choices, usage = getattr(found, "choices", None), getattr(found, "usage", None)
        if not choices:
            raise UserError(f"{self.url}: what came back is no chat completion; such a URL usually ends in /v1")
        message = choices[0].message
        if not message.content and any(getattr(message, name, None) for name in ("reasoning_content", "reasoning")):
            raise UserError(f"{row.where}: the server took the answer for reasoning; {REMEDY}")
        self._prove(row, getattr(usage, "prompt_tokens", None), ids)
        tokens = getattr(usage, "completion_tokens", None)
        return Reply(message.content or "", choices[0].finish_reason != "length", tokens, seconds)

    def _prove(self, row: Row, count: int | None, ids: Sequence[int] | None) -> None:
        if ids is not None and list(ids) != row.prompt:
            at = next((i for i, (a, b) in enumerate(zip(ids, row.prompt, strict=False)) if a != b), None)
            differ = f"differing from token {min(len(ids), len(row.prompt)) if at is None else at} on"
            raise UserError(f"{row.where}: {_counts(len(ids), row)}, {differ}; {self._remedy}")
        if count is None and ids is None:
            raise UserError(
                f"{row.where}: the server does not say how many tokens the prompt has (usage.prompt_tokens), so "
                "nothing shows that it renders the prompt that the model was trained on; have it report usage"
            )
        if count is not None and count != len(row.prompt):
            raise UserError(f"{row.where}: {_counts(count, row)}; {self._remedy}")

    def _ids(self, messages: list[Message]) -> list[int]:
        """The prompt's tokens by the server's own account.

        Raises:
            ValueError: It answers with something else.
        """
        found: Any = self._client.post(
            f"{self.url.rstrip('/').removesuffix('/v1')}/tokenize",
            cast_to=object,
            body={"model": self.model, "messages": messages, "add_generation_prompt": True},
            options={"max_retries": 0},
        )
        ids = found.get("tokens") if isinstance(found, dict) else None
        if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
            raise ValueError("no token ids")
        return ids

    def _reason(self, error: Exception) -> str:
        openai, body = self._openai, getattr(error, "body", None)
        words = body.get("message") or body.get("detail") if isinstance(body, dict) else None
        said = " ".join(str(words or first_line(error)).split())
        if isinstance(error, openai.APITimeoutError):
            return f"no answer within {TIMEOUT} s; lower --at_once, or wait until the server has loaded the model"
        if isinstance(error, openai.APIConnectionError):
            return f"no connection ({first_line(error.__cause__ or error)}); start the server, or mend the URL"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"the key was refused ({said}); set OPENAI_API_KEY"
        if isinstance(error, openai.NotFoundError):
            return f"not found ({said}); such a URL usually ends in /v1, and --served_model names a model there"
        if isinstance(error, openai.BadRequestError):
            return f"asked for {self.model!r}, it refused ({said}); --served_model names the model to ask for"
        return said


def question(row: Row) -> list[Message]:
    """The turns that a model is asked with."""
    messages = list(row.messages)
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _counts(count: int, row: Row) -> str:
    return f"the server's prompt has {count:,} tokens and formtune's {len(row.prompt):,}"

"""An OpenAI-compatible server, which must show that it renders the prompts that the model was trained on: a second BOS,
thinking left on or another template gives no error, only worse answers."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.errors import UserError, first_line
from formtune.export.llama_cpp import chat_prompt, prompt_fault

TIMEOUT = 120  # seconds for an answer
REFUSED = (400, 422)  # statuses with which a server may refuse to give log-probabilities
RETRIES = 2  # of a request that fails because of the server or the network
UNANSWERED = (
    "start the server and wait for its model to load; check the URL, which usually ends in /v1, --served_model and "
    "OPENAI_API_KEY; lower --at_once if it is too slow"
)
REMEDY = (
    "serve the tokenizer and the chat template of the exported folder, add no second BOS, and switch thinking off, or "
    "on for the format Reasoning (transformers: --reasoning off; vLLM: --default-chat-template-kwargs "
    "'{\"enable_thinking\": false}'); if the template writes the date, check with today's (--data.date)"
)


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    finished: bool  # False if it was cut for length
    seconds: float  # from sending the request to having the whole answer
    count: int  # tokens of the answer
    tokens: dict[str, list[Any]] | None  # their texts and log-probabilities, None if the server does not give them


class Endpoint:
    """A server and a model on it; the key, where one is needed, is read from OPENAI_API_KEY."""

    def __init__(self, url: str, model: str, max_tokens: int, renderer: Renderer) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("formtune check-endpoint needs the extra: pip install -e '.[synthesize]'") from None
        self._error = openai.APIError
        key = os.environ.get("OPENAI_API_KEY", "none")  # local servers take any
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)
        self.url, self.model, self.max_tokens, self._renderer = url, model, max_tokens, renderer
        self.ids: Callable[[dict[str, Any]], list[int]] | None = None  # how the server shows a prompt's tokens
        self._logprobs = True  # whether to ask for log-probabilities

    def open(self, row: Row, schema: Any = None) -> None:
        """Ask once, so that what is wrong for all rows is found first and loading the model is not timed."""
        for ids in (self._ids_of_vllm, self._ids_of_llama_cpp):
            with contextlib.suppress(self._error, LookupError, TypeError):  # most servers have no such route
                self.ids = self.ids or (ids if ids(chat_prompt(row)) else None)
        self.ask(row, schema)

    def ask(self, row: Row, schema: Any = None) -> Reply:
        """The greedy answer to a row, by constrained decoding if there is a schema, once its prompt is proven."""
        prompt, started = chat_prompt(row), time.perf_counter()
        options: dict[str, Any] = prompt | ({"logprobs": True} if self._logprobs else {})
        if schema is not None:
            json_schema = {"name": "answer", "schema": schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        try:
            completion: Any = self._client.chat.completions.create(
                model=self.model, temperature=0, max_tokens=self.max_tokens, **options
            )
            seconds = time.perf_counter() - started
            choice, usage = completion.choices[0], completion.usage
            ids = self.ids(prompt) if self.ids else None
        except self._error as error:
            if self._logprobs and getattr(error, "status_code", None) in REFUSED:
                self._logprobs = False
                return self.ask(row, schema)
            reason = " ".join(first_line(part) for part in (error, error.__cause__) if part)
            raise UserError(f"{self.url}: {reason}; {UNANSWERED}") from None
        except (AttributeError, LookupError, TypeError):
            raise UserError(f"{self.url}: the reply is not a chat completion; {UNANSWERED}") from None
        message, tags = choice.message, self._renderer.tags
        reasoning = tags and (getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None))
        if tags and reasoning:  # the server took the answer apart
            message.content = f"{tags[0]}{reasoning}{tags[1]}{message.content or ''}"
        if fault := self._fault(row, message, getattr(usage, "prompt_tokens", None), ids):
            raise UserError(f"{row.where}: {fault}")
        content = getattr(choice.logprobs, "content", None) or []
        tokens = {"tokens": [token.token for token in content], "logprobs": [token.logprob for token in content]}
        return Reply(
            message.content or "", choice.finish_reason != "length", seconds,
            getattr(usage, "completion_tokens", 0), tokens if content and not reasoning else None,
        )  # fmt: skip

    def _fault(self, row: Row, message: Any, count: int | None, ids: list[int] | None) -> str | None:
        """Why a reply says nothing of the model: it is not the answer, or its prompt is not proven to be formtune's."""
        parsed = [name for name in ("reasoning_content", "reasoning", "tool_calls") if getattr(message, name, None)]
        if parsed and not message.content:
            return f"the server took the answer for {parsed[0]}; start it without such a parser; {REMEDY}"
        if ids is not None:
            fault = prompt_fault(row, ids, self._renderer)
        elif count is None:
            return "the server does not say how many tokens the prompt has (usage.prompt_tokens); have it report usage"
        else:
            own = len(row.prompt_ids)
            fault = f"the server's prompt has {count:,} tokens and formtune's {own:,}" if count != own else None
        return fault and f"{fault}; {REMEDY}"

    def _ids_of_vllm(self, prompt: dict[str, Any]) -> list[int]:
        return self._post("/tokenize", {"model": self.model, **prompt, "add_generation_prompt": True})["tokens"]

    def _ids_of_llama_cpp(self, prompt: dict[str, Any]) -> list[int]:
        text = self._post("/apply-template", prompt)["prompt"]
        return self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        url = f"{self.url.rstrip('/').removesuffix('/v1')}{path}"
        return self._client.post(url, cast_to=object, body=body, options={"max_retries": 0})

"""A client for OpenAI-compatible servers, and a check that they render prompts as training did."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.errors import UserError, first_line
from formtune.export.llama_cpp import chat_prompt, llama_cpp_tokens, prompt_fault
from formtune.export.quantize import missing_package

TIMEOUT = 120  # seconds for an answer
RETRIES = 2  # after an error of the server or the network
UNANSWERED = (
    "start the server and wait for its model to load; check the URL, which usually ends in /v1, the model's name and "
    "OPENAI_API_KEY; lower --concurrency if it is too slow"
)
REMEDY = (
    "serve the tokenizer and the chat template of the exported folder as formtune serve does, with one BOS, and "
    "with thinking on only for the format Reasoning; if the template writes the date, check with today's (--data.date)"
)


class Refused(UserError):
    """The server answered with an error, of this HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A model on a server; the API key, if needed, is read from OPENAI_API_KEY."""

    def __init__(self, url: str, model: str) -> None:
        if missing := missing_package("chat"):
            raise UserError(f"a request for chat completions {missing}")
        import openai

        self.url, self.model, self._error = url, model, openai.APIError
        key = os.environ.get("OPENAI_API_KEY", "none")  # local servers accept any
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)

    def complete(self, **body: Any) -> Any:
        reply = self._send(self._client.chat.completions.create, model=self.model, temperature=0, **body)
        if not getattr(reply, "choices", None):
            raise UserError(f"{self.url}: the reply is not a chat completion; {UNANSWERED}")
        return reply

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The reply to another request than a chat completion."""
        url = f"{self.url.rstrip('/').removesuffix('/v1')}{path}"
        return self._send(self._client.post, path=url, cast_to=object, body=body)

    def _send(self, send: Callable[..., Any], **arguments: Any) -> Any:
        try:
            return send(**arguments)
        except self._error as error:
            reason = " ".join(first_line(part) for part in (error, error.__cause__) if part)
            message, status = f"{self.url}: {reason}; {UNANSWERED}", getattr(error, "status_code", None)
            raise (Refused(message, status) if status else UserError(message)) from None


class Endpoint(Client):
    """A server whose prompts must have the tokens of training: other ones give no error, only worse answers."""

    def __init__(self, url: str, model: str, max_tokens: int, renderer: Renderer) -> None:
        super().__init__(url, model)
        self._renderer = renderer
        self.ids: Callable[[dict[str, Any]], list[int]] | None = None  # how the server shows a prompt's tokens
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": True}

    def open(self, row: Row, schema: Any = None) -> None:
        """Ask once: general errors come first, and loading the model is not timed."""
        try:
            self.complete(**self._body(row, schema))  # first of all: a server that is down is asked nothing else
        except Refused:  # some servers refuse a request for log-probabilities
            del self._options["logprobs"]
            self.complete(**self._body(row, schema))
        for ids in (self._ids_of_vllm, self._ids_of_llama_cpp):
            with contextlib.suppress(UserError, LookupError, TypeError):  # most servers have no such route
                self.ids = self.ids or (ids if ids(chat_prompt(row)) else None)

    def _body(self, row: Row, schema: Any) -> dict[str, Any]:
        body = chat_prompt(row) | self._options
        if schema is not None:
            json_schema = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return body

    def ask(self, row: Row, schema: Any = None) -> tuple[Any, int, float]:
        """The greedy answer to a row, under a schema, if any, with its tokens and seconds; checks the prompt."""
        started = time.perf_counter()
        reply = self.complete(**self._body(row, schema))
        seconds = time.perf_counter() - started
        choice, message, tags = reply.choices[0], reply.choices[0].message, self._renderer.tags
        reasoning = tags and (getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None))
        if tags and reasoning:  # the server split the answer
            message.content, choice.logprobs = f"{tags[0]}{reasoning}{tags[1]}{message.content or ''}", None
        ids = self.ids(chat_prompt(row)) if self.ids else None
        if fault := self._fault(row, message, getattr(reply.usage, "prompt_tokens", None), ids):
            raise UserError(f"{row.where}: {fault}; {REMEDY}")
        return choice, getattr(reply.usage, "completion_tokens", 0), seconds

    def _fault(self, row: Row, message: Any, count: int | None, ids: list[int] | None) -> str | None:
        """Why a reply cannot be checked: it is not the answer, or its prompt is not verifiably formtune's."""
        parsed = [name for name in ("reasoning_content", "reasoning", "tool_calls") if getattr(message, name, None)]
        if parsed and not message.content:
            return f"the server parsed the answer as {parsed[0]}; start it without that parser"
        if ids is not None:
            return prompt_fault(row, ids, self._renderer)
        if count is None:
            return "the server does not say how many tokens the prompt has (usage.prompt_tokens); have it report usage"
        expected = len(row.prompt_ids)
        return f"the server's prompt has {count:,} tokens and formtune's {expected:,}" if count != expected else None

    def _ids_of_vllm(self, prompt: dict[str, Any]) -> list[int]:
        return self.post("/tokenize", {"model": self.model, **prompt, "add_generation_prompt": True})["tokens"]

    def _ids_of_llama_cpp(self, prompt: dict[str, Any]) -> list[int]:
        return llama_cpp_tokens(self.post, self.post("/apply-template", prompt)["prompt"])

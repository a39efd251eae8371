"""One example in token ids, and the turns that it was rendered from."""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": text}, and as in OpenAI's chat completions
# `tool_calls` (with arguments as an object), `reasoning_content`, `tool_call_id` and the `name` of a tool.
Message = dict[str, Any]
Tags = tuple[str, str] | None  # around reasoning; None without reasoning
SYSTEM_ROLES = ("system", "developer")

_IDS: dict[int, int] = {}  # each token id once


@dataclass(frozen=True, slots=True)
class Row:
    """One example in token ids."""

    prompt_ids: list[int]  # up to and including the opening of the assistant's turn
    target_ids: list[int]  # the target and the end-of-turn token; empty without a target
    input: str  # text of the last user turn
    target: str | None  # text of the target
    where: str  # `file:line` the row came from
    number: int = 0  # position among the rows it was encoded with
    origin: str = ""  # author: "human", the name of a model, or "" if unknown
    messages: Sequence[Message] = ()  # the turns it was rendered from
    schema: str | None = None  # JSON text of the row's own schema
    tools: str | None = None  # JSON list of the tools that the prompt defines

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


def interned(ids: Sequence[int]) -> list[int]:
    """The ids with equal ones as one object: such lists take a fifth of the memory."""
    return [*map(_IDS.setdefault, ids, ids)]


def with_json_arguments(messages: Sequence[Message]) -> list[Message]:
    """The turns with the arguments of their tool calls as JSON text, as OpenAI's chat completions have them."""
    turns = copy.deepcopy(list(messages))
    for function in (call["function"] for turn in turns for call in turn.get("tool_calls", ())):
        if not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return turns


def full_text(message: Message) -> str:
    """A turn's text, and its tool calls as JSON."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


class UnfitRow(ValueError):
    """A row that this tokenizer and template cannot represent unchanged; the message says why."""


def check_turns(context: list[Message], prompt: str, closing: str) -> None:
    """Refuse a row if the prompt does not contain every turn: a template may leave one out."""
    prompt = _letters(prompt)
    turns = [(turn["role"], turn["content"]) for turn in context]
    # Templates leave out the reasoning of earlier answers.
    turns = [(role, text.rpartition(closing)[2] if role == "assistant" else text) for role, text in turns]
    # Longest first, and each one removed, since a short text may also be part of a longer one.
    for role, content in sorted(turns, key=lambda turn: len(_letters(turn[1])), reverse=True):
        # A template may write a tool's result as JSON text.
        forms = [content, json.dumps(content, ensure_ascii=False)] if role == "tool" else [content]
        letters = next((form for form in map(_letters, forms) if form in prompt), None)
        if letters is None:
            text = " ".join(content.split())[:40]
            raise UnfitRow(
                f"the template leaves out the {role} turn {text!r}; move it into the last user turn or change the base"
            )
        prompt = prompt.replace(letters, "\0", 1)


def _letters(text: str) -> str:
    """A text without case, punctuation and spacing, which a template may change."""
    return re.sub(r"[\W_]+", "", text.casefold())


def quantile(sizes: Sequence[int], percent: float) -> int:
    """The percentile of the sizes: always one of them, never an interpolation; 0 if there are none."""
    return int(np.percentile(sizes, percent, method="higher")) if len(sizes) else 0

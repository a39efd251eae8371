"""One example in token ids, and the turns that it was rendered from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True, slots=True)
class Row:
    """One example in token ids."""

    prompt_ids: list[int]  # up to and including the opening of the assistant's turn
    target_ids: list[int]  # the target and the end-of-turn token; empty where there is no target
    input: str  # text of the last user turn
    target: str | None  # text of the target
    where: str  # `file:line` the row came from
    number: int = 0  # position among the rows it was encoded with
    origin: str = ""  # author: "human", the name of a model, or "" if unknown
    messages: Sequence[Message] = ()  # the turns it was rendered from

    @property
    def context(self) -> str:
        """Everything that the answer's values may come from: every turn, the system prompt and tool results too."""
        turns = self.messages if self.target is None else self.messages[:-1]
        return "\n".join(message["content"] for message in turns) or self.input

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


class UnfitRow(ValueError):
    """A row that this tokenizer and template cannot represent unchanged; the message says why."""


def quantile(sizes: Sequence[int], percent: float) -> int:
    """The percentile of the sizes: always one of them, never an interpolation; 0 if there are none."""
    return int(np.percentile(sizes, percent, method="higher")) if len(sizes) else 0

"""One example in token ids, and the turns that it was rendered from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True, slots=True)
class Row:
    """One example in token ids.

    Args:
        prompt: Ids up to and including the opening of the assistant's turn.
        target: Ids of the answer and the end-of-turn token; empty where there is no gold answer.
        is_value: For each target id, whether it touches a value of the answer (the rest is structure).
        source: Text of the last user turn.
        gold: Text of the wanted answer, None where there is none.
        where: `file:line` the row came from.
        number: Position among the rows it was encoded with.
        origin: Who wrote it: "human", the name of a model, or "" where that is not known.
        messages: The turns it was rendered from.
    """

    prompt: list[int]
    target: list[int]
    is_value: list[bool]
    source: str
    gold: str | None
    where: str
    number: int = 0
    origin: str = ""
    messages: Sequence[Message] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


class UnfitRow(ValueError):
    """A row that this tokenizer and template cannot carry unchanged; the message says why."""


def quantile(sizes: Sequence[int], percent: float) -> int:
    """The size that `percent` of all sizes do not exceed: one of them, nothing in between; 0 if there are none."""
    return int(np.percentile(sizes, percent, method="higher")) if len(sizes) else 0

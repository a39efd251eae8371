"""What the collate function makes of rows, and what an evaluation returns for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from formtune.base.row import Row
from formtune.errors import Fault
from formtune.formats import Verdict


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to a row, and the format's verdict on it."""

    row: Row
    text: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an evaluation decodes."""

    constrained: bool = False  # to the format, even if `model.constrained` is off
    max_new_tokens: int | None = None  # of an answer; None for the model's own limit
    logged: bool = True  # whether the figures go to the logger


@dataclass(slots=True)
class Batch:
    """This process's rows of one optimizer step or of an evaluation, and the tensors that they are computed from."""

    rows: Sequence[Row]
    micro_batches: list[Any]  # `Packed` or `Padded`, each within the token budget
    limits: Sequence[int] = ()  # for each row, how many tokens its answer may have
    decoding: Decoding = Decoding()

    def to(self, device: Any) -> Batch:
        """Called by Lightning; each micro-batch is copied to the device when it is computed."""
        return self


@contextlib.contextmanager
def out_of_memory_named(rows: Sequence[Row], tokens: int) -> Iterator[None]:
    """If memory runs out, say which rows were being computed and what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        longest = max(rows, key=len)
        raise Fault(
            f"out of memory in a step of {len(rows)} rows, the longest {longest.where} with {len(longest)} tokens; "
            f"lower model.tokens_per_micro_batch (now {tokens}) or set model.gradient_checkpointing: true"
        ) from error

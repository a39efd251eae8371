"""What the collate function makes of rows: the micro-batches of one optimizer step or of an evaluation batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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

    constrained: bool = False  # to the format, also where the model is not set to do it always
    max_new_tokens: int | None = None  # of an answer; None for the model's own limit
    logged: bool = True  # whether the figures go to the logger


@dataclass(slots=True)
class Batch:
    """This process's rows, and the tensors that the model computes them from."""

    rows: Sequence[Row]
    micro_batches: list[Any]  # `Packed` or `Padded`, each within the token budget
    decoding: Decoding = Decoding()

    def to(self, device: Any, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on a device; Lightning calls it."""
        return replace(self, micro_batches=[part.to(device, non_blocking) for part in self.micro_batches])

    def pin_memory(self) -> Batch:
        """The same batch with its tensors in page-locked memory; the DataLoader calls it."""
        return replace(self, micro_batches=[part.pin_memory() for part in self.micro_batches])


class TensorFields:
    """A dataclass whose fields named in `TENSORS` move between devices."""

    TENSORS: ClassVar[tuple[str, ...]]

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """The same with its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Any:
        """The same with its tensors in page-locked memory."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Any) -> Any:
        fields: Any = self
        return replace(fields, **{name: change(getattr(self, name)) for name in self.TENSORS})


@contextlib.contextmanager
def out_of_memory_named(rows: Sequence[Row], tokens: int) -> Iterator[None]:
    """Say which rows were being computed when memory ran out, and what to lower."""
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

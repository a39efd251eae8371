"""What the collate function makes of rows, and what an evaluation returns for each."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from formtune.base.row import Row
from formtune.errors import Fault
from formtune.evaluation.confidence import UNKNOWN, Confidence
from formtune.formats import Verdict


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to a row, and the format's verdict on it."""

    row: Row
    text: str
    verdict: Verdict
    confidence: Confidence = UNKNOWN


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

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        """The same batch with its tensors on a device; Lightning calls it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch with its tensors in page-locked memory; the DataLoader calls it."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        parts = []
        for part in self.micro_batches:
            tensors = [field.name for field in fields(part) if isinstance(getattr(part, field.name), Tensor)]
            parts.append(replace(part, **{name: change(getattr(part, name)) for name in tensors}))
        return replace(self, micro_batches=parts)


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

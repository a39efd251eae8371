"""What the processes of a run have to know of each other."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed

T = TypeVar("T")


def highest(trainer: Any, *values: float) -> list[float]:
    """Each value's highest over all processes, the same on each of them."""
    if trainer.world_size == 1:
        return [float(value) for value in values]
    found = trainer.strategy.reduce(
        torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device), reduce_op="max"
    )
    return found.tolist()


def gathered(trainer: Any, part: list[T]) -> list[T]:
    """The parts of all processes one after the other, the same on each of them."""
    if trainer.world_size == 1:
        return part
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, part)
    return [one for some in parts for one in some]

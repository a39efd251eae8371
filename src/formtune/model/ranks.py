"""What the processes of a run exchange."""

from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed

T = TypeVar("T")


def highest(trainer: Any, *values: float) -> list[float]:
    if trainer.world_size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(tensor, reduce_op="max").tolist()  # type: ignore[no-any-return]


def gathered(trainer: Any, part: list[T]) -> list[T]:
    """The parts of all processes in the order of their ranks."""
    if trainer.world_size == 1:
        return part
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, part)
    return list(chain(*parts))

"""What the processes of a run have to know of each other."""

from __future__ import annotations

from typing import Any

import torch


def highest(trainer: Any, *values: float) -> list[float]:
    """Each value's highest over all processes, the same on each of them."""
    if trainer.world_size == 1:
        return [float(value) for value in values]
    found = trainer.strategy.reduce(
        torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device), reduce_op="max"
    )
    return found.tolist()

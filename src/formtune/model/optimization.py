"""Optimizer, learning-rate schedule, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from formtune.errors import Fault, UserError, first_line

SKIPPED = 20  # skipped steps in a row that abort a run; 16-mixed skips a few while it finds its scale


class CosineWithWarmup(LRScheduler):
    """Rises linearly from zero, then falls along a cosine to zero at the last step.

    Args:
        optimizer: Optimizer whose learning rate it sets.
        warmup: Share of all steps in which the learning rate rises.
    """

    def __init__(self, optimizer: Optimizer, warmup: ClosedUnitInterval = 0.1) -> None:
        self.warmup, self.steps = float(warmup), 1  # a plain float, which safe loading takes
        super().__init__(optimizer)

    def start(self, steps: int) -> None:
        """Set the number of steps, which Lightning knows only after the optimizer is made."""
        self.steps = steps
        self._last_lr: list[Any] = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[Any]:
        step, warmup = self.last_epoch, round(self.warmup * self.steps)
        factor = step / max(1, warmup)
        if step >= warmup:
            factor = max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup))))
        return [rate * factor for rate in self.base_lrs]


def build_optimizer(
    optimizer: OptimizerCallable, scheduler: LRSchedulerCallable, parameters: list[Parameter], trainer: Any
) -> dict[str, Any]:
    """Optimizer and schedule, as Lightning's `configure_optimizers` returns them."""
    built = optimizer(parameters)
    # Fused optimizers would unscale 16-mixed gradients inside step(), after they should have been clipped.
    built._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    schedule = scheduler(built)
    if isinstance(schedule, CosineWithWarmup):
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("trainer.max_steps: set it; the learning-rate schedule needs to know the last step")
        schedule.start(int(steps))
    return {"optimizer": built, "lr_scheduler": schedule}


def check_optimizer(factory: OptimizerCallable) -> None:
    """Try the optimizer's arguments before the base is loaded."""
    try:
        values = factory([Parameter(torch.zeros(1, 1))]).defaults
    except (TypeError, ValueError) as error:
        raise UserError(f"model.optimizer: {first_line(error)}") from error
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"model.optimizer: {name} is {value}, it must be a finite number")


class GradientGuard:
    """Clips gradients; skips and counts steps with a non-finite gradient."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm or float("inf")
        self.skipped = self.in_a_row = 0

    def check(self, parameters: Sequence[Parameter], step: int) -> None:
        """Clip the gradients, or drop them all; too many skipped steps in a row are a fault."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        if torch.isfinite(norm):  # the same on all ranks, since gradients were exchanged
            self.in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None  # then the optimizer leaves parameter and moments unchanged
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == SKIPPED:
            raise Fault(
                f"model.optimizer: {SKIPPED} steps in a row had a non-finite gradient (up to step {step}); earlier "
                "checkpoints are kept; lower the learning rate or look at the rows with formtune audit"
            )

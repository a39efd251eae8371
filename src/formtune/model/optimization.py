"""Optimizer and learning-rate schedule."""

import math
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from formtune.errors import UserError, first_line


class CosineWithWarmup(LRScheduler):
    """Rises linearly from zero, then falls along a cosine to zero at the last step.

    Args:
        optimizer: Optimizer whose learning rate it sets.
        warmup: Fraction of all steps in which the learning rate rises.
    """

    def __init__(self, optimizer: Optimizer, warmup: ClosedUnitInterval = 0.1) -> None:
        self.warmup, self.steps = float(warmup), 1  # a plain float, which safe loading accepts
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
    schedule, steps = scheduler(built), trainer.estimated_stepping_batches
    if (total := getattr(schedule, "total_steps", steps)) < steps < float("inf"):
        raise UserError(f"model.scheduler: total_steps is {total}, but the run has {steps} steps; set it to {steps}")
    if isinstance(schedule, CosineWithWarmup):
        if steps == float("inf"):
            raise UserError("trainer.max_steps: set it; the cosine schedule needs the number of steps")
        schedule.start(int(steps))
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_optimizer(optimizer: OptimizerCallable, scheduler: LRSchedulerCallable) -> None:
    """Try the arguments of optimizer and schedule before the base is loaded."""
    key = "model.optimizer"
    try:
        parameter = Parameter(torch.zeros(2, 2))
        built = optimizer([parameter])
        for name, value in built.defaults.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}, it must be a finite number")
        parameter.grad = torch.zeros(2, 2)
        built.step()  # some need a closure, or sparse gradients
        key = "model.scheduler"
        if isinstance(scheduler(built), ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau needs a metric after each step; use another schedule")
    except Exception as error:  # from torch, or from a custom class
        raise UserError(f"{key}: {first_line(error)}") from error

"""What `trainer` may hold: a flag that would waste a training is refused before anything slow begins."""

from __future__ import annotations

import os
from collections.abc import Set
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from formtune.configuration.parsing import did_you_mean
from formtune.errors import UserError

TRAINS = ("train", "fit")
# Flag, the values that are refused, the commands that refuse them, and why.
REFUSED = (
    ("limit_val_batches", (0,), (*TRAINS, "validate"), "0 leaves nothing to judge the model by"),
    ("limit_test_batches", (0,), ("train", "test"), "0 leaves nothing to judge the model by"),
    ("max_steps", (0,), TRAINS, "0 leaves nothing to train"),
    ("max_epochs", (0,), TRAINS, "0 leaves nothing to train"),
    ("val_check_interval", (0,), TRAINS, "0 is not a number of steps; leave it out for every 100"),
)
# Adam's second moments and the adapters would be rounded away in 16 bits.
SIXTEEN_BITS = ("bf16-true", "bf16", "16-true", "16")


def check_trainer(config: Namespace, command: str) -> None:
    """Refuse flags that make no sense here; the UserError names the flag, the reason and what to use instead."""
    trainer = config.trainer
    for flag, values, commands, reason in REFUSED:
        if command in commands and trainer[flag] in values:
            raise UserError(f"trainer.{flag}: {reason}")
    if trainer.gradient_clip_val:
        raise UserError("trainer.gradient_clip_val: set model.max_grad_norm instead")
    if trainer.accumulate_grad_batches != 1:
        raise UserError("trainer.accumulate_grad_batches: a batch is a whole step here; set data.rows_per_step instead")
    if str(trainer.precision) in SIXTEEN_BITS:
        raise UserError(
            f"trainer.precision: {trainer.precision} would store the adapters in 16 bits; use bf16-mixed or 16-mixed"
        )
    _check_strategy(trainer.strategy)
    if trainer.strategy == "fsdp" and (config.model.quantize or config.model.compile):
        raise UserError("trainer.strategy: fsdp takes neither model.quantize nor model.compile; use ddp with them")


def _check_strategy(strategy: str | Namespace) -> None:
    name, start = strategy, ""
    if isinstance(strategy, Namespace):
        name, start = strategy.class_path, strategy.get("init_args.start_method", "")
    if any(kind in f"{name} {start}" for kind in ("spawn", "fork", "notebook")):
        raise UserError(
            "trainer.strategy: processes that are spawned or forked (ddp_spawn, ddp_fork, ddp_notebook, start_method) "
            "cannot hand back what they trained; use ddp"
        )
    if name != "fsdp" and any(kind in str(name).lower() for kind in ("fsdp", "deepspeed", "modelparallel")):
        raise UserError(f"trainer.strategy: {name} would split the adapters too; use fsdp or ddp")


def check_callbacks(trainer: Any, names: Set[str]) -> None:
    """Refuse a callback that cannot work here, or that monitors a metric that no validation measures.

    Args:
        trainer: With its callbacks.
        names: Metrics of a validation.
    """
    names = names | {"epoch", "step", "train/loss", "train/eval_loss", "val/loss_gap"}
    for callback in trainer.callbacks:
        kind, monitor = type(callback).__name__, getattr(callback, "monitor", None)
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise UserError(
                f"trainer.callbacks: {kind} averages weights after the best checkpoint was chosen, "
                "so what is tested and exported would not be what was validated; leave it out"
            )
        if monitor is not None and monitor not in names:
            remedy = did_you_mean(monitor, names) or "; monitor val/loss, for example"
            raise UserError(f"trainer.callbacks: {kind} monitors {monitor}, which no validation measures{remedy}")


def default_precision(accelerator: Any) -> str:
    """bfloat16 arithmetic if the hardware has it."""
    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    on_cpu = accelerator == "cpu" or not torch.backends.mps.is_available()
    return "bf16-mixed" if on_cpu and torch.cpu._is_avx512_bf16_supported() else "32-true"


def launched_externally() -> bool:
    """Whether torchrun or srun started this process beside others."""
    if SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return True
    return int(os.environ.get("WORLD_SIZE", 1)) > 1

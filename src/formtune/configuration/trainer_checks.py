"""What `trainer` may hold: refused before anything slow begins, instead of trained for nothing or found out later."""

from __future__ import annotations

import difflib
import os
from collections.abc import Set
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from formtune.errors import UserError


def check_trainer(config: Namespace, verb: str) -> None:
    """Refuse what would train for nothing, or fail only after the first evaluation.

    Args:
        config: Of the verb.
        verb: What is to be done.

    Raises:
        UserError: Names the key.
    """
    trainer = config.trainer
    for name in {"fit": ("val", "test"), "validate": ("val",), "test": ("test",)}.get(verb, ()):
        if trainer[f"limit_{name}_batches"] == 0:
            raise UserError(f"trainer.limit_{name}_batches: 0 leaves nothing to judge the model by")
    for name in ("max_steps", "max_epochs"):
        if verb == "fit" and trainer[name] == 0:
            raise UserError(f"trainer.{name}: 0 leaves nothing to train")
    if verb == "fit" and trainer.val_check_interval == 0:
        raise UserError("trainer.val_check_interval: 0 is no number of steps; leave it out for every 100")
    strategy = trainer.strategy
    named = str(strategy.get("class_path", "") if isinstance(strategy, Namespace) else strategy).lower()
    if strategy != "fsdp" and any(kind in named for kind in ("fsdp", "deepspeed", "modelparallel")):
        raise UserError(f"trainer.strategy: {named} would split the adapters too; use fsdp or ddp")
    if strategy == "fsdp" and (config.model.quantize or config.model.compile):
        raise UserError("trainer.strategy: fsdp takes neither model.quantize nor model.compile; use ddp with them")
    if trainer.gradient_clip_val:
        raise UserError("trainer.gradient_clip_val: set model.max_grad_norm instead")
    if trainer.accumulate_grad_batches != 1:
        raise UserError("trainer.accumulate_grad_batches: a batch is a whole step here; set data.rows_per_step instead")


def check_processes(trainer: Any) -> None:
    """Refuse processes that Lightning spawns or forks: what they train stays in them, and the run is lost at its end.

    Args:
        trainer: With its strategy.

    Raises:
        UserError: Names the strategy to take.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise UserError(
            "trainer.strategy: processes that are spawned or forked (ddp_spawn, ddp_fork, ddp_notebook, start_method) "
            "cannot hand back what they trained; use ddp"
        )


def check_callbacks(trainer: Any, names: Set[str]) -> None:
    """Refuse a callback that cannot work here, or that monitors a metric that does not exist.

    Args:
        trainer: With its callbacks.
        names: Of all that a validation measures.

    Raises:
        UserError: Names the callback, and the name that may be meant.
    """
    names = names | {"epoch", "step", "train/loss", "train/eval_loss", "val/loss_gap"}
    for callback in trainer.callbacks:
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} averages weights after the best checkpoint was chosen, "
                "so what is tested and exported would not be what was validated; leave it out"
            )
        name = getattr(callback, "monitor", None)
        if name is not None and name not in names:
            near = difflib.get_close_matches(name, names, 1) or ["val/loss"]
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} monitors {name}, which no validation measures; "
                f"did you mean {near[0]}?"
            )


def checked_precision(precision: Any, accelerator: Any) -> str:
    """The precision to train in; where none is given, bfloat16 arithmetic if the hardware has it."""
    if precision is None:
        if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
            return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
        on_cpu = accelerator == "cpu" or not torch.backends.mps.is_available()
        return "bf16-mixed" if on_cpu and torch.cpu._is_avx512_bf16_supported() else "32-true"
    if str(precision) in ("bf16-true", "bf16", "16-true", "16"):
        # Adam's second moments and the adapters would be rounded away in 16 bits.
        raise UserError(
            f"trainer.precision: {precision} would store the adapters in 16 bits; use bf16-mixed or 16-mixed"
        )
    return str(precision)


def started_by_others() -> bool:
    """Whether torchrun or srun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 or (
        SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    )

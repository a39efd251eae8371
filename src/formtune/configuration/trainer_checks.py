"""The parser of the Lightning commands, and trainer flags that are refused before anything slow starts."""

import inspect
import os
from collections.abc import Set
from typing import Any

import lightning.pytorch as L
import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import callbacks as known
from lightning.pytorch.cli import LightningArgumentParser

from formtune.configuration.parsing import OneLine, did_you_mean
from formtune.configuration.yaml_file import LINES, is_set
from formtune.errors import UserError

REFUSED = {  # values that a flag cannot have, and why
    "limit_val_batches": ((0,), "leaves no rows to evaluate the model on"),
    "limit_test_batches": ((0,), "leaves no rows to evaluate the model on"),
    "limit_train_batches": ((0,), "leaves nothing to train"),
    "max_steps": ((0,), "leaves nothing to train"),
    "max_epochs": ((0,), "leaves nothing to train"),
    "val_check_interval": ((0,), "never validates; the default is 100"),
    "enable_checkpointing": ((False,), "would keep no best checkpoint; set checkpoint.every_n_seconds"),
    "barebones": ((True,), "switches off the checkpoints and the logger that a run needs"),
    "use_distributed_sampler": ((True,), "would split the rows a second time; remove it"),
    # Adam's second moments and the adapters would be rounded away.
    "precision": (("bf16-true", "16-true"), "would store the adapters in 16 bits; use bf16-mixed or 16-mixed"),
}  # fmt: skip
ALIASES = {"bf16": "bf16-mixed", "16": "16-mixed", 16: "16-mixed"}  # of precisions
USED_BY = {  # the commands that use a key
    **dict.fromkeys(("baselines", "baseline_rows"), ("train",)),
    **dict.fromkeys(("dry_run", "resume", "logger", "trainer.logger"), ("train", "fit")),
    **dict.fromkeys(("answers", "min_confidence", "target_precision"), ("predict",)),
}
# Parts of a strategy's name and start_method.
REFUSED_STRATEGIES = dict.fromkeys(("spawn", "fork", "notebook"), "cannot return the trained weights; use ddp")
REFUSED_STRATEGIES |= dict.fromkeys(("fsdp", "deepspeed", "modelparallel"), "shards the adapters too; use fsdp or ddp")

# `typing` caches the order of a union at its first import; with float first, 1 batch would be 1.0, which is all.
_HINTS: dict[str, Any] = inspect.unwrap(L.Trainer.__init__).__annotations__
_HINTS |= {flag: int | float | None for flag, hint in _HINTS.items() if hint == int | float | None}


class Parser(OneLine, LightningArgumentParser):
    """Lightning's parser with one-line mistakes; a file that a value names is never read as configuration."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        # Else a file of rows that begins with `{"class_path": ...}` could name a class to import.
        return super().add_class_arguments(*args, **kwargs | {"sub_configs": False})


def check_trainer(config: Namespace, command: str) -> None:
    """Refuse unsupported flags; the UserError names the flag, the reason and what to use instead."""
    trainer = config.trainer
    for key, commands in USED_BY.items():
        # On the command line: a run's configuration may have it.
        if command not in commands and LINES.get(key) == "" and config[key]:
            raise UserError(f"{key}: {command} does not use it, only {' and '.join(commands)}")
    for flag, (values, reason) in REFUSED.items():
        if trainer[flag] in values:
            raise UserError(f"trainer.{flag}: {trainer[flag]} {reason}")
    for unit in ("steps", "epochs"):
        if 0 <= (trainer[f"max_{unit}"] or -1) < (trainer[f"min_{unit}"] or 0):
            raise UserError(f"trainer.min_{unit}: more than trainer.max_{unit}, {trainer[f'max_{unit}']}")
    timed = trainer.max_time and not config.model.scheduler.class_path.endswith(".CosineWithWarmup")
    if trainer.max_steps == -1 and trainer.max_epochs == -1 and not timed:
        raise UserError("trainer.max_epochs: with -1 the schedule has no last step; set this key or trainer.max_steps")
    if not isinstance(trainer.val_check_interval, int | float | None):
        raise UserError(
            "trainer.val_check_interval: set steps, or a fraction of an epoch; the clocks of processes differ"
        )
    if trainer.check_val_every_n_epoch not in (None, 1) or (
        trainer.check_val_every_n_epoch and isinstance(trainer.val_check_interval, int)
    ):
        remedy = "with null, val_check_interval counts steps; with 1, it must be a fraction of an epoch, such as 0.5"
        raise UserError(f"trainer.check_val_every_n_epoch: use null or 1; {remedy}")
    if trainer.default_root_dir:
        raise UserError("trainer.default_root_dir: runs are in logs/TASK/RUN; set task and run instead")
    if trainer.gradient_clip_val:
        raise UserError("trainer.gradient_clip_val: set model.max_grad_norm instead")
    if trainer.accumulate_grad_batches != 1:
        raise UserError("trainer.accumulate_grad_batches: a batch is a full step here; set data.rows_per_step instead")
    strategy = trainer.strategy
    if strategy == "fsdp" and (config.model.quantize or config.model.compile):
        raise UserError("trainer.strategy: fsdp supports neither model.quantize nor model.compile; use ddp with them")
    name = str(strategy)
    if isinstance(strategy, Namespace):
        name = f"{strategy.class_path} {strategy.get('init_args.start_method', '')}".strip()
    for part, reason in REFUSED_STRATEGIES.items():
        if part in name.lower() and name != "fsdp":
            raise UserError(f"trainer.strategy: {name} {reason}")


def check_callbacks(trainer: Any, names: Set[str]) -> None:
    """Refuse an unsupported callback, or one that monitors a metric not in `names`."""
    names = names | {"epoch", "step", "train/loss", "train/eval_loss", "val/loss_gap"}
    custom = "custom/"  # prefix of custom metrics, whose names are known only after a validation
    for callback in trainer.callbacks:
        kind, monitor = type(callback).__name__, getattr(callback, "monitor", None)
        if isinstance(callback, known.StochasticWeightAveraging | known.WeightAveraging):
            fault = "averages weights after the best checkpoint was chosen, without validating them; remove it"
        elif isinstance(callback, known.GradientAccumulationScheduler):
            fault = "changes the rows of a step, which data.rows_per_step sets; remove it"
        elif isinstance(callback, known.LearningRateFinder | known.BatchSizeFinder):
            fault = (
                "cannot set formtune's keys; set model.tokens_per_micro_batch, compare rates with formtune sweep --over"
            )
        elif kind in ("LearningRateMonitor", "DeviceStatsMonitor") and not trainer.loggers:
            fault = "needs a logger; remove trainer.logger: false"
        elif monitor is not None and monitor not in names and not monitor.startswith(custom):
            remedy = did_you_mean(monitor, names) or "; monitor val/loss, for example"
            fault = f"monitors {monitor}, which no validation measures{remedy}"
        else:
            continue
        raise UserError(f"trainer.callbacks: {kind} {fault}")


def complete_trainer(trainer: Namespace) -> None:
    """Set the precision that suits the hardware, and unset limits and intervals that follow from those that are set."""
    trainer.precision = ALIASES.get(trainer.precision, trainer.precision) or _default_precision(trainer.accelerator)
    if trainer.max_steps > 0 and is_set("trainer.max_steps") and not is_set("trainer.max_epochs"):
        trainer.max_epochs = -1
    if trainer.min_steps and not is_set("trainer.min_epochs"):
        trainer.min_epochs = 0  # Lightning's is 1
    if isinstance(trainer.val_check_interval, float) and not is_set("trainer.check_val_every_n_epoch"):
        trainer.check_val_every_n_epoch = 1  # a float is a fraction of an epoch
    if trainer.check_val_every_n_epoch == 1 and not is_set("trainer.val_check_interval"):
        trainer.val_check_interval = 1.0


def _default_precision(accelerator: Any) -> str:
    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    on_cpu = accelerator == "cpu" or not torch.backends.mps.is_available()
    return "bf16-mixed" if on_cpu and torch.cpu._is_avx512_bf16_supported() else "32-true"


def launched_externally() -> bool:
    """Whether torchrun or srun started this process beside others."""
    tasks = os.environ.get("SLURM_NTASKS", 1) if SLURMEnvironment.detect() else 1
    return max(int(tasks), int(os.environ.get("WORLD_SIZE", 1))) > 1

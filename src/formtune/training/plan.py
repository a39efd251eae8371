"""What a training would do and take on this machine, from a few steps and answers: `--dry_run`."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from resource import RUSAGE_SELF, getrusage
from statistics import mean
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from formtune.base.row import quantile
from formtune.data.datamodule import FormatDataModule
from formtune.errors import UserError
from formtune.model import FormatModule
from formtune.model.fsdp import padded, unsynced
from formtune.model.micro_batches import Decoding
from formtune.model.ranks import highest
from formtune.training import callback
from formtune.training.evaluator import LONGEST
from formtune.training.pipeline import prepare

STEPS, SECONDS = 3, 30  # steps that are timed at most, and the time after which no further one is
COUNTED = 32  # steps whose micro-batches are counted
ROWS, TOKENS = 32, 16  # answers that are timed, and tokens of each


class Timing(Callback):
    """Times steps and answers where training would begin, and ends it before its first step."""

    def on_train_start(self, trainer: Any, model: Any) -> None:
        trainer.should_stop = True
        datamodule = trainer.datamodule
        longest = sorted(datamodule.rows["train"], key=len)[-datamodule.rows_per_step :]
        self._step(trainer, model, model.collate(longest, evaluation=False))  # the peak memory; it also warms up
        batches = list(islice(datamodule.train_dataloader(), COUNTED))
        self.tokens = mean(map(_tokens, batches))  # of a step
        self.micro_batches = mean(len(batch.micro_batches) for batch in batches)
        tokens, seconds = 0, 0.0
        for batch in batches[:STEPS]:
            if seconds < SECONDS:
                tokens, seconds = tokens + _tokens(batch), seconds + self._step(trainer, model, batch)
        self.step = seconds / tokens * self.tokens  # seconds
        rows = datamodule.rows["validation"][:ROWS]
        self.forced, whole = (self._answers(trainer, model, rows, limit) for limit in (1, TOKENS + 1))
        self.token = max(whole - self.forced, 0.0) / TOKENS  # seconds of a row

    def _step(self, trainer: Any, model: Any, batch: Any) -> float:
        batch = trainer.strategy.batch_to_device(batch)

        def step() -> None:
            micro_batches = padded(trainer, batch.micro_batches, model.micro_batches.dummy)
            for i, micro_batch in enumerate(micro_batches, 1):
                # As in training: processes, which may have other numbers of micro-batches, exchange gradients once.
                with contextlib.nullcontext() if i == len(micro_batches) else unsynced(trainer.strategy):
                    with trainer.precision_plugin.forward_context():
                        loss = model.micro_batches.predictions(micro_batch)[0].loss
                    model.manual_backward(loss)
            model.zero_grad()

        return highest(trainer, _seconds(step))[0]  # the same on all processes, which then time as many steps

    def _answers(self, trainer: Any, model: Any, rows: Sequence[Any], limit: int) -> float:
        """Seconds of a row whose answer is decoded from its first token up to a limit."""
        batch = model.collate(rows, evaluation=True, decoding=Decoding(max_new_tokens=limit))
        batch = trainer.strategy.batch_to_device(batch)
        with trainer.precision_plugin.forward_context(), torch.inference_mode():
            model.eval()
            seconds = _seconds(lambda: model.predict_step(batch, 0))
            model.train()
        return seconds / len(rows)


def plan(
    trainer: Any, model: FormatModule, datamodule: FormatDataModule, baselines: Sequence[str] | None = None,
    most: int = 0, checks: Sequence[Callable[[FormatModule], Any]] = (),
) -> None:  # fmt: skip
    """Prepare the rows, and print the steps of a training with about the time and the memory that it takes.

    `baselines`, which are measured on at most so many rows, and `checks` are those of `formtune train`.
    """
    prepare(trainer, datamodule)
    for check in checks:
        check(model)
    timing, rows = callback(trainer, Timing), datamodule.rows
    trainer.fit(model, datamodule)
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise UserError("dry_run: a limit of time has no number of steps; set trainer.max_epochs or trainer.max_steps")
    interval = (trainer.val_check_batch or math.inf) * (trainer.check_val_every_n_epoch or 1)
    validations, validated, tested = max(1, math.ceil(steps / interval)), len(rows["validation"]), len(rows["test"])
    sizes = [len(row.target_ids) for row in rows["train"]]
    # An untuned base rarely ends its answers. A tuned model is right at first sight more and more often.
    untuned = timing.forced + min(model.max_new_tokens, LONGEST * max(sizes)) * timing.token
    tuned = timing.forced + quantile(sizes, 50) / 2 * timing.token
    seconds = {"training": steps * timing.step, "validations": validations * validated * tuned}
    if baselines is not None:
        seconds["baselines"] = ((1 + len(baselines)) * min(most, tested) + validated) * untuned
        seconds["test"] = ((1 + ("constrained" in baselines)) * tested + validated) * tuned
    parts = ", ".join(f"{name} {_minutes(value)}" for name, value in seconds.items())
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    lines = [
        f"steps: {steps:,} of {datamodule.rows_per_step} rows, {steps / trainer.num_training_batches:.3g} epochs; each "
        f"computes {timing.tokens:,.0f} tokens in {timing.micro_batches:.1f} micro-batches, in {timing.step:.2g} s",
        f"validations: {validations:,} of {validated:,} rows",
        f"time: about {_minutes(sum(seconds.values()))} ({parts})",
        f"peak memory: {memory / 2**30:.1f} GiB",
        "dry run: nothing was trained",
    ]
    if baselines is not None:
        measured = ", ".join(["plain", *baselines])
        lines.insert(2, f"baselines: {measured}, on {min(most, tested):,} of {tested:,} test rows")
    rank_zero_only(print)("\n".join(lines), flush=True)


def _tokens(batch: Any) -> int:
    """The tokens that a batch computes, a shared prefix once."""
    return sum(part.ids.numel() for part in batch.micro_batches)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""What a training would do and take on this machine, from a few micro-batches and answers: `--dry_run`."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from formtune.base.row import quantile
from formtune.data.datamodule import EVALUATION_ROWS, FormatDataModule
from formtune.errors import UserError
from formtune.files import write_entry
from formtune.model import FormatModule
from formtune.model.micro_batches import Decoding
from formtune.model.ranks import highest, padded, unsynced
from formtune.training import callback
from formtune.training.evaluator import LONGEST
from formtune.training.pipeline import peak_memory, prepare
from formtune.training.run_folder import plan_entry

STEPS = 32  # steps whose micro-batches are counted
MOST, SECONDS = 8, 3  # micro-batches that are timed at most, and about how long
ROWS, TOKENS = 16, 8  # answers that are timed, and tokens of each


class Timing(Callback):
    """Times micro-batches and answers where training would begin, and ends it before its first step."""

    def on_train_start(self, trainer: Any, model: Any) -> None:
        trainer.should_stop = True
        datamodule = trainer.datamodule
        batches = list(islice(datamodule.train_dataloader(), STEPS))
        parts = list(chain(*(batch.micro_batches for batch in batches)))
        longest = model.collate(sorted(datamodule.rows["train"], key=len)[-datamodule.rows_per_step :], False)
        # The peak memory; it also warms up, and on a slow machine it is all that is timed.
        timed = longest.micro_batches[-1:]
        seconds = self._train(trainer, model, timed)
        if more := parts[: min(MOST, int(SECONDS / seconds))]:
            timed, seconds = more, self._train(trainer, model, more)
        self.tokens, self.micro_batches = _tokens(parts) / len(batches), len(parts) / len(batches)  # of a step
        self.step = seconds / _tokens(timed) * self.tokens  # seconds
        rows = datamodule.rows["validation"]
        batch = model.collate(rows[:EVALUATION_ROWS], evaluation=True)
        forward, whole = (self._answer(trainer, model, rows[:ROWS], limit) for limit in (1, TOKENS + 1))
        few = model.collate(rows[:ROWS], evaluation=True)
        # Seconds of a row: many rows that share a prefix compute it once.
        self.forced = forward / _tokens(few.micro_batches) * _tokens(batch.micro_batches) / len(batch.rows)
        self.token = max(whole - forward, 0.0) / TOKENS / len(few.rows)

    def _train(self, trainer: Any, model: Any, micro_batches: Sequence[Any]) -> float:
        """Seconds of the forward and backward passes."""
        started, parts = _now(), padded(trainer, [*micro_batches], model.micro_batches.dummy)
        for i, micro_batch in enumerate(parts, 1):
            # As in training: processes, which may have other numbers of micro-batches, exchange gradients once.
            with contextlib.nullcontext() if i == len(parts) else unsynced(trainer.strategy):
                with trainer.precision_plugin.forward_context():
                    loss = model.micro_batches.loss(micro_batch)
                model.manual_backward(loss)
        model.zero_grad()
        return highest(trainer, _now() - started)[0]  # the same on all processes, which then time as many

    def _answer(self, trainer: Any, model: Any, rows: Sequence[Any], limit: int) -> float:
        """Seconds of answers that are decoded from their first token up to a limit."""
        batch = model.collate(rows, evaluation=True, decoding=Decoding(max_new_tokens=limit))
        model.eval()
        started = _now()
        with trainer.precision_plugin.forward_context(), torch.inference_mode():
            model.predict_step(batch, 0)
        seconds = _now() - started
        model.train()
        return seconds / trainer.world_size


def plan(
    trainer: Any, model: FormatModule, datamodule: FormatDataModule, config: Callable[[], str],
    baselines: Sequence[str] | None = None, most: int = 0, checks: Sequence[Callable[[FormatModule], Any]] = (),
) -> None:  # fmt: skip
    """Prepare the rows, and print the steps of a training with about the time and the memory that it takes.

    The estimates are kept for the report of a run of the same configuration. `baselines`, which are measured on at
    most so many rows, and `checks` are those of `formtune train`.
    """
    prepare(trainer, datamodule)
    for check in checks:
        check(model)
    timing, rows = callback(trainer, Timing), datamodule.rows
    trainer.fit(model, datamodule)
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise UserError("dry_run: a time limit gives no number of steps; set trainer.max_epochs or trainer.max_steps")
    interval = (trainer.val_check_batch or math.inf) * (trainer.check_val_every_n_epoch or 1)
    validations, validated, tested = max(1, math.ceil(steps / interval)), len(rows["validation"]), len(rows["test"])
    sizes = [len(row.target_ids) for row in rows["train"]]
    # An untuned base rarely ends its answers. A tuned model is right at first sight more and more often.
    untuned = timing.forced + min(model.max_new_tokens, LONGEST * max(sizes)) * timing.token
    tuned = timing.forced + quantile(sizes, 50) / 2 * timing.token
    seconds = {"training": steps * timing.step, "validations": validations * validated * (timing.forced + tuned)}
    if baselines is not None:
        measured = ["plain", *baselines, *(["adapter"] if model.adapter else [])]
        seconds["baselines"] = (len(measured) * min(most, tested) + validated) * untuned
        seconds["test"] = ((1 + ("constrained" in baselines)) * tested + validated) * tuned
        rank_zero_only(print)(f"baselines: {', '.join(measured)}, on {min(most, tested):,} of {tested:,} test rows")
    parts = ", ".join(f"{name} {_minutes(value)}" for name, value in seconds.items())
    estimates = {"steps": steps, "training, min": (seconds["training"] + seconds["validations"]) / 60}
    estimates |= {f"{name}, min": seconds[name] / 60 for name in ("baselines", "test") if name in seconds}
    estimates["peak memory, GiB"] = memory = peak_memory()
    if trainer.is_global_zero and datamodule.splits:
        write_entry(plan_entry(config(), datamodule.splits.key), estimates, kept=24)
    rank_zero_only(print)(
        f"steps: {steps:,} of {datamodule.rows_per_step} rows, {steps / trainer.num_training_batches:.3g} epochs; each "
        f"computes {timing.tokens:,.0f} tokens in {timing.micro_batches:.1f} micro-batches, in {timing.step:.2g} s\n"
        f"validations: {validations:,} of {validated:,} rows\n"
        f"time: about {_minutes(sum(seconds.values()))} ({parts}), estimated on this machine now\n"
        f"peak memory: {memory:.1f} GiB\ndry run: nothing was trained",
        flush=True,
    )


def _tokens(micro_batches: Sequence[Any]) -> int:
    """The tokens that are computed, a shared prefix once."""
    return sum(part.ids.numel() for part in micro_batches)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

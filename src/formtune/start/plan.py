"""`--dry_run`: steps, time and memory of a run on this machine, estimated from a few steps and answers."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from formtune.base.row import quantile
from formtune.data.datamodule import EVALUATION_ROWS, FormatDataModule
from formtune.errors import UserError
from formtune.files import read_entry, write_entry
from formtune.model import FormatModule
from formtune.model.micro_batches import Decoding
from formtune.model.ranks import max_over_ranks
from formtune.training.evaluator import untuned_limit
from formtune.training.pipeline import peak_memory, prepare
from formtune.training.run_folder import FREE, leaves

STEPS = 32  # whose micro-batches are counted
MAX_TIMED, SECONDS = 8, 3  # steps that are timed, and about how long
ROWS, TOKENS = 16, 8  # answers that are timed, and tokens of each
# Keys that do not change the time of a run, and those that a dry run sets itself.
UNPLANNED = (*FREE, "data.date", *(f"trainer.{key}" for key in ("logger", "callbacks", "enable_checkpointing", "min_")))


class Timing(Callback):
    """Times steps and answers where training would start, and ends it before its first step."""

    def on_train_start(self, trainer: Any, model: Any) -> None:
        trainer.should_stop = True
        model.lr_schedulers().step = lambda: None  # a schedule may have fewer steps than are timed
        datamodule = trainer.datamodule
        batches = list(islice(datamodule.train_dataloader(), STEPS))
        longest = sorted(datamodule.rows["train"], key=len)[-datamodule.rows_per_step :]
        # The longest rows give the peak memory and the warm-up; on a slow machine, nothing else is timed.
        timed = [model.collate(longest[trainer.global_rank :: trainer.world_size], evaluation=False)]
        seconds = self._train(trainer, model, timed)
        if more := batches[: min(MAX_TIMED, int(SECONDS / seconds))]:
            timed, seconds = more, self._train(trainer, model, more)
        self.tokens = _tokens(batches) / len(batches)  # of a step
        self.micro_batches = sum(len(batch.micro_batches) for batch in batches) / len(batches)
        self.step = seconds / _tokens(timed) * self.tokens  # seconds
        rows = datamodule.rows["validation"]
        batch = model.collate(rows[:EVALUATION_ROWS], evaluation=True)
        few = model.collate(rows[:ROWS], evaluation=True)
        forward, decoded = (self._answer(trainer, model, rows[:ROWS], limit) for limit in (1, TOKENS + 1))
        # Per row of a full batch, whose rows share a prefix that is computed once.
        self.seconds_per_row = forward / _tokens([few]) * _tokens([batch]) / len(batch.rows)
        self.seconds_per_token = max(decoded - forward, 0.0) / TOKENS / len(few.rows)

    def _train(self, trainer: Any, model: Any, batches: Sequence[Any]) -> float:
        started = _now()
        for batch in batches:
            with trainer.precision_plugin.train_step_context():
                model.training_step(batch, 0)
        return max_over_ranks(trainer, _now() - started)[0]  # equal on all processes, which then time equally many

    def _answer(self, trainer: Any, model: Any, rows: Sequence[Any], limit: int) -> float:
        """Seconds to decode answers from their first token up to a limit."""
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
    baselines: Sequence[str] | None, max_rows: int,
) -> None:  # fmt: skip
    """Prepare the rows, and print the steps, time and memory of a run; `baselines` is None for `fit`.

    The estimates are kept for the report of a run of the same configuration.
    """
    prepare(trainer, datamodule)
    timing, rows = Timing(), datamodule.rows
    trainer.callbacks.append(timing)
    trainer.fit(model, datamodule)
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise UserError("dry_run: a time limit gives no number of steps; set trainer.max_epochs or trainer.max_steps")
    interval = trainer.val_check_batch or math.inf
    validations, tested = max(1, math.ceil(steps / interval)), len(rows["test"])
    validated = min(len(rows["validation"]), int(sum(trainer.num_val_batches)) * EVALUATION_ROWS)
    sizes = [len(row.target_ids) for row in rows["train"]]
    # An untuned base rarely ends its answers; a tuned model decodes few tokens after its first mismatch.
    untuned = timing.seconds_per_row + untuned_limit(model, max(sizes)) * timing.seconds_per_token
    tuned = timing.seconds_per_row + quantile(sizes, 50) / 2 * timing.seconds_per_token
    seconds = {"training": steps * timing.step + validations * validated * (timing.seconds_per_row + tuned)}
    if baselines is not None:
        measured = ["zero-shot", *baselines, *(["adapter"] if model.adapter else [])]
        seconds["baselines"] = (len(measured) * min(max_rows, tested) + validated) * untuned
        seconds["test"] = ((1 + ("constrained" in baselines)) * tested + len(rows["validation"])) * tuned
        rank_zero_only(print)(f"baselines: {', '.join(measured)}, on {min(max_rows, tested):,} of {tested:,} test rows")
    parts = ", ".join(f"{name} {timedelta(seconds=round(value))}" for name, value in seconds.items())
    estimates = {"steps": steps, "peak memory, GiB": peak_memory()}
    estimates |= {f"{name}, min": value / 60 for name, value in seconds.items()}
    if trainer.is_global_zero and datamodule.splits:
        write_entry(_entry(config(), datamodule.splits.key), estimates, kept=24)
    rank_zero_only(print)(
        f"steps: {steps:,} with {datamodule.rows_per_step} rows each, {steps / trainer.num_training_batches:.3g} epochs"
        f"; each has {timing.tokens:,.0f} tokens, {timing.micro_batches:.1f} micro-batches, {timing.step:.2f} s\n"
        f"validations: {validations:,} on {validated:,} rows\n"
        f"time: about {timedelta(seconds=round(sum(seconds.values())))} ({parts}), estimated on this machine now\n"
        f"peak memory: {estimates['peak memory, GiB']:.1f} GiB\ndry run: nothing was trained",
        flush=True,
    )


def _tokens(batches: Sequence[Any]) -> int:
    """Computed tokens, a shared prefix counted once."""
    return sum(part.ids.numel() for batch in batches for part in batch.micro_batches)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def estimated(config: str, data: str, measured: dict[str, float]) -> dict[str, Any]:
    """For `metrics.json`: what a dry run of this configuration (YAML) and these rows (content hash) estimated."""
    estimates = read_entry(_entry(config, data)) or {}
    pairs = {name: {"estimated": value, "measured": measured[name]} for name, value in estimates.items()}
    return {"estimates": pairs} if pairs else {}


def _entry(config: str, data: str) -> Path:
    """The cache entry of the estimates."""
    keys = [(key, value) for key, value in leaves(yaml.safe_load(config)) if not key.startswith(UNPLANNED)]
    return Path(".cache/plan", f"{hashlib.sha256(json.dumps([keys, data], default=str).encode()).hexdigest()}.json")

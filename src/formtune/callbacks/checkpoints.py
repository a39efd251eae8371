"""Keep the checkpoint that answers best, by format first, and the newest ones to go on from.

Order: most rows with `format/exact`; checkpoints within one row of the most count as equal, and among those the
higher `content/field_f1` wins, then the lower `val/loss`, then the earlier step. "Within one row" is not transitive,
so it is applied to the set of all checkpoints so far and not pairwise. A checkpoint that could still win later (when
a better one moves the set's edge) has to be kept: there is at most one for each of the two counts at the top.

A run goes on from its newest checkpoint, whichever that is: all hold the whole state of training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Checkpoint

from formtune import checkpoint_files
from formtune.callbacks.signals import Signals
from formtune.errors import Stopped
from formtune.ranks import highest

EVERY = 30.0  # seconds of training that a killed run loses at most
NEWEST = 2  # checkpoints kept to go on from: the second should the first be damaged


@dataclass(frozen=True, slots=True)
class Score:
    """What one validation measured.

    Args:
        step: Optimizer steps done.
        exact: Rows with `format/exact`.
        field_f1: `content/field_f1`.
        loss: `val/loss` in nats per token.
    """

    step: int
    exact: int
    field_f1: float
    loss: float

    @property
    def order(self) -> tuple[float, float, int]:
        """Sort key among checkpoints whose formats count as equal: best first."""
        return (-self.field_f1, self.loss, self.step)


def best(scores: Iterable[Score]) -> Score | None:
    """The best of the scores, None if there is none that is finite."""
    scores = _finite(scores)
    top = max((s.exact for s in scores), default=0)
    return min((s for s in scores if s.exact >= top - 1), key=lambda s: s.order, default=None)


def contenders(scores: Iterable[Score]) -> set[Score]:
    """The scores that are best now or can be after later validations."""
    scores = _finite(scores)
    top = max((s.exact for s in scores), default=0)
    winners = (best(s for s in scores if s.exact == count) for count in (top, top - 1))
    return {winner for winner in winners if winner is not None}


def _finite(scores: Iterable[Score]) -> list[Score]:
    return [s for s in scores if math.isfinite(s.loss) and math.isfinite(s.field_f1)]


class Checkpoints(Checkpoint):
    """Writes `checkpoints/step-N.ckpt` after each validation and every `EVERY` seconds, and removes what nobody needs.

    Kept are those that can be the best and the `NEWEST`. A checkpoint is written between two steps, and never between
    a step and its validation: Lightning would leave that validation out when the run goes on.

    Args:
        signals: Tells whether the run is to stop; it is saved then.
    """

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.scores: list[Score] = []
        self.rows = 0  # of each validation
        self.seconds = 0.0  # of training, before this process
        self._started = self._saved = 0.0

    @property
    def best(self) -> Score | None:
        """The best validation so far."""
        return best(self.scores)

    @property
    def lowest_loss(self) -> Score | None:
        """The validation with the lowest loss, which need not be the best one."""
        return min((s for s in self.scores if math.isfinite(s.loss)), key=lambda s: s.loss, default=None)

    def state_dict(self) -> dict[str, Any]:
        scores = [list(astuple(score)) for score in self.scores]
        return {"scores": scores, "rows": self.rows, "seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores = [Score(*score) for score in state_dict["scores"]]
        self.rows, self.seconds = state_dict["rows"], state_dict["seconds"]

    def elapsed(self) -> float:
        """Seconds of training so far, validations included, those before an interruption too."""
        return self.seconds + (time.monotonic() - self._started if self._started else 0.0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._started = self._saved = time.monotonic()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds, self._started = self.elapsed(), 0.0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= trainer.estimated_stepping_batches:
            trainer.should_stop = True  # makes Lightning validate the last weights too, whatever the interval
        signal, due = highest(trainer, self.signals.number, time.monotonic() - self._saved >= EVERY)
        loop = trainer.fit_loop
        # Between two epochs Lightning does not find its place again: the next step is soon enough.
        between = trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if (signal or due) and not between:
            self._save(trainer)
            if signal:
                raise Stopped(int(signal), f"saved at step {trainer.global_step}; {self.signals.remedy}")

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.state.fn == "fit":
            [signal] = highest(trainer, self.signals.number)
            if signal:
                last = list(checkpoint_files.steps(self._folder(trainer)))
                saved = f"the newest checkpoint is of step {last[-1]}" if last else "no checkpoint yet"
                raise Stopped(int(signal), f"stopped in a validation, {saved}; {self.signals.remedy}")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        exact, self.rows = pl_module.counts["format/exact"]
        self.scores.append(
            Score(trainer.global_step, exact, float(metrics["content/field_f1"]), float(metrics["val/loss"]))
        )
        self._save(trainer)

    @staticmethod
    def _folder(trainer: Any) -> Path:
        return Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "checkpoints"

    def _save(self, trainer: Any) -> None:
        if trainer.fast_dev_run:
            return
        folder = self._folder(trainer)
        if trainer.is_global_zero and folder.parent.exists():  # else it was removed: not to be begun again
            folder.mkdir(exist_ok=True)
        trainer.save_checkpoint(folder / f"step-{trainer.global_step}.ckpt")
        self._saved = time.monotonic()
        if trainer.is_global_zero:
            there = checkpoint_files.steps(folder)
            keep = {score.step for score in contenders(self.scores)} | set(list(there)[-NEWEST:])
            for step in there.keys() - keep:
                there[step].unlink(missing_ok=True)

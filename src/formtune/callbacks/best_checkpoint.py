"""Keep the checkpoint that answers best, by format first.

Order: most rows with `format/exact`; checkpoints within one row of the most count as equal, and among those the
higher `content/field_f1` wins, then the lower `val/loss`, then the earlier step. "Within one row" is not transitive,
so it is applied to the set of all checkpoints so far and not pairwise. A checkpoint that could still win later (when
a better one moves the set's edge) has to be kept: there is at most one for each of the two counts at the top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Checkpoint


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


class BestCheckpoint(Checkpoint):
    """Writes `checkpoints/step-N.ckpt` after a validation that can win, and removes those that no longer can."""

    def __init__(self) -> None:
        self.scores: list[Score] = []
        self.rows = 0  # of each validation
        self._files: dict[Score, Path] = {}

    @property
    def best(self) -> Score | None:
        """The best validation so far."""
        return best(self.scores)

    @property
    def lowest_loss(self) -> Score | None:
        """The validation with the lowest loss, which need not be the best one."""
        return min((s for s in self.scores if math.isfinite(s.loss)), key=lambda s: s.loss, default=None)

    @property
    def path(self) -> Path | None:
        """File of the best checkpoint."""
        return None if self.best is None else self._files[self.best]

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= trainer.estimated_stepping_batches:
            trainer.should_stop = True  # makes Lightning validate the last weights too, whatever the interval

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        # Saved here and nowhere else: the score belongs to the weights that it was measured on.
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.fast_dev_run:
            return
        metrics = trainer.callback_metrics
        exact, self.rows = pl_module.counts["format/exact"]
        score = Score(
            trainer.global_step,
            exact,
            float(metrics["content/field_f1"]),
            float(metrics["val/loss"]),
        )
        self.scores.append(score)
        keep = contenders(self._files.keys() | {score})
        if score in keep:
            self._files[score] = (
                Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "checkpoints" / f"step-{score.step}.ckpt"
            )
            trainer.save_checkpoint(self._files[score])
        for stale in self._files.keys() - keep:
            trainer.strategy.remove_checkpoint(self._files.pop(stale))

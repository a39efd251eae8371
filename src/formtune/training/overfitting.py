"""Tell learning from memorising while a run goes on, in words, and stop a run that has nothing left to learn.

The training loss of a step cannot be compared with the validation loss: it has dropout, other rows each time, and the
weights of its own step. So a fixed sample of training rows is measured as validation rows are, at each validation and
with the same weights. What the two losses and the format say together is the diagnosis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from formtune.training.validations import Validation, Validations, best, fewer

# A change must last for 3 validations: one may be luck, and two may be the same luck when they lie close together, as
# the last two of a run do.
LASTING = 3
# The rows are the same each time, so that only the weights make a loss move, and they move it by a few percent from
# validation to validation while the learning rate is high. A gain may be small, since it is the sum of all gains since
# the last one that counted and keeps a run alive; a verdict of memorising needs more than that noise.
GAIN = 0.01
CHANGE = 0.05
# In nats per token; less is no change whatever its share. It makes an answer of 50 tokens 5 % more or less likely.
FLOOR = 0.001
# A training loss that has risen by as much as it was is no step too far that the next ones correct.
FAR = 1.0

T = TypeVar("T")
Kind = Literal["too early", "learning", "memorising", "saturated", "not learning", "diverged"]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the validations so far say together.

    Args:
        kind: The finding.
        since: First step that it holds for.
        text: The finding in a line, with its figures.
    """

    kind: Kind
    since: int
    text: str


def diagnose(history: Sequence[Validation]) -> Diagnosis:
    """Diagnose a run from its validations in the order of their steps, at least one."""
    found = [v for v in history if _finite(v)]
    start, last = (found or history)[0], history[-1]
    far = [not _finite(v) or _counts(v.train_loss - start.train_loss, start.train_loss, FAR) for v in history]
    if far[-1]:
        since = history[_begin(far)].step
        figures = f"train {last.train_loss:.4g}, validation {last.val_loss:.4g}, {start.train_loss:.4g} at the start"
        return Diagnosis("diverged", since, f"diverged since step {since}: losses {figures}")

    train, loss = [v.train_loss for v in found], [v.val_loss for v in found]
    gains = {
        "validation loss": _last_fall(loss),
        # What is no difference between two checkpoints is no change; for F1 a row's worth.
        "format/exact": _last_rise([v.valid for v in found], fewer, int.bit_count),
        "joint/exact": _last_rise([v.right for v in found], fewer, int.bit_count),
        "content/field_f1": _last_rise([v.field_f1 for v in found], lambda old, new: new - old > 1 / last.rows, float),
    }
    recent = [name for name, at in gains.items() if at and len(found) - 1 - at < LASTING]
    lowest = loss.index(min(loss))
    above = [_counts(value - loss[lowest], loss[lowest], CHANGE) for value in loss]
    rise = f"validation loss {_change(loss[lowest], loss[-1])} from its lowest"
    if recent:
        but = f", with the {rise}" if all(above[-LASTING:]) else ""
        verb = "improves" if len(recent) == 1 else "improve"
        return Diagnosis("learning", start.step, f"learning: {' and '.join(recent)} still {verb}{but}")
    if len(found) <= LASTING:
        text = f"too early to tell: validation {len(found)} of the {LASTING + 1} that it takes, nothing improved yet"
        return Diagnosis("too early", start.step, text)
    kept = best(history)
    if all(above[-LASTING:]) and _counts(train[lowest] - train[-1], train[lowest], CHANGE):
        since = found[_begin(above)].step
        at = gains["format/exact"]
        parts = [
            f"memorising since step {since}: {rise} while train fell {_change(train[lowest], train[-1])[1:]}",
            f"format/exact saturated since step {found[at].step}" if at else "format/exact has not risen",
            *([f"the best checkpoint is of step {kept.step}"] if kept else []),
        ]
        return Diagnosis("memorising", since, "; ".join(parts))
    if not any(gains.values()) and not _last_fall(train):
        text = f"not learning: neither loss has fallen in {len(found)} validations"
        return Diagnosis("not learning", start.step, text)
    at = max(gains.values())
    fell = _counts(train[at] - train[-1], train[at], CHANGE)
    but = f", while train fell {_change(train[at], train[-1])[1:]}" if fell else ""
    if kept and kept.step != found[at].step:
        but += f"; the best checkpoint is of step {kept.step}, which can be chance"
    return Diagnosis("saturated", found[at].step, f"saturated: nothing improved since step {found[at].step}{but}")


def should_stop(history: Sequence[Validation], validations: int) -> bool:
    """Whether each of the last so many validations found the run memorising or saturated.

    A run whose format, content or validation loss still improves is "learning" and never stopped.
    """
    ends = range(len(history), len(history) - validations, -1)
    return all(end > 0 and diagnose(history[:end]).kind in ("memorising", "saturated") for end in ends)


def _finite(v: Validation) -> bool:
    return math.isfinite(v.train_loss) and math.isfinite(v.val_loss)


def _counts(change: float, value: float, share: float) -> bool:
    return change > max(share * value, FLOOR)


def _last_fall(losses: Sequence[float]) -> int:
    """Index of the last loss that counts as lower than the lowest before it, 0 if none does."""
    return _last_gain(losses, lambda best, new: _counts(best - new, best, GAIN))


def _last_rise(scores: Sequence[T], rose: Callable[[T, T], bool], size: Callable[[T], float]) -> int:
    """Index of the last score that rose from the highest before it, 0 if none did.

    Each score's median with its neighbours counts as well: one lucky validation would hide a rise that goes on.
    """
    near = [sorted(scores[max(i - 1, 0) : i + 2], key=size) for i in range(len(scores))]
    medians = [some[(len(some) - 1) // 2] for some in near]
    return max(_last_gain(series, rose) for series in (scores, medians))


def _last_gain(values: Sequence[T], gained: Callable[[T, T], bool]) -> int:
    best, last = values[0], 0
    for i, value in enumerate(values):
        if gained(best, value):
            best, last = value, i
    return last


def _begin(flags: Sequence[bool]) -> int:
    """Index at which the last run of true flags begins."""
    return len(flags) - next((i for i, flag in enumerate(reversed(flags)) if not flag), len(flags))


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.0%}" if before else f"{after - before:+.4f}"


class OverfittingWatch(Callback):
    """Measures training rows as validation rows are measured, and says what the history of both means.

    It costs one teacher-forced pass without gradients over as many rows as validation has, and decodes nothing.

    Args:
        validations: What was measured so far, recorded before this callback looks.
        patience: Validations in a row that must find the run memorising or saturated before it is stopped; None
            never stops it.
    """

    def __init__(self, validations: Validations, patience: int | None = None) -> None:
        self.validations, self.patience = validations, patience

    @property
    def diagnosis(self) -> Diagnosis | None:
        """What the validations so far say, None before the first."""
        return diagnose(self.validations.history) if self.validations.history else None

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # In this hook and not a later one: the model is still in evaluation, and its metrics are not yet reset.
        if not trainer.sanity_checking:
            loss = pl_module.teacher_forced_loss(trainer.datamodule.training_sample())
            gap = pl_module.losses.compute()["loss"] - loss
            pl_module.log_dict({"train/eval_loss": loss, "val/loss_gap": gap}, batch_size=1)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        history = self.validations.history
        before, now = diagnose(history[:-1]) if history[1:] else None, diagnose(history)
        changed = before is None or (before.kind, before.since) != (now.kind, now.since)
        if changed and isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            trainer.logger.experiment.add_text("diagnosis", now.text, trainer.global_step)
        if self.patience and trainer.state.fn == "fit" and should_stop(history, self.patience):
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"stopped at step {trainer.global_step}: {now.text}", flush=True)

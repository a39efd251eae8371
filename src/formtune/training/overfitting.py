"""Diagnose during a run whether it still learns or memorises, and stop a run that has nothing left to learn."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback

from formtune.evaluation.metrics import ratios
from formtune.training import callback
from formtune.training.loggers import log_table
from formtune.training.validations import Validation, Validations, best, fewer

LASTING = 3  # validations that a change must last: the last two of a run are close, and may be the same luck
# Shares of a loss. Small gains add up and keep a run alive; to call it memorising takes more than the noise, a few
# percent from validation to validation.
GAIN = 0.01
CHANGE = 0.05
FAR = 1.0  # a training loss that has doubled does not come back
FLOOR = 0.001  # nats per token; a smaller change does not count

T = TypeVar("T")


class Diagnosis(NamedTuple):
    """What the validations so far show together."""

    kind: Literal["too early", "learning", "memorising", "saturated", "not learning", "diverged"]
    text: str  # one line, with its figures
    improving: tuple[str, ...] = ()  # what has improved recently


def diagnose(history: Sequence[Validation]) -> Diagnosis:
    """Diagnose a run from its validations in the order of their steps, at least one."""
    finite = [v for v in history if v.is_finite]
    start, last = (finite or history)[0], history[-1]
    if not last.is_finite or counts(last.train_loss - start.train_loss, start.train_loss, FAR):
        figures = f"train {last.train_loss:.4g}, validation {last.val_loss:.4g}, {start.train_loss:.4g} at the start"
        return Diagnosis("diverged", f"diverged: losses {figures}")

    train, loss = [v.train_loss for v in finite], [v.val_loss for v in finite]
    gains = {  # index of the last improvement of each, 0 for none
        "validation loss": _last_gain(loss, _fell),
        "format/exact": _last_rise([v.valid for v in finite], fewer, int.bit_count),
        "joint/exact": _last_rise([v.right for v in finite], fewer, int.bit_count),
        # At least by one row's worth.
        "content/field_f1": _last_rise([v.field_f1 for v in finite], lambda old, new: new - old > 1 / last.rows, float),
    }
    recent = [name for name, at in gains.items() if at and len(finite) - 1 - at < LASTING]
    lowest = loss.index(min(loss))
    above = all(counts(value - loss[lowest], loss[lowest], CHANGE) for value in loss[-LASTING:])
    rise = f"validation loss {_change(loss[lowest], loss[-1])} from its lowest"
    if recent:
        text = f"learning: {' and '.join(recent)} still improve{'s' if len(recent) == 1 else ''}"
        return Diagnosis("learning", text + (f", with the {rise}" if above else ""), tuple(recent))
    if len(finite) <= LASTING:
        text = f"too early to tell: validation {len(finite)} of the {LASTING + 1} needed, nothing improved yet"
        return Diagnosis("too early", text)
    chosen = best(history)
    if above and counts(train[lowest] - train[-1], train[lowest], CHANGE):
        at, fell = gains["format/exact"], _change(train[lowest], train[-1])[1:]
        text = f"memorising since step {finite[lowest].step}: {rise} while train fell {fell}; format/exact "
        text += f"saturated since step {finite[at].step}" if at else "has not risen"
        return Diagnosis("memorising", text + (f"; the best checkpoint is of step {chosen.step}" if chosen else ""))
    if not any(gains.values()) and not _last_gain(train, _fell):
        return Diagnosis("not learning", f"not learning: neither loss has fallen in {len(finite)} validations")
    at = max(gains.values())
    text = f"saturated: nothing improved since step {finite[at].step}"
    if counts(train[at] - train[-1], train[at], CHANGE):
        text += f", while train fell {_change(train[at], train[-1])[1:]}"
    if chosen and chosen.step != finite[at].step:
        text += f"; the best checkpoint is of step {chosen.step}, which can be chance"
    return Diagnosis("saturated", text)


def should_stop(history: Sequence[Validation], validations: int) -> bool:
    """Whether each of the last `validations` found the run memorising or saturated; a run that learns never stops."""
    ends = range(len(history), len(history) - validations, -1)
    return all(end > 0 and diagnose(history[:end]).kind in ("memorising", "saturated") for end in ends)


def counts(change: float, value: float, share: float) -> bool:
    """Whether a change is more than a share of a value, and not too small to matter."""
    return change > max(share * value, FLOOR)


def _fell(lowest: float, new: float) -> bool:
    return counts(lowest - new, lowest, GAIN)


def _last_rise(scores: Sequence[T], rose: Callable[[T, T], bool], size: Callable[[T], float]) -> int:
    # Medians of neighbors count as well: one lucky validation would hide a rise that continues.
    near = [sorted(scores[max(i - 1, 0) : i + 2], key=size) for i in range(len(scores))]
    medians = [group[(len(group) - 1) // 2] for group in near]
    return max(_last_gain(series, rose) for series in (scores, medians))


def _last_gain(values: Sequence[T], gained: Callable[[T, T], bool]) -> int:
    """Index of the last value that gained on the best before it, 0 if none did."""
    best, last = values[0], 0
    for i, value in enumerate(values):
        if gained(best, value):
            best, last = value, i
    return last


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.0%}" if before else f"{after - before:+.4f}"


class OverfittingWatch(Callback):
    """Measures a sample of training rows in each validation, and diagnoses the history of both.

    The loss of a step cannot be compared with the validation loss: it has dropout, other rows and older weights. The
    cost is a forward pass over as many rows as validation has; nothing is decoded.

    Args:
        patience: Validations in a row that must find the run memorising or saturated before it is stopped; None
            never stops it.
    """

    def __init__(self, patience: PositiveInt | None = None) -> None:
        self.patience = patience

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # It comes before this callback in the trainer's list, and has recorded a validation when this one reads it.
        self.validations = callback(trainer, Validations)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        # Not in a later hook: the model is still in evaluation mode, and its metrics are not yet reset.
        if not trainer.sanity_checking:
            loss = pl_module.teacher_forced_loss(trainer.datamodule.training_sample())
            gap = ratios(pl_module.scores.losses.compute())["val/loss"] - loss
            pl_module.log_dict({"train/eval_loss": loss, "val/loss_gap": gap}, batch_size=1)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        history = self.validations.history
        now = diagnose(history)
        changed = len(history) == 1 or diagnose(history[:-1]).kind != now.kind
        if changed:
            log_table(trainer, "diagnosis", ("diagnosis",), [(now.text,)])
        if self.patience and trainer.state.fn == "fit" and should_stop(history, self.patience):
            trainer.should_stop = True
            if trainer.is_global_zero:
                print(f"stopped at step {trainer.global_step}: {now.text}", flush=True)

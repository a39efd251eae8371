"""The diagnosis of a run from its validations (docs/training.md has the rules)."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

from formtune.training.validations import Validation, fewer

PATIENCE = 3  # validations without improvement before a verdict; a run's last two can be a few steps apart
# Fractions of a loss. GAIN is low because small gains add up; CHANGE must exceed the noise between validations, a
# few percent.
GAIN = 0.01
CHANGE = 0.05
DIVERGENCE = 1.0  # a training loss that has doubled does not recover
FLOOR = 0.001  # nats per token; a smaller change does not count

T = TypeVar("T")


class Diagnosis(NamedTuple):
    """What the validations so far show."""

    kind: Literal["too early", "learning", "overfitting", "saturated", "not learning", "diverged"]
    text: str  # one line, with the numbers
    improving: tuple[str, ...] = ()  # what has improved recently


def diagnose(history: Sequence[Validation]) -> Diagnosis:
    """Diagnose a run from its validations in the order of their steps."""
    if not history:
        return Diagnosis("too early", "too early to tell: no validation yet")
    finite = [v for v in history if v.is_finite]
    start, last = (finite or history)[0], history[-1]
    if not last.is_finite or exceeds(last.train_loss - start.train_loss, start.train_loss, DIVERGENCE):
        losses = f"train {last.train_loss:.4g}, validation {last.val_loss:.4g}, {start.train_loss:.4g} at the start"
        return Diagnosis("diverged", f"diverged: losses {losses}")

    train, loss = [v.train_loss for v in finite], [v.val_loss for v in finite]
    gains = {  # index of the last improvement of each, 0 for none
        "validation loss": _last_gain(loss, _fell),
        "format/exact": _last_rise([v.valid for v in finite], fewer, int.bit_count),
        "joint/exact": _last_rise([v.right for v in finite], fewer, int.bit_count),
        # At least by one row's worth.
        "content/field_f1": _last_rise([v.field_f1 for v in finite], lambda old, new: new - old > 1 / last.rows, float),
    }
    recent = [name for name, at in gains.items() if at and len(finite) - 1 - at < PATIENCE]
    lowest = loss.index(min(loss))
    above = all(exceeds(value - loss[lowest], loss[lowest], CHANGE) for value in loss[-PATIENCE:])
    rise = f"validation loss {_percent(loss[lowest], loss[-1])} from its lowest"
    if recent:
        text = f"learning: {' and '.join(recent)} still improve{'s' if len(recent) == 1 else ''}"
        return Diagnosis("learning", text + (f", with the {rise}" if above else ""), tuple(recent))
    if len(finite) <= PATIENCE:
        text = f"too early to tell: validation {len(finite)} of the {PATIENCE + 1} needed"
        return Diagnosis("too early", text)
    if above and exceeds(train[lowest] - train[-1], train[lowest], CHANGE):
        fell = _percent(train[lowest], train[-1])[1:]
        return Diagnosis("overfitting", f"overfitting since step {finite[lowest].step}: {rise} while train fell {fell}")
    if not any(gains.values()) and not _last_gain(train, _fell):
        return Diagnosis("not learning", f"not learning: neither loss has fallen in {len(finite)} validations")
    at = max(gains.values())
    text = f"saturated: nothing improved since step {finite[at].step}"
    if exceeds(train[at] - train[-1], train[at], CHANGE):
        text += f", while train fell {_percent(train[at], train[-1])[1:]}"
    return Diagnosis("saturated", text)


def should_stop(history: Sequence[Validation], validations: int) -> bool:
    """Whether each of the last `validations` shows overfitting or saturation; a run that learns never stops."""
    ends = range(len(history), len(history) - validations, -1)
    return all(end > 0 and diagnose(history[:end]).kind in ("overfitting", "saturated") for end in ends)


def exceeds(change: float, value: float, fraction: float) -> bool:
    """Whether a change exceeds a fraction of a value, and `FLOOR`."""
    return change > max(fraction * value, FLOOR)


def _fell(lowest: float, new: float) -> bool:
    return exceeds(lowest - new, lowest, GAIN)


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


def _percent(before: float, after: float) -> str:
    return f"{after / before - 1:+.0%}" if before else f"{after - before:+.4f}"

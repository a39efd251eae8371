"""The diagnosis of a run from its validations, and the next command (docs/training.md has the rules)."""

import itertools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import linear_regression
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

from lightning.pytorch.callbacks import Timer

from formtune.data.encoded import FEW_ROWS
from formtune.training.validations import Validation, best, fewer

LASTING = 3  # validations without improvement before a verdict; the last two of a run are close, and not independent
# Shares of a loss. Small gains add up and keep a run going; overfitting must exceed the noise between validations, a
# few percent.
GAIN = 0.01
CHANGE = 0.05
DIVERGENCE = 1.0  # a training loss that has doubled does not recover
FLOOR = 0.001  # nats per token; a smaller change does not count
# For the next command
MAX_FACTOR = 3  # of the steps: the last validations say nothing about a longer run
LOWEST_RANK, HIGHEST_RANK = 4, 64
FEW_WRONG = 0.01  # of the validation rows
SPIKE = 0.1  # of the first training loss
SLOW = 0.2  # of the first training loss; a useful learning rate reduces it by more
GAP = 0.2  # of the validation loss
ERRORS = {  # the first that still improves says how much longer to train
    "joint/exact": lambda v: 1 - v.joint / v.rows,
    "content/field_f1": lambda v: 1 - v.field_f1,
    "format/exact": lambda v: 1 - v.exact / v.rows,
    "validation loss": lambda v: v.val_loss,
}

T = TypeVar("T")
Step = tuple[str, dict[str, Any]]  # what to do, and the keys to change; none if the rows should change


class Diagnosis(NamedTuple):
    """What the validations so far show."""

    kind: Literal["too early", "learning", "overfitting", "saturated", "not learning", "diverged"]
    text: str  # one line, with its figures
    improving: tuple[str, ...] = ()  # what has improved recently


def diagnose(history: Sequence[Validation]) -> Diagnosis:
    """Diagnose a run from its validations in the order of their steps."""
    if not history:
        return Diagnosis("too early", "too early to tell: no validation yet")
    finite = [v for v in history if v.is_finite]
    start, last = (finite or history)[0], history[-1]
    if not last.is_finite or _exceeds(last.train_loss - start.train_loss, start.train_loss, DIVERGENCE):
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
    above = all(_exceeds(value - loss[lowest], loss[lowest], CHANGE) for value in loss[-LASTING:])
    rise = f"validation loss {_percent(loss[lowest], loss[-1])} from its lowest"
    if recent:
        text = f"learning: {' and '.join(recent)} still improve{'s' if len(recent) == 1 else ''}"
        return Diagnosis("learning", text + (f", with the {rise}" if above else ""), tuple(recent))
    if len(finite) <= LASTING:
        text = f"too early to tell: validation {len(finite)} of the {LASTING + 1} needed"
        return Diagnosis("too early", text)
    if above and _exceeds(train[lowest] - train[-1], train[lowest], CHANGE):
        fell = _percent(train[lowest], train[-1])[1:]
        return Diagnosis("overfitting", f"overfitting since step {finite[lowest].step}: {rise} while train fell {fell}")
    if not any(gains.values()) and not _last_gain(train, _fell):
        return Diagnosis("not learning", f"not learning: neither loss has fallen in {len(finite)} validations")
    at = max(gains.values())
    text = f"saturated: nothing improved since step {finite[at].step}"
    if _exceeds(train[at] - train[-1], train[at], CHANGE):
        text += f", while train fell {_percent(train[at], train[-1])[1:]}"
    return Diagnosis("saturated", text)


def should_stop(history: Sequence[Validation], validations: int) -> bool:
    """Whether each of the last `validations` shows overfitting or saturation; a run that learns never stops."""
    ends = range(len(history), len(history) - validations, -1)
    return all(end > 0 and diagnose(history[:end]).kind in ("overfitting", "saturated") for end in ends)


def next_step(
    history: Sequence[Validation], trainer: Any, command: str, full: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """What to do after a run of `train` or `fit`, and the command that does it; the keys in `full` undo `--quick`."""
    chosen, folder = best(history), Path(trainer.default_root_dir)
    if chosen and chosen.rows - chosen.joint <= FEW_WRONG * chosen.rows:
        what = f"keep the best checkpoint ({chosen.joint} of {chosen.rows} validation rows are right)"
        words = ["export" if command == "train" else "test", str(folder)]
    else:
        what, keys = _change(history, chosen, trainer)
        keys |= full if keys else {}
        words = [command if keys else "audit", "-c", str(folder / "config.yaml")]
        words += [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return f"{what}: {shlex.join(['formtune', *words])}"


def _change(history: Sequence[Validation], chosen: Validation | None, trainer: Any) -> Step:
    kind, _, improving = diagnose(history)
    measured = [v for v in history if v.is_finite]
    if not history:
        return _longer((), (), trainer)
    if kind == "diverged" or chosen is None:
        return _rate(trainer, 0.1, "training diverged")
    first, last = measured[0], measured[-1]
    for old, new in itertools.pairwise(history):
        if not new.is_finite or _exceeds(new.train_loss - old.train_loss, first.train_loss, SPIKE):
            change = f"from {old.train_loss:.3g} to {new.train_loss:.3g}"
            return _rate(trainer, 1 / 3, f"training loss rose {change} at step {new.step}")
    fell = first.train_loss - last.train_loss
    if kind == "not learning":
        rose = _exceeds(-fell, first.train_loss, CHANGE)
        return _rate(trainer, 1 / 3 if rose else 10, f"training loss has {'risen' if rose else 'not fallen'}")
    if kind == "learning" and len(measured) > LASTING and fell < SLOW * first.train_loss:
        return _rate(trainer, 3, f"training loss fell by only {fell / first.train_loss:.0%}")
    if kind in ("learning", "too early"):
        return _longer([v for v in measured if v.step], improving, trainer)
    # Each row once, whatever its weight.
    rows, rank = len(trainer.datamodule.splits.rows["train"]), trainer.lightning_module.lora.r
    epoch = trainer.num_training_batches
    if kind == "overfitting" and rows >= FEW_ROWS:
        lowest = min(measured, key=lambda v: v.val_loss)
        epochs = max(1, math.ceil(max(lowest.step, chosen.step) / epoch))
        if epochs < math.ceil(trainer.global_step / epoch):
            what = "train fewer epochs, so that the learning rate decays by the best step"
            return what, _epochs(trainer, epochs)
        if rank > LOWEST_RANK:
            return "lower the rank (training is already short)", _rank(trainer, rank // 2)
    losses = f"training loss {last.train_loss:.3g}, validation loss {last.val_loss:.3g}"
    near = not _exceeds(last.val_loss - last.train_loss, last.val_loss, GAP)
    if kind == "saturated" and near and rank < HIGHEST_RANK:
        return f"raise the rank ({losses})", _rank(trainer, 2 * rank)
    return f"add rows like those that the audit finds rare or missing ({losses} with {rows:,} rows)", {}


def _longer(trained: Sequence[Validation], improving: Sequence[str], trainer: Any) -> Step:
    """Train until the error halves, if it falls as a power of the steps, as in the last half of the validations."""
    times, why = float(MAX_FACTOR), "too few validations to say how long"
    name = next((name for name in ERRORS if name in improving), None)
    late = trained[-max(LASTING, math.ceil(len(trained) / 2)) :]
    if name and len(late) > 1:
        errors = [max(ERRORS[name](v), 1e-6) for v in late]
        power = -linear_regression([math.log(v.step) for v in late], list(map(math.log, errors))).slope
        times = 2 ** (1 / power) if power > 1 / math.log2(MAX_FACTOR) else times
        first, last = (f"{e:.3g}" if name == "validation loss" else f"{1 - e:.0%}" for e in (errors[0], errors[-1]))
        why = f"{name} {first} at step {late[0].step}, {last} at step {late[-1].step}"
        why += f", format/exact {late[-1].exact / late[-1].rows:.0%}" if name != "format/exact" else ""
    done, epoch = trainer.global_step, trainer.num_training_batches
    steps = max(round(times * done), done + 1)
    keys = _epochs(trainer, max(math.ceil(steps / epoch), done // epoch + 1))
    return f"train longer ({why})", keys if steps >= epoch else keys | {"trainer.max_steps": steps}


def _epochs(trainer: Any, number: int) -> dict[str, Any]:
    keys: dict[str, Any] = {"trainer.max_epochs": number}
    if trainer.max_steps > 0:
        keys["trainer.max_steps"] = -1
    if any(isinstance(callback, Timer) for callback in trainer.callbacks):  # trainer.max_time
        keys["trainer.max_time"] = "null"
    return keys


def _rank(trainer: Any, rank: int) -> dict[str, Any]:
    # An adapter keeps its rank, so one of another rank starts from the base.
    return {"model.lora.r": rank} | ({"model.adapter": "null"} if trainer.lightning_module.adapter else {})


def _rate(trainer: Any, times: float, why: str) -> Step:
    lr = times * trainer.optimizers[0].defaults["lr"]
    return f"{'lower' if times < 1 else 'raise'} the learning rate ({why})", {"model.optimizer.lr": f"{lr:.1e}"}


def _exceeds(change: float, value: float, share: float) -> bool:
    """Whether a change exceeds a share of a value, and `FLOOR`."""
    return change > max(share * value, FLOOR)


def _fell(lowest: float, new: float) -> bool:
    return _exceeds(lowest - new, lowest, GAIN)


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

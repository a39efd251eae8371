"""What to do after a run, and the command that does it (docs/training.md has the rules)."""

import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

from lightning.pytorch.callbacks import Timer

from formtune.data.encoded import FEW_ROWS
from formtune.training.diagnosis import CHANGE, PATIENCE, diagnose, exceeds
from formtune.training.validations import Validation, best

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

Step = tuple[str, dict[str, Any]]  # what to do, and the keys to change; none if the rows should change


def next_step(history: Sequence[Validation], trainer: Any, command: str, without_quick: Mapping[str, Any]) -> str:
    """What to do after `train` or `fit`, and the command that does it; the keys in `without_quick` undo `--quick`."""
    chosen, folder = best(history), Path(trainer.default_root_dir)
    if chosen and chosen.rows - chosen.joint <= FEW_WRONG * chosen.rows:
        what = f"keep the best checkpoint ({chosen.joint} of {chosen.rows} validation rows are right)"
        words = ["export" if command == "train" else "test", str(folder)]
    else:
        what, keys = _change(history, chosen, trainer)
        keys |= without_quick if keys else {}
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
        if not new.is_finite or exceeds(new.train_loss - old.train_loss, first.train_loss, SPIKE):
            change = f"from {old.train_loss:.3g} to {new.train_loss:.3g}"
            return _rate(trainer, 1 / 3, f"training loss rose {change} at step {new.step}")
    fell = first.train_loss - last.train_loss
    if kind == "not learning":
        rose = exceeds(-fell, first.train_loss, CHANGE)
        return _rate(trainer, 1 / 3 if rose else 10, f"training loss has {'risen' if rose else 'not fallen'}")
    if kind == "learning" and len(measured) > PATIENCE and fell < SLOW * first.train_loss:
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
            what = "train fewer epochs, so that the learning rate has decayed at the best step"
            return what, _epochs(trainer, epochs)
        if rank > LOWEST_RANK:
            return "lower the rank (training is already short)", _rank(trainer, rank // 2)
    losses = f"training loss {last.train_loss:.3g}, validation loss {last.val_loss:.3g}"
    near = not exceeds(last.val_loss - last.train_loss, last.val_loss, GAP)
    if kind == "saturated" and near and rank < HIGHEST_RANK:
        return f"raise the rank ({losses})", _rank(trainer, 2 * rank)
    return f"add rows like those that the audit finds rare or missing ({losses} with {rows:,} rows)", {}


def _longer(trained: Sequence[Validation], improving: Sequence[str], trainer: Any) -> Step:
    """Train until the error halves, if it falls as a power of the steps, as in the last half of the validations."""
    times, why = float(MAX_FACTOR), "too few validations to say how long"
    name = next((name for name in ERRORS if name in improving), None)
    late = trained[-max(PATIENCE, math.ceil(len(trained) / 2)) :]
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
    # An adapter's rank is fixed, so a run with another rank starts from the base.
    return {"model.lora.r": rank} | ({"model.adapter": "null"} if trainer.lightning_module.adapter else {})


def _rate(trainer: Any, times: float, why: str) -> Step:
    lr = times * trainer.optimizers[0].defaults["lr"]
    return f"{'lower' if times < 1 else 'raise'} the learning rate ({why})", {"model.optimizer.lr": f"{lr:.1e}"}

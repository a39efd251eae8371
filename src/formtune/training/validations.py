"""What each validation measured, and which checkpoint is the best."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch.callbacks import Callback

from formtune.model.ranks import gathered

PRINTED = ("val/loss", "format/exact", "joint/exact", "content/field_f1")


@dataclass(frozen=True, slots=True)
class Validation:
    """What one validation measured."""

    step: int  # optimizer steps done; 0 is before training, which has no checkpoint
    train_loss: float  # nats per token, on a sample of training rows
    val_loss: float  # nats per token
    field_f1: float
    rows: int
    valid: int  # which rows have a valid format: one bit per row, the highest for the first row
    right: int  # which rows are right as well, likewise

    @property
    def exact(self) -> int:
        return self.valid.bit_count()

    @property
    def joint(self) -> int:
        return self.right.bit_count()

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.train_loss) and math.isfinite(self.val_loss)

    @property
    def order(self) -> tuple[int, float, float, int]:
        """Sort key among candidates: most right answers, then highest field F1, lowest loss, earliest step."""
        return (-self.joint, -self.field_f1, self.val_loss, self.step)

    def figures(self) -> dict[str, Any]:
        names = ("step", "train_loss", "val_loss", "exact", "joint", "rows", "field_f1")
        return {name: getattr(self, name) for name in names}


def fewer(rows: int, others: int) -> bool:
    """Whether `rows` are fewer than `others` by more than one standard error of the paired difference, sqrt(b + c)."""
    gap = others.bit_count() - rows.bit_count()
    return gap > 0 and gap**2 > (rows ^ others).bit_count()


def best(history: Iterable[Validation]) -> Validation | None:
    """The best checkpoint, None if no validation gave finite figures.

    It is the first in `order` of those that have not `fewer` rows in valid format than the one with the most.
    """
    if not (measured := _measured(history)):
        return None
    most = _most_valid(measured).valid
    return min((v for v in measured if not fewer(v.valid, most)), key=lambda v: v.order)


def contenders(history: Iterable[Validation]) -> set[int]:
    """Steps of the checkpoints that are the best now, or can be after later validations.

    A checkpoint cannot win any more if it is too far behind every possible reference, or if another one comes before it
    in the order and is a candidate whenever it is. `tests/unit/training/test_checkpoints.py` has the proof.
    """
    measured = _measured(history)
    top = max((v.exact for v in measured), default=0)

    def too_far(a: Validation) -> bool:
        behind = top - a.exact
        return behind**2 - behind > 2 * min(a.exact, a.rows - top)

    def beaten(a: Validation, b: Validation) -> bool:
        lowest = max(top, b.exact + 2)
        behind, gap, apart = lowest - a.exact, lowest - b.exact, (a.valid ^ b.valid).bit_count()
        lacking = a.rows - (a.valid | b.valid).bit_count()
        return b.order < a.order and behind**2 - apart >= min(gap**2, 2 * lacking - gap + 1)

    return {a.step for a in measured if not too_far(a) and not any(beaten(a, b) for b in measured)}


def reason(history: Sequence[Validation]) -> str:
    """The best checkpoint in words, beside those that other rules would take."""
    chosen, measured = best(history), _measured(history)
    if chosen is None:
        return "no best checkpoint: no validation had a finite loss"
    parts = [f"best checkpoint: step {chosen.step} ({chosen.joint} of {chosen.rows} right, {chosen.exact} valid)"]
    others = {
        "most valid": _most_valid(measured),
        "most right": min(measured, key=lambda v: v.order),
        "lowest loss": min(measured, key=lambda v: v.val_loss),
        "last": history[-1],
    }
    for name, other in others.items():
        figures = f"step {other.step} ({other.joint} right, {other.exact} valid)"
        parts.append(f"{name}: {'the same' if other is chosen else figures}")
    return "; ".join(parts)


def _measured(history: Iterable[Validation]) -> list[Validation]:
    return [v for v in history if v.step and math.isfinite(v.val_loss) and math.isfinite(v.field_f1)]


def _most_valid(measured: Sequence[Validation]) -> Validation:
    return min(measured, key=lambda v: (-v.exact, *v.order))


class Validations(Callback):
    """Records and prints what each validation of a run measured; the record is the same on all processes."""

    def __init__(self) -> None:
        self.history: list[Validation] = []
        self._verdicts: list[tuple[int, bool, bool]] = []

    def state_dict(self) -> dict[str, Any]:
        # As text: safe loading takes no integers of more than 255 bytes.
        return {"history": [asdict(v) | {"valid": f"{v.valid:x}", "right": f"{v.right:x}"} for v in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [
            Validation(**record | {name: int(record[name], 16) for name in ("valid", "right")})
            for record in state_dict["history"]
        ]

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        pairs = zip(batch.rows, outputs, strict=True)
        self._verdicts += [(row.number, outcome.exact, outcome.joint) for row, outcome in pairs]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        rows, metrics = sorted(gathered(trainer, self._verdicts)), trainer.callback_metrics
        self._verdicts = []
        if trainer.sanity_checking:
            return
        # Each time the same rows, in the order of the file, however many processes share them.
        valid, right = (int("".join("01"[row[i]] for row in rows) or "0", 2) for i in (1, 2))
        names = ("train/eval_loss", "val/loss", "content/field_f1")
        train, loss, f1 = (float(metrics.get(name, math.nan)) for name in names)
        self.history.append(Validation(trainer.global_step, train, loss, f1, len(rows), valid, right))
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            figures = "  ".join(f"{name} {float(metrics[name]):.4f}" for name in PRINTED)
            pl_module.print(f"step {trainer.global_step}  {figures}")  # above the progress bar
            print(end="", flush=True)

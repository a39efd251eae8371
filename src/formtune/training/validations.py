"""The metrics of each validation, and the choice of the best checkpoint."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Validation:
    """What one validation measured."""

    step: int  # optimizer steps done; 0 is before training, which has no checkpoint
    train_loss: float  # nats per token, on a sample of training rows
    val_loss: float  # nats per token
    field_f1: float
    rows: int
    valid: int  # which rows have a valid format: one bit per row, the highest for the first row
    right: int  # which rows are right, as bits too

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

    def to_dict(self) -> dict[str, Any]:
        names = ("step", "train_loss", "val_loss", "exact", "joint", "rows", "field_f1")
        return {name: getattr(self, name) for name in names}


def fewer(rows: int, others: int) -> bool:
    """Whether `rows` are fewer than `others` by more than one standard error of the paired difference, sqrt(b + c)."""
    gap = others.bit_count() - rows.bit_count()
    return gap > 0 and gap**2 > (rows ^ others).bit_count()


def best(history: Iterable[Validation]) -> Validation | None:
    """The best checkpoint, None if no validation gave finite metrics.

    It is the first in `order` of those within one standard error of the most valid formats, see `fewer`.
    """
    if not (measured := _measured(history)):
        return None
    most = _most_valid(measured).valid
    return min((v for v in measured if not fewer(v.valid, most)), key=lambda v: v.order)


def can_still_win(history: Iterable[Validation]) -> set[int]:
    """Steps of the checkpoints that are the best now, or can be after later validations.

    A checkpoint cannot win any more if another one comes before it in the order and is a candidate whenever it is.
    `tests/unit/training/test_checkpoints.py` has the proof.
    """
    measured = _measured(history)
    top = max((v.exact for v in measured), default=0)

    def beaten(a: Validation, b: Validation) -> bool:
        lowest = max(top, b.exact + 2)
        behind, gap, apart = lowest - a.exact, lowest - b.exact, (a.valid ^ b.valid).bit_count()
        lacking = a.rows - (a.valid | b.valid).bit_count()
        return b.order < a.order and behind**2 - apart >= min(gap**2, 2 * lacking - gap + 1)

    return {a.step for a in measured if not any(beaten(a, b) for b in measured)}


def reason(history: Sequence[Validation]) -> str:
    """The best checkpoint, and those that other rules would choose, in one line."""
    chosen, measured = best(history), _measured(history)
    if chosen is None:
        return f"no best checkpoint: no validation {'had a finite loss' if history else 'was run'}"
    parts = [f"best checkpoint: step {chosen.step} ({chosen.joint} of {chosen.rows} right, {chosen.exact} valid)"]
    others = {
        "most valid": _most_valid(measured),
        "most right": min(measured, key=lambda v: v.order),
        "lowest loss": min(measured, key=lambda v: v.val_loss),
        "last": history[-1],
    }
    for name, other in others.items():
        text = f"step {other.step} ({other.joint} right, {other.exact} valid)"
        parts.append(f"{name}: {'the same' if other is chosen else text}")
    return "; ".join(parts)


def _measured(history: Iterable[Validation]) -> list[Validation]:
    return [v for v in history if v.step and math.isfinite(v.val_loss) and math.isfinite(v.field_f1)]


def _most_valid(measured: Sequence[Validation]) -> Validation:
    return min(measured, key=lambda v: (-v.exact, *v.order))

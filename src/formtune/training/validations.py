"""What each validation measured, and which checkpoint is the best by it.

Format comes first, but not its noise. The reference is the checkpoint with the most rows in valid format. Candidates
are all checkpoints that are not behind it by more than one standard error of the paired difference on the same rows: if
b rows have a valid format in the reference alone, and c rows in the other alone, b - c is compared with sqrt(b + c).
Among the candidates the most right answers (`joint/exact`) decide, then the higher `content/field_f1`, the lower
`val/loss`, the earlier step. Of several with the most valid rows, the first in this order is the reference.

The candidates are a set and not a chain of ties: a later reference may rule out the best checkpoint, and then one that
was behind becomes the best. `contenders` says which can.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch.callbacks import Callback

from formtune.model.ranks import gathered


@dataclass(frozen=True, slots=True)
class Validation:
    """What one validation measured.

    Args:
        step: Optimizer steps done; 0 is the base, of which there is no checkpoint.
        train_loss: `train/eval_loss` in nats per token.
        val_loss: `val/loss` in nats per token.
        field_f1: `content/field_f1`.
        rows: Rows of the validation set.
        valid: Which rows have a valid format: one bit for each row, the first row's is the highest.
        right: Which rows are right as well (`joint/exact`), likewise.
    """

    step: int
    train_loss: float
    val_loss: float
    field_f1: float
    rows: int
    valid: int
    right: int

    @property
    def exact(self) -> int:
        """Number of rows with `format/exact`."""
        return self.valid.bit_count()

    @property
    def joint(self) -> int:
        """Number of rows with `joint/exact`."""
        return self.right.bit_count()

    @property
    def order(self) -> tuple[int, float, float, int]:
        """Sort key among candidates: best first."""
        return (-self.joint, -self.field_f1, self.val_loss, self.step)

    def figures(self) -> dict[str, Any]:
        """All but which rows they were."""
        names = ("step", "train_loss", "val_loss", "exact", "joint", "rows", "field_f1")
        return {name: getattr(self, name) for name in names}


def fewer(one: int, other: int) -> bool:
    """Whether `one` has fewer rows than `other` by more than one standard error of the paired difference."""
    gap = other.bit_count() - one.bit_count()
    return gap > 0 and gap**2 > (one ^ other).bit_count()


def best(history: Iterable[Validation]) -> Validation | None:
    """The best checkpoint, None if no validation gave finite figures."""
    return min(_candidates(_measured(history))[1], key=lambda v: v.order, default=None)


def contenders(history: Iterable[Validation]) -> set[int]:
    """Steps of the checkpoints that are the best now or can be after later validations, whatever these measure.

    None that can win is left out. Let the reference have t valid rows now; a later one has r >= t. A checkpoint A with
    a valid rows cannot be the best, now or later, if one of these is true:

    1. It is too far behind. A is a candidate if (r - a)² <= b + c, where b - c = r - a, c <= a and c <= rows - r. So it
       takes m² - m <= 2 min(a, rows - r) for m = r - a. With r the left side rises and the right side does not: if this
       is false for t, it is false for every r.
    2. Another checkpoint B, with b valid rows, comes before A in the order and is a candidate whenever A is. This needs
       proof for r >= b + 2 only: one row less is never too few. Let h rows tell A from B, let both lack n rows, and let
       the reference have s <= n of these and lack j of those that only B has. Its distance from A is then
       h - (r - b) + 2 (s - j), and from B it is nearer by h at most. So if A is a candidate,
       (r - a)² <= h + 2 n - (r - b), and B differs from the reference in (r - a)² - h rows at least. B is a candidate
       too if that is at least (r - b)². Where one of the two settles it for the lowest r, it does for every r: the
       difference of both sides does not fall as r rises. It does not matter whether B's own file is kept.

    Both are sufficient and cheap, so a few that cannot win may be kept. A fixed limit would give a best one away, since
    there are verdicts for which each of many may still win. In simulated runs 1 to 6 were kept of 40 validations, and
    never more than 13 of 150 whose figures were noise alone.
    """
    found = _measured(history)
    top = max((v.exact for v in found), default=0)

    def too_far(a: Validation) -> bool:
        behind = top - a.exact
        return behind**2 - behind > 2 * min(a.exact, a.rows - top)

    def beaten(a: Validation, b: Validation) -> bool:
        lowest = max(top, b.exact + 2)
        behind, gap, apart = lowest - a.exact, lowest - b.exact, (a.valid ^ b.valid).bit_count()
        lacking = a.rows - (a.valid | b.valid).bit_count()
        return b.order < a.order and behind**2 - apart >= min(gap**2, 2 * lacking - gap + 1)

    return {a.step for a in found if not too_far(a) and not any(beaten(a, b) for b in found)}


def reason(history: Sequence[Validation]) -> str:
    """Why the best checkpoint is the best, in words, beside the lowest-loss, the last and the most right one."""
    found = _measured(history)
    reference, candidates = _candidates(found)
    if reference is None:
        return "no best checkpoint: no validation gave a finite loss"
    chosen, *others = sorted(candidates, key=lambda v: v.order)
    why = f"its valid format, {chosen.exact}, is the most"
    if chosen is not reference:
        near = f"within one standard error of step {reference.step}'s {reference.exact}"
        why = f"its valid format, {chosen.exact}, is {near}, the most"
    if others and others[0].joint == chosen.joint:
        names = ("a higher field F1", "a lower loss", "fewer steps")
        first = next(name for name, a, b in zip(names, chosen.order[1:], others[0].order[1:], strict=True) if a != b)
        why += f"; as many right as step {others[0].step}, with {first}"
    parts = [f"best checkpoint: step {chosen.step} ({chosen.joint} of {chosen.rows} right; {why})"]
    for name, other, but in (
        ("lowest loss", min(found, key=lambda v: v.val_loss), ""),
        ("last", history[-1], ""),
        # If it were a candidate, it would have been chosen.
        ("most right", min(found, key=lambda v: v.order), ", more than one standard error below the most"),
    ):
        figures = f"step {other.step} ({other.joint} right, {other.exact} valid{but})"
        parts.append(f"{name}: {'the same' if other is chosen else figures}")
    return "; ".join(parts)


def _measured(history: Iterable[Validation]) -> list[Validation]:
    """Those that can be the best: checkpoints whose figures are numbers."""
    return [v for v in history if v.step and math.isfinite(v.val_loss) and math.isfinite(v.field_f1)]


def _candidates(found: Sequence[Validation]) -> tuple[Validation | None, list[Validation]]:
    """The checkpoint with the most rows in valid format, and all whose format is as good but for noise."""
    reference = min(found, key=lambda v: (-v.exact, *v.order), default=None)
    return reference, [v for v in found if reference and not fewer(v.valid, reference.valid)]


class Validations(Callback):
    """Records what each validation of a run measured, row by row, the same on all processes."""

    def __init__(self) -> None:
        self.history: list[Validation] = []
        self._found: list[tuple[int, bool, bool]] = []

    @property
    def best(self) -> Validation | None:
        """The best checkpoint's validation so far."""
        return best(self.history)

    @property
    def lowest_loss(self) -> Validation | None:
        """The checkpoint's validation with the lowest loss, which need not be the best one."""
        return min(_measured(self.history), key=lambda v: v.val_loss, default=None)

    def summary(self) -> dict[str, Any]:
        """What `metrics.json` records of the validations; none of it is measured on the test rows."""
        best, lowest = self.best, self.lowest_loss
        return {
            "best_step": best.step if best else None,
            "best_reason": reason(self.history),
            "best": best.figures() | {"loss": best.val_loss} if best else None,
            "lowest_loss_step": lowest.step if lowest else None,
            "history": [validation.figures() for validation in self.history],
        }

    def state_dict(self) -> dict[str, Any]:
        # As text: safe loading takes no integers of more than 255 bytes.
        return {"history": [asdict(v) | {"valid": f"{v.valid:x}", "right": f"{v.right:x}"} for v in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [
            Validation(**one | {name: int(one[name], 16) for name in ("valid", "right")})
            for one in state_dict["history"]
        ]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._found = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self._found += [(a.row.number, a.verdict.exact, a.verdict.joint) for a in outputs]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        rows, metrics = sorted(gathered(trainer, self._found)), trainer.callback_metrics
        # Each time the same rows, in the order of the file, however many processes share them.
        valid, right = (int("".join("01"[row[i]] for row in rows) or "0", 2) for i in (1, 2))
        train, loss, f1 = (
            float(metrics.get(name, math.nan)) for name in ("train/eval_loss", "val/loss", "content/field_f1")
        )
        self.history.append(Validation(trainer.global_step, train, loss, f1, len(rows), valid, right))

"""Which point of a grid to take: the smallest that is within one standard error of the best (Breiman et al. 1984).

Format first: the points whose `format/exact` counts as equal to the highest. Among these the points whose
`content/field_f1` counts as equal to the highest of them. Of these the one with the fewest trainable parameters; where
several have as few, the higher `format/exact`, the higher field F1, the lower loss, then the earlier point of the grid.
All of it on the validation rows: a choice that has seen the test rows would flatter the test figures of what it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean of a share over seeds, and its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What the best checkpoints of a point's runs, one a seed, got on the validation rows.

    Args:
        trainable_parameters: Number of them.
        rows: Validation rows.
        exact: `format/exact`.
        field_f1: `content/field_f1`.
        loss: Mean of `val/loss` in nats per token.
    """

    trainable_parameters: int
    rows: int
    exact: Estimate
    field_f1: Estimate
    loss: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Indices into the points.

    Args:
        taken: The point to take.
        in_format: Points whose format counts as equal to the best, `best_in_format`.
        in_content: Those of them whose content counts as equal to the best of them, `best_in_content`.
    """

    taken: int
    best_in_format: int
    in_format: tuple[int, ...]
    best_in_content: int
    in_content: tuple[int, ...]


def estimate(shares: Sequence[float], rows: int) -> Estimate:
    """Mean and standard error: over seeds, or of a rate over the rows where there is one seed.

    The second is exact for a share of rows, and for F1 an approximation that takes the values of a row as one.
    """
    mean = fmean(shares)
    if len(shares) > 1:
        return Estimate(mean, stdev(shares) / math.sqrt(len(shares)))
    return Estimate(mean, math.sqrt(mean * (1 - mean) / rows))


def choose(points: Sequence[Measured]) -> Choice:
    """The point to take.

    Args:
        points: At least one, all with the same number of seeds and the same validation rows.
    """
    best_in_format, in_format = _equal_to_the_best(range(len(points)), [p.exact for p in points], points[0].rows)
    best_in_content, in_content = _equal_to_the_best(in_format, [p.field_f1 for p in points], points[0].rows)

    def smallest(i: int) -> tuple[float, ...]:
        point = points[i]
        return (point.trainable_parameters, -point.exact.mean, -point.field_f1.mean, point.loss, i)

    return Choice(min(in_content, key=smallest), best_in_format, in_format, best_in_content, in_content)


def _equal_to_the_best(among: Sequence[int], estimates: Sequence[Estimate], rows: int) -> tuple[int, tuple[int, ...]]:
    best = max(among, key=lambda i: (estimates[i].mean, estimates[i].standard_error))
    # One row never decides, as among checkpoints: seeds that happen to agree have a standard error of 0.
    margin = max(estimates[best].standard_error, 1 / rows) + 1e-9  # a row's share is rounded
    return best, tuple(i for i in among if estimates[i].mean >= estimates[best].mean - margin)

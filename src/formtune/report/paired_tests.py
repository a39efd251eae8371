"""Paired tests of two runs on the same rows, and intervals of field F1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from formtune.evaluation.statistics import CONFIDENCE, Interval

POWER = 0.8  # of a test on the rows needed

_QUANTILES = tuple(map(float, stats.norm.ppf([(1 + CONFIDENCE) / 2, POWER])))
_ELEMENTS = 4_000_000  # numbers that are drawn at once, which bounds the memory


@dataclass(frozen=True, slots=True)
class Difference:
    """How the second of two runs differs from the first on the same rows."""

    value: float  # second minus first, between -1 and 1
    significant: bool
    rows: int
    needed: int | None  # rows for 80 % power, None if there is no difference
    p: float


def mcnemar(gained: int, lost: int) -> float:
    """p of the exact two-sided McNemar test, from the rows that only the second or only the first run has right."""
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def rows_needed(gained: int, lost: int, rows: int) -> int | None:
    """Rows with which the exact McNemar test would have 80 % power; None for no difference."""
    # Connor (Biometrics 43, 1987), with Edwards's continuity correction (Psychometrika 13, 1948).
    if gained == lost:
        return None
    differing, difference = (gained + lost) / rows, abs(gained - lost) / rows
    level, power = _QUANTILES
    plain = ((level * math.sqrt(differing) + power * math.sqrt(differing - difference**2)) / difference) ** 2
    return math.ceil(plain / 4 * (1 + math.sqrt(1 + 4 / (plain * difference))) ** 2)


def rate_difference(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """Compare two rates: for each row, in the same order, whether the first and the second run have it right."""
    pairs = list(zip(first, second, strict=True))
    gained, lost, rows = pairs.count((False, True)), pairs.count((True, False)), len(pairs)
    p = mcnemar(gained, lost)
    return Difference((gained - lost) / max(rows, 1), p < 1 - CONFIDENCE, rows, rows_needed(gained, lost, rows), p)


def f1_interval(counts: np.ndarray) -> Interval:
    """95 % interval of micro F1 by bootstrap; `counts`, of shape (2, rows), are shared values and values of both."""
    if counts.shape[1] < 2:
        return 0.0, 1.0
    # Not BCa: it is undefined if no resample is below or above the value, as often near an F1 of 1.
    drawn = stats.bootstrap(
        tuple(counts), _f1, paired=True, vectorized=True, confidence_level=CONFIDENCE, method="percentile",
        batch=max(1, _ELEMENTS // counts.size), rng=0,
    )  # fmt: skip
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def f1_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compare micro F1 (counts: see `f1_interval`) by randomization (Yeh, 2000): each row's two answers are swapped.

    The test is exact up to 12 differing rows.
    """
    value, rows = float(_f1(*second) - _f1(*first)), first.shape[1]
    differs = (first != second).any(axis=0)
    if not differs.any():
        return Difference(value, False, rows, None, 1.0)
    rest = first[:, ~differs].sum(axis=1, keepdims=True)  # the other rows as one, where swapping changes nothing
    shared, total = np.concatenate([first[:, differs], rest, second[:, differs], rest], axis=1)
    test = stats.permutation_test(
        tuple(np.arange(len(total)).reshape(2, -1)),
        lambda before, after, axis: _f1(shared[after], total[after], axis) - _f1(shared[before], total[before], axis),
        permutation_type="samples", vectorized=True, batch=max(1, _ELEMENTS // len(total)), rng=0,
    )  # fmt: skip
    significant, needed = bool(test.pvalue < 1 - CONFIDENCE), None
    if value:  # F1 is nearly a mean, whose standard error falls with the square root of the rows
        needed = math.ceil(rows * (sum(_QUANTILES) * float(np.std(test.null_distribution)) / value) ** 2)
        needed = needed if significant else max(needed, rows + 1)
    return Difference(value, significant, rows, needed, float(test.pvalue))


def verdict(difference: Difference) -> str:
    """`better`, `worse`, or `cannot tell with 300 rows: about 1,200 would`."""
    if difference.significant:
        return "better" if difference.value > 0 else "worse"
    if not difference.needed:
        return f"cannot tell with {difference.rows:,} rows"
    unit = 10 ** max(0, len(str(difference.needed)) - 2)
    return f"cannot tell with {difference.rows:,} rows: about {math.ceil(difference.needed / unit) * unit:,} would"


def _f1(shared: Any, total: Any, axis: int = -1) -> Any:
    return 2 * shared.sum(axis) / np.maximum(total.sum(axis), 1)

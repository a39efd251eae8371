"""How certain a figure on the test rows is, and whether two runs on the same rows differ.

With 300 test rows, a difference of two points is often noise. So every figure has an interval, and runs are compared
row by row, which removes the difficulty of the rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95  # of every interval; tests have the level 0.05
DRAWS = 9999  # of the bootstrap and of the randomization test
POWER = 0.8  # of a test on the rows needed

Interval = tuple[float, float]

_QUANTILES = tuple(map(float, stats.norm.ppf([(1 + CONFIDENCE) / 2, POWER])))
_ELEMENTS = 4_000_000  # numbers that the bootstrap draws at once, which bounds its memory


@dataclass(frozen=True, slots=True)
class Difference:
    """How the second of two runs differs from the first on the same rows."""

    value: float  # second minus first, between -1 and 1
    sure: bool  # whether it is significant
    rows: int
    needed: int | None  # rows with which the test would have 80 % power, None for no difference
    p: float
    interval: Interval | None = None  # of the value; None for a rate


def wilson(count: int, rows: int) -> Interval:
    """95 % interval of the rate `count` of `rows` (Wilson, 1927); 0 to 1 without rows."""
    if not rows:
        return 0.0, 1.0
    interval = stats.binomtest(count, rows).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(gained: int, lost: int) -> float:
    """p of the exact two-sided McNemar test, from the rows that only the second or only the first run has right."""
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def rows_needed(gained: int, lost: int, rows: int) -> int | None:
    """Rows with which the exact McNemar test would have 80 % power; None for no difference.

    By Connor (Biometrics 43, 1987), with Edwards's continuity correction (Psychometrika 13, 1948); without it the exact
    test has a few points less.
    """
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
    return _bootstrap(lambda totals: _f1(*totals), counts)[0] if counts.shape[1] > 1 else (0.0, 1.0)


def quantile_interval(values: Sequence[float], percent: float) -> Interval:
    """95 % interval of a percentile, by bootstrap; of one distinct value, that value."""
    if len(set(values)) < 2:
        return values[0], values[0]
    statistic = functools.partial(np.percentile, q=percent)
    drawn = stats.bootstrap([values], statistic, confidence_level=CONFIDENCE, method="percentile", rng=0)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def f1_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compare micro F1 (counts: see `f1_interval`): interval by paired bootstrap, test by randomization (Yeh, 2000).

    The test asks how often the difference would be as large if the two answers to each row were swapped at random. If
    all differing rows have equal weight, it is the exact McNemar test.
    """
    rows, value = first.shape[1], float(_gain(np.concatenate([first, second]).sum(axis=1)))
    if rows < 2:
        return Difference(value, False, rows, None, 1.0, (-1.0, 1.0))
    interval, error = _bootstrap(_gain, np.concatenate([first, second]))
    p = _randomization(first, second)
    sure = p < 1 - CONFIDENCE
    # F1 is nearly a mean, whose standard error falls with the square root of the rows.
    needed = math.ceil(rows * (sum(_QUANTILES) * error / value) ** 2) if value else None
    return Difference(value, sure, rows, needed if sure or not needed else max(needed, rows + 1), p, interval)


def verdict(difference: Difference) -> str:
    """`better`, `worse`, or `cannot tell with 300 rows: about 1,200 would`."""
    if difference.sure:
        return "better" if difference.value > 0 else "worse"
    would = f": about {_rounded_up(difference.needed):,} would" if difference.needed else ""
    return f"cannot tell with {difference.rows:,} rows{would}"


def _f1(both: Any, either: Any) -> Any:
    return 2 * both / np.maximum(either, 1)


def _gain(totals: np.ndarray) -> np.ndarray:
    return _f1(*totals[2:]) - _f1(*totals[:2])


# Rows with the same counts are interchangeable, so it is enough to draw how often each distinct row appears: 0.3 s for
# 50,000 rows. scipy's bootstrap takes 15 s for one run, its permutation_test minutes.


def _distinct(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct columns and their counts, in an order that does not depend on which run comes first."""
    columns, places, times = np.unique(counts, axis=1, return_index=True, return_counts=True)
    order = places.argsort()
    return columns[:, order], times[order]


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], counts: np.ndarray) -> tuple[Interval, float]:
    """Interval and standard error of a statistic of the totals of `counts`, of shape (figures, rows)."""
    columns, times = _distinct(counts)
    rows, generator, values = counts.shape[1], np.random.default_rng(0), []
    batch = max(1, _ELEMENTS // len(times))
    for start in range(0, DRAWS, batch):
        drawn = generator.multinomial(rows, times / rows, min(batch, DRAWS - start))
        values.append(statistic(columns.astype(float) @ drawn.T.astype(float)))  # exact; numpy is slow on integers
    drawn = np.concatenate(values)
    # Not BCa: it is undefined if no resample is below or above the figure, as often near an F1 of 1.
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return (float(low), float(high)), float(drawn.std(ddof=1))


def _randomization(first: np.ndarray, second: np.ndarray) -> float:
    """p of the two-sided test, exact if there are few ways to swap."""
    gained = (second - first)[:, (first != second).any(axis=0)]
    if not gained.size:
        return 1.0
    columns, times = _distinct(gained)
    if math.prod((times + 1).tolist()) <= DRAWS:
        swapped = np.indices((times + 1).tolist()).reshape(len(times), -1)
        weights = stats.binom.pmf(swapped, times[:, None], 0.5).prod(axis=0)
        moved = columns @ swapped
    else:
        generator, moved = np.random.default_rng(0), np.zeros((2, DRAWS + 1))  # the first is what was observed
        weights = np.full(DRAWS + 1, 1 / (DRAWS + 1))
        for gain, number in zip(columns.T, times, strict=True):
            moved[:, 1:] += gain[:, None] * generator.binomial(number, 0.5, DRAWS)
    totals = np.concatenate([first.sum(axis=1)[:, None] + moved, second.sum(axis=1)[:, None] - moved])
    gains, observed = _gain(totals), float(_gain(np.concatenate([first, second]).sum(axis=1)))
    rounding = 1e-12  # equal fractions of different sums
    tails = weights[gains >= observed - rounding].sum(), weights[gains <= observed + rounding].sum()
    return min(1.0, 2 * float(min(tails)))


def _rounded_up(number: int) -> int:
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit

"""How sure a figure of the test rows is, and whether two runs on the same rows differ.

Test sets are small: on 300 rows, two runs that are two points apart have often only drawn other luck. Every figure
therefore comes with an interval, and runs are compared row by row, which leaves the difficulty of the rows out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95  # of every interval and, as 1 minus it, the level of every test
DRAWS = 9999  # of the bootstrap and of the randomization test
POWER = 0.8  # share of tries in which the rows needed would show the difference

Interval = tuple[float, float]

_QUANTILES = tuple(map(float, stats.norm.ppf([(1 + CONFIDENCE) / 2, POWER])))
_ELEMENTS = 4_000_000  # numbers that the bootstrap draws at once: bounds its memory


@dataclass(frozen=True, slots=True)
class Difference:
    """What a run has more than another on the same rows.

    Args:
        value: Second minus first, as a share of 1.
        sure: Whether it is told from chance at the 5 % level.
        rows: Rows that were compared.
        needed: Rows that would tell a difference of this size in 80 % of tries; None where there is none.
        p: Of the test.
        interval: 95 % interval of the value; None for a rate.
    """

    value: float
    sure: bool
    rows: int
    needed: int | None
    p: float
    interval: Interval | None = None


def wilson(count: int, rows: int) -> Interval:
    """95 % interval of the rate `count` of `rows` (Wilson, 1927); all from 0 to 1 where there is no row."""
    if not rows:
        return 0.0, 1.0
    found = stats.binomtest(count, rows).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(gained: int, lost: int) -> float:
    """p of the exact two-sided McNemar test.

    Args:
        gained: Rows that only the second run has right.
        lost: Rows that only the first has right.
    """
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def rows_needed(gained: int, lost: int, rows: int) -> int | None:
    """Rows on which the exact McNemar test would tell a difference like this one in 80 % of tries.

    The formula of Connor (Biometrics 43, 1987) for the shares of rows that were gained and lost, with Edwards's
    correction for continuity (Psychometrika 13, 1948), without which the exact test falls a few points short.

    Returns:
        The number, or None where as many rows were gained as lost.
    """
    if gained == lost:
        return None
    differing, difference = (gained + lost) / rows, abs(gained - lost) / rows
    level, power = _QUANTILES
    plain = ((level * math.sqrt(differing) + power * math.sqrt(differing - difference**2)) / difference) ** 2
    return math.ceil(plain / 4 * (1 + math.sqrt(1 + 4 / (plain * difference))) ** 2)


def rate_difference(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """Compare two rates.

    Args:
        first: For each row, whether the first run has it right.
        second: The same of the second run, in the same order.
    """
    pairs = list(zip(first, second, strict=True))
    gained, lost, rows = pairs.count((False, True)), pairs.count((True, False)), len(pairs)
    p = mcnemar(gained, lost)
    return Difference((gained - lost) / max(rows, 1), p < 1 - CONFIDENCE, rows, rows_needed(gained, lost, rows), p)


def f1_interval(counts: np.ndarray) -> Interval:
    """95 % interval of micro F1, by bootstrap over rows.

    Args:
        counts: Of shape (2, rows): values that answer and target have in common; values of both together.
    """
    return _bootstrap(lambda totals: _f1(*totals), counts)[0] if counts.shape[1] > 1 else (0.0, 1.0)


def quantile_interval(values: Sequence[float], percent: float) -> Interval:
    """95 % interval of the value that `percent` of all do not exceed, by bootstrap; of one value, that value."""
    if len(set(values)) < 2:
        return values[0], values[0]
    found = stats.bootstrap(
        (np.array(values),), lambda drawn, axis: np.percentile(drawn, percent, axis=axis),
        confidence_level=CONFIDENCE, method="percentile", rng=0,
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def f1_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compare micro F1: its interval by paired bootstrap over rows, its test by randomization (Yeh, 2000).

    The test asks how often the difference would be as large if each row's two answers were dealt to the runs at random.
    Where the differing rows weigh the same it is the exact McNemar test; the bootstrap calls four such rows enough.

    Args:
        first: Counts of the first run, of shape (2, rows) as for `f1_interval`.
        second: Counts of the second run, the rows in the same order.
    """
    rows, value = first.shape[1], float(_f1(*second.sum(axis=1)) - _f1(*first.sum(axis=1)))
    if rows < 2:
        return Difference(value, False, rows, None, 1.0, (-1.0, 1.0))
    interval, error = _bootstrap(_gain, np.concatenate([first, second]))
    p = _randomization(first, second)
    sure = p < 1 - CONFIDENCE
    # A mean's standard error falls with the root of the rows, and F1 is nearly one.
    needed = math.ceil(rows * (sum(_QUANTILES) * error / value) ** 2) if value else None
    return Difference(value, sure, rows, needed if sure or not needed else max(needed, rows + 1), p, interval)


def verdict(difference: Difference) -> str:
    """`better`, `worse`, or `cannot tell with 300 rows: about 1,200 would`; nothing after the rows if none would."""
    if difference.sure:
        return "better" if difference.value > 0 else "worse"
    would = f": about {_rounded_up(difference.needed):,} would" if difference.needed else ""
    return f"cannot tell with {difference.rows:,} rows{would}"


def _f1(both: Any, either: Any) -> Any:
    return 2 * both / np.maximum(either, 1)


def _gain(totals: np.ndarray) -> np.ndarray:
    return _f1(*totals[2:]) - _f1(*totals[:2])


def _kinds(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns that differ, and how often each stands there; in the order of the rows, whichever run comes first."""
    kinds, places, times = np.unique(counts, axis=1, return_index=True, return_counts=True)
    order = places.argsort()
    return kinds[:, order], times[order]


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], counts: np.ndarray) -> tuple[Interval, float]:
    """Interval and standard error of a statistic of the totals of `counts`, of shape (figures, rows)."""
    # Rows with the same counts are alike: how often each kind is drawn says all of a resample, and there are few kinds.
    kinds, times = _kinds(counts)
    rows, dice, found = counts.shape[1], np.random.default_rng(0), []
    batch = max(1, _ELEMENTS // len(times))
    for start in range(0, DRAWS, batch):
        drawn = dice.multinomial(rows, times / rows, min(batch, DRAWS - start))
        found.append(statistic(kinds.astype(float) @ drawn.T.astype(float)))  # exact, and numpy is slow on integers
    values = np.concatenate(found)
    # The percentile interval, because BCa is undefined where no resample lies below or above the figure itself, and
    # near an F1 of 1 that is no rarity.
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return (float(low), float(high)), float(values.std(ddof=1))


def _randomization(first: np.ndarray, second: np.ndarray) -> float:
    """p of the two-sided test; exact where there are few ways to deal, of so many drawn ones beyond."""
    gained = (second - first)[:, (first != second).any(axis=0)]
    if not gained.size:
        return 1.0
    # Again it is enough to know how many rows of each kind are dealt the other way round.
    kinds, times = _kinds(gained)
    ways = math.prod((times + 1).tolist())
    if ways <= DRAWS:
        swapped = np.indices((times + 1).tolist()).reshape(len(times), -1)
        weights = stats.binom.pmf(swapped, times[:, None], 0.5).prod(axis=0)
        moved = kinds @ swapped
    else:
        dice, moved = np.random.default_rng(0), np.zeros((2, DRAWS + 1))  # the first deal is the one that was observed
        weights = np.full(DRAWS + 1, 1 / (DRAWS + 1))
        for gain, number in zip(kinds.T, times, strict=True):
            moved[:, 1:] += gain[:, None] * dice.binomial(number, 0.5, DRAWS)
    totals = np.concatenate([first.sum(axis=1)[:, None] + moved, second.sum(axis=1)[:, None] - moved])
    gains, observed = _gain(totals), float(_f1(*second.sum(axis=1)) - _f1(*first.sum(axis=1)))
    rounding = 1e-12  # equal fractions of other sums
    tails = (weights[gains >= observed - rounding].sum(), weights[gains <= observed + rounding].sum())
    return min(1.0, 2 * float(min(tails)))


def _rounded_up(number: int) -> int:
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit

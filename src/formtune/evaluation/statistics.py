"""Intervals."""

from scipy.stats import binomtest


def wilson(count: int, rows: int) -> tuple[float, float]:
    """95 % interval."""
    found = binomtest(count, rows).proportion_ci(method="wilson")
    return float(found.low), float(found.high)

"""95 % intervals of rates."""

from scipy import stats

CONFIDENCE = 0.95  # of every interval; tests have the level 0.05

Interval = tuple[float, float]


def wilson_interval(count: int, rows: int) -> Interval:
    """95 % interval of the rate `count` of `rows` (Wilson, 1927); 0 to 1 without rows."""
    if not rows:
        return 0.0, 1.0
    interval = stats.binomtest(count, rows).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def rate_text(count: int, rows: int, of: str = "") -> str:
    """A rate with its interval, such as `97.3% right (94.9% to 98.6%)`."""
    low, high = wilson_interval(count, rows)
    return f"{count / rows if rows else 0:.1%}{of} ({low:.1%} to {high:.1%})"

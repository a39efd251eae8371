"""The point of a grid to take: the smallest within one standard error of the best (Breiman et al. 1984), which only
validation rows decide: a choice that has seen the test rows would flatter its test figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

FORMAT, CONTENT = METRICS = ("format/exact", "content/field_f1")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean of a share over seeds, and its standard error."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} ± {100 * self.standard_error:.1f}"


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of a point's finished runs: those of their best checkpoints, and the means on the test rows."""

    name: str
    seeds: int
    trainable_parameters: int
    rows: int  # for validation
    loss: float  # nats per token
    validation: dict[str, Estimate]  # by metric
    test: dict[str, float]


def measure(name: str, results: Sequence[dict[str, Any]]) -> Measured:
    best = [result["training"]["best"] for result in results]
    rows = best[0]["rows"]
    shares = {FORMAT: [b["exact"] / rows for b in best], CONTENT: [b["field_f1"] for b in best]}
    return Measured(
        name=name,
        seeds=len(results),
        trainable_parameters=results[0]["training"]["trainable_parameters"],
        rows=rows,
        loss=fmean(b["loss"] for b in best),
        validation={metric: estimate(values, rows) for metric, values in shares.items()},
        test={metric: fmean(result["after"][metric] for result in results) for metric in METRICS},
    )


def estimate(shares: Sequence[float], rows: int) -> Estimate:
    """Mean and standard error over seeds; with one seed the error of a rate over rows, an approximation for F1."""
    mean = fmean(shares)
    if len(shares) > 1:
        return Estimate(mean, stdev(shares) / math.sqrt(len(shares)))
    return Estimate(mean, math.sqrt(mean * (1 - mean) / rows))


def choose(points: Sequence[Measured]) -> tuple[str, str]:
    """The name of the point to take, and why."""
    in_format = _equal_to_the_best(points, FORMAT)
    in_content = _equal_to_the_best(in_format, CONTENT)

    def smallest(point: Measured) -> tuple[float, ...]:
        return (point.trainable_parameters, *(-point.validation[metric].mean for metric in METRICS), point.loss)

    taken = min(in_content, key=smallest)
    none_valid = not any(point.validation[FORMAT].mean for point in points)
    nothing = "No point has an answer with a valid format, so train longer first. " if none_valid else ""
    return taken.name, (
        f"{nothing}{taken.name} is chosen: it has the fewest parameters ({taken.trainable_parameters:,}) of those "
        f"within one standard error, or one row, of the best format/exact ({', '.join(p.name for p in in_format)}) and "
        f"then of the best field F1 ({', '.join(p.name for p in in_content)})."
    )


def _equal_to_the_best(points: Sequence[Measured], metric: str) -> list[Measured]:
    best = max((p.validation[metric] for p in points), key=lambda e: (e.mean, e.standard_error))
    # One row never decides, as among checkpoints: seeds that happen to agree have a standard error of 0.
    margin = max(best.standard_error, 1 / points[0].rows) + 1e-9  # a row's share is rounded
    return [point for point in points if point.validation[metric].mean >= best.mean - margin]

"""The point of a grid to take: the smallest within one standard error of the best (Breiman et al. 1984).

Format first: the points whose `format/exact` counts as equal to the highest; of these the points whose field F1 counts
as equal to their highest; of these the one with the fewest trainable parameters. All on the validation rows: a choice
that has seen the test rows would flatter its test figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from formtune.sweep.grid import Point

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
    """What the best checkpoints of a point's runs, one a seed, got on the validation rows."""

    trainable_parameters: int
    rows: int
    exact: Estimate
    field_f1: Estimate
    loss: float  # nats per token


@dataclass(frozen=True, slots=True)
class Choice:
    """Indices into the points: the one to take, and those that count as equal to the best in format and in content."""

    taken: int
    best_in_format: int
    in_format: tuple[int, ...]
    best_in_content: int
    in_content: tuple[int, ...]


def estimate(shares: Sequence[float], rows: int) -> Estimate:
    """Mean and standard error: over seeds, or of a rate over the rows if there is one seed.

    The second is exact for a share of rows, and an approximation for F1.
    """
    mean = fmean(shares)
    if len(shares) > 1:
        return Estimate(mean, stdev(shares) / math.sqrt(len(shares)))
    return Estimate(mean, math.sqrt(mean * (1 - mean) / rows))


def choose(points: Sequence[Measured]) -> Choice:
    """The point to take; all have the same number of seeds and the same validation rows."""
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


def findings(
    points: Sequence[Point], seeds: Sequence[int], results: dict[tuple[int, int], dict[str, Any]]
) -> dict[str, Any]:
    """What each point measured, which is taken, and why; `results` is `metrics.json` by index of the point and seed."""
    entries = []
    measured: dict[str, Measured] = {}
    for at, point in enumerate(points):
        runs = {seed: results[at, seed] for seed in seeds if (at, seed) in results}
        folders = {seed: f"{point.name}-seed{seed}" for seed in runs}
        entry: dict[str, Any] = {"name": point.name, "values": point.values, "runs": folders}
        entries.append(entry)
        if not runs:
            continue
        first, training = next(iter(runs.values())), [result["training"] for result in runs.values()]
        best, rows = [one["best"] for one in training], training[0]["best"]["rows"]
        exact = estimate([one["exact"] / rows for one in best], rows)
        field_f1 = estimate([one["field_f1"] for one in best], rows)
        loss, size = fmean(one["loss"] for one in best), training[0]["trainable_parameters"]
        test = {name: [result["after"][name] for result in runs.values()] for name in METRICS}
        entry |= {"trainable_parameters": size, "seconds": fmean(one["seconds"] for one in training), "loss": loss}
        entry |= {"rows": rows, "validation": {FORMAT: asdict(exact), CONTENT: asdict(field_f1)}}
        entry |= {"test": {name: asdict(estimate(shares, first["rows"])) for name, shares in test.items()}}
        if len(runs) == len(seeds):  # a point that lost a seed would be judged by those that went well
            measured[point.name] = Measured(size, rows, exact, field_f1, loss)
    found = {"rows": None, "points": entries, "taken": None}
    if not measured:
        return found | {"reason": "Nothing is taken: no point has finished with every seed."}
    names, candidates = list(measured), list(measured.values())
    choice = choose(candidates)
    reason = _reason(names, candidates, choice)
    if lacking := [point.name for point in points if point.name not in names]:
        reason += f" Not considered, since a run failed: {', '.join(lacking)}."
    return found | {"rows": candidates[0].rows, "taken": names[choice.taken], "reason": reason}


def _reason(names: Sequence[str], points: Sequence[Measured], choice: Choice) -> str:
    taken, size = names[choice.taken], points[choice.taken].trainable_parameters
    as_small = sum(points[at].trainable_parameters == size for at in choice.in_content)
    best = f"the best figures of the {as_small} with " if as_small > 1 else ""
    in_format, in_content = (", ".join(names[at] for at in among) for among in (choice.in_format, choice.in_content))
    exact, field_f1 = points[choice.best_in_format].exact, points[choice.best_in_content].field_f1
    nothing = "" if exact.mean else "No point has an answer with a valid format, so train longer first. "
    return (
        f"{nothing}{taken} is taken. Within one standard error, or one row, of the best format/exact "
        f"({names[choice.best_in_format]}, {exact}): {in_format}. Of these, as near to their best field F1 "
        f"({names[choice.best_in_content]}, {field_f1}): {in_content}. "
        f"{taken} has {best}the fewest trainable parameters, {size:,}."
    )

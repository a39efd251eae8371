"""What the points of a sweep measured, over their seeds, and which of them is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from formtune.sweep.choice import Choice, Estimate, Measured, choose, estimate
from formtune.sweep.grid import Point

FORMAT, CONTENT = METRICS = ("format/exact", "content/field_f1")


def findings(
    points: Sequence[Point], seeds: Sequence[int], results: dict[tuple[int, int], dict[str, Any]]
) -> dict[str, Any]:
    """What each point measured, which is taken, and why.

    Args:
        points: The grid.
        seeds: What each point was to be trained with.
        results: `metrics.json` of the finished runs, by index of the point and seed.
    """
    entries = []
    for at, point in enumerate(points):
        ran = {seed: results[at, seed] for seed in seeds if (at, seed) in results}
        entries.append(_entry(point, ran))
    # A point that lost a seed would be judged by those that went well.
    whole = [entry for entry in entries if len(entry["runs"]) == len(seeds)]
    measured = [_measured(entry) for entry in whole]
    choice = choose(measured) if measured else None
    reason = _reason(whole, choice) if choice else "Nothing is taken: no point has finished with every seed."
    lacking = [entry["name"] for entry in entries if entry not in whole]
    if choice and lacking:
        reason += f" Not considered, since a run failed: {', '.join(lacking)}."
    return {
        "rows": measured[0].rows if measured else None,
        "points": entries,
        "taken": whole[choice.taken]["name"] if choice else None,
        "reason": reason,
    }


def _entry(point: Point, ran: dict[int, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": point.name, "values": point.values, "runs": {s: f"{point.name}-seed{s}" for s in ran},
        "trainable_parameters": None, "seconds": None, "validation": {}, "test": {},
    }  # fmt: skip
    if not ran:
        return found
    training, after = ([result[part] for result in ran.values()] for part in ("training", "after"))
    best = [one["best"] for one in training]
    rows, test_rows = best[0]["rows"], next(iter(ran.values()))["rows"]
    validation = {
        FORMAT: [one["exact"] / rows for one in best],
        CONTENT: [one["field_f1"] for one in best],
    }
    return found | {
        "trainable_parameters": training[0]["trainable_parameters"],
        "seconds": fmean(one["seconds"] for one in training),
        "loss": fmean(one["loss"] for one in best),
        "rows": rows,
        "validation": {name: asdict(estimate(shares, rows)) for name, shares in validation.items()},
        "test": {name: asdict(estimate([one[name] for one in after], test_rows)) for name in METRICS},
    }


def _measured(entry: dict[str, Any]) -> Measured:
    exact, field_f1 = (Estimate(**entry["validation"][name]) for name in METRICS)
    return Measured(entry["trainable_parameters"], entry["rows"], exact, field_f1, entry["loss"])


def _reason(entries: Sequence[dict[str, Any]], choice: Choice) -> str:
    taken, exact, field_f1 = (entries[at] for at in (choice.taken, choice.best_in_format, choice.best_in_content))
    size = taken["trainable_parameters"]
    as_small = sum(entries[at]["trainable_parameters"] == size for at in choice.in_content)
    best = f"the best figures of the {as_small} with " if as_small > 1 else ""
    in_format, in_content = (
        ", ".join(entries[at]["name"] for at in among) for among in (choice.in_format, choice.in_content)
    )
    nothing = "" if exact["validation"][FORMAT]["mean"] else "No point has an answer in format, so train longer first. "
    return (
        f"{nothing}{taken['name']} is taken. Within one standard error, or one row, of the best format/exact "
        f"({exact['name']}, {share(exact['validation'][FORMAT])}): {in_format}. "
        f"Of these, as near to their best field F1 ({field_f1['name']}, "
        f"{share(field_f1['validation'][CONTENT])}): {in_content}. "
        f"{taken['name']} has {best}the fewest trainable parameters, {size:,}."
    )


def share(estimate: dict[str, float] | None) -> str:
    """Mean and standard error in percent, nothing for nothing."""
    return f"{estimate['mean']:.1%} ± {100 * estimate['standard_error']:.1f}" if estimate else ""

"""`formtune compare`: says of runs on the same test rows whether one is better, or that the rows cannot tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from formtune.errors import UserError
from formtune.evaluation.outcomes import RATES, VIEWS, Outcome, field_f1, read_outcomes
from formtune.evaluation.statistics import f1_difference, f1_interval, rate_difference, verdict, wilson

F1 = "content/field_f1"
IN_WORDS = ("format/exact", "joint/exact")  # said in a sentence below the table


@dataclass(frozen=True, slots=True)
class Run:
    """A run's test rows.

    Args:
        name: What it is called in the table.
        path: File of its outcomes.
        outcomes: Its rows; those of all runs in one order.
    """

    name: str
    path: Path
    outcomes: list[Outcome]


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Read what `RUN RUN ...` names, and bring all rows into the order of the first.

    Rows are the same if input and target are; where a pair stands several times, the first is the first and so on.

    Raises:
        UserError: A file is missing or damaged, or the runs were tested on different rows.
    """
    paths = [_path(argument) for argument in arguments]
    names = [Path(argument).name or argument for argument in arguments]
    if len(set(names)) < len(set(paths)):
        names = list(arguments)
    keyed = [_keyed(read_outcomes(path)) for path in paths]
    first = keyed[0]
    for path, rows in zip(paths, keyed, strict=True):
        if not rows:
            raise UserError(f"{path}: no test rows")
        if rows.keys() != first.keys():
            raise UserError(
                f"{path}: {len(rows.keys() & first.keys()):,} of its {len(rows):,} test rows are among the "
                f"{len(first):,} of {paths[0]}; compare runs with the same data and the same test split"
            )
    return [Run(name, path, [rows[key] for key in first]) for name, path, rows in zip(names, paths, keyed, strict=True)]


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Every figure of every run with its interval, and what each further run has more than the first.

    Returns:
        `rows`, `runs` (each with `figures`) and `comparisons` (each with `differences`, for the figures that both runs
        have), as `--out` writes them.
    """
    return {
        "rows": len(runs[0].outcomes),
        "runs": [{"name": run.name, "outcomes": str(run.path), "figures": figures(run.outcomes)} for run in runs],
        "comparisons": [
            {"run": run.name, "against": runs[0].name, "differences": _differences(runs[0].outcomes, run.outcomes)}
            for run in runs[1:]
        ],
    }


def print_comparison(found: dict[str, Any]) -> None:
    """One table, and one sentence for each run after the first."""
    comparisons = found["comparisons"]
    differences = [{}, *(one["differences"] for one in comparisons)]
    console = Console()
    console.print(figures_table(f"Comparison on {found['rows']:,} test rows", found["runs"], differences))
    for one in comparisons:
        parts = (f"{name} {_sentence(one['differences'][name])}" for name in IN_WORDS)
        line = f"{one['run']} against {one['against']}: {'; '.join(parts)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every rate and field F1, each as `value` and `interval`."""
    rates = {
        name: {"value": sum(right) / len(right), "interval": wilson(sum(right), len(right))}
        for name, right in _right(outcomes).items()
    }
    return _in_order(rates, {"value": field_f1(outcomes), "interval": f1_interval(_counts(outcomes))})


def figures_table(title: str, runs: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> Table:
    """A column for each run.

    Args:
        title: What stands above.
        runs: Of each its `name` and `figures`.
        differences: Of each, by figure, what it has more than the first; empty for the first.
    """
    table = Table(Column("metric", overflow="fold"), title=title, title_justify="left")
    for run in runs:
        table.add_column(Text(run["name"]), justify="right", overflow="fold")
    for name in dict.fromkeys(name for run in runs for name in run["figures"]):
        cells = [_cell(run["figures"].get(name), d.get(name)) for run, d in zip(runs, differences, strict=True)]
        table.add_row(Text(name), *cells, end_section=name == F1)
    return table


def _path(argument: str) -> Path:
    if argument.endswith(".jsonl"):
        return Path(argument)
    folder, _, view = argument.rpartition(":")
    if not folder or view not in VIEWS:
        folder, view = argument, "after"
    return Path(folder, "outcomes", f"{view}.jsonl")


def _keyed(outcomes: Sequence[Outcome]) -> dict[tuple[str, str, int], Outcome]:
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for one in outcomes:
        key = (one.input, one.target)
        found[*key, seen[key]] = one
        seen[key] += 1
    return found


def _right(outcomes: Sequence[Outcome]) -> dict[str, list[bool]]:
    """For each rate, whether each row is right."""
    right = {name: [getattr(one, attribute) for one in outcomes] for name, attribute in RATES.items()}
    fields = [name for name in outcomes[0].fields if all(name in one.fields for one in outcomes)]
    return right | {f"content/field_acc/{name}": [one.fields[name] for one in outcomes] for name in fields}


def _counts(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([[one.matched, one.predicted + one.gold] for one in outcomes]).T


def _in_order(rates: dict[str, Any], f1: Any) -> dict[str, Any]:
    """The headline rates, F1, the fields."""
    return {name: rates[name] for name in RATES} | {F1: f1} | rates


def _differences(first: Sequence[Outcome], second: Sequence[Outcome]) -> dict[str, Any]:
    before, after = _right(first), _right(second)
    rates = {name: rate_difference(before[name], after[name]) for name in before if name in after}
    differences = _in_order(rates, f1_difference(_counts(first), _counts(second)))
    return {name: {"verdict": verdict(one), **asdict(one)} for name, one in differences.items()}


def _cell(figure: dict[str, Any] | None, difference: dict[str, Any] | None) -> str:
    if figure is None:
        return "-"
    low, high = figure["interval"]
    cell = f"{figure['value']:.1%} ({100 * low:.1f} to {100 * high:.1f})"
    return cell + (f"\n{difference['verdict'].partition(' with ')[0]}, {_p(difference)}" if difference else "")


def _sentence(difference: dict[str, Any]) -> str:
    if not difference["sure"]:
        return difference["verdict"]
    return f"{difference['verdict']} by {100 * abs(difference['value']):.1f} points ({_p(difference)})"


def _p(difference: dict[str, Any]) -> str:
    return "p < 0.001" if difference["p"] < 0.001 else f"p = {difference['p']:.3f}"

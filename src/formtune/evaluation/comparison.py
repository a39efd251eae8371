"""`formtune compare`: whether one of several runs is better on the same test rows, or the rows cannot tell."""

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
FIELD = "content/field_acc/"
IN_WORDS = ("format/exact", "joint/exact")  # figures in the sentence below the table


@dataclass(frozen=True, slots=True)
class Run:
    """A run's test rows, in the same order for all runs."""

    name: str
    path: Path
    outcomes: list[Outcome]


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Read the outcomes of the runs named on the command line, all in the order of the first.

    Rows are matched by input and target; of repeated ones the first matches the first, and so on.

    Raises:
        UserError: A file is missing or damaged, or the runs were tested on different rows.
    """
    paths = [_path(argument) for argument in arguments]
    names = [Path(argument).name or argument for argument in arguments]
    if len(set(names)) < len(set(paths)):
        names = list(arguments)
    runs = [_keyed(read_outcomes(path)) for path in paths]
    first = runs[0]
    for path, rows in zip(paths, runs, strict=True):
        if not rows:
            raise UserError(f"{path}: no test rows")
        if rows.keys() != first.keys():
            raise UserError(
                f"{path}: {len(rows.keys() & first.keys()):,} of its {len(rows):,} test rows are among the "
                f"{len(first):,} of {paths[0]}; compare runs with the same data and the same test split"
            )
    return [Run(name, path, [rows[key] for key in first]) for name, path, rows in zip(names, paths, runs, strict=True)]


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Every figure of every run, and the differences of each further run from the first."""
    return {
        "rows": len(runs[0].outcomes),
        "runs": [{"name": run.name, "outcomes": str(run.path), "figures": figures(run.outcomes)} for run in runs],
        "comparisons": [
            {"run": run.name, "against": runs[0].name, "differences": _differences(runs[0].outcomes, run.outcomes)}
            for run in runs[1:]
        ],
    }


def print_comparison(comparison: dict[str, Any]) -> None:
    """Print what `compare` returns: one table, and one sentence for each run after the first."""
    pairs = comparison["comparisons"]
    console = Console()
    title = f"Comparison on {comparison['rows']:,} test rows"
    console.print(figures_table(title, comparison["runs"], [{}, *(pair["differences"] for pair in pairs)]))
    for pair in pairs:
        parts = (f"{name} {_sentence(pair['differences'][name])}" for name in IN_WORDS)
        line = f"{pair['run']} against {pair['against']}: {'; '.join(parts)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every rate and field F1, each as `value` and `interval`."""
    by_row = _by_row(outcomes)
    f1 = {"value": field_f1(outcomes), "interval": f1_interval(by_row[F1])}
    rates = {n: {"value": sum(r) / len(r), "interval": wilson(sum(r), len(r))} for n, r in by_row.items() if n != F1}
    return {name: rates.get(name, f1) for name in by_row}


def figures_table(title: str, runs: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> Table:
    """A column for each run's `name` and `figures`, with its differences from the first run ({} for none)."""
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
    """The outcomes by input, target and how many equal ones came before."""
    seen: Counter[tuple[str, str]] = Counter()
    keyed = {}
    for outcome in outcomes:
        key = (outcome.input, outcome.target)
        keyed[*key, seen[key]] = outcome
        seen[key] += 1
    return keyed


def _by_row(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For each rate whether each row is right, and for field F1 its counts; in the order of the table."""
    fields = [name for name in outcomes[0].fields if all(name in o.fields for o in outcomes)]
    return {
        **{name: [getattr(o, attribute) for o in outcomes] for name, attribute in RATES.items()},
        F1: np.array([[o.matched, o.predicted + o.expected] for o in outcomes]).T,
        **{FIELD + name: [o.fields[name] for o in outcomes] for name in fields},
    }


def _differences(first: Sequence[Outcome], second: Sequence[Outcome]) -> dict[str, Any]:
    before, after = _by_row(first), _by_row(second)
    differences = {}
    for name in (name for name in before if name in after):
        difference = (f1_difference if name == F1 else rate_difference)(before[name], after[name])
        differences[name] = {"verdict": verdict(difference), **asdict(difference)}
    return differences


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

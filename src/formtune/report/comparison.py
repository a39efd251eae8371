"""`formtune compare`: paired comparisons of runs on the same test rows."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from formtune.configuration.terminal import echo
from formtune.errors import UserError
from formtune.evaluation.outcomes import COMPARED, EVALUATIONS, F1, FIELD, RATES, Outcome, field_f1, read_outcomes
from formtune.evaluation.statistics import wilson_interval
from formtune.report.paired_tests import f1_difference, f1_interval, rate_difference, verdict

FIELDS = 20  # most frequent fields of rows with their own schemas

Run = tuple[str, list[Outcome]]  # as named on the command line, and its test rows in the same order for all runs


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """Read the outcomes of runs named on the command line; a UserError if they were tested on different rows."""
    runs, first = [], Counter[tuple[str, str, str]]()
    for argument in arguments:
        path = _path(argument)
        outcomes = sorted(read_outcomes(path), key=lambda o: (o.input, o.target, o.schema or ""))
        rows = Counter((o.input, o.target, o.schema or "") for o in outcomes)
        if not rows:
            raise UserError(f"{path}: no test rows")
        first = first or rows
        if rows != first:
            others = (
                f"the {first.total():,} of {_path(arguments[0])}; compare runs with the same data, splits and --quick"
            )
            raise UserError(f"{path}: {(rows & first).total():,} of its {rows.total():,} test rows are among {others}")
        runs.append((argument, outcomes))
    return runs


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Every metric of every run; those of each further run with their differences from the first."""
    first = runs[0][1]
    columns = [{"name": runs[0][0], "metrics": metrics_of(first)}]
    columns += [{"name": name, "metrics": metrics_of(outcomes, first)} for name, outcomes in runs[1:]]
    return {"rows": len(first), "runs": columns}


def metrics_of(outcomes: Sequence[Outcome], first: Sequence[Outcome] = ()) -> dict[str, Any]:
    """Every rate and field F1 as `value` and `interval`, with the `difference` from a first run on the same rows."""
    result: dict[str, Any] = {}
    before = _by_row(first)
    for name, rows in _by_row(outcomes).items():
        if name == F1:
            result[name] = {"value": field_f1(outcomes), "interval": f1_interval(rows)}
        else:
            result[name] = {"value": sum(rows) / len(rows), "interval": wilson_interval(sum(rows), len(rows))}
        if name in before:
            difference = (f1_difference if name == F1 else rate_difference)(before[name], rows)
            result[name]["difference"] = {"verdict": verdict(difference), **asdict(difference)}
    return result


def print_comparison(comparison: dict[str, Any]) -> None:
    """Print what `compare` returns: one table, and one sentence for each run after the first."""
    first, *others = comparison["runs"]
    Console().print(metrics_table(f"Comparison on {comparison['rows']:,} test rows", comparison["runs"]))
    for run in others:
        parts = []
        for name in COMPARED:
            difference = run["metrics"][name]["difference"]
            size = f" by {100 * abs(difference['value']):.1f} points ({_p(difference)})"
            parts.append(f"{name} {difference['verdict']}{size * difference['significant']}")
        echo(f"{run['name']} against {first['name']}: {'; '.join(parts)}")


def metrics_table(title: str, runs: Sequence[dict[str, Any]]) -> Table:
    """A table with a column for each run's `name` and `metrics`."""
    table = Table(Column("metric", no_wrap=True), title=title, title_justify="left")
    for run in runs:
        table.add_column(wrap(run["name"]), justify="right")
    for name in dict.fromkeys(name for run in runs for name in run["metrics"]):
        cells = [_cell(run["metrics"].get(name)) for run in runs]
        table.add_row(Text(name.replace(FIELD, "field ")), *cells, end_section=name == F1)
    return table


def _path(argument: str) -> Path:
    """The file of outcomes that `FILE.jsonl`, `FOLDER` or `FOLDER:NAME` names."""
    if argument.endswith(".jsonl"):
        return Path(argument)
    folder, _, evaluation = argument.rpartition(":")
    if evaluation not in EVALUATIONS:
        folder, evaluation = argument, "after"
    return Path(folder, "outcomes", f"{evaluation}.jsonl")


def _by_row(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """For each rate whether each row is right, and for field F1 its counts; in the order of the table."""
    if not outcomes:
        return {}
    fields = Counter(name for o in outcomes for name in o.fields).most_common(FIELDS if outcomes[0].schema else None)
    return {
        **{name: [getattr(o, attribute) for o in outcomes] for name, attribute in RATES.items()},
        F1: np.array([[o.matched, o.values] for o in outcomes]).T,
        **{FIELD + name: [o.fields[name] for o in outcomes if name in o.fields] for name, _ in fields},
    }


def _cell(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "-"
    low, high = metric["interval"]
    cell, difference = f"{metric['value']:.1%} ({100 * low:.1f} to {100 * high:.1f})", metric.get("difference")
    return cell + (f"\n{difference['verdict'].partition(' with ')[0]}, {_p(difference)}" if difference else "")


def _p(difference: dict[str, Any]) -> str:
    return "p < 0.001" if difference["p"] < 0.001 else f"p = {difference['p']:.3f}"


def wrap(name: str, width: int = 12) -> Text:
    """A name in lines of about `width` characters, broken after its separators."""
    lines = [""]
    for part in re.split(r"(?<=[/:_.-])", name):
        lines += [""] * (len(lines[-1] + part) > width)
        lines[-1] += part
    return Text("\n".join(filter(None, lines)))

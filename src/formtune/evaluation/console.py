"""The result of an evaluation or a whole run in the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from formtune.configuration.terminal import echo
from formtune.evaluation.outcomes import EVALUATIONS, FIELD

MAX_FIELDS = 5  # the worst fields, which are printed
HEADLINES = ("format/exact", "format/loose", "joint/exact", "content/field_f1", "val/loss")


def print_result(result: dict[str, Any], folder: Path | None, split: str = "test", measured: str | None = None) -> None:
    """Print the headlines of each evaluation, the worst fields, the failures by kind, and the run's files.

    `result` is the content of `metrics.json`; for a single evaluation its metrics are under `result`, and `measured`
    names the weights.
    """
    columns = {name: result[name] for name in (*EVALUATIONS, "result") if name in result}
    first, counts = next(iter(columns.values())), result["counts"]
    model = measured.rpartition("/checkpoints/")[2] if measured else None
    title = f"{model or 'Result'} on {result['rows']:,} {split} rows"
    narrow = (0, 0 if len(columns) > 5 else 1)  # breaks no word in 80 characters
    table = Table(Column("metric", no_wrap=True), title=title, title_justify="left", pad_edge=False, padding=narrow)
    for column in columns:
        rows = counts[column]["format/exact"][1]
        sample = f"\n{rows:,} rows" if rows != result["rows"] else ""
        table.add_column((model or EVALUATIONS.get(column, column).replace(" ", "\n")) + sample, justify="right")
    custom = [name for name in first if name.startswith("custom/")]
    fields = sorted((name for name in first if name.startswith(FIELD)), key=result.get("after", first).__getitem__)
    fields = fields[:MAX_FIELDS] if len(columns) <= 3 else []  # with more columns they would not fit into 80 characters
    kinds = [name for name in first if name.startswith("fail/") and any(metrics[name] for metrics in columns.values())]
    ends = ((custom or HEADLINES)[-1], *fields[-1:])
    for name in (*HEADLINES, *custom, *fields, *kinds):
        cells = [_cell(name, metrics[name]) if name in metrics else "-" for metrics in columns.values()]
        table.add_row(name.replace(FIELD, "field "), *cells, end_section=name in ends)
    Console().print(table)
    if folder is None:
        return
    training = result["training"]
    files = {"checkpoint": f"checkpoints/step-{training['best_step']}.ckpt", "adapter": "adapter"}
    files |= {"report": "report.html"} if (folder / "report.html").exists() else {}
    files |= {"metrics": "metrics.json", "configuration": "config.yaml"}
    echo(f"{training['steps']} steps in {training['seconds']:.0f} s; {training['best_reason']}")
    echo(f"diagnosis: {training['diagnosis']}")
    if training["next"]:
        print(f"next: {training['next']}")  # a command to copy
    for what, name in files.items():
        print(f"{what:>14}: {folder / name}")
    print(f"{'curves':>14}: {'make tensorboard' if any(folder.glob('events.*')) else folder}")


def _cell(name: str, value: float) -> str:
    if name.startswith("fail/"):
        return f"{value:,.0f}"
    return f"{value:.4f}" if name == "val/loss" or name.startswith("custom/") else f"{value:.1%}"

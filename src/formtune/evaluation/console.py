"""What a person reads in the terminal: the data before training, the result after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from formtune.evaluation.outcomes import VIEWS

HEADLINES = (
    "format/exact",
    "format/loose",
    "joint/exact",
    "content/exact_match",
    "content/field_f1",
    "val/tf_exact",
    "val/loss",
)


def print_result(result: dict[str, Any], folder: Path | None, split: str = "test", measured: str | None = None) -> None:
    """One table: the headlines in each view, the failures by kind, and where the files lie.

    Args:
        result: As in `metrics.json`, or one view called `result`.
        folder: Of the run; None where nothing was written.
        split: What the rows belong to.
        measured: What the view called `result` is of: a checkpoint, or the untuned base.
    """
    views = [name for name in (*VIEWS, "result") if name in result]
    first = result[views[0]]
    console = Console()
    # What it is of comes first: a title may be broken after that.
    title = f"{Path(measured).name if measured else 'Result'} on {result['rows']:,} {split} rows"
    table = Table(Column("metric", no_wrap=True), title=title, title_justify="left")
    for view in views:
        table.add_column(Path(measured).name if measured else view.replace("_", " "), justify="right")
    own = [name for name in first if name.startswith("own/")]
    # Five views leave room for neither fields nor counts on 80 columns; the report has them.
    few = len(views) <= 3
    fields = [name for name in first if few and name.startswith("content/field_acc/")]
    kinds = [name for name in first if name.startswith("fail/") and any(result[view][name] for view in views)]
    for name in (*HEADLINES, *own, *fields, *kinds):
        cells = [_cell(name, result[view][name], few and result["counts"][view].get(name)) for view in views]
        table.add_row(name, *cells, end_section=name in ((own or HEADLINES)[-1], *fields[-1:]))
    console.print(table)
    if folder is None:
        return
    training = result["training"]
    console.print(
        f"{training['steps']} steps in {training['seconds']:.0f} s; {training['best_reason']}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"diagnosis: {training['diagnosis']}", highlight=False, soft_wrap=True)
    checkpoint = f"checkpoints/step-{training['best_step']}.ckpt"
    for what, name in (
        ("checkpoint", checkpoint),
        ("adapter", "adapter"),
        ("report", "report.html"),
        ("figures", "metrics.json"),
        ("configuration", "config.yaml"),
    ):
        console.print(f"{what:>14}: {folder / name}", highlight=False, soft_wrap=True)
    console.print(f"{'curves':>14}: make tensorboard", highlight=False)


def _cell(name: str, value: float, count: Any) -> str:
    if name.startswith("fail/"):
        return f"{value:,.0f}"
    if not count or name == "content/field_f1":
        return f"{value:.4f}" if name == "val/loss" or name.startswith("own/") else f"{value:.1%}"
    return f"{value:.1%} ({count[0]:,}/{count[1]:,})"

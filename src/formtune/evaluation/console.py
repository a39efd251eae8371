"""The result of an evaluation or a whole run in the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from formtune.configuration.terminal import say
from formtune.evaluation.outcomes import FIELD, VIEWS

MAX_FIELDS = 5  # the worst fields, which are printed
HEADLINES = ("format/exact", "format/loose", "joint/exact", "content/field_f1", "val/loss")


def print_result(result: dict[str, Any], folder: Path | None, split: str = "test", measured: str | None = None) -> None:
    """Print the headlines of each evaluation, the worst fields, the failures by kind, and the run's files.

    `result` is as in `metrics.json`, or has one evaluation called `result`, of the model `measured`.
    """
    views = [view for view in (*VIEWS, "result") if view in result]
    first, counts = result[views[0]], result["counts"]
    model = measured.rpartition("/checkpoints/")[2] if measured else None
    title = f"{model or 'Result'} on {result['rows']:,} {split} rows"
    narrow = (0, 0 if len(views) > 5 else 1)  # breaks no word in 80 characters
    table = Table(Column("metric", no_wrap=True), title=title, title_justify="left", pad_edge=False, padding=narrow)
    for view in views:
        rows = counts[view]["format/exact"][1]
        sample = f"\n{rows:,} rows" if rows != result["rows"] else ""
        table.add_column((model or VIEWS.get(view, view).replace(" ", "\n")) + sample, justify="right")
    custom = [name for name in first if name.startswith("custom/")]
    fields = sorted((name for name in first if name.startswith(FIELD)), key=result.get("after", first).__getitem__)
    fields = fields[:MAX_FIELDS] if len(views) <= 3 else []  # with five columns they would not fit into 80 characters
    kinds = [name for name in first if name.startswith("fail/") and any(result[view][name] for view in views)]
    ends = ((custom or HEADLINES)[-1], *fields[-1:])
    for name in (*HEADLINES, *custom, *fields, *kinds):
        cells = [_cell(name, result[view][name]) for view in views]
        table.add_row(name.replace(FIELD, "field "), *cells, end_section=name in ends)
    Console().print(table)
    if folder is None:
        return
    training = result["training"]
    files = {"checkpoint": f"checkpoints/step-{training['best_step']}.ckpt", "adapter": "adapter"}
    files |= {"report": "report.html", "figures": "metrics.json", "configuration": "config.yaml"}
    say(f"{training['steps']} steps in {training['seconds']:.0f} s; {training['best_reason']}")
    say(f"diagnosis: {training['diagnosis']}")
    print(f"next: {training['next']}")  # a command to copy
    for what, name in files.items():
        print(f"{what:>14}: {folder / name}")
    print(f"{'curves':>14}: {'make tensorboard' if any(folder.glob('events.*')) else folder}")


def _cell(name: str, value: float) -> str:
    if name.startswith("fail/"):
        return f"{value:,.0f}"
    return f"{value:.4f}" if name == "val/loss" or name.startswith("custom/") else f"{value:.1%}"

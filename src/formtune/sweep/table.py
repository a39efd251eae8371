"""A sweep's result as a table, as JSON and as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from formtune.evaluation.page import BLUE, ORANGE, RED, environment, svg
from formtune.files import write_json, write_whole
from formtune.sweep.results import METRICS, share

COLORS = dict(zip(METRICS, (BLUE, ORANGE), strict=True))


def write_report(found: dict[str, Any], folder: Path) -> None:
    """Write `sweep.json` and `sweep.html` into the folder."""
    write_json(folder / "sweep.json", found)
    template = environment().get_template("sweep/sweep.html.jinja")
    measured = [point for point in found["points"] if point["trainable_parameters"]]
    plots = {name: svg(_plot(measured, name, found["taken"])) for name in ("trainable_parameters", "seconds")}
    write_whole(folder / "sweep.html", template.render(found=found, plots=plots if measured else {}, share=share))


def print_sweep(found: dict[str, Any], folder: Path) -> None:
    """The table, which point is taken and why, and where the files lie."""
    table = Table("point", title="Sweep (the test rows have no part in the choice)", title_justify="left")
    for column in ("trainable\nparameters", "format/exact\nvalidation", "field F1\nvalidation"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("test\nexact", "test\nF1"):
        table.add_column(column, justify="right", no_wrap=True, style="dim")
    table.add_column("seconds", justify="right", no_wrap=True)
    for point in found["points"]:
        parameters, seconds, seeds = point["trainable_parameters"], point["seconds"], len(point["runs"])
        lacking = f" ({seeds} of {len(found['seeds'])} seeds)" if seeds < len(found["seeds"]) else ""
        table.add_row(
            escape(point["name"]) + lacking,
            f"{parameters:,}" if parameters else "",
            *(share(point["validation"].get(name)) for name in METRICS),
            *(f"{point['test'][name]['mean']:.1%}" if seeds else "" for name in METRICS),
            f"{seconds:,.0f}" if seconds is not None else "",
            style="bold" if point["name"] == found["taken"] else None,
        )
    console = Console()
    console.print(table)
    console.print(escape(found["reason"]), highlight=False, soft_wrap=True)
    names = {"configuration": "config.yaml", "page": "sweep.html", "figures": "sweep.json"}
    for what, name in names.items():
        if (folder / name).exists():
            console.print(f"{what:>14}: {folder / name}", highlight=False, soft_wrap=True)


def _plot(points: list[dict[str, Any]], quantity: str, taken: str | None) -> Figure:
    """Both metrics on the validation rows, with their standard errors, against a quantity of the points."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axis = figure.subplots()
    at = [point[quantity] for point in points]
    for name, color in COLORS.items():
        estimates = [point["validation"][name] for point in points]
        means, errors = ([100 * one[key] for one in estimates] for key in ("mean", "standard_error"))
        axis.errorbar(at, means, errors, fmt="o", color=color, capsize=4, alpha=0.8, label=name)
    for point in points:
        bold = point["name"] == taken
        highest = 100 * max(sum(point["validation"][name].values()) for name in METRICS)  # above the error bars
        axis.annotate(point["name"], (point[quantity], highest), xytext=(0, 5), textcoords="offset points", ha="center",
                      fontsize=8, color=RED if bold else None, weight="bold" if bold else None)  # fmt: skip
    axis.margins(x=0.12, y=0.2)
    # Where all figures are the same, matplotlib makes up an axis that reaches below 0.
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, -2.0), max(high, 2.0))
    axis.set(xlabel=quantity.replace("_", " "), ylabel="% on the validation rows")
    if quantity == "trainable_parameters":
        axis.set_xscale("log")
        ticks = sorted(set(at))
        axis.set_xticks(ticks, [f"{count:,}" for count in ticks])
        axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    return figure

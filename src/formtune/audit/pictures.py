"""The plots on the audit's page, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from formtune.evaluation.page import BLUE, ORANGE, RED

FIELDS, LABELS = 6, 8  # plotted at most


def pictures(findings: dict[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of each plot that there is data for."""
    if "train" in findings["lengths"]:
        yield "lengths", "Tokens of prompts and answers, with P95", _lengths(findings)
    if findings["quarantined"]:
        rows = list(findings["quarantined"].items())
        yield "quarantined", "Quarantined rows, by reason", _bars(rows, "rows")
    if findings["labels"]:
        fields = [(path, splits["train"]) for path, splits in findings["labels"].items()][:FIELDS]
        rows = [(f"{path}: {label}"[:48], n) for path, counts in fields for label, n in list(counts.items())[:LABELS]]
        yield "labels", "Labels of the training rows", _bars(rows, "training rows")


def _lengths(findings: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    sides = {"train": (findings["lengths"]["train"], BLUE)}
    if findings["production"] is not None:
        sides["production"] = (findings["production"]["lengths"], ORANGE)
    for axis, kind in zip(figure.subplots(1, 2), ("prompt", "answer"), strict=True):
        shown = {name: (lengths[kind], color) for name, (lengths, color) in sides.items() if kind in lengths}
        sizes = [size for lengths, _ in shown.values() for size in lengths["sizes"]]
        bins = np.linspace(min(sizes), max(sizes) + 1, 30)
        for name, (lengths, color) in shown.items():
            values, counts = list(lengths["sizes"]), list(lengths["sizes"].values())
            axis.hist(values, bins, weights=np.array(counts) / sum(counts), color=color, alpha=0.55)
            label = f"{name}: P95 {lengths['P95']}"
            axis.axvline(lengths["P95"], color=color, linestyle="--", linewidth=1.2, label=label)
        if kind == "prompt" and findings["limit"] <= 2 * max(sizes):
            axis.axvline(findings["limit"], color=RED, linewidth=1.2, label=f"limit {findings['limit']}")
        axis.set(title=f"{kind}, tokens", yticks=[])
        # The numbers are in the legend: two P95 lines may be side by side, with no room for a label at either.
        axis.legend(frameon=False, fontsize=8)
    return figure


def _bars(rows: Sequence[tuple[str, float]], unit: str) -> Figure:
    figure = Figure(figsize=(7.5, 0.5 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    names = [name.replace("_", " ") for name, _ in rows]
    bars = axis.barh(names, [value for _, value in rows], color=BLUE, alpha=0.8)
    axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel=unit, xticks=[])
    axis.spines["bottom"].set_visible(False)
    return figure

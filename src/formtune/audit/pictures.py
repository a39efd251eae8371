"""The audit's plots, as matplotlib figures: for the page as SVG, for TensorBoard as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from formtune.evaluation.page import BLUE, GREY, ORANGE, RED

KINDS = ("prompt", "answer")


def pictures(found: dict[str, Any]) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of each plot that the findings have something for."""
    if "train" in found["lengths"]:
        yield "lengths", "Tokens of prompts and answers, with P95", _lengths(found)
    if found["set_aside"]:
        rows = list(found["set_aside"].items())
        yield "set_aside", "Rows set aside, by reason", _bars(rows, "rows", BLUE)
    if found["mixtures"]:
        yield "styles", "Ways in which the same thing is written", _mixtures(found["mixtures"])
    if found["labels"]:
        yield "labels", "Labels of the training rows", _labels(found["labels"])
    if found["production"] is not None and found["production"]["features"]["production"]:
        yield "drift", "Words that tell production's inputs from train's", _features(found["production"]["features"])
    if len(found["growth"]) > 1:
        yield "growth", "Held-out word pairs that stand in so many training rows", _growth(found["growth"])


def _figure(height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.5, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _lengths(found: dict[str, Any]) -> Figure:
    figure, axes = _figure(2.8, 2)
    sides = {"train": (found["lengths"]["train"], BLUE)}
    if found["production"] is not None:
        sides["production"] = (found["production"]["lengths"], ORANGE)
    for axis, kind in zip(axes, KINDS, strict=True):
        shown = {name: (sizes[kind], color) for name, (sizes, color) in sides.items() if kind in sizes}
        most = max(size for sizes, _ in shown.values() for size in sizes["sizes"])
        least = min(size for sizes, _ in shown.values() for size in sizes["sizes"])
        edges = np.linspace(least, most + 1, 30)
        for name, (sizes, color) in shown.items():
            values, counts = list(sizes["sizes"]), list(sizes["sizes"].values())
            axis.hist(values, edges, weights=np.array(counts) / sum(counts), color=color, alpha=0.55)
            axis.axvline(sizes["P95"], color=color, linestyle="--", linewidth=1.2, label=f"{name}: P95 {sizes['P95']}")
        if kind == "prompt" and found["limit"] <= 2 * most:
            axis.axvline(found["limit"], color=RED, linewidth=1.2, label=f"limit {found['limit']}")
        axis.set(title=f"{kind}, tokens", yticks=[])
        # The figures stand in the legend: two P95 lines may lie side by side, with no room for a label at either.
        axis.legend(frameon=False, fontsize=8)
    return figure


def _bars(rows: Sequence[tuple[str, float]], unit: str, color: str) -> Figure:
    figure, axis = _figure(0.5 + 0.32 * len(rows))
    names = [name.replace("_", " ") for name, _ in rows]
    bars = axis.barh(names, [value for _, value in rows], color=color, alpha=0.8)
    axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel=unit, xticks=[])
    axis.spines["bottom"].set_visible(False)
    return figure


def _mixtures(mixtures: list[dict[str, Any]]) -> Figure:
    shown = mixtures[:12]
    figure, axis = _figure(0.6 + 0.55 * len(shown))
    names = [f"{m['what']}: {m['path'] or 'answer'}" for m in shown]
    for row, mixture in enumerate(shown):
        total, left = sum(mixture["forms"].values()), 0.0
        for at, (form, count) in enumerate(mixture["forms"].items()):
            width = count / total
            axis.barh(row, width, left=left, color=(BLUE, ORANGE, GREY, RED)[min(at, 3)], alpha=0.8)
            if width > 0.12:
                axis.text(left + width / 2, row, f"{form[:28]} ({count:,})", ha="center", va="center", fontsize=8)
            left += width
    axis.set(yticks=range(len(shown)), yticklabels=names, xlim=(0, 1), xticks=[])
    axis.invert_yaxis()
    return figure


def _labels(fields: dict[str, dict[str, dict[str, int]]]) -> Figure:
    shown = [(path, splits["train"]) for path, splits in fields.items() if splits.get("train")][:6]
    rows = [(f"{path}: {label}"[:48], count) for path, counts in shown for label, count in list(counts.items())[:8]]
    return _bars(rows, "training rows", BLUE)


def _features(features: dict[str, list[tuple[str, float]]]) -> Figure:
    figure, axes = _figure(3.0, 2)
    for axis, (side, color) in zip(axes, (("train", BLUE), ("production", ORANGE)), strict=True):
        words = features[side][::-1]
        axis.barh([word[:24] for word, _ in words], [abs(weight) for _, weight in words], color=color, alpha=0.8)
        axis.set(title=f"speak for {side}", xticks=[])
    return figure


def _growth(curve: list[tuple[int, float]]) -> Figure:
    figure, axis = _figure(2.4)
    rows, shares = zip(*curve, strict=True)
    axis.plot(rows, [100 * share for share in shares], marker="o", color=BLUE)
    axis.set(xlabel="training rows", ylabel="% known", xscale="log", xticks=rows, ylim=(0, 100))
    axis.set_xticks(rows, [f"{count:,}" for count in rows])
    axis.minorticks_off()
    return figure

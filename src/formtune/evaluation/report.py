"""A run as one self-contained page, and the card of its adapter: whether it was worth it, and where it fails."""

from __future__ import annotations

import difflib
import html
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from formtune import __version__
from formtune.evaluation.baselines import best_prompt
from formtune.evaluation.outcomes import RATES, VIEWS, Outcome, field_f1, rate
from formtune.evaluation.page import BLUE, GREY, ORANGE, RED, environment, svg
from formtune.evaluation.slices import slices
from formtune.evaluation.statistics import Difference, rate_difference, verdict, wilson
from formtune.files import write_whole
from formtune.formats import KINDS, Format

SHOWN = 60  # failures in the gallery
PACKAGES = ("torch", "lightning", "transformers", "peft", "tokenizers")


@dataclass(frozen=True, slots=True)
class Run:
    """What a report is made of.

    Args:
        name: Of task and run.
        result: What `metrics.json` holds.
        outcomes: By view, `before` and `after` at least, the outcomes of the same test rows.
        contract: Of the task.
        longest: Tokens of the longest prompt that was trained on.
        production_p95: Tokens of production's prompts at P95, None where they are not known.
        set_aside: Rows that were not used, by reason.
        config: The configuration as YAML.
        base: Folder or hub id of the base.
        date: Day that the chat template writes, None where it writes none.
    """

    name: str
    result: dict[str, Any]
    outcomes: Mapping[str, Sequence[Outcome]]
    contract: Format
    longest: int
    production_p95: int | None
    set_aside: dict[str, int]
    config: str
    base: str
    date: str | None = None


def write_run_report(run: Run, folder: Path) -> None:
    """Write `report.html` into the run's folder, and the card into its adapter if there is one."""
    write_whole(folder / "report.html", page(run))
    if (folder / "adapter").is_dir():
        write_whole(folder / "adapter" / "README.md", card(run))


def page(run: Run) -> str:
    """The page."""
    plots = {name: (caption, svg(figure)) for name, caption, figure in pictures(run)}
    template = environment().get_template("evaluation/report.html.jinja")
    return template.render(**_facts(run), plots=plots, gallery=list(gallery(run.outcomes["after"])), shown=SHOWN)


def card(run: Run) -> str:
    """The model card, in Markdown with the metadata that a hub reads."""
    return environment(autoescape=False).get_template("evaluation/card.md.jinja").render(**_facts(run))


def headline(run: Run) -> list[str]:
    """Whether the tuned model is better than the best prompt, and than that with a grammar: a line for each rate."""
    names = [_best_prompt(run), *(["before_constrained"] if "before_constrained" in run.outcomes else [])]
    lines = []
    for attribute, what in (("exact", "keep the format"), ("joint", "are right")):
        said, against = [], []
        for name, under in (("after", f"of the answers {what} "), ("after_constrained", "under a grammar ")):
            if name in run.outcomes:
                count, rows = rate(run.outcomes[name], attribute)
                low, high = wilson(count, rows)
                said.append(f"{count / rows:.1%} {under}({low:.1%} to {high:.1%})")
        for name in names:
            before = rate(run.outcomes[name], attribute)[0] / rows
            against.append(f"against {before:.1%} ({VIEWS[name]}) {verdict(_gain(run, name, attribute))}")
        if attribute == "joint" and (floor := _floor(run)):
            against.append(f"against {floor:.1%} by always giving the most frequent training answer")
        lines.append(f"{', '.join(said)}: {', '.join(against)}")
    return lines


def _floor(run: Run) -> float:
    """Share of right answers that takes no look at the input."""
    right, rows = run.result.get("constant", (0, 1))
    return float(right / rows)


def _best_prompt(run: Run) -> str:
    return best_prompt({name: run.outcomes[name] for name in ("before", "few_shot") if name in run.outcomes})


def _gain(run: Run, view: str, attribute: str) -> Difference:
    return rate_difference(*([getattr(one, attribute) for one in run.outcomes[name]] for name in (view, "after")))


def _facts(run: Run) -> dict[str, Any]:
    views = [name for name in VIEWS if name in run.outcomes]
    table = []
    for title, name in RATES.items():
        cells = []
        for view in views:
            count, rows = rate(run.outcomes[view], name)
            cells.append((count / rows, *wilson(count, rows)) if rows else None)
        table.append((title, cells))
    fields = [
        (path, [(sum(o.fields[path] for o in run.outcomes[view]), len(run.outcomes[view])) for view in views])
        for path in run.contract.fields
    ]
    kinds = [
        (kind, [sum(one.kind == kind for one in run.outcomes[view]) for view in views])
        for kind in KINDS
        if any(one.kind == kind for view in views for one in run.outcomes[view])
    ]
    parts = []
    for one in slices(run.outcomes["after"], run.contract, run.longest, run.production_p95):
        before, after = ([run.outcomes[view][i] for i in one.rows] for view in ("before", "after"))
        rates = [
            (rate(before, name)[0], rate(after, name)[0], wilson(*rate(after, name))) for name in ("exact", "joint")
        ]
        parts.append((one, rates, (field_f1(before), field_f1(after))))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    same, compared = run.result["counts"]["after"]["val/parity"]
    return {
        "run": run,
        "result": run.result,
        "headline": headline(run),
        "better": any(verdict(_gain(run, _best_prompt(run), name)) == "better" for name in ("exact", "joint"))
        and rate(run.outcomes["after"], "joint")[0] >= _floor(run) * len(run.outcomes["after"]),
        "views": views,
        "names": VIEWS,
        "table": table,
        "own": [name for name in run.result["after"] if name.startswith("own/")],
        "f1": [field_f1(run.outcomes[view]) for view in views],
        "fields": fields,
        "kinds": kinds,
        "parts": parts,
        "parity": (same, compared, *wilson(same, compared)),
        "versions": {"formtune": __version__} | versions,
        "contract": run.contract.to_dict(),
    }


def gallery(outcomes: Sequence[Outcome]) -> Iterator[tuple[Outcome, Markup, Markup]]:
    """Answers that are not right, the earlier kinds first: each with target and answer, what differs marked."""
    failed = [one for one in outcomes if one.kind != "ok"]
    for one in sorted(failed, key=lambda one: KINDS.index(one.kind))[:SHOWN]:
        yield one, *_marked(one.target, one.answer)


def _marked(target: str, answer: str) -> tuple[Markup, Markup]:
    """Both texts as HTML, with `<del>` around what only the target and `<ins>` around what only the answer has."""
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in difflib.SequenceMatcher(None, target, answer, autojunk=False).get_opcodes():
        for side, tag, part in ((sides[0], "del", target[a:b]), (sides[1], "ins", answer[c:d])):
            text = html.escape(part)
            side.append(text if kind == "equal" or not part else f"<{tag}>{text}</{tag}>")
    return Markup("".join(sides[0])), Markup("".join(sides[1]))


def pictures(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of each plot that the run has something for."""
    history = run.result["training"].get("history") or []
    if len(history) > 1:
        yield "curves", "Loss without dropout, and format, at each validation", _curves(run.result["training"])
    yield "kinds", "What became of the test rows", _kinds(run)


class _Plain(LogFormatter):
    """Marks a logarithmic axis where matplotlib would, with 0.02 and 8.6 in place of powers of ten."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.4g}" if super().__call__(x, pos) else ""


def _curves(training: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    history = training["history"]
    steps = [point["step"] for point in history]
    for key, label, color in (("train_loss", "train", BLUE), ("val_loss", "validation", ORANGE)):
        values = [point.get(key) for point in history]
        if all(value is not None for value in values):
            left.plot(steps, values, marker=".", color=color, label=label)
    left.set(title="loss, nats per token", xlabel="optimizer steps", yscale="log")
    left.yaxis.set_major_formatter(_Plain())
    left.yaxis.set_minor_formatter(_Plain(labelOnlyBase=False))
    left.legend(frameon=False, fontsize=8)
    right.plot(steps, [100 * p["exact"] / p["rows"] for p in history], marker=".", color=BLUE, label="format/exact")
    right.plot(steps, [100 * p["field_f1"] for p in history], marker=".", color=ORANGE, label="field F1")
    right.set(title="% of the validation rows", xlabel="optimizer steps", ylim=(0, 102))
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.axvline(training["best_step"], color=GREY, linestyle="--", linewidth=1)
    return figure


def _kinds(run: Run) -> Figure:
    views = [name for name in VIEWS if name in run.outcomes]
    figure = Figure(figsize=(7.5, 0.9 + 0.4 * len(views)), layout="constrained")
    axis = figure.subplots()
    colors = {"ok": "#2f9e60", "content": "#8bc6a4", "extra_text": "#e8c15c", "syntax": RED, "truncated": GREY}
    others = iter((ORANGE, "#7a4f9e", BLUE, "#6b4423", "#d67fa8", "#1f9aa8", "#3b3f46"))  # no two kinds look alike
    left = np.zeros(len(views))
    for kind in ("ok", "content", *(kind for kind in KINDS if kind not in ("ok", "content"))):
        shares = np.array([np.mean([one.kind == kind for one in run.outcomes[view]]) for view in views])
        if shares.any():
            color = colors.get(kind) or next(others)
            axis.barh([VIEWS[view] for view in views], shares, left=left, color=color, label=kind)
            left += shares
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xticks=[])
    axis.legend(frameon=False, fontsize=8, ncols=6, loc="upper left", bbox_to_anchor=(0, 0))
    return figure

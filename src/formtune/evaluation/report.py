"""A run's report as one self-contained page, and its adapter's model card: was it worth it, and where does it fail."""

import difflib
import html
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from formtune import __version__
from formtune.evaluation.baselines import best_prompt
from formtune.evaluation.comparison import figures
from formtune.evaluation.outcomes import FIELD, VIEWS, Outcome, field_f1, paired, rate, worst_first
from formtune.evaluation.page import environment
from formtune.evaluation.selective import calibration, judged, risks
from formtune.evaluation.slices import slices
from formtune.evaluation.statistics import rate_difference, verdict, wilson
from formtune.files import write_whole
from formtune.formats import KINDS, Format

SHOWN = 60  # failures in the gallery
POINTS = 100  # of the risk-coverage curve
LOSSES = {"train": "train_loss", "validation": "val_loss"}
PACKAGES = ("torch", "lightning", "transformers", "peft", "tokenizers")


@dataclass(frozen=True, slots=True)
class Run:
    """What a report is made of."""

    name: str  # task/run
    result: dict[str, Any]  # of metrics.json
    outcomes: Mapping[str, Sequence[Outcome]]  # by evaluation, `before` and `after` at least
    format: Format
    longest: int  # tokens of the longest prompt in training
    production_p95: int | None  # tokens of production's prompts at P95, None if unknown
    quarantined: dict[str, int]  # rows by reason
    config: str  # as YAML
    base: str  # folder or hub id
    date: str | None = None  # written by the chat template
    note: str = ""  # how prompts are rendered, where a chat server does not render them so


def write_run_report(run: Run, folder: Path) -> None:
    """Write `report.html` into the run's folder, and the card into its adapter if there is one."""
    write_whole(folder / "report.html", page(run))
    if (folder / "adapter").is_dir():
        write_whole(folder / "adapter" / "README.md", card(run))


def page(run: Run) -> str:
    """The report as HTML."""
    template = environment().get_template("evaluation/report.html.jinja")
    history = run.result["training"].get("history") or []
    return template.render(
        **_facts(run),
        history=history,
        curves=_curves(history),
        kinds={VIEWS[view]: _kinds(run.outcomes[view]) for view in VIEWS if view in run.outcomes},
        trust=_trust(run),
        slices=list(_slices(run)),
        gallery=list(gallery(run.outcomes["after"])),
        parity=_share(*run.result["counts"]["after"]["val/parity"]),
    )


def card(run: Run) -> str:
    """The model card, in Markdown with the metadata that a hub reads."""
    return environment(autoescape=False).get_template("evaluation/card.md.jinja").render(**_facts(run))


def headline(run: Run) -> list[str]:
    """Whether the tuned model is better than the best prompt and the constrained base: a line for each rate."""
    lines = []
    for name, what in (("exact", "have a valid format"), ("joint", "are right")):
        tuned = _share(*rate(run.outcomes["after"], name), f" of the answers {what}")
        if "after_constrained" in run.outcomes:
            tuned += f", {_share(*rate(run.outcomes['after_constrained'], name), ' constrained')}"
        against = []
        for view in _compared(run):
            count, rows = rate(run.outcomes[view], name)
            sample = f" of {rows:,} rows" if rows != len(run.outcomes["after"]) else ""
            against.append(f"against {count / rows:.1%}{sample} ({VIEWS[view]}) {_verdict(run, view, name)}")
        if name == "joint" and (majority := _majority(run)):
            against.append(f"against {majority:.1%} for always giving the most frequent training answer")
        lines.append(f"{tuned}: {', '.join(against)}")
    return lines


def _share(count: int, rows: int, of: str = "") -> str:
    low, high = wilson(count, rows)
    return f"{count / rows if rows else 0:.1%}{of} ({low:.1%} to {high:.1%})"


def _verdict(run: Run, view: str, name: str) -> str:
    """Whether the tuned model is better, on the rows that both were measured on."""
    before, after = paired(run.outcomes[view], run.outcomes["after"])
    return verdict(rate_difference([getattr(o, name) for o in before], [getattr(o, name) for o in after]))


def _compared(run: Run) -> list[str]:
    """The best prompt, and the constrained base if it was measured."""
    prompts = {view: run.outcomes[view] for view in ("before", "few_shot") if view in run.outcomes}
    return [best_prompt(prompts), *({"before_constrained"} & run.outcomes.keys())]


def _majority(run: Run) -> float:
    """Majority-answer accuracy."""
    right, rows = run.result.get("constant", (0, 1))
    return float(right / rows)


def _facts(run: Run) -> dict[str, Any]:
    """What the report and the card show."""
    views = [view for view in VIEWS if view in run.outcomes]
    right, rows = rate(run.outcomes["after"], "joint")
    better = any(_verdict(run, _compared(run)[0], name) == "better" for name in ("exact", "joint"))
    return {
        "run": run,
        "hub": not Path(run.base).exists(),  # a folder's path would mean nothing elsewhere
        "result": run.result,
        "headline": headline(run),
        "better": better and right >= _majority(run) * rows,
        "views": {view: f"{VIEWS[view]}, {len(run.outcomes[view]):,} rows" for view in views},
        "figures": {view: figures(run.outcomes[view]) for view in views},
        "field": FIELD,
        "own": [name for name in run.result["after"] if name.startswith("own/")],
        "versions": {"formtune": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "format": run.format.to_dict(),
    }


def _slices(run: Run) -> Iterator[tuple[str, str, list[str]]]:
    """Group and name of each slice, its rows, and three figures of the base and the tuned model on it."""
    tuned = run.outcomes["after"]
    for group, name, rows in slices(tuned, run.format, run.longest, run.production_p95):
        after = [tuned[i] for i in rows]
        before, _ = paired(run.outcomes["before"], after)
        cells = [f"{len(after):,}" if len(before) == len(after) else f"{len(after):,} (base {len(before):,})"]
        for right in ("exact", "joint"):
            cells += [f"{rate(before, right)[0] / len(before):.1%}" if before else "", _share(*rate(after, right))]
        cells += [f"{field_f1(before):.1%}" if before else "", f"{field_f1(after):.1%}"]
        yield group, name, cells


def gallery(outcomes: Sequence[Outcome]) -> Iterator[tuple[Outcome, Markup, Markup]]:
    """The worst failed answers, each with target and answer, in which `<del>` and `<ins>` mark the differences."""
    for outcome in worst_first(outcomes)[:SHOWN]:
        target = answer = ""
        matcher = difflib.SequenceMatcher(None, outcome.target, outcome.answer, autojunk=False)
        for kind, a, b, c, d in matcher.get_opcodes():
            missing, extra = html.escape(outcome.target[a:b]), html.escape(outcome.answer[c:d])
            target += missing if kind == "equal" or not missing else f"<del>{missing}</del>"
            answer += extra if kind == "equal" or not extra else f"<ins>{extra}</ins>"
        yield outcome, Markup(target), Markup(answer)


def _curves(history: Sequence[dict[str, Any]]) -> list[tuple[str, float, dict[str, list[Any]]]]:
    """Title and upper limit of each plot, and the values of its curves at each validation."""
    measured = {name: [point.get(key) for point in history] for name, key in LOSSES.items()}
    losses: dict[str, list[Any]] = {name: values for name, values in measured.items() if None not in values}
    rates = {
        "format/exact": [100 * point["exact"] / point["rows"] for point in history],
        "field F1": [100 * point["field_f1"] for point in history],
    }
    highest = max((value for values in losses.values() for value in values), default=1)
    return [("loss, nats per token", highest, losses), ("% of the validation rows", 100, rates)]


def _trust(run: Run) -> dict[str, Any] | None:
    """The summary of confidence, and the points of its plots; None if the run has none."""
    if "confidence" not in run.result or not (rows := judged(run.outcomes["after"])):
        return None
    curve = risks(rows)
    at = sorted({round(i) for i in np.linspace(1, len(rows), POINTS)})
    risk = [(count / len(rows), float(curve[count - 1])) for count in at]
    return run.result["confidence"] | {"risk": risk, "highest": max(curve) or 1.0, "bins": calibration(rows)}


def _kinds(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Share of each kind of verdict that occurs, right answers first."""
    shares = {kind: sum(outcome.kind == kind for outcome in outcomes) / len(outcomes) for kind in KINDS}
    return {kind: shares[kind] for kind in ("ok", "content", *KINDS[1:-1]) if shares[kind]}

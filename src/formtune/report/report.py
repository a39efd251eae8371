"""A run's report as one self-contained HTML page, and its adapter's model card."""

import importlib.metadata
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from formtune import __version__
from formtune.base.row import Row
from formtune.evaluation.baselines import best_prompt
from formtune.evaluation.outcomes import EVALUATIONS, FIELD, Outcome, confidences, field_f1, paired, rate
from formtune.evaluation.statistics import rate_text, wilson_interval
from formtune.files import write_atomic
from formtune.formats import KINDS, Format
from formtune.pages.page import render
from formtune.report.comparison import metrics_of
from formtune.report.failures import MAX_CHARACTERS, MAX_VALUES, failures, slices
from formtune.report.paired_tests import rate_difference, verdict
from formtune.report.selective import calibration, selective_risk

POINTS = 100  # of the risk-coverage curve
IN_WORDS = {"exact": "have a valid format", "joint": "are right"}  # rates of outcomes in words
PACKAGES = ("torch", "lightning", "transformers", "peft", "tokenizers")


@dataclass(frozen=True, slots=True)
class Run:
    """What a report is made of."""

    name: str  # task/run
    result: dict[str, Any]  # of metrics.json
    outcomes: Mapping[str, Sequence[Outcome]]  # by evaluation, `before` and `after` at least
    format: Format
    quarantined: dict[str, int]  # rows by reason
    config: str  # as YAML
    base: str  # folder or Hub id
    train: Sequence[Row] = ()  # what failures are compared with
    date: str | None = None  # written by the chat template
    note: str = ""  # how prompts are rendered, if chat servers render them differently


def write_report(evaluator: Any) -> None:
    """Write `report.html` into a run's folder, and the card into its adapter if there is one."""
    folder, settings = evaluator.folder, evaluator.settings
    run = Run(
        name=f"{folder.parent.name}/{folder.name}",
        result=evaluator.result,
        outcomes=evaluator.outcomes,
        format=evaluator.model.format,
        quarantined=dict(evaluator.splits.reasons.most_common()),
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        base=evaluator.model.base,
        train=evaluator.train_rows,
        date=settings.date,
        note=settings.renderer.note,
    )
    write_atomic(folder / "report.html", page(run))
    if (folder / "adapter").is_dir():
        write_atomic(folder / "adapter" / "README.md", card(run))


def page(run: Run) -> str:
    """The report as HTML."""
    gallery = failures(run.outcomes["after"], run.format, run.train)
    return render(
        "report/report.html.jinja",
        **_template_values(run),
        conclusion=conclusion(run),
        kind_names=KINDS,
        config=yaml.safe_load(run.config),
        curves=_curves(run.result["training"].get("history", ())),
        kinds={name: Counter(o.kind for o in outcomes) for name, outcomes in run.outcomes.items()},
        trust=_trust(run),
        slices=list(_slices(run)),
        gallery=gallery,
        limits=(MAX_CHARACTERS, MAX_VALUES),
        failed_fields=Counter(field for failure in gallery for field in failure.fields).most_common(),
        parity=rate_text(*run.result["counts"]["after"]["val/parity"]),
    )


def card(run: Run) -> str:
    """The model card, in Markdown with the metadata that a hub reads."""
    return render("report/card.md.jinja", **_template_values(run))


def conclusion(run: Run) -> tuple[bool, str]:
    """Whether training was worth it, against the best that the base reached in any way, and why in one sentence."""
    count, rows = rate(run.outcomes["after"], "joint")
    if (majority := _majority(run)) and wilson_interval(count, rows)[0] <= majority:
        constant = f"the most frequent training answer alone is right in {majority:.1%}"
        worse = "Do not use it" if count < majority * rows else "No better than the majority answer"
        return False, f"{worse}: {count / rows:.1%} of the answers are right, and {constant}."
    parts = []
    for name, what in IN_WORDS.items():
        count, rows = rate(run.outcomes["after"], name)
        way, best, _, compared = max(_comparisons(run, name), key=itemgetter(1))
        parts += [compared, f"{count / rows:.1%} of the answers {what}, against {best:.1%} before ({EVALUATIONS[way]})"]
    form, valid, content, right = parts
    if content in ("better", "worse"):
        helped = content == "better"
        return helped, f"Fine-tuning {'helped' if helped else 'made the answers worse'}: {right}."
    if form == "better":
        return True, f"Fine-tuning helped the format: {valid}. Right answers: {content}."
    return False, f"No gain can be shown: {right}; {content}."


def headline(run: Run) -> list[str]:
    """Whether the tuned model is better than the best prompt and the constrained base: a line for each rate."""
    lines = []
    for name, what in IN_WORDS.items():
        count, total = rate(run.outcomes["after"], name)
        tuned = rate_text(count, total, f" of the answers {what}")
        if "after_constrained" in run.outcomes:
            tuned += f", {rate_text(*rate(run.outcomes['after_constrained'], name), ' constrained')}"
        against = [
            f"{EVALUATIONS[way]} {before:.1%}{f' of {rows:,} rows' if rows != total else ''} ({compared})"
            for way, before, rows, compared in _comparisons(run, name)
        ]
        if name == "joint" and (majority := _majority(run)):
            against.append(f"majority answer {majority:.1%}")
        lines.append(f"{tuned}: against {', '.join(against)}")
    return lines


def _comparisons(run: Run, name: str) -> Iterator[tuple[str, float, int, str]]:
    """Each way to use the base: its rate, its rows, and whether the tuned model is better on the rows of both.

    They are the best prompt, and the constrained base and the adapter at the start if they were measured.
    """
    prompts = {way: run.outcomes[way] for way in ("before", "few_shot") if way in run.outcomes}
    for way in (best_prompt(prompts), "before_constrained", "start"):
        if way in run.outcomes:
            right = ([getattr(o, name) for o in rows] for rows in paired(run.outcomes[way], run.outcomes["after"]))
            count, rows = rate(run.outcomes[way], name)
            yield way, count / rows, rows, verdict(rate_difference(*right))


def _majority(run: Run) -> float:
    right, rows = run.result.get("constant", (0, 1))
    return float(right / rows)


def _template_values(run: Run) -> dict[str, Any]:
    names = [name for name in EVALUATIONS if name in run.outcomes]
    return {
        "run": run,
        "hub": not Path(run.base).exists(),  # a folder's path would mean nothing elsewhere
        "result": run.result,
        "headline": headline(run),
        "names_of": EVALUATIONS,
        "evaluations": {name: f"{EVALUATIONS[name]}, {len(run.outcomes[name]):,} rows" for name in names},
        "metrics": {name: metrics_of(run.outcomes[name]) for name in names},
        "field": FIELD,
        "custom": [name for name in run.result["after"] if name.startswith("custom/")],
        "versions": {"formtune": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "format": run.format.to_dict(),
    }


def _slices(run: Run) -> Iterator[tuple[str, str, list[str], set[str]]]:
    """Group and name of each slice, the number of its rows with three metrics of base and tuned model, its rows."""
    tuned = run.outcomes["after"]
    longest = max((len(row.prompt_ids) for row in run.train), default=0)
    for group, name, rows in slices(tuned, run.format, longest):
        after = [tuned[i] for i in rows]
        before, _ = paired(run.outcomes["before"], after)
        cells = [f"{len(after):,}" if len(before) == len(after) else f"{len(after):,} (base {len(before):,})"]
        for right in ("exact", "joint"):
            cells += [f"{rate(before, right)[0] / len(before):.1%}" if before else "", rate_text(*rate(after, right))]
        cells += [f"{field_f1(before):.1%}" if before else "", f"{field_f1(after):.1%}"]
        yield group, name, cells, {outcome.where for outcome in after}


def _curves(history: Sequence[dict[str, Any]]) -> list[tuple[str, float, float, dict[str, list[Any]]]]:
    """Title and limits of each plot, and its curves: at each validation a value, and its height from 0 to 1."""
    measured = {"train": [p.get("train_loss") for p in history], "validation": [p.get("val_loss") for p in history]}
    losses: dict[str, list[Any]] = {name: values for name, values in measured.items() if None not in values}
    positive = [value for values in losses.values() for value in values if 0 < value < math.inf] or [1.0]
    low, high = min(positive), max(positive)
    scale = math.log(high / low) or 1  # logarithmic: the first loss is often a hundred times the last
    drawn = {name: [(v, v if math.isfinite(v) else high) for v in values] for name, values in losses.items()}
    heights = {name: [(v, math.log(max(y, low) / low) / scale) for v, y in points] for name, points in drawn.items()}
    rates = {"format/exact": [p["exact"] / p["rows"] for p in history], "field F1": [p["field_f1"] for p in history]}
    shares = {name: [(100 * value, value) for value in values] for name, values in rates.items()}
    return [("loss, nats per token, logarithmic", low, high, heights), ("% of the validation rows", 0, 100, shares)]


def _trust(run: Run) -> dict[str, Any] | None:
    """The summary of confidence, and the points of its plots; None if the run has none."""
    if "confidence" not in run.result or not (rows := confidences(run.outcomes["after"])):
        return None
    curve = selective_risk(rows)
    at = sorted({round(i) for i in np.linspace(1, len(rows), POINTS)})
    risk = [(count / len(rows), float(curve[count - 1])) for count in at]
    return run.result["confidence"] | {"risk": risk, "highest": max(curve) or 1.0, "bins": calibration(rows)}

"""The findings of an audit as plain data, its page, and its lines in the terminal."""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from formtune.base.row import Row, quantile
from formtune.configuration.terminal import echo
from formtune.data.blockers import blockers
from formtune.data.cleaning import Example
from formtune.data.encoded import FEW_ROWS, Splits
from formtune.data.preparation import load_splits, production_rows
from formtune.data.settings import DataSettings
from formtune.data.table import print_data
from formtune.errors import UserError
from formtune.files import optional, write_atomic, write_json, write_lines
from formtune.formats import Format, JsonSchema
from formtune.formats.content import leaves
from formtune.pages.page import render

MAX_LISTED = 8  # labels or words in a warning
MIN_LABEL_SHARE = 0.1  # of the rows that each label would have if all had as many; a label with fewer is rare
MAX_LABELS = 200  # of a field; one with more has values, not labels
MAX_BINS = 40  # of a histogram
MAX_WORDS = 12  # listed with their shares in train and production
MIN_DIFFERENCE = 0.25  # of a word's two shares, for a warning
QUANTILES = {"P50": 50, "P95": 95, "P99": 99, "max": 100}
MAX_PRINTED = 10  # warnings; the page has all of them
MAX_ROWS = 200  # of a reason on the page; quarantine.jsonl has all of them


def audit(settings: DataSettings, splits: Splits | None = None) -> tuple[dict[str, Any], Splits]:
    """Prepare and describe the rows: the verdict, blockers and warnings with their remedies, and the evidence."""
    splits = splits or load_splits(settings, from_cache=False)
    examples, format = splits.examples, settings.format
    all_examples = list(chain(*examples.values()))
    turns = {row.where: row.messages for row in splits.quarantine}
    turns |= {example.where: example.messages for example in all_examples}
    reasons, production = blockers(settings, splits), production_rows(settings)
    sizes = _sizes(splits.rows | {"production": production})
    findings: dict[str, Any] = {
        "verdict": "blocked" if reasons else "ready",
        "data": splits.key,
        "blockers": reasons,
        "weights": splits.weights,
        "rows": {name: {"read": splits.read.get(name), "used": len(rows)} for name, rows in examples.items()},
        "repairs": dict(splits.repairs.most_common()),
        "quarantined": dict(splits.reasons.most_common()),
        "ignored": dict(splits.ignored.most_common()),
        "ignored_of_production": dict(settings.ignored.get("production", Counter()).most_common()),
        "own_system": splits.own_system,
        "shared_text": splits.shared,
        "mixtures": [asdict(mixture) for mixture in splits.mixtures],
        "lengths": {
            name: {side: {q: quantile(values, p) for q, p in QUANTILES.items()} for side, values in sides.items()}
            for name, sides in sizes.items()
        },
        "histograms": {side: _histogram(sizes, side) for side in ("prompt", "answer") if "train" in sizes},
        "limit": settings.limit,
        "max_new_tokens": settings.max_new_tokens,
        "labels": _labels(examples, format),
        "sources": dict(Counter(example.origin for example in examples["train"]).most_common()),
        "ungrounded": ungrounded(all_examples, format),
        "reordered": _reordered(examples["train"], format),
        "production": compare_inputs(splits.rows["train"], production) if production else {},
        # Each with the turns of the row that it repeats or contradicts.
        "quarantine": [asdict(row) | {"other_messages": turns.get(row.other)} for row in splits.quarantine],
    }
    return findings | {"warnings": list(_warnings(findings, settings))}, splits


def _sizes(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, list[int]]]:
    """Tokens of the prompts and answers of each split that has rows."""
    return {
        name: {"prompt": [len(row.prompt_ids) for row in members], "answer": [len(row.target_ids) for row in members]}
        for name, members in rows.items()
        if members
    }


def ungrounded(examples: Iterable[Example], format: Format) -> dict[str, dict[str, Any]]:
    """Values of answers that are not in their prompts: by field, their share and rows; derived fields are exempt."""
    counts: Counter[str] = Counter()
    rows: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        words, derived, context = Words(example.input), format.of_row(example.schema).derived, None
        for _, (value, path) in leaves(example.value, format.sets):
            if path in derived or isinstance(value, bool):
                continue
            counts[path] += 1
            if not words.contains(value) and not (context := context or Words(example.text)).contains(value):
                rows.setdefault(path, []).append({"where": example.where, "value": value, "source": example.origin})
    return {path: {"share": len(invented) / counts[path], "rows": invented} for path, invented in rows.items()}


def _reordered(examples: Sequence[Example], format: Format) -> int:
    """The number of answers whose keys come in another order than the schema's; 0 if no grammar can force it."""
    try:
        if not format.per_row and (grammar := optional("constrained.grammar", "grammar")):
            grammar(format)
    except UserError:
        return 0
    reordered = 0
    for example in examples:
        row_format = (format.inner or format).of_row(example.schema)
        text = json.dumps(example.value, ensure_ascii=False, separators=(",", ":"))
        reordered += isinstance(row_format, JsonSchema) and row_format.write(example.value) != text
    return reordered


def compare_inputs(train: Sequence[Row], production: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """The shares of train's and production's inputs that contain a word, for the words whose shares differ most."""
    counts = [
        Counter(word for row in rows for word in {*re.findall(r"\w+", row.input.casefold())})
        for rows in (train, production)
    ]
    sizes = max(len(train), 1), len(production)
    shares = {word: (counts[0][word] / sizes[0], counts[1][word] / sizes[1]) for word in counts[0] | counts[1]}
    words = sorted(shares, key=lambda word: -abs(shares[word][1] - shares[word][0]))
    return {word: shares[word] for word in words[:MAX_WORDS]}


def _histogram(sizes: dict[str, dict[str, list[int]]], side: str) -> dict[str, Any]:
    """The shares of train's rows (for prompts also production's) in bins of equal width in tokens."""
    drawn = ("train", "production") if side == "prompt" else ("train",)
    shown = {name: sides[side] for name, sides in sizes.items() if name in drawn}
    low, high = min(map(min, shown.values())), max(map(max, shown.values()))
    edges = range(low, high + 2 + (high - low) // MAX_BINS, (high - low) // MAX_BINS + 1)
    shares = {name: (np.histogram(values, edges)[0] / len(values)).tolist() for name, values in shown.items()}
    return {"edges": list(edges), "shares": shares}


def _labels(examples: Mapping[str, Sequence[Example]], format: Format) -> dict[str, dict[str, dict[str, int]]]:
    """For each derived field, the number of rows with each label by split."""
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: {name: Counter() for name in examples})
    for split, rows in examples.items():
        for example in rows:
            derived = format.of_row(example.schema).derived
            for _, (value, path) in leaves(example.value, format.sets):
                if path in derived:
                    counts[path or "answer"][split][str(value)] += 1
    tables = {}
    for path, by_split in counts.items():
        labels = [label for label, _ in sum(by_split.values(), Counter()).most_common()]
        if len(labels) <= MAX_LABELS:
            tables[path] = {split: {label: count[label] for label in labels} for split, count in by_split.items()}
    return tables


def _warnings(findings: dict[str, Any], settings: DataSettings) -> Iterator[str]:
    rows, reordered, format = findings["rows"]["train"]["used"], findings["reordered"], settings.format
    fix = f"data.repair_answers: [{', '.join(dict.fromkeys([*settings.repair_answers, 'canonical']))}]"
    if rows < FEW_ROWS:
        yield (
            f"{rows:,} training rows: with fewer than {FEW_ROWS}, a model memorizes the examples instead of learning "
            "the task; collect more, from people where possible"
        )
    if reordered:
        yield (
            f"{reordered:,} of {rows:,} training answers have keys in another order than the schema's; formtune's "
            "constrained decoding allows it, but an engine that forces the schema's order (vLLM, llama.cpp, OpenAI's "
            f"response_format) makes the model drop each key that is out of order; if you serve with one, set {fix}"
        )
    for path, splits in findings["labels"].items():
        least = ceil(MIN_LABEL_SHARE * sum(splits["train"].values()) / len(splits["train"]))
        if rare := sorted(label for label, count in splits["train"].items() if count < least):
            yield f"{path}: fewer than {least:,} training rows have {', '.join(rare[:MAX_LISTED])}"
    can_derive = "derived" in (format.inner or format).to_dict()["init_args"]
    derived = " If answers compute them, name the field in data.format.derived" if can_derive else ""
    for path, entry in sorted(findings["ungrounded"].items(), key=lambda item: -len(item[1]["rows"])):
        first = entry["rows"][0]
        yield (
            f"{path or 'the answer'}: {len(entry['rows']):,} values ({entry['share']:.0%}) are not in their inputs "
            f"({first['where']}: {str(first['value'])[:40]!r}): hallucinated in the data, or derived?{derived}"
        )
    words = findings["production"].items()
    if different := [f"{word} {b:.0%} (train {a:.0%})" for word, (a, b) in words if abs(b - a) >= MIN_DIFFERENCE]:
        yield f"production's words differ: {', '.join(different[:MAX_LISTED])}; add rows like production's"


def write_report(findings: dict[str, Any], folder: Path) -> None:
    """Write `audit.json`, `quarantine.jsonl` and `report.html` into the folder, each atomically."""
    write_lines(folder / "quarantine.jsonl", findings["quarantine"])
    write_json(folder / "audit.json", {name: value for name, value in findings.items() if name != "quarantine"})
    write_atomic(folder / "report.html", page(findings))


def page(findings: dict[str, Any]) -> str:
    reasons: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(findings["quarantine"], key=lambda row: -findings["quarantined"][row["reason"]]):
        reasons.setdefault(row["reason"], []).append(row)
    return render("audit/report.html.jinja", audit=findings, reasons=reasons, shown=MAX_ROWS)


def print_audit(findings: dict[str, Any], settings: DataSettings, splits: Splits, folder: Path) -> None:
    """Print the data table, the blockers and warnings, and the verdict."""
    print_data(settings, splits, folder)
    print_problems(findings)
    print(f"report: {folder / 'report.html'}")
    counts = [(findings["blockers"], "to fix first"), (findings["warnings"], "to look at")]
    parts = [f", {len(lines)} {what}" for lines, what in counts if lines]
    echo(f"verdict: {findings['verdict']}{''.join(parts)}", "bold")


def print_problems(findings: dict[str, Any]) -> None:
    """Print the blockers and the first warnings, one per line."""
    for line in findings["blockers"]:
        echo(f"blocker: {line}", "red")
    for line in findings["warnings"][:MAX_PRINTED]:
        echo(f"warning: {line}", "yellow")
    if more := findings["warnings"][MAX_PRINTED:]:
        echo(f"warning: {len(more):,} more: formtune audit lists all", "yellow")


class Words:
    """The words and numbers of a text, for looking up values."""

    def __init__(self, text: str) -> None:
        self._words, self._numbers = _words(text), _numbers(text)

    def contains(self, value: Any) -> bool:
        """Whether the text contains a value: strings by their words, numbers by their size; True for other types."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return abs(value) in self._numbers
        if not isinstance(value, str):
            return True
        words = _words(value)
        # From the beginning of a word: "on" is not in "London". Other scripts may have no spaces.
        start = r"(?<![0-9a-z_])" if words.isascii() else ""
        return re.search(start + re.escape(words), self._words) is not None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _numbers(text: str) -> set[float]:
    """The numbers in a text; a comma or point is read both as thousands separator and as decimal point."""
    numbers = set()
    for token in re.findall(r"\d+(?:[.,]\d+)*", text, re.ASCII):
        for thousands, point in ((",", "."), (".", ",")):
            with suppress(ValueError):
                numbers.add(float(token.replace(thousands, "").replace(point, ".")))
    return numbers

"""Everything that an audit finds, as plain data: what `audit.json` holds and the report shows.

The rows are prepared by the very code that prepares them for training, and cached under the hash of all that decides
them, so that the audited rows are the trained rows; what blocks training here blocks it there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from formtune.audit.drift import compare_inputs
from formtune.audit.origins import by_origin, ungrounded
from formtune.base.row import Row, quantile
from formtune.data.blockers import blockers
from formtune.data.cleaning import Example
from formtune.data.encoded import FEW_ROWS, Splits
from formtune.data.preparation import load_splits, production_rows
from formtune.data.settings import DataSettings
from formtune.formats import Format
from formtune.formats.content import leaves

COMPLEX_FIELDS = 8  # from this many fields on, or with nesting, a format is complex
COMPLEX_ROWS = 2000  # needed for a complex format
RARE = 0.01  # share below which a label is rare
LABELS = 30  # different values at most for a field of labels
QUANTILES = {"P50": 50, "P95": 95, "P99": 99, "max": 100}


def audit(settings: DataSettings) -> tuple[dict[str, Any], Splits]:
    """Prepare the rows and describe them.

    Returns:
        `verdict` (blocked or ready), `blockers` and `warnings` (one line each, with the remedy), and the evidence; and
        the splits.

    Raises:
        UserError: A file or a row cannot be read.
    """
    splits = load_splits(settings, from_cache=False)
    examples, format = splits.examples, settings.format
    train, all_examples = examples["train"], [example for rows in examples.values() for example in rows]
    reasons = blockers(settings, splits)
    findings: dict[str, Any] = {
        "verdict": "blocked" if reasons else "ready",
        "data": splits.key,
        "blockers": reasons,
        "warnings": [],
        "rows": {name: {"read": splits.read.get(name), "used": len(rows)} for name, rows in examples.items()},
        "repairs": dict(splits.repairs.most_common()),
        "quarantined": dict(splits.reasons.most_common()),
        "ignored": dict(splits.ignored.most_common()),
        "own_system": splits.own_system,
        "shared_text": splits.shared,
        "mixtures": [asdict(mixture) for mixture in splits.mixtures],
        "lengths": {name: _lengths(rows) for name, rows in splits.rows.items() if rows},
        "limit": settings.limit,
        "labels": _labels(examples, format),
        "sources": by_origin(train, format),
        "ungrounded": ungrounded(all_examples, format),
        "suspects": [[{"where": e.where, "messages": e.messages} for e in pair] for pair in splits.suspects],
        "production": None,
        "quarantine": _quarantine(splits),
    }
    if rows := production_rows(settings):
        findings["production"] = {
            "lengths": _lengths(rows),
            "ignored": dict(settings.ignored["production"].most_common()),
            **compare_inputs([e.input for e in train], [row.input for row in rows]),
        }
    findings["warnings"] = list(_warnings(findings, format))
    return findings, splits


def _quarantine(splits: Splits) -> list[dict[str, Any]]:
    """The quarantined rows, each with the turns of the row that it repeats or contradicts."""
    turns = {row.where: row.messages for row in splits.quarantine}
    turns |= {example.where: example.messages for rows in splits.examples.values() for example in rows}
    return [asdict(row) | {"other_messages": turns.get(row.other)} for row in splits.quarantine]


def _lengths(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """P50, P95, P99 and maximum of prompt and answer in tokens, and how many rows have each length."""
    sides = {"prompt": [len(row.prompt_ids) for row in rows], "answer": [len(row.target_ids) for row in rows]}
    return {
        name: {label: quantile(sizes, percent) for label, percent in QUANTILES.items()}
        | {"sizes": dict(sorted(Counter(sizes).items()))}
        for name, sizes in sides.items()
        if any(sizes)
    }


def _labels(examples: dict[str, list[Example]], format: Format) -> dict[str, dict[str, dict[str, int]]]:
    """For each field with few values that answers do not copy: how many rows of each split have which, 0 for none."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for split, rows in examples.items():
        for example in rows:
            for _, (value, path) in leaves(example.value, format.sets):
                if path in format.derived:
                    counts.setdefault(path, {name: Counter() for name in examples})[split][str(value)] += 1
    tables = {}
    for path, table in counts.items():
        total = sum(table.values(), Counter())
        if len(total) <= LABELS:
            order = sorted(total, key=lambda label: (-table["train"][label], -total[label]))
            tables[path or "answer"] = {split: {label: c[label] for label in order} for split, c in table.items()}
    return tables


def _warnings(findings: dict[str, Any], format: Format) -> Iterator[str]:
    """What does not block training and should be looked at, one line each."""
    rows, suspects = findings["rows"]["train"]["used"], findings["suspects"]
    is_complex = len(format.fields) >= COMPLEX_FIELDS or any("." in path for path in format.fields)
    if rows < FEW_ROWS:
        yield (
            f"{rows:,} training rows: below about {FEW_ROWS} a model learns the examples more than the task; "
            "collect more, from people where possible"
        )
    elif is_complex and rows < COMPLEX_ROWS:
        yield (
            f"{rows:,} training rows: 2,000 to 5,000 are usual for a format with many or nested fields "
            f"({len(format.fields)} here); compare a run on half of them to see whether more would help"
        )
    if suspects:
        yield (
            f"{len(suspects):,} pairs of rows have nearly the same input and answers whose difference it does not show "
            f"({suspects[0][0]['where']} and {suspects[0][1]['where']}): is one of the two wrong?"
        )
    for path, splits in findings["labels"].items():
        total = sum(splits["train"].values())
        if rare := sorted(label for label, count in splits["train"].items() if count < RARE * total):
            yield f"{path}: fewer than {RARE:.0%} of the training rows have {', '.join(rare[:8])}"
    for path, entry in findings["ungrounded"].items():
        first, count = entry["rows"][0], len(entry["rows"])
        yield f"{path or 'the answer'}: " + (
            f"{entry['share']:.0%} of the values are not in their inputs; if answers compute them, say so in "
            "data.format.derived"
            if entry["share"] > 0.5
            else f"{count:,} values are not in their inputs ({first['where']}: {str(first['value'])[:40]!r}): "
            "invented, or derived?"
        )
    for name, entry in findings["sources"].items():
        opening, share = next(iter(entry["openings"].items()), ("", 0.0))
        if name and entry["rows"] >= 50 and share > 0.2:
            yield f"{share:.0%} of the rows of {name} begin with {opening!r}: ask the teacher for more variety"
    if production := findings["production"]:
        auc = max(production["auc"], production["auc_length"])
        signs = ", ".join(repr(word) for word, _ in production["features"]["production"][:4])
        if auc > 0.75:
            yield (
                f"a simple classifier tells production's inputs from train's (AUC {auc:.2f}; 0.5 would be alike), by "
                f"{'their words: ' + signs if auc == production['auc'] else 'their length'}; add rows like production's"
            )

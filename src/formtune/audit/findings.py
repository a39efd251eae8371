"""Everything that an audit finds, as plain data: what `audit.json` holds and the report shows.

The rows are prepared by the very code that prepares them for training, and stored below the hash of all that decides
them, so that the audited rows are the trained rows; what blocks training here blocks it there.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import regex

from formtune.audit.drift import compare_inputs
from formtune.audit.origins import by_origin, ungrounded
from formtune.base.row import Row, quantile
from formtune.data.cleaning import Example
from formtune.data.encoded import FEW_ROWS, Splits
from formtune.data.preparation import Preparation
from formtune.data.splits import Prepared
from formtune.formats import Format
from formtune.formats.content import leaves

COMPLEX_FIELDS = 8  # from this many fields on, or with nesting, a contract is complex
COMPLEX_ROWS = 2000  # wanted for a complex contract
RARE = 0.01  # share below which a script or a label is an outlier
SCRIPTS = (
    *("Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil", "Thai", "Hangul"),
    *("Hiragana", "Katakana", "Han", "Georgian", "Armenian", "Ethiopic"),
)
QUANTILES = {"P50": 50, "P95": 95, "P99": 99, "max": 100}

_SCRIPT = {name: regex.compile(rf"\p{{Script={name}}}") for name in SCRIPTS}


def audit(preparation: Preparation) -> tuple[dict[str, Any], Splits]:
    """Prepare the rows and say what there is to say of them.

    Returns:
        `verdict` (blocked or ready), `blockers` and `warnings` (one line each, with the remedy), and the evidence; and
        the splits.

    Raises:
        UserError: A file or a row cannot be read.
    """
    prepared = preparation.prepare()
    splits, examples = prepared.splits, prepared.examples
    train, contract = examples["train"], preparation.format
    found: dict[str, Any] = {
        "verdict": "ready",
        "data": splits.key,
        "blockers": preparation.blockers(splits),
        "warnings": [],
        "rows": {name: {"read": splits.read.get(name), "used": len(rows)} for name, rows in examples.items()},
        "repairs": dict(splits.repairs.most_common()),
        "set_aside": dict(splits.reasons.most_common()),
        "ignored": dict(splits.ignored.most_common()),
        "own_system": splits.own_system,
        "shared_text": splits.shared,
        "mixtures": [asdict(mixture) for mixture in splits.mixtures],
        "lengths": {name: lengths(rows) for name, rows in splits.rows.items() if rows},
        "limit": preparation.limit,
        "scripts": scripts([e for rows in examples.values() for e in rows]),
        "labels": labels(examples, contract),
        "sources": by_origin(train, contract),
        "ungrounded": ungrounded([e for rows in examples.values() for e in rows], contract),
        "growth": growth(train, [*examples["validation"], *examples["test"]]),
        "suspects": [[{"where": e.where, "messages": e.messages} for e in pair] for pair in prepared.suspects],
        "production": None,
        "quarantine": quarantine(prepared),
    }
    if rows := preparation.production_rows:
        found["production"] = {
            "lengths": lengths(rows),
            "ignored": dict(preparation.ignored["production"].most_common()),
            **compare_inputs([e.input for e in train], [row.source for row in rows]),
        }
    if found["blockers"]:
        found["verdict"] = "blocked"
    found["warnings"] = warnings(found, contract)
    return found, splits


def quarantine(prepared: Prepared) -> list[dict[str, Any]]:
    """The rows set aside, each with the turns of the row that it repeats or contradicts."""
    turns = {row.where: row.messages for row in prepared.splits.quarantine}
    turns |= {example.where: example.messages for rows in prepared.examples.values() for example in rows}
    return [asdict(row) | {"other_messages": turns.get(row.other)} for row in prepared.splits.quarantine]


def lengths(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """P50, P95, P99 and maximum of prompt and answer in tokens, and the counts of a histogram."""
    found: dict[str, Any] = {}
    for name, sizes in (("prompt", [len(r.prompt) for r in rows]), ("answer", [len(r.target) for r in rows])):
        if any(sizes):
            found[name] = {label: quantile(sizes, percent) for label, percent in QUANTILES.items()}
            found[name]["sizes"] = dict(sorted(Counter(sizes).items()))
    return found


def scripts(examples: Sequence[Example]) -> dict[str, list[str]]:
    """For each script that is the main one of fewer than `RARE` of the inputs, the places of these."""
    places: dict[str, list[str]] = {}
    for example in examples:
        text = example.input
        counts = {"Latin": 1} if text.isascii() else {name: len(p.findall(text)) for name, p in _SCRIPT.items()}
        main = max(counts, key=lambda name: counts[name])
        places.setdefault(main if counts[main] else "no letters", []).append(example.where)
    return {name: found for name, found in places.items() if len(found) < RARE * len(examples)}


def labels(examples: dict[str, list[Example]], contract: Format) -> dict[str, dict[str, dict[str, int]]]:
    """For each field with few values that answers do not copy: how many rows of each split have which, 0 for none."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for split, rows in examples.items():
        for example in rows:
            for _, (value, path) in leaves(example.value, contract.sets):
                if path in contract.derived:
                    counts.setdefault(path, {}).setdefault(split, Counter())[str(value)] += 1
    tables = {}
    for path, found in counts.items():
        table = {split: found.get(split, Counter[str]()) for split in examples}
        total = sum(table.values(), Counter())
        if len(total) <= 30:
            order = sorted(total, key=lambda label: (-table["train"][label], -total[label]))
            tables[path or "answer"] = {split: {label: c[label] for label in order} for split, c in table.items()}
    return tables


def growth(train: Sequence[Example], held_out: Sequence[Example]) -> list[tuple[int, float]]:
    """Share of the held-out inputs' word pairs that stand in 1/8, 1/4, 1/2 and all of train, shuffled.

    A curve that still climbs at its end says that more rows would bring what production will ask for.
    """
    order = list(train)
    random.Random(0).shuffle(order)
    wanted = [pair for example in held_out for pair in _pairs(example)]
    known: set[tuple[str, str]] = set()
    curve, done = [], 0
    for share in (8, 4, 2, 1):
        until = len(order) // share
        known.update(pair for example in order[done:until] for pair in _pairs(example))
        done = until
        if wanted and until:
            curve.append((until, sum(pair in known for pair in wanted) / len(wanted)))
    return curve


def _pairs(example: Example) -> list[tuple[str, str]]:
    return list(pairwise(example.input.casefold().split()))


def warnings(found: dict[str, Any], contract: Format) -> list[str]:
    """What does not block training and should be looked at, one line each."""
    said = []
    rows = found["rows"]["train"]["used"]
    is_complex = len(contract.fields) >= COMPLEX_FIELDS or any("." in path for path in contract.fields)
    if rows < FEW_ROWS:
        said.append(
            f"{rows:,} training rows: below about {FEW_ROWS} a model learns the examples more than the task; "
            "collect more, from people where possible"
        )
    elif is_complex and rows < COMPLEX_ROWS:
        said.append(
            f"{rows:,} training rows: 2,000 to 5,000 are usual for a contract with many or nested fields "
            f"({len(contract.fields)} here); compare a run on half of them to see whether more would help"
        )
    curve = found["growth"]
    if len(curve) == 4 and curve[3][1] - curve[2][1] > 0.05:
        said.append(
            f"the last half of the training rows brought {curve[3][1] - curve[2][1]:.0%} more of the held-out word "
            "pairs: more rows would still bring new language"
        )
    if suspects := found["suspects"]:
        said.append(
            f"{len(suspects):,} pairs of rows have nearly the same input and answers whose difference it does not show "
            f"({suspects[0][0]['where']} and {suspects[0][1]['where']}): is one of the two wrong?"
        )
    if found["scripts"]:
        odd = ", ".join(f"{name} {len(places):,}" for name, places in found["scripts"].items())
        said.append(f"few inputs are written in other scripts ({odd}): meant, or strays?")
    for path, splits in found["labels"].items():
        total = sum(splits.get("train", {}).values())
        everywhere = {value for counts in splits.values() for value in counts}
        rare = sorted(v for v in everywhere if splits.get("train", {}).get(v, 0) < RARE * total)
        if rare:
            said.append(f"{path}: fewer than {RARE:.0%} of the training rows have {', '.join(rare[:8])}")
    for path, entry in found["ungrounded"].items():
        if entry["share"] > 0.5:
            said.append(
                f"{path or 'the answer'}: {entry['share']:.0%} of the values do not stand in their inputs; if answers "
                "work them out, say so in data.format.derived"
            )
        else:
            example = entry["rows"][0]
            said.append(
                f"{path or 'the answer'}: {len(entry['rows']):,} values do not stand in their inputs "
                f"({example['where']}: {str(example['value'])[:40]!r}): invented, or derived?"
            )
    for name, entry in found["sources"].items():
        opening, share = next(iter(entry["openings"].items()), ("", 0.0))
        if name and entry["rows"] >= 50 and share > 0.2:
            said.append(f"{share:.0%} of the rows of {name} begin with {opening!r}: ask the teacher for more variety")
    if (production := found["production"]) is not None:
        auc = max(production["auc"], production["auc_length"])
        if auc > 0.75:
            signs = ", ".join(repr(word) for word, _ in production["features"]["production"][:4])
            said.append(
                f"a simple classifier tells production's inputs from train's (AUC {auc:.2f}; 0.5 would be alike), by "
                f"{'their words: ' + signs if auc == production['auc'] else 'their length'}; add rows like production's"
            )
    return said

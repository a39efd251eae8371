"""Who wrote the rows, and what synthetic ones bring with them: the teacher's style, and sometimes invented facts."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from formtune.data.cleaning import Example
from formtune.formats import Format
from formtune.formats.content import Words, leaves

SAMPLE = 1000  # inputs of each source for distinct-n, which falls with their number


def ungrounded(examples: Iterable[Example], contract: Format) -> dict[str, dict[str, Any]]:
    """Values that answers should copy and that do not stand in their inputs, by field.

    Words are compared without case and marks, numbers by what they amount to; fields that the contract says are
    derived, enums among them, are exempt.

    Returns:
        For each field with such values `share` of its values, and `rows`, each with where, value and source.
    """
    counts: Counter[str] = Counter()
    found: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        said = Words(example.input)
        for _, (value, path) in leaves(example.value, contract.sets):
            if path in contract.derived or isinstance(value, bool):
                continue
            counts[path] += 1
            if not said.hold(value):
                found.setdefault(path, []).append({"where": example.where, "value": value, "source": example.origin})
    return {path: {"share": len(rows) / counts[path], "rows": rows} for path, rows in found.items()}


def by_origin(examples: Sequence[Example], contract: Format) -> dict[str, dict[str, Any]]:
    """For each source the number of its rows, of those with values that do not stand in the input, and its variety.

    Returns:
        `rows`, `ungrounded`, `distinct_1` and `distinct_2` (share of words and pairs of words of the inputs that are
        different; Li et al., 2016), `openings` (the three most frequent first three words, with their shares).
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.origin, []).append(example)
    size = min([SAMPLE, *map(len, groups.values())])
    found = {}
    for name, rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        invented = {row["where"] for entry in ungrounded(rows, contract).values() for row in entry["rows"]}
        words = [re.findall(r"\w+", e.input.casefold()) for e in random.Random(0).sample(rows, size)]
        openings = Counter(" ".join(re.findall(r"\w+", e.input.casefold())[:3]) for e in rows)
        found[name] = {
            "rows": len(rows),
            "ungrounded": len(invented),
            "distinct_1": _distinct([w for text in words for w in text]),
            "distinct_2": _distinct([pair for text in words for pair in pairwise(text)]),
            "openings": {opening: count / len(rows) for opening, count in openings.most_common(3)},
        }
    return found


def _distinct(grams: Sequence[Any]) -> float:
    return len(set(grams)) / len(grams) if grams else 0.0

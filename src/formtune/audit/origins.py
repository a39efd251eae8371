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


def ungrounded(examples: Iterable[Example], format: Format) -> dict[str, dict[str, Any]]:
    """Values that answers should copy and that are not in their inputs: by field, their share and their rows.

    Words are compared without case and punctuation, numbers by their value; fields that the format says are derived,
    enums among them, are exempt.
    """
    counts: Counter[str] = Counter()
    rows: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        words = Words(example.input)
        for _, (value, path) in leaves(example.value, format.sets):
            if path in format.derived or isinstance(value, bool):
                continue
            counts[path] += 1
            if not words.hold(value):
                rows.setdefault(path, []).append({"where": example.where, "value": value, "source": example.origin})
    return {path: {"share": len(invented) / counts[path], "rows": invented} for path, invented in rows.items()}


def by_origin(examples: Sequence[Example], format: Format) -> dict[str, dict[str, Any]]:
    """For each source the number of its rows, of those with values that are not in the input, and its variety.

    `distinct_1` and `distinct_2` are the shares of the inputs' words and word pairs that are different (Li et al.,
    2016), `openings` the three most frequent first three words, with their shares.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.origin, []).append(example)
    size = min([SAMPLE, *map(len, groups.values())])
    sources = {}
    for name, rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        invented = {row["where"] for entry in ungrounded(rows, format).values() for row in entry["rows"]}
        words = [re.findall(r"\w+", e.input.casefold()) for e in random.Random(0).sample(rows, size)]
        openings = Counter(" ".join(re.findall(r"\w+", e.input.casefold())[:3]) for e in rows)
        sources[name] = {
            "rows": len(rows),
            "ungrounded": len(invented),
            "distinct_1": _distinct([w for text in words for w in text]),
            "distinct_2": _distinct([pair for text in words for pair in pairwise(text)]),
            "openings": {opening: count / len(rows) for opening, count in openings.most_common(3)},
        }
    return sources


def _distinct(grams: Sequence[Any]) -> float:
    return len(set(grams)) / len(grams) if grams else 0.0

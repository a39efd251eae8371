"""Where a model fails: the test rows by the length of their prompt, by who wrote them, by label."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from formtune.evaluation.outcomes import Outcome
from formtune.formats import Format
from formtune.formats.content import leaves

BUCKETS = 4  # of prompt lengths, with equally many rows
LABELS = 12  # a field with more values is not a label
FEW = 5  # a slice of fewer rows is left out

Slice = tuple[str, str, list[int]]  # what the rows are grouped by, the group's name, and its rows' indices


def slices(outcomes: Sequence[Outcome], format: Format, longest: int, production_p95: int | None = None) -> list[Slice]:
    """The slices with at least `FEW` rows that do not hold all rows; `longest` is the longest training prompt."""
    parts = _lengths([o.prompt_tokens for o in outcomes], longest, production_p95)
    parts += _groups("source", [o.origin for o in outcomes])
    labels: dict[str, list[str]] = {}
    for number, outcome in enumerate(outcomes):
        own = format.of_row(outcome.schema)
        for _, (value, path) in leaves(own.check(outcome.target).value, own.sets):
            if path in own.derived:
                labels.setdefault(path, [""] * len(outcomes))[number] = str(value)
    for path, values in labels.items():
        if len(set(values)) <= LABELS:
            parts += _groups(path or "label", values)
    return [part for part in parts if FEW <= len(part[2]) < len(outcomes)]


def _lengths(tokens: Sequence[int], longest: int, production_p95: int | None) -> list[Slice]:
    sizes = np.array(tokens)
    edges = np.unique(np.percentile(sizes, np.linspace(0, 100, BUCKETS + 1), method="higher")).tolist()
    edges[-1] += 1  # the last bucket includes the longest
    buckets = {f"{low} to {high - 1}": (sizes >= low) & (sizes < high) for low, high in pairwise(edges)}
    if production_p95 is not None:
        buckets[f"from production's P95 ({production_p95}) on"] = sizes >= production_p95
    buckets[f"longer than any training row ({longest})"] = sizes > longest
    return [("prompt tokens", name, np.flatnonzero(rows).tolist()) for name, rows in buckets.items()]


def _groups(group: str, names: Sequence[str]) -> list[Slice]:
    return [(group, name, [i for i, n in enumerate(names) if n == name]) for name in sorted(set(names) - {""})]

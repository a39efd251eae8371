"""Where a model fails: the test rows by the length of their input, by who wrote them, by label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from formtune.evaluation.outcomes import Outcome
from formtune.formats import Format
from formtune.formats.content import leaves

BUCKETS = 4  # of input lengths, with equally many rows
LABELS = 12  # a field with more values is not a label
FEW = 5  # a slice of fewer rows is left out


@dataclass(frozen=True, slots=True)
class Slice:
    """Some of the test rows."""

    group: str  # what rows are grouped by
    name: str
    rows: tuple[int, ...]  # indices of the outcomes


def slices(outcomes: Sequence[Outcome], format: Format, longest: int, production_p95: int | None = None) -> list[Slice]:
    """The slices with at least `FEW` rows that do not hold all rows.

    Args:
        outcomes: Of the test rows.
        format: Its fields with a fixed set of values are labels.
        longest: Tokens of the longest prompt in training.
        production_p95: Tokens of production's prompts at P95, None if unknown.
    """
    parts = [*_lengths(outcomes, longest, production_p95), *_groups("source", [o.origin for o in outcomes])]
    labels: dict[str, list[str]] = {}
    for number, outcome in enumerate(outcomes):
        for _, (value, path) in leaves(format.check(outcome.target).value, format.sets):
            if path in format.derived:
                labels.setdefault(path, [""] * len(outcomes))[number] = str(value)
    for path, values in labels.items():
        if len(set(values)) <= LABELS:
            parts += _groups(path or "label", values)
    return [part for part in parts if FEW <= len(part.rows) < len(outcomes)]


def _lengths(outcomes: Sequence[Outcome], longest: int, production_p95: int | None) -> Iterator[Slice]:
    if not outcomes:
        return
    sizes = np.array([outcome.prompt_tokens for outcome in outcomes])
    edges = np.unique(np.percentile(sizes, np.linspace(0, 100, BUCKETS + 1), method="higher")).tolist()
    edges[-1] += 1  # the last bucket includes the longest
    buckets = {f"{low} to {high - 1}": (sizes >= low) & (sizes < high) for low, high in pairwise(edges)}
    if production_p95 is not None:
        buckets[f"from production's P95 ({production_p95}) on"] = sizes >= production_p95
    buckets[f"longer than any training row ({longest})"] = sizes > longest
    for name, chosen in buckets.items():
        yield Slice("prompt tokens", name, tuple(np.flatnonzero(chosen).tolist()))


def _groups(group: str, names: Sequence[str]) -> Iterator[Slice]:
    for name in sorted(set(names) - {""}):
        yield Slice(group, name, tuple(number for number, other in enumerate(names) if other == name))

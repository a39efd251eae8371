"""Where a model fails: the test rows by the length of their input, by who wrote them, by label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from formtune.evaluation.outcomes import Outcome
from formtune.formats import Format
from formtune.formats.content import leaves

BUCKETS = 4  # of input lengths, equally many rows each
LABELS = 12  # values of a field at most for it to be a label
FEW = 5  # rows below which a slice says nothing


@dataclass(frozen=True, slots=True)
class Slice:
    """Some of the test rows.

    Args:
        group: What they are told apart by.
        name: Which of them these are.
        rows: Their indices among the outcomes.
    """

    group: str
    name: str
    rows: tuple[int, ...]


def slices(
    outcomes: Sequence[Outcome], contract: Format, longest: int, production_p95: int | None = None
) -> list[Slice]:
    """The slices that hold some and not all of the rows, those of fewer than `FEW` rows left out.

    Args:
        outcomes: Of the test rows.
        contract: Tells which fields are labels.
        longest: Tokens of the longest prompt that was trained on.
        production_p95: Tokens of production's prompts at P95, None where they are not known.
    """
    found = [*_lengths(outcomes, longest, production_p95), *_groups("source", outcomes, lambda one: one.origin)]
    labels: dict[str, list[str]] = {}
    for number, one in enumerate(outcomes):
        for _, (value, path) in leaves(contract.check(one.target).value, contract.sets):
            if path in contract.derived:
                labels.setdefault(path, [""] * len(outcomes))[number] = str(value)
    for path, values in labels.items():
        if len(set(values)) <= LABELS:
            at = dict(zip(map(id, outcomes), values, strict=True))
            found += _groups(path or "label", outcomes, lambda one, at=at: at[id(one)])  # type: ignore[misc]
    return [one for one in found if FEW <= len(one.rows) < len(outcomes)]


def _lengths(outcomes: Sequence[Outcome], longest: int, production_p95: int | None) -> Iterator[Slice]:
    sizes = np.array([one.prompt_tokens for one in outcomes])
    if not len(sizes):
        return
    edges = np.unique(np.percentile(sizes, np.linspace(0, 100, BUCKETS + 1), method="higher"))
    for low, high in pairwise(edges.tolist()):
        last = high == int(edges[-1])
        rows = np.flatnonzero((sizes >= low) & ((sizes <= high) if last else (sizes < high)))
        yield Slice("prompt tokens", f"{low} to {high if last else high - 1}", tuple(rows.tolist()))
    if production_p95 is not None:
        rows = np.flatnonzero(sizes >= production_p95)
        yield Slice("prompt tokens", f"from production's P95 ({production_p95}) on", tuple(rows.tolist()))
    yield Slice("prompt tokens", f"longer than any training row ({longest})", tuple(np.flatnonzero(sizes > longest)))


def _groups(group: str, outcomes: Sequence[Outcome], name: Callable[[Outcome], Any]) -> Iterator[Slice]:
    names: dict[str, list[int]] = {}
    for number, one in enumerate(outcomes):
        names.setdefault(name(one), []).append(number)
    for value, rows in sorted(names.items()):
        if value:
            yield Slice(group, value, tuple(rows))

"""Which of the rows with a valid format are used: one of each duplicate, none of a conflict, none of a leak.

All rows of all splits are clustered once. Rows are in one cluster if their inputs are the same but for case,
punctuation and spacing, if what they say beyond shared text (see `boilerplate`) is nearly the same (see `duplicates`),
or if one conversation continues the other. Only rows with the same system prompt and the same shared instruction are
compared, and never two of which one continues the other: there, another answer is right. The rules, in this order:

* **conflict**: rows of one split with the same input and different answers are all dropped, since nobody can tell
  which one is right. Inputs that differ only in case, punctuation, spacing or a mistyped letter count as the same,
  unless they show why the answers differ: each value that differs is in its own row's input and not in both ("call
  Anna", "call anna"). Inputs that differ by a word or a number may rightly have different answers. If the inputs do
  not show why, the two rows are **suspects**: used, and listed for a person to look at.
* **leak**: a cluster belongs to one split, the first that has a row in it. Its rows in later splits are dropped.
* **duplicate**: rows are taken in the order of their file; one with the answer and (nearly) the input of a row taken
  before is dropped.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, product
from typing import Any

import numpy as np

from formtune.data.boilerplate import split_shared
from formtune.data.cleaning import Example, Quarantined, quarantine
from formtune.data.duplicates import components, near_pairs
from formtune.formats.content import Words, leaves, typed

WORD = 5  # letters of the shortest word in which one letter counts as mistyped: "now" and "not" are two words
OPENING = 10  # a conversation continued in more ways is an opening such as "hello", and joins nothing

Near = Mapping[int, list[tuple[int, float]]]  # for each input those that are nearly the same, with their similarity


@dataclass(slots=True)
class Selection:
    """The rows to use, and the others."""

    kept: dict[str, list[Example]]  # used rows of each split
    quarantine: list[Quarantined] = field(default_factory=list)
    cluster: dict[str, float] = field(default_factory=dict)  # by place of a used row, its cluster's number in [0, 1)
    suspects: list[tuple[Example, Example]] = field(default_factory=list)
    shared: float = 0.0  # share of the inputs' text that many of them share, left out of the near comparison


def select(
    splits: Mapping[str, Sequence[Example]],
    threshold: float,
    sets: frozenset[str] = frozenset(),
    progress: Callable[[Iterator[int], int], Iterator[int]] | None = None,
) -> Selection:
    """Choose the rows to use; splits that come first own what they share with later ones.

    Two inputs are nearly the same from a Jaccard index of `threshold` on; 1 switches that off. `sets` are the paths of
    arrays in answers whose order does not matter.
    """
    keys: dict[str, int] = {}
    rows = [
        _Row(example, split, keys.setdefault(example.key, len(keys)), sets)
        for split, examples in splits.items()
        for example in examples
    ]
    groups: list[list[_Row]] = [[] for _ in keys]
    for row in rows:
        groups[row.at].append(row)
    names = list(keys)
    places = [_share(name) for name in names]
    selection = Selection({split: [] for split in splits})
    near, edges = _near(names, places, rows, threshold, progress, selection)
    edges += _continuations(names, rows)
    left, right = np.array(edges, np.int64).reshape(-1, 2).T
    clusters = components(len(names), left, right).tolist()
    selection.suspects = _mark_conflicts(groups, near)
    owners: dict[int, _Row] = {}
    taken: dict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        owner = owners.get(clusters[row.at], row)
        if row.rival is not None:
            entry = row.quarantined("conflict", "same input as {}, another answer", row.rival, row.similarity)
        elif owner.split != row.split:
            entry = row.quarantined("leak", "the input is also in {}", owner, 1.0 if owner.at == row.at else None)
        elif twin := _twin(row, taken, near):
            reason = "duplicate" if twin[0].text == row.text else "near_duplicate"
            entry = row.quarantined(reason, "same input and answer as {}", *twin)
        else:
            owners.setdefault(clusters[row.at], row)
            taken[row.at].append(row)
            selection.kept[row.split].append(row.example)
            continue
        selection.quarantine.append(entry)
    lowest: dict[int, float] = {}
    for place, cluster in zip(places, clusters, strict=True):
        lowest[cluster] = min(lowest.get(cluster, 1.0), place)
    selection.cluster = {row.example.where: lowest[clusters[at]] for at, group in taken.items() for row in group}
    return selection


class _Row:
    """An example with what it is compared by: the number of its input, and hashes."""

    __slots__ = ("answer", "at", "example", "rival", "similarity", "split", "task", "text")

    def __init__(self, example: Example, split: str, at: int, sets: frozenset[str]) -> None:
        self.example, self.split, self.at = example, split, at
        self.text, self.answer = hash(example.text), hash(typed(example.value, sets))
        self.rival: _Row | None = None
        self.similarity = 1.0
        self.task = ""  # the instruction that its input shares with others

    def quarantined(self, reason: str, detail: str, other: _Row, similarity: float | None = 1.0) -> Quarantined:
        where = other.example.where
        detail = detail.format(where)
        if similarity is None:
            detail = f"the input is nearly that of {where}, or continues it"
        elif similarity < 1:
            detail = detail.replace("same input", f"input {similarity:.0%} the same", 1)
        return quarantine(self.example, reason, detail, where)

    def comparable(self, other: _Row) -> bool:
        """Whether equal inputs of the two should have equal answers."""
        if (self.split, self.task) != (other.split, other.task) or self.example.system != other.example.system:
            return False
        if len(self.example.messages) == len(other.example.messages):
            return True
        mine, theirs = self.example.turns, other.example.turns
        shorter = min(len(mine), len(theirs))
        return len(mine) == len(theirs) or mine[:shorter] != theirs[:shorter]


def _near(
    names: Sequence[str],
    places: Sequence[float],
    rows: Iterable[_Row],
    threshold: float,
    progress: Callable[[Iterator[int], int], Iterator[int]] | None,
    selection: Selection,
) -> tuple[Near, list[tuple[int, int]]]:
    """The inputs that are nearly the same with the same instruction; and the pairs that make clusters."""
    near: dict[int, list[tuple[int, float]]] = defaultdict(list)
    if threshold >= 1:
        return near, []
    alike: dict[str, list[int]] = {}
    tasks = []
    for at, (rest, task) in enumerate(split_shared(names, places)):
        alike.setdefault(rest, []).append(at)
        tasks.append(task)
    selection.shared = 1 - sum(len(rest) * len(group) for rest, group in alike.items()) / max(sum(map(len, names)), 1)
    for row in rows:
        row.task = tasks[row.at]
    members = list(alike.values())
    left, right, index = near_pairs(list(alike), threshold, progress)
    edges = [(group[0], other) for group in members for other in group[1:]]
    edges += [(members[i][0], members[j][0]) for i, j in zip(left.tolist(), right.tolist(), strict=True)]
    equal = ((combinations(group, 2), 1.0) for group in members)
    close = zip(left.tolist(), right.tolist(), index.tolist(), strict=True)
    for pairs, similarity in chain(equal, ((product(members[i], members[j]), s) for i, j, s in close)):
        for one, other in pairs:
            if tasks[one] == tasks[other]:
                near[one].append((other, similarity))
                near[other].append((one, similarity))
    return near, edges


def _continuations(names: Sequence[str], rows: Sequence[_Row]) -> list[tuple[int, int]]:
    """Pairs of inputs of which one begins with all turns of the other, unless that is a mere opening."""
    begun: dict[tuple[str, ...], int] = {}
    longer: list[tuple[int, list[str]]] = []
    for row in rows:
        if sum(message["role"] != "system" for message in row.example.messages) == 2:
            begun[names[row.at],] = row.at
        else:
            longer.append((row.at, row.example.turns))
            begun.setdefault(tuple(longer[-1][1]), row.at)
    ways: dict[tuple[str, ...], dict[tuple[str, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for at, turns in longer:
        for end in range(1, len(turns)):
            if (start := tuple(turns[:end])) in begun:
                ways[start][tuple(turns[end : end + 2])].append(at)
    return [
        (begun[start], at)
        for start, continued in ways.items()
        if len(continued) <= OPENING
        for places in continued.values()
        for at in places
    ]


def _mark_conflicts(groups: list[list[_Row]], near: Near) -> list[tuple[Example, Example]]:
    """Give each row of a conflict its rival; returns the suspects."""
    suspects = []
    for at, group in enumerate(groups):
        alike: dict[Any, _Row] = {}
        for row in group:
            for first in (alike.setdefault((row.split, row.text), row), _first(group, row)):
                if _differ(first, row):
                    _set_rivals(first, row, 1.0)
        for other, similarity in near.get(at, ()):
            for row in group if other > at else ():
                first = _first(groups[other], row)
                if not _differ(first, row):
                    continue
                if _mistyped(first.example.key, row.example.key):
                    _set_rivals(first, row, similarity)
                else:
                    suspects.append((row.example, first.example))
        for row in group:  # rows of the same text share one conflict
            first = alike[row.split, row.text]
            if row.rival is not None and first.rival is None:
                first.rival, first.similarity = row, 1.0
        for row in group:
            first = alike[row.split, row.text]
            if row.rival is None and first.rival is not None:
                row.rival, row.similarity = first.rival, first.similarity
    return suspects


def _first(group: list[_Row], row: _Row) -> _Row:
    """The first of a group that the row can be compared with, the row itself if there is none."""
    return next((other for other in group if row.comparable(other)), row)


def _differ(a: _Row, b: _Row) -> bool:
    """Whether two answers differ and the inputs do not show why."""
    return a.answer != b.answer and not (a.text != b.text and _explained(a.example, b.example))


def _set_rivals(a: _Row, b: _Row, similarity: float) -> None:
    for one, other in ((a, b), (b, a)):
        if one.rival is None:
            one.rival, one.similarity = other, similarity


def _mistyped(a: str, b: str) -> bool:
    """Whether two inputs differ in nothing but a letter in some of their longer words."""
    pairs = list(zip(a.split(), b.split(), strict=False))
    return len(a.split()) == len(b.split()) and all(x == y or _one_letter(x, y) for x, y in pairs)


def _one_letter(x: str, y: str) -> bool:
    """Whether one letter was added, left out, replaced or swapped with its neighbor; digits are not letters."""
    if min(len(x), len(y)) < WORD or not (x.isalpha() and y.isalpha()):
        return False
    start = next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
    rest = x[start:], y[start:]
    tails = ((1, 1), (0, 1), (1, 0))
    return any(rest[0][i:] == rest[1][j:] for i, j in tails) or (
        rest[0][:2] == rest[1][:2][::-1] and rest[0][2:] == rest[1][2:]
    )


def _explained(a: Example, b: Example) -> bool:
    """Whether every value in which two answers differ is in its own input, and not in both."""
    values = dict(leaves(a.value)), dict(leaves(b.value))
    for path in values[0].keys() | values[1].keys():
        x, y = (leaf[path][0] if path in leaf else None for leaf in values)
        if typed(x) == typed(y):
            continue
        if not (_holds(a.input, x) and _holds(b.input, y)) or (_holds(b.input, x) and _holds(a.input, y)):
            return False
    return True


def _holds(text: str, value: Any) -> bool:
    """Whether a text holds a value: a string letter for letter, a number by its value, null always."""
    if isinstance(value, str):
        return value in text
    return value is None or (not isinstance(value, bool) and Words(text).hold(value))


def _twin(row: _Row, taken: Mapping[int, list[_Row]], near: Near) -> tuple[_Row, float] | None:
    """A row taken before with the same answer and the same or nearly the same input."""
    for place, similarity in ((row.at, 1.0), *near.get(row.at, ())):
        for other in taken.get(place, ()):
            if other.answer == row.answer and other.comparable(row):
                return other, similarity
    return None


def _share(key: str) -> float:
    """A number in [0, 1) that is a function of the text alone, so that a split survives new rows and reordering."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big") / 2**48

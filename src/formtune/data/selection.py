"""Chooses the rows to train on: one of each duplicate, none of a conflict, none of a leak (see docs/data.md)."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from formtune.data.cleaning import Example, Quarantined, folded
from formtune.data.encoded import Splits
from formtune.files import optional
from formtune.formats.content import typed

MAX_LINKS = 10  # continuations or groups of an input; with more it is an opening such as "hello", and joins nothing


@dataclass(eq=False, slots=True)
class _Row:
    example: Example
    input: int  # number of its input; the same for inputs that differ only in case, punctuation and spacing
    task: str  # the instruction that its input shares with others
    text: int  # hash of `Example.text`: prompt and schema, with single spaces
    answer: int  # hash of the answer's content
    loose: int  # hash of the answer's content without case, punctuation and spacing
    cluster: int = -1  # number of its cluster

    @property
    def answers(self) -> list[tuple[Any, int]]:
        """The groups of rows that must have one answer, and the answer of this row."""
        # Inputs that differ only in case or punctuation may be answered by copies of them: "call Anna", "call anna".
        split, task = self.example.split, (self.example.system, self.example.schema)
        return [((split, self.text), self.answer), ((split, self.input, *task), self.loose)]

    def comparable(self, other: _Row) -> bool:
        """Whether both rows have the same split and task, and neither continues the other's conversation."""
        a, b = ((r.example.split, r.task, r.example.system, r.example.schema) for r in (self, other))
        if a != b or len(self.example.messages) == len(other.example.messages):
            return a == b
        shorter, longer = sorted((self.example.turns, other.example.turns), key=len)
        return len(shorter) == len(longer) or longer[: len(shorter)] != shorter

    def quarantined(self, reason: str, other: _Row, what: str = "") -> Quarantined:
        where, relation = other.example.where, "same input as" if self.input == other.input else "near-duplicate of"
        detail = {
            "conflict": f"{relation} {where}, different answer",
            "input": f"the input is also in {where}",
            "group": f"another row of its group, {self.example.group[:40]!r}, is in {where}",
            "cluster": f"the input is a near-duplicate or a continuation of {where}",
        }.get(what or reason, f"{relation} {where}, same answer")
        return self.example.quarantined(reason, detail, where)


def select(
    examples: Sequence[Example], threshold: float, sets: frozenset[str] = frozenset(), cut: bool = True
) -> tuple[list[Example], Splits]:
    """Choose the rows to use; an input in several splits stays in the first.

    `threshold` is the Jaccard index of near-duplicates, 1 for none; `sets` are the paths of arrays without an order;
    `cut` is whether splits are then made from train, by cluster.
    """
    keyed = list(zip(examples, input_keys(examples), strict=True))
    inputs = {key: number for number, key in enumerate(dict.fromkeys(key for _, key in keyed))}
    hashes = [_unit_hash(key) for key in inputs]
    parts = [(key, "") for key in inputs]  # each input, and the text that it shares with many
    edges: list[tuple[int, int]] = []  # near-duplicates
    if threshold < 1 and (find := optional("quality.duplicates", "near_duplicates")):
        parts, edges = find(list(inputs), hashes, threshold)
    rows = [
        _Row(
            example, inputs[key], parts[inputs[key]][1], hash(example.text),
            # Not of the values: Python's hashes of -1 and -2 are equal.
            hash(typed(example.value, sets, scalar=repr)), hash(typed(example.value, sets, scalar=_loose)),
        )
        for example, key in keyed
    ]  # fmt: skip
    near: dict[int, list[int]] = defaultdict(list)  # near-duplicates of each input
    for i, j in edges:
        near[i].append(j)
        near[j].append(i)
    groups = {name: n for n, name in enumerate(dict.fromkeys(e.group for e in examples if e.group), len(inputs))}
    members = {(row.input, groups[row.example.group]) for row in rows if row.example.group}
    openings = {number for number, count in Counter(number for number, _ in members).items() if count > MAX_LINKS}
    pairs = [pair for pair in (*edges, *_continuations(rows), *sorted(members)) if openings.isdisjoint(pair)]
    clusters = components(len(inputs) + len(groups), *np.array(pairs, np.int64).reshape(-1, 2).T).tolist()
    for row in rows:
        row.cluster = clusters[groups.get(row.example.group, row.input)]
    answers: dict[Any, dict[int, _Row]] = defaultdict(dict)
    for row in rows:
        for group, answer in row.answers:
            answers[group].setdefault(answer, row)
    splits = Splits(shared=1 - sum(len(rest) for rest, _ in parts) / max(sum(map(len, inputs)), 1))
    owners: dict[tuple[str, Any], _Row] = {}
    used: dict[int, list[_Row]] = defaultdict(list)
    chosen = []
    for row in rows:
        keys = [("input", row.input), ("group", row.example.group or row), ("cluster", row.cluster)]
        owned = [(what, owners[what, which]) for what, which in keys if (what, which) in owners]
        # An opening can be in several clusters, and each of these in another split.
        split = row.example.split
        is_cut = cut and split == "train"
        leaks = [(what, o) for what, o in owned if o.example.split != split or (is_cut and o.cluster != row.cluster)]
        similar = (other for number in (row.input, *near.get(row.input, ())) for other in used.get(number, ()))
        duplicate = next((other for other in similar if other.answer == row.answer and other.comparable(row)), None)
        others = (other for group, mine in row.answers for theirs, other in answers[group].items() if theirs != mine)
        if other := next(others, None):
            splits.quarantine.append(row.quarantined("conflict", other))
        elif duplicate and split == "train":  # a test file stays comparable
            reason = "duplicate" if duplicate.text == row.text else "near_duplicate"
            splits.quarantine.append(row.quarantined(reason, duplicate))
        elif leaks:
            what, owner = leaks[0]
            splits.quarantine.append(row.quarantined("leak", owner, what))
        else:
            for key in keys:
                owners.setdefault(key, row)
            used[row.input].append(row)
            chosen.append(row.example)
    lowest = {cluster: number for number, cluster in sorted(zip(hashes, clusters, strict=False), reverse=True)}
    # Hashed again: the lowest of many numbers would be in the first split nearly always.
    lowest = {cluster: _unit_hash(str(number)) for cluster, number in lowest.items()}
    lowest |= {clusters[groups[name]]: _unit_hash(name) for name in sorted(groups, reverse=True)}
    splits.cluster = {row.example.where: lowest[row.cluster] for group in used.values() for row in group}
    return chosen, splits


def components(count: int, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int32]:
    """The cluster number of each of `count` texts; pairs join texts directly or in a chain."""
    edges = csr_array((np.ones(len(left), np.bool_), (left, right)), shape=(count, count))
    return connected_components(edges, directed=False)[1]


def input_keys(examples: Sequence[Example]) -> list[str]:
    """`Example.key` of each input, with its system prompt if the input has many that are twice its length."""
    # Such an input, for example "Extract the fields", only asks about the text in the system prompt.
    keys, prompts = [example.key for example in examples], [example.system for example in examples]
    systems: dict[str, set[str]] = defaultdict(set)
    for key, prompt in zip(keys, prompts, strict=True):
        if len(prompt) > 2 * len(key):
            systems[key].add(prompt)
    many = {key for key, different in systems.items() if len(different) > MAX_LINKS}
    return [folded(f"{prompt}\n{key}") if key in many else key for key, prompt in zip(keys, prompts, strict=True)]


def _continuations(rows: Sequence[_Row]) -> Iterator[tuple[int, int]]:
    """Pairs of inputs of which one begins with all turns of the other, unless that is an opening."""
    if all(message["role"] != "assistant" for row in rows for message in row.example.messages[:-1]):
        return  # most data has one turn each
    inputs: dict[tuple[str, ...], int] = {}
    for row in rows:
        inputs.setdefault(tuple(row.example.turns), row.input)
    longer: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for turns in inputs:
        for end in range(1, len(turns)):
            if turns[:end] in inputs:
                longer[turns[:end]].append(turns)
    for start, conversations in longer.items():
        if len({turns[len(start) : len(start) + 2] for turns in conversations}) <= MAX_LINKS:
            yield from ((inputs[start], inputs[turns]) for turns in conversations)


def _loose(value: Any) -> Any:
    return folded(value) if isinstance(value, str) else (repr(value),)


def _unit_hash(key: str) -> float:
    """A number in [0, 1) from the text alone, so that new rows and reordering do not change a split."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big") / 2**48

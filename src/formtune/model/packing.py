"""Rows that begin alike share their beginning: a trie of their tokens, laid out as one sequence.

Three rows of two system prompts, P and Q, where the first two rows' prompts also go on alike (s):

    token      P P P P s s a a a a b b b Q Q Q c c c c      depth first, so that whoever continues a segment
    position   0 1 2 3 4 5 6 7 8 9 6 7 8 0 1 2 3 4 5 6      stands right behind it, up to the segment's `stop`
    segment    [P        stop -------->)   [Q   stop ->)
                       [s  stop ------>)

A token sees the earlier tokens of its own segment and all of those that its segment continues, never another row:
exactly what it would see alone. Every row owns at least the token before its answer, where the first target is
predicted, so no prediction is shared. What is computed shrinks; what a step contains does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from formtune.base.row import Row

# A shared segment costs every token behind it one more attention call and its merging, about a tenth of a token's
# own work: sharing less than this share of the tokens behind it would be slower than computing them again.
GAIN = 1 / 8


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) of a packed sequence; those in [end, stop) continue them."""

    start: int
    end: int
    stop: int


@dataclass(frozen=True, slots=True)
class Packed:
    """One sequence that holds several rows.

    Args:
        rows: Which rows, by their index among those given, in the order of their leaves.
        ids: Token ids, shape (1, tokens).
        positions: Position of each token in its own row, shape (1, tokens).
        segments: The trie's nodes, depth first.
        leaves: For each row the index of the segment that it owns; its last tokens predict the row's targets.
        predicting: Indices of the tokens that predict targets, row after row, shape (targets,).
        targets: What they should predict, -1 where there is no gold answer, shape (targets,).
        sizes: For each row the number of its targets, at least 1.
        longest: Tokens of the longest row.
    """

    rows: list[int]
    ids: Tensor
    positions: Tensor
    segments: list[Segment]
    leaves: list[int]
    predicting: Tensor
    targets: Tensor
    sizes: list[int]
    longest: int

    def stops(self) -> Tensor:
        """For each token the end of what may look at it, so that q sees k if `k <= q < stops[k]`; shape (tokens,)."""
        stops = torch.empty(self.ids.size(1), dtype=torch.long)
        for segment in self.segments:
            stops[segment.start : segment.end] = segment.stop
        return stops

    def paths(self) -> list[list[Segment]]:
        """For each row the segments that it consists of, from the root to its leaf."""
        open_: list[Segment] = []
        found = []
        leaves = set(self.leaves)
        for i, segment in enumerate(self.segments):
            while open_ and open_[-1].stop <= segment.start:
                open_.pop()
            open_.append(segment)
            if i in leaves:
                found.append(list(open_))
        return found


def pack(rows: Sequence[Row], tokens: int, room: int = 0) -> Iterator[Packed]:
    """Lay rows out in packed sequences, similar rows together.

    Args:
        rows: The rows of a step or of an evaluation batch.
        tokens: Tokens of one sequence; a row longer than that gets one of its own.
        room: Tokens that each row may need on top of those computed now.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].prompt)
    # Rows in the order of their letters: the longest beginning that two rows share is the least of those of the
    # neighbours between them.
    alike = [_alike(rows[a].prompt, rows[b].prompt) for a, b in pairwise(order)]
    first = 0
    while first < len(order):
        last, used = first, 0
        while last < len(order):
            new = _computed(rows[order[last]]) + room - (alike[last - 1] if last > first else 0)
            if last > first and used + new > tokens:
                break
            last, used = last + 1, used + new
        # What saves too little is not shared, so the sequence can come out longer than it was taken to be.
        while (
            (packed := _lay_out(rows, order[first:last], alike[first : last - 1]))
            and last - first > 1
            and packed.ids.size(1) + room * (last - first) > tokens
        ):
            last -= 1
        yield packed
        first = last


def _computed(row: Row) -> int:
    """Tokens of a row that are fed in: nothing is predicted from the last one."""
    return len(row.prompt) + max(len(row.target) - 1, 0)


def _alike(a: list[int], b: list[int]) -> int:
    """Tokens that two prompts have in common at their beginning, at most all but the last of each."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _lay_out(rows: Sequence[Row], order: list[int], alike: list[int]) -> Packed:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[list[int]] = []
    leaves: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    sizes = [_computed(rows[i]) for i in order]

    def add(tokens: list[int], depth: int) -> int:
        segments.append([len(ids), len(ids) + len(tokens), 0])
        ids.extend(tokens)
        positions.extend(range(depth, depth + len(tokens)))
        return len(segments) - 1

    # (first row, end, tokens that are laid out already) or, once a shared segment's rows are done, that segment.
    todo: list[tuple[int, int, int] | int] = [(0, len(order), 0)]
    while todo:
        item = todo.pop()
        if isinstance(item, int):
            segments[item][2] = len(ids)
            continue
        a, b, depth = item
        if b - a == 1:
            row = rows[order[a]]
            leaves.append(add((row.prompt + row.target)[depth : sizes[a]], depth))
            segments[leaves[-1]][2] = len(ids)
            wanted = row.target or [-1]
            predicting += range(len(ids) - len(wanted), len(ids))
            targets += wanted
            continue
        shared = min(alike[a : b - 1])
        saved = (shared - depth) * (b - a - 1)
        if saved > GAIN * (sum(sizes[a:b]) - shared * (b - a)):
            todo.append(add(rows[order[a]].prompt[depth:shared], depth))
            depth = shared
        cuts = [a, *(i + 1 for i in range(a, b - 1) if alike[i] == shared), b]
        todo += [(x, y, depth) for x, y in reversed(list(pairwise(cuts)))]
    return Packed(
        order,
        torch.tensor([ids]),
        torch.tensor([positions]),
        [Segment(*segment) for segment in segments],
        leaves,
        torch.tensor(predicting),
        torch.tensor(targets),
        [max(len(rows[i].target), 1) for i in order],
        max(sizes),
    )

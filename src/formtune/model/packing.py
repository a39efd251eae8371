"""Rows share the prefixes of their prompts: a trie of their tokens, laid out as one sequence.

Three rows with two system prompts, P and Q; the first two rows' prompts share some more tokens (s):

    token      P P P P s s a a a a b b b Q Q Q c c c c      depth first: what continues a segment
    position   0 1 2 3 4 5 6 7 8 9 6 7 8 0 1 2 3 4 5 6      follows it directly, up to the segment's `stop`
    segment    [P        stop -------->)   [Q   stop ->)
                       [s  stop ------>)

A token attends to the earlier tokens of its own segment and to the segments that this one continues, as if its row were
computed alone. Every row owns at least the token before its target, which predicts the first label.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from formtune.base.row import Row

# A shared segment costs each token that continues it one more attention call, about a tenth of the token's own cost:
# sharing fewer than this share of those tokens would be slower than computing the prefix again.
GAIN = 1 / 8


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) of a packed sequence; those in [end, stop) continue them."""

    start: int
    end: int
    stop: int
    position: int  # of its first token in every row that it is part of


@dataclass(frozen=True, slots=True)
class Packed:
    """One micro-batch: a sequence that holds several rows."""

    rows: list[int]  # their indices in the batch, in the order of their leaves
    sizes: list[int]  # for each row the number of its labels, at least 1
    ids: Tensor  # token ids, (1, tokens)
    positions: Tensor  # of each token in its own row, (1, tokens)
    predicting: Tensor  # indices of the tokens that predict labels, row after row, (labels,)
    targets: Tensor  # the labels, -1 for rows without a target, (labels,)
    segments: list[Segment]  # the trie's nodes, depth first
    leaves: list[int]  # for each row the index of the segment that it owns; its last tokens predict the row's labels
    longest: int  # tokens of the longest row

    def stops(self) -> Tensor:
        """For each token the end of those that attend to it: q attends to k if `k <= q < stops[k]`; (tokens,)."""
        stops = torch.empty(self.ids.size(1), dtype=torch.long)
        for segment in self.segments:
            stops[segment.start : segment.end] = segment.stop
        return stops

    def paths(self) -> list[list[Segment]]:
        """For each row its segments, from the root to its leaf."""
        leaves = [self.segments[i] for i in self.leaves]
        return [[s for s in self.segments if s.start <= leaf.start < s.stop] for leaf in leaves]


def pack(rows: Sequence[Row], tokens: int, extra: int = 0) -> Iterator[Packed]:
    """Packed sequences of similar rows, of one row or at most `tokens` tokens, where a row counts `extra` more."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].prompt_ids)
    # In sorted order, the prefix that two rows share is the shortest of those that neighbors between them share.
    common = [_shared(rows[a].prompt_ids, rows[b].prompt_ids) for a, b in pairwise(order)]
    first = 0
    while first < len(order):
        last, used = first, 0
        while last < len(order):
            new = _computed(rows[order[last]]) + extra - (common[last - 1] if last > first else 0)
            if last > first and used + new > tokens:
                break
            last, used = last + 1, used + new
        packed = _lay_out(rows, order[first:last], common[first : last - 1])
        # A prefix that saves too little is not shared, so the sequence can be longer than estimated.
        while last - first > 1 and packed.ids.size(1) + extra * (last - first) > tokens:
            last -= 1
            packed = _lay_out(rows, order[first:last], common[first : last - 1])
        yield packed
        first = last


def _computed(row: Row) -> int:
    """Input tokens of a row: the last target token predicts nothing."""
    return len(row.prompt_ids) + max(len(row.target_ids) - 1, 0)


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the prefix that two prompts share, at most all but the last token of each."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _lay_out(rows: Sequence[Row], order: list[int], common: list[int]) -> Packed:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[list[int]] = []  # the fields of each `Segment`
    leaves: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    lengths = [_computed(rows[i]) for i in order]

    def add(tokens: list[int], depth: int) -> int:
        end = len(ids) + len(tokens)
        segments.append([len(ids), end, end, depth])
        ids.extend(tokens)
        positions.extend(range(depth, depth + len(tokens)))
        return len(segments) - 1

    def lay_out(a: int, b: int, depth: int) -> None:
        """Rows [a, b) of the order, of which `depth` tokens are laid out already."""
        if b - a == 1:
            row = rows[order[a]]
            leaves.append(add((row.prompt_ids + row.target_ids)[depth : lengths[a]], depth))
            labels = row.target_ids or [-1]
            predicting.extend(range(len(ids) - len(labels), len(ids)))
            targets.extend(labels)
            return
        shared, segment = min(common[a : b - 1]), None
        saved = (shared - depth) * (b - a - 1)
        if saved > GAIN * (sum(lengths[a:b]) - shared * (b - a)):
            segment = add(rows[order[a]].prompt_ids[depth:shared], depth)
            depth = shared
        for x, y in pairwise([a, *(i + 1 for i in range(a, b - 1) if common[i] == shared), b]):
            lay_out(x, y, depth)
        if segment is not None:
            segments[segment][2] = len(ids)

    lay_out(0, len(order), 0)
    return Packed(
        rows=order,
        sizes=[max(len(rows[i].target_ids), 1) for i in order],
        ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
        segments=[Segment(*segment) for segment in segments],
        leaves=leaves,
        longest=max(lengths),
    )

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
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from formtune.base.row import Row
from formtune.model.loss import NO_LABEL

# A prefix is shared if that saves at least this fraction of the tokens that continue it; else sharing is slower.
MIN_SAVED = 1 / 8


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, end) of a packed sequence; those in [end, stop) continue them."""

    start: int
    end: int
    stop: int
    position: int  # of its first token, in every row that contains it


@dataclass(frozen=True, slots=True)
class Packed:
    """One micro-batch: a sequence of several rows."""

    rows: list[int]  # their indices in the batch, in the order of their leaves
    sizes: list[int]  # for each row the number of its labels, at least 1
    ids: Tensor  # token ids, (1, tokens)
    positions: Tensor  # of each token in its own row, (1, tokens)
    predicting: Tensor  # indices of the tokens that predict labels, row after row, (labels,)
    targets: Tensor  # the labels, NO_LABEL for rows without a target, (labels,)
    segments: list[Segment]  # the trie's nodes, depth first
    leaves: list[Segment]  # for each row the segment that it owns; its last tokens predict the row's labels

    def stops(self) -> Tensor:
        """For each token the end of those that attend to it: q attends to k if `k <= q < stops[k]`; (tokens,)."""
        return torch.cat([torch.full((s.end - s.start,), s.stop) for s in self.segments])

    def paths(self) -> list[list[Segment]]:
        """For each row its segments, from the root to its leaf."""
        return [[s for s in self.segments if s.start <= leaf.start < s.stop] for leaf in self.leaves]


def pack(rows: Sequence[Row], tokens: int, extra: int = 0) -> Iterator[Packed]:
    """Packed sequences of at most `tokens` tokens, or of one longer row; each row counts `extra` tokens more."""
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
    segments: list[Segment] = []
    leaves: list[Segment] = []
    inputs = [(rows[i].prompt_ids + rows[i].target_ids)[: _computed(rows[i])] for i in order]

    def add(tokens: list[int], depth: int) -> None:
        end = len(ids) + len(tokens)
        segments.append(Segment(len(ids), end, end, depth))
        ids.extend(tokens)

    def lay_out(a: int, b: int, depth: int) -> None:
        """Rows [a, b) of the order, of which `depth` tokens are laid out already."""
        if b - a == 1:
            add(inputs[a][depth:], depth)
            leaves.append(segments[-1])
            return
        shared, first = min(common[a : b - 1]), len(segments)
        saved = (shared - depth) * (b - a - 1)
        gains = saved > MIN_SAVED * (sum(map(len, inputs[a:b])) - shared * (b - a))
        if gains:
            add(inputs[a][depth:shared], depth)
        for x, y in pairwise([a, *(i + 1 for i in range(a, b - 1) if common[i] == shared), b]):
            lay_out(x, y, shared if gains else depth)
        if gains:
            segments[first] = replace(segments[first], stop=len(ids))

    lay_out(0, len(order), 0)
    labels = [rows[i].target_ids or [NO_LABEL] for i in order]
    pairs = list(zip(leaves, labels, strict=True))
    return Packed(
        rows=order,
        sizes=list(map(len, labels)),
        ids=torch.tensor([ids]),
        positions=torch.cat([torch.arange(s.position, s.position + s.end - s.start) for s in segments])[None],
        predicting=torch.cat([torch.arange(leaf.end - len(part), leaf.end) for leaf, part in pairs]),
        targets=torch.tensor([label for part in labels for label in part]),
        segments=segments,
        leaves=leaves,
    )

"""Greedy decoding that continues from the KV cache of a teacher-forced pass, shared prefixes included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from formtune.model.packing import Segment

GROWTH = 32  # tokens that the cache grows by at a time


class CachedAttention:
    """Attention of one new token per row to the row's own KV cache and to the shared segments that it continues.

    Columns of the scores: | positions of the shared segments, not copied | the row's own tokens |

    Args:
        kept: KV cache of a packed sequence, by layer, shape (1, heads, tokens, width).
        paths: For each row its segments, from the root to its leaf; rows in the order of their leaves.
        own: For each row how many of its leaf's tokens belong to the cache.
    """

    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]], paths: list[list[Segment]], own: list[int]) -> None:
        device = next(iter(kept.values()))[0].device
        self.kept, self.paths = kept, [path[:-1] for path in paths]
        self.starts = torch.tensor([sum(s.end - s.start for s in path) for path in self.paths], device=device)
        self.at = torch.tensor(own, device=device)  # where each row's next token goes
        leaves = torch.tensor([path[-1].start for path in paths], device=device)
        take = leaves[:, None] + torch.arange(max(own), device=device).clamp_max(self.at[:, None] - 1)
        self.own = {i: tuple(x[0][:, take].transpose(0, 1) for x in pair) for i, pair in kept.items()}
        self._regroup()

    @property
    def positions(self) -> Tensor:
        """Position of each row's next token, shape (rows, 1)."""
        return (self.starts + self.at)[:, None]

    def advance(self) -> None:
        """Count the tokens that were just fed."""
        self.at = self.at + 1
        self._begin()

    def select(self, rows: list[int]) -> None:
        """Keep these rows only."""
        index = torch.tensor(rows, device=self.at.device)
        self.paths = [self.paths[i] for i in rows]
        self.starts, self.at = self.starts[index], self.at[index]
        self.own = {i: tuple(x[index] for x in pair) for i, pair in self.own.items()}
        self._regroup()

    def _regroup(self) -> None:
        """Find which rows [a, b) continue each shared segment, and the position at which it begins."""
        spans: dict[Segment, list[int]] = {}
        for i, path in enumerate(self.paths):
            position = 0
            for segment in path:
                spans.setdefault(segment, [i, i, position])[1] = i + 1
                position += segment.end - segment.start
        self.shared = [(segment, a, b, position) for segment, (a, b, position) in spans.items()]
        self._begin()

    def _begin(self) -> None:
        self._longest = int(self.at.max()) + 1  # own tokens of the longest row, with the one about to be fed
        self._masks: dict[int | None, Tensor] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """See `Attend`; one token per row."""
        rows, heads, _, width = query.shape
        keys, values = self._append(layer, key, value)
        groups = key.size(1)
        query = query.view(rows, groups, heads // groups, width) * (width**-0.5 if scaling is None else scaling)
        mask = self._mask(window, keys.size(2))
        edge = mask.size(-1) - keys.size(2)
        scores = query.new_empty(rows, groups, heads // groups, mask.size(-1)).fill_(float("-inf"))
        scores[..., edge:] = query @ keys.mT
        for segment, a, b, position in self.shared:
            some = query[a:b].transpose(0, 1).flatten(1, 2) @ self.kept[layer][0][0, :, segment.start : segment.end].mT
            scores[a:b, ..., position : position + some.size(-1)] = some.unflatten(1, (b - a, -1)).transpose(0, 1)
        weights = (scores.float() + mask).softmax(-1).to(value.dtype)
        out = weights[..., edge:] @ values
        for segment, a, b, position in self.shared:
            some = weights[a:b, ..., position : position + segment.end - segment.start].transpose(0, 1).flatten(1, 2)
            seen = some @ self.kept[layer][1][0, :, segment.start : segment.end]
            out[a:b] += seen.unflatten(1, (b - a, -1)).transpose(0, 1)
        return out.view(rows, heads, 1, width)

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        pair = self.own[layer]
        if pair[0].size(2) < self._longest:
            pair = self.own[layer] = tuple(F.pad(x, (0, 0, 0, GROWTH)) for x in pair)
        rows = torch.arange(len(self.at), device=self.at.device)
        for cache, new in zip(pair, (key, value), strict=True):
            cache[rows, :, self.at] = new[:, :, 0]
        return pair[0][:, :, : self._longest], pair[1][:, :, : self._longest]

    def _mask(self, window: int | None, own: int) -> Tensor:
        """Added to the scores of all layers with this window, shape (rows, 1, 1, columns)."""
        if window not in self._masks:
            edge = max((position + s.end - s.start for s, _, _, position in self.shared), default=0)
            columns = torch.arange(edge + own, device=self.at.device)[None]
            starts, now = self.starts[:, None], self.positions
            position = torch.where(columns < edge, columns, columns - edge + starts)
            seen = (position <= now) & ((columns >= edge) | (columns < starts))
            if window is not None:
                seen &= now - position < window
            mask = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


def greedy(
    feed: Callable[[Tensor, Tensor, CachedAttention], Tensor],
    choose: Callable[[Tensor, list[int]], list[int]],
    cache: CachedAttention,
    before: Sequence[int],
    begun: Sequence[list[int]],
    stop_ids: Sequence[int],
    limits: Sequence[int],
) -> list[list[int]]:
    """Generate each row's answer to its end, up to and including a stop token.

    Args:
        feed: (ids of shape (rows, 1), positions of the same shape, cache) -> logits, shape (rows, vocabulary).
        choose: (these logits, which rows they belong to) -> the next tokens.
        cache: All tokens fed so far.
        before: For each row the token before its answer, fed if the answer is still empty.
        begun: For each row its answer so far; its last token was not fed yet.
        stop_ids: Tokens that end an answer.
        limits: For each row how many tokens its answer may have.
    """
    answers = [list(answer) for answer in begun]
    alive = list(range(len(answers)))  # the rows in the cache
    while alive:
        last = torch.tensor([[(answers[i] or before[i : i + 1])[-1]] for i in alive], device=cache.at.device)
        tokens = choose(feed(last, cache.positions, cache), alive)
        cache.advance()
        for i, token in zip(alive, tokens, strict=True):
            answers[i].append(token)
        unfinished = [j for j, i in enumerate(alive) if answers[i][-1] not in stop_ids and len(answers[i]) < limits[i]]
        if len(unfinished) < len(alive):
            alive = [alive[j] for j in unfinished]
            if alive:
                cache.select(unfinished)
    return answers

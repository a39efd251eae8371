"""Attention of generated tokens to the KV cache of a teacher-forced pass, shared prefixes included."""

import torch
import torch.nn.functional as F
from torch import Tensor

from formtune.model.packing import Segment

GROWTH = 32  # tokens that the cache grows by at a time


class CachedAttention:
    """Attention of one new token per row to the row's own KV cache and to the shared segments that it continues.

    Columns of the scores: | positions of the shared segments, not copied | the row's own tokens |

    `kept` is the KV cache of a packed sequence by layer, each of shape (1, heads, tokens, width). `paths` has the rows'
    segments, in the order of their leaves. `own` is the number of tokens of each leaf that belong to the cache.
    """

    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]], paths: list[list[Segment]], own: list[int]) -> None:
        device = next(iter(kept.values()))[0].device
        self.kept, self.paths = kept, paths
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
        self.paths, self.at = [self.paths[i] for i in rows], self.at[rows]
        self.own = {i: tuple(x[rows] for x in pair) for i, pair in self.own.items()}
        self._regroup()

    def _regroup(self) -> None:
        """Find which rows [a, b) continue each shared segment."""
        spans: dict[Segment, list[int]] = {}
        for i, path in enumerate(self.paths):
            for segment in path[:-1]:
                spans.setdefault(segment, [i, i])[1] = i + 1
        columns = {s: slice(s.position, s.position + s.end - s.start) for s in spans}
        self.shared = [(slice(s.start, s.end), columns[s], slice(a, b)) for s, (a, b) in spans.items()]
        starts = [path[-1].position for path in self.paths]  # tokens before each row's own ones
        self.starts, self._edge = torch.tensor(starts, device=self.at.device), max(starts)
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
        mask = self._mask(window)
        scores = query.new_full((*query.shape[:3], mask.size(-1)), float("-inf"))
        scores[..., self._edge :] = query @ keys.mT
        for tokens, columns, among in self.shared:
            part = query[among].transpose(0, 1).flatten(1, 2) @ self.kept[layer][0][0, :, tokens].mT
            scores[among, ..., columns] = part.unflatten(1, (among.stop - among.start, -1)).transpose(0, 1)
        weights = (scores.float() + mask).softmax(-1).to(value.dtype)
        out = weights[..., self._edge :] @ values
        for tokens, columns, among in self.shared:
            part = weights[among, ..., columns].transpose(0, 1).flatten(1, 2) @ self.kept[layer][1][0, :, tokens]
            out[among] += part.unflatten(1, (among.stop - among.start, -1)).transpose(0, 1)
        return out.view(rows, heads, 1, width)

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        pair = self.own[layer]
        if pair[0].size(2) < self._longest:
            pair = self.own[layer] = tuple(F.pad(x, (0, 0, 0, GROWTH)) for x in pair)
        rows = torch.arange(len(self.at), device=self.at.device)
        for cache, new in zip(pair, (key, value), strict=True):
            cache[rows, :, self.at] = new[:, :, 0]
        return pair[0][:, :, : self._longest], pair[1][:, :, : self._longest]

    def _mask(self, window: int | None) -> Tensor:
        """Added to the scores of all layers with this window, shape (rows, 1, 1, columns)."""
        if window not in self._masks:
            columns = torch.arange(self._edge + self._longest, device=self.at.device)[None]
            starts, now = self.starts[:, None], self.positions
            position = torch.where(columns < self._edge, columns, columns - self._edge + starts)
            seen = (position <= now) & ((columns >= self._edge) | (columns < starts))
            if window is not None:
                seen &= now - position < window
            mask = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))
            self._masks[window] = mask[:, None, None]
        return self._masks[window]

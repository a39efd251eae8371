"""Exact attention within packed sequences, computed only for pairs of tokens that attend to each other.

On a CPU a token's softmax is over several pieces of keys, each one call of a fused kernel, merged by their denominators
as in ring attention (arXiv:2310.01889). On a GPU one FlexAttention kernel skips fully masked blocks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from formtune.model.lora import raise_recompile_limit
from formtune.packing.packed import Packed, Segment

NAME = "formtune"  # of `attention_forward` in transformers
BLOCK = 128  # tokens on a side of a block that FlexAttention skips if nothing in it is seen
GROWTH = 32  # tokens that the cache grows by at a time

# (layer, query, key, value, scaling, sliding window) -> output, all of shape (batch, heads, tokens, width).
Attend = Callable[[int, Tensor, Tensor, Tensor, float | None, int | None], Tensor]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@functools.cache
def _flex() -> Callable[..., Any]:
    # One kernel for each dtype, window, gradient mode and block count (1, or more); uncompiled, it stores all scores.
    raise_recompile_limit()
    return torch.compile(flex_attention, dynamic=True)


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, attend: Attend | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention implementation of transformers; `attend` reaches it as a keyword argument of the decoder."""
    unsupported = {name: options.get(name) for name in ("softcap", "s_aux", "position_bias")}
    unsupported["mask"] = attention_mask if attend and attention_mask is not None and attention_mask.numel() else None
    if names := [name for name, value in unsupported.items() if value is not None]:
        raise NotImplementedError(f"packed attention does not support: {', '.join(names)}")
    if attend is not None:
        return attend(module.layer_idx, query, key, value, scaling, sliding_window).transpose(1, 2), None
    # Rows are not packed, for example if a callback calls the model.
    if attention_mask is None and sliding_window is not None and key.size(2) > sliding_window:
        raise NotImplementedError("this call needs a mask for its window: call set_attn_implementation('sdpa') first")
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    return out, None


class PackedAttention:
    """Attention of one packed sequence (see `Attend`); without gradients it fills the KV cache, for decoding."""

    def __init__(self, packed: Packed) -> None:
        self.packed, self.longest = packed, int(packed.positions.max()) + 1
        self.cache: dict[int, tuple[Tensor, Tensor]] = {}  # by layer
        self._masks: dict[int | None, Any] = {}  # by window: pieces on a CPU, else a block mask

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        if not torch.is_grad_enabled():
            self.cache[layer] = (key, value)
        if window is not None and self.longest <= window:
            window = None
        if window not in self._masks:
            self._masks[window] = (_pieces if query.is_cpu else _block_mask)(self.packed, window, query)
        mask = self._masks[window]
        if query.is_cpu:
            return _Pieces.apply(query, key, value, mask, scaling)  # type: ignore[no-any-return]
        # By default, sequences below 128 tokens get a kernel for decoding, which cannot be compiled for all shapes.
        options: Any = {"BACKEND": "TRITON"}
        return _flex()(  # type: ignore[no-any-return]
            query, key, value, block_mask=mask, scale=scaling, enable_gqa=True, kernel_options=options
        )


class Piece(NamedTuple):
    """Queries and the keys that they attend to in one kernel call."""

    queries: slice
    keys: slice
    own: bool  # whether the keys are the queries' own segment, their first piece
    mask: Tensor | None = None  # added to the scores, under a sliding window


def _pieces(packed: Packed, window: int | None, query: Tensor) -> list[Piece]:
    """Each segment with itself, then each shared segment with the tokens that continue it."""
    pieces = [Piece(slice(s.start, s.end), slice(s.start, s.end), True) for s in packed.segments]
    pieces += [Piece(slice(s.end, s.stop), slice(s.start, s.end), False) for s in packed.segments if s.stop > s.end]
    if window is None:
        return pieces
    masked, positions = [], packed.positions[0]
    for piece in pieces:
        distance = positions[piece.queries, None] - positions[None, piece.keys]
        seen = (distance < window) & (distance >= 0)
        if seen.any():
            mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, float("-inf"))
            masked.append(piece._replace(mask=mask))
    return masked


class _Pieces(torch.autograd.Function):
    """out = sum_i exp(z_i - z) out_i, with z = logsumexp_i z_i and z_i = logsumexp(scores of piece i).

    From the merged `out` and `z` the backward kernel recomputes the true probabilities of a piece.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: list[Piece], scale: float | None
    ) -> Tensor:
        batch, heads, tokens, width = query.shape
        # The model transposes to (batch, tokens, heads, width) next: in this layout, no copy is needed.
        out = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
        z = torch.empty(batch, heads, tokens, dtype=torch.promote_types(query.dtype, torch.float32))
        # The kernel accepts fewer key heads than query heads, but then takes up to twice the time.
        wide_key, wide_value = (x.repeat_interleave(heads // x.size(1), 1) for x in (key, value))
        for piece in pieces:
            q, k, mask = piece.queries, piece.keys, piece.mask
            part, part_z = _forward(
                query[:, :, q], wide_key[:, :, k], wide_value[:, :, k], 0.0, piece.own and mask is None,
                attn_mask=mask, scale=scale,
            )  # fmt: skip
            if mask is not None:  # the kernel returns z = 0 for a query that attends to none of these keys
                part_z.masked_fill_(mask.isneginf().all(-1), float("-inf"))
            if piece.own:  # nothing to merge with yet
                out[:, :, q], z[:, :, q] = part, part_z
                continue
            merged_z = torch.logaddexp(z[:, :, q], part_z)
            out[:, :, q] *= (z[:, :, q] - merged_z).exp_().unsqueeze(-1)
            out[:, :, q] += part * (part_z - merged_z).exp_().unsqueeze(-1)
            z[:, :, q] = merged_z
        ctx.save_for_backward(query, key, value, out, z)
        ctx.pieces, ctx.scale = pieces, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, z = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for piece in ctx.pieces:
            q, k, mask = piece.queries, piece.keys, piece.mask
            parts = _backward(
                grad[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k], out[:, :, q], z[:, :, q], 0.0,
                piece.own and mask is None, attn_mask=mask, scale=ctx.scale,
            )  # fmt: skip
            for total, part, where in zip(grads, parts, (q, k, k), strict=True):
                if piece.own:
                    total[:, :, where] = part
                else:
                    total[:, :, where] += part
        return *grads, None, None


def _block_mask(packed: Packed, window: int | None, query: Tensor) -> BlockMask:
    stops, positions = packed.stops().to(query.device), packed.positions[0].to(query.device)

    def see(batch: Any, head: Any, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < stops[k])
        return seen if window is None else seen & (positions[q] - positions[k] < window)

    # Block by block of queries: `create_block_mask` takes ten bytes for each pair of tokens.
    count, keys = -(-len(stops) // BLOCK), torch.arange(len(stops), device=query.device)
    some, every = (torch.zeros(count, count, dtype=torch.bool, device=query.device) for _ in range(2))
    for i, queries in enumerate(keys.split(BLOCK)):
        seen = F.pad(see(0, 0, queries[:, None], keys[None]), (0, count * BLOCK - len(keys)))
        seen = seen.view(len(queries), count, BLOCK)
        every[i] = seen.all(-1).all(0) & (len(queries) == BLOCK)
        some[i] = seen.any(-1).any(0) & ~every[i]
    # For each line of blocks their number, and first their columns.
    counts = [kind.sum(-1).int()[None, None] for kind in (some, every)]
    columns = [kind.int().argsort(dim=-1, descending=True, stable=True).int()[None, None] for kind in (some, every)]
    return BlockMask.from_kv_blocks(
        counts[0], columns[0], counts[1], columns[1], BLOCK, mask_mod=see, seq_lengths=(len(keys), len(keys))
    )


class CachedAttention:
    """Attention of one new token per row to the row's own KV cache and to the shared segments that it continues.

    Columns of the scores: | positions of the shared segments, not copied | the row's own tokens |
    `paths` has each row's segments, in the order of their leaves, and `own` the tokens of each leaf in the cache.
    """

    def __init__(self, cache: dict[int, tuple[Tensor, Tensor]], paths: list[list[Segment]], own: list[int]) -> None:
        device = next(iter(cache.values()))[0].device
        self.cache, self.paths = cache, paths
        self.at = torch.tensor(own, device=device)  # where each row's next token goes
        leaves = torch.tensor([path[-1].start for path in paths], device=device)
        take = leaves[:, None] + torch.arange(max(own), device=device).clamp_max(self.at[:, None] - 1)
        self.own = {i: tuple(x[0][:, take].transpose(0, 1) for x in pair) for i, pair in cache.items()}
        self._regroup()

    @property
    def positions(self) -> Tensor:
        """Position of each row's next token, shape (rows, 1)."""
        return (self.starts + self.at)[:, None]

    def advance(self, rows: list[int]) -> None:
        """Count the tokens that were just fed, and keep these rows only."""
        self.at = self.at + 1
        if len(rows) < len(self.paths):
            self.paths, self.at = [self.paths[i] for i in rows], self.at[rows]
            self.own = {i: tuple(x[rows] for x in pair) for i, pair in self.own.items()}
        self._regroup()

    def _regroup(self) -> None:
        spans: dict[Segment, list[int]] = {}  # the rows [a, b) that continue each shared segment
        for i, path in enumerate(self.paths):
            for segment in path[:-1]:
                spans.setdefault(segment, [i, i])[1] = i + 1
        columns = {s: slice(s.position, s.position + s.end - s.start) for s in spans}
        self.shared = [(slice(s.start, s.end), columns[s], slice(a, b)) for s, (a, b) in spans.items()]
        starts = [path[-1].position for path in self.paths]  # tokens before each row's own ones
        self.starts, self._edge = torch.tensor(starts, device=self.at.device), max(starts)
        self._longest = int(self.at.max()) + 1  # own tokens of the longest row, with the one about to be fed
        self._masks: dict[int | None, Tensor] = {}

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        rows, heads, _, width = query.shape
        keys, values = self._append(layer, key, value)
        groups = key.size(1)
        query = query.view(rows, groups, heads // groups, width) * (width**-0.5 if scaling is None else scaling)
        mask = self._mask(window)
        scores = query.new_full((*query.shape[:3], mask.size(-1)), float("-inf"))
        scores[..., self._edge :] = query @ keys.mT
        for tokens, columns, among in self.shared:
            part = query[among].transpose(0, 1).flatten(1, 2) @ self.cache[layer][0][0, :, tokens].mT
            scores[among, ..., columns] = part.unflatten(1, (among.stop - among.start, -1)).transpose(0, 1)
        weights = (scores.float() + mask).softmax(-1).to(value.dtype)
        out = weights[..., self._edge :] @ values
        for tokens, columns, among in self.shared:
            part = weights[among, ..., columns].transpose(0, 1).flatten(1, 2) @ self.cache[layer][1][0, :, tokens]
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

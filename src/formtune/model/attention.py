"""Exact attention within packed sequences, computed only for pairs of tokens that attend to each other.

On a CPU no mask is built. A token attends to the segments on its path, so its softmax is over several pieces of keys,
each one call of a fused kernel: causal within a segment, full for the tokens that continue a segment. A piece also
returns z_i = logsumexp(scores_i), and out = sum_i exp(z_i - z) out_i with z = logsumexp_i z_i. From the merged `out`
and `z` the backward kernel recomputes the true probabilities of a piece (as ring attention does, arXiv:2310.01889).

On CUDA one FlexAttention kernel skips fully masked blocks (arXiv:2412.05496); other devices use SDPA with a mask.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from formtune.model.packing import Packed

NAME = "formtune"  # of this attention in transformers, after `register()`

# (layer, query, key, value, scaling, sliding window) -> output, all of shape (batch, heads, tokens, width).
Attend = Callable[[int, Tensor, Tensor, Tensor, float | None, int | None], Tensor]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_flex = functools.cache(lambda: torch.compile(flex_attention, dynamic=True))


def register() -> None:
    """Make `NAME` an attention implementation of transformers, which then builds no mask."""
    from transformers import AttentionInterface

    # Not compiled with the layers: its Python code takes another path for each packed sequence.
    AttentionInterface.register(NAME, torch.compiler.disable(_attention))


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    attend: Attend | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    special = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if attention_mask is not None or special:
        raise NotImplementedError(f"the model's attention is a special one ({', '.join(special) or 'its masks'})")
    if attend is not None:
        return attend(module.layer_idx, query, key, value, scaling, sliding_window).transpose(1, 2), None
    # A callback, say, calls the model on rows that are not packed.
    if sliding_window is not None and key.size(2) > sliding_window:
        raise NotImplementedError("rows are longer than the window: call set_attn_implementation('sdpa') first")
    causal = query.size(2) > 1
    out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


class PackedAttention:
    """Attention of one packed sequence (see `Attend`); with `keep`, `kept` is every layer's KV cache, for decoding."""

    def __init__(self, packed: Packed, keep: bool = False) -> None:
        self.packed, self.keep = packed, keep
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Any] = {}  # by window: pieces, a dense mask or a block mask

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        if self.keep:
            self.kept[layer] = (key, value)
        if window is not None and self.packed.longest <= window:
            window = None
        if window not in self._masks:
            make = _pieces if query.is_cpu else functools.partial(_mask, blocks=query.is_cuda)
            self._masks[window] = make(self.packed, window, query)
        mask = self._masks[window]
        if isinstance(mask, list):
            return _Pieces.apply(query, key, value, mask, scaling)  # type: ignore[no-any-return]
        if isinstance(mask, Tensor):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
        return _flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)  # type: ignore[no-any-return]


class Piece(NamedTuple):
    """Queries and the keys that they attend to in one kernel call."""

    queries: slice
    keys: slice
    own: bool  # whether these are the queries' own segment, which is their first piece
    mask: Tensor | None = None  # added to the scores, under a sliding window


def _pieces(packed: Packed, window: int | None, query: Tensor) -> list[Piece]:
    """Each segment with itself, then each shared segment with the tokens that continue it."""
    pieces = [Piece(slice(s.start, s.end), slice(s.start, s.end), True) for s in packed.segments]
    pieces += [Piece(slice(s.end, s.stop), slice(s.start, s.end), False) for s in packed.segments if s.stop > s.end]
    if window is None:
        return pieces
    masked = []
    for piece in pieces:
        distance = packed.positions[0, piece.queries, None] - packed.positions[0, None, piece.keys]
        seen = (distance < window) & (distance >= 0)
        if seen.any():
            mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, float("-inf"))
            masked.append(piece._replace(mask=mask))
    return masked


class _Pieces(torch.autograd.Function):
    """Softmax over several pieces of keys, merged by their denominators."""

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
            whole = torch.logaddexp(z[:, :, q], part_z)
            out[:, :, q] *= (z[:, :, q] - whole).exp_().unsqueeze(-1)
            out[:, :, q] += part * (part_z - whole).exp_().unsqueeze(-1)
            z[:, :, q] = whole
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
            for whole, part, where in zip(grads, parts, (q, k, k), strict=True):
                if piece.own:
                    whole[:, :, where] = part
                else:
                    whole[:, :, where] += part
        return *grads, None, None


def _mask(packed: Packed, window: int | None, query: Tensor, blocks: bool) -> Any:
    """The tokens that each token attends to, as FlexAttention's block mask or as a dense mask."""
    stops, positions = packed.stops().to(query.device), packed.positions[0].to(query.device)

    def see(batch: Any, head: Any, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < stops[k])
        return seen if window is None else seen & (positions[q] - positions[k] < window)

    size = packed.ids.size(1)
    if blocks:
        return create_block_mask(see, None, None, size, size, device=query.device)
    at = torch.arange(size, device=query.device)
    return see(0, 0, at[:, None], at[None])

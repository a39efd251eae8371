"""Which passes a model gets: sharing prefixes, or length buckets where it cannot do that.

Both say the same of every row; they differ in what it costs. The choice is not looked up in a list of architectures
but shown on the model itself, with a few dozen tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from formtune.base.row import Row
from formtune.errors import first_line
from formtune.model.attention import NAME, PackedAttention, register
from formtune.model.length_buckets import LengthBuckets
from formtune.model.micro_batches import Passes
from formtune.model.packing import pack
from formtune.model.shared_prefixes import SharedPrefixes


@torch.no_grad()
def passes(model: Any) -> Passes:
    """Shared prefixes if the model says the same with them as without, length buckets otherwise."""
    shared, training = SharedPrefixes(model), [module for module in model.modules() if module.training]
    usual = shared.base.config._attn_implementation
    model.eval()
    try:
        difference = _difference(shared)
    except Exception as error:  # whatever an architecture makes of keyword arguments that it does not know
        difference = first_line(error)
    for module in training:
        module.training = True
    if difference is None:
        return shared
    shared.base.set_attn_implementation(usual)
    rank_zero_warn(f"prefixes are not shared, each row is computed on its own: {difference}")
    return LengthBuckets(model)


def _difference(shared: SharedPrefixes) -> str | None:
    """Why this model cannot take packed rows, None if it can; leaves it with the attention for them."""
    base, config = shared.base, shared.base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        return f"the model has layers of other kinds ({', '.join(sorted(kinds))})"
    size = base.get_input_embeddings().num_embeddings
    ids = [1 + i * 7919 % (size - 1) for i in range(48)]
    # Two levels of sharing, and a row of its own.
    prompts = [ids[:16] + ids[16:20], ids[:16] + ids[16:18] + ids[24:28], ids[:16] + ids[30:40], ids[40:]]
    [group] = pack([Row(prompt, [], [], "", None, "") for prompt in prompts], 10**6)
    alone = [base(torch.tensor([prompts[i]], device=shared.device), use_cache=False).logits[0] for i in group.rows]
    register()
    base.set_attn_implementation(NAME)
    windows, attention = set(), PackedAttention(group)

    def attend(*arguments: Any) -> Tensor:
        windows.add(arguments[-1])
        return attention(*arguments)

    packed = base.get_output_embeddings()(shared.hidden(group.ids, group.positions, attend)[0])
    window = getattr(config, "sliding_window", None)
    if window and "sliding_attention" in kinds and window not in windows:
        return "the model keeps its attention's window to itself"
    for path, logits in zip(group.paths(), alone, strict=True):
        same = torch.cat([packed[segment.start : segment.end] for segment in path]).float()
        error = float((same - logits.float()).norm() / logits.float().norm())
        if not error < (1e-3 if packed.dtype == torch.float32 else 0.05):
            return f"the model's logits come out different (by {error:.1%})"
    return None

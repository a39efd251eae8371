"""Micro-batches in which rows share the prefixes of their prompts, for every model that allows it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from formtune.base.row import Row
from formtune.errors import first_line
from formtune.model.micro_batches import Answers, MicroBatches, logits_error
from formtune.packing.attention import NAME, CachedAttention, PackedAttention, attention_forward
from formtune.packing.packed import Packed, pack


class SharedPrefixes(MicroBatches):
    """Packed sequences; decoding reuses the KV cache of the teacher-forced pass."""

    def split(self, rows: Sequence[Row], tokens: int, extra: int = 0) -> Iterator[Packed]:
        return pack(rows, tokens, extra)

    def _forward(self, packed: Packed) -> tuple[nn.Module, Tensor, Any]:
        attention = PackedAttention(packed)
        hidden = self._hidden(packed.ids, packed.positions, attention)
        return self.base.get_output_embeddings(), hidden[0, packed.predicting.to(self.device)], attention.cache

    def _generate(self, packed: Packed, cache: Any, answers: Answers, unfinished: list[int]) -> None:
        leaves, head = packed.paths(), self.base.get_output_embeddings()
        paths = [leaves[j] for j in unfinished]
        # Index of the last token of each prompt, which predicts the first label.
        last = {j: path[-1].end - packed.sizes[j] for j, path in zip(unfinished, paths, strict=True)}
        written = [answers.decoded[j].ids for j in range(len(leaves))]
        # Tokens of each leaf that stay in the cache: the target was fed beyond the first mismatch too.
        kept = [last[j] - path[-1].start + len(written[j]) for j, path in zip(unfinished, paths, strict=True)]
        attention = CachedAttention(cache, paths, kept)
        while unfinished:
            ids = [[written[j][-1] if written[j] else int(packed.ids[0, last[j]])] for j in unfinished]
            hidden = self._hidden(torch.tensor(ids), attention.positions, attention)
            answers.add(unfinished, head(hidden[:, -1]))
            if remaining := set(answers.unfinished(unfinished)):
                attention.advance([i for i, j in enumerate(unfinished) if j in remaining])
            unfinished = [j for j in unfinished if j in remaining]

    def _hidden(self, ids: Tensor, positions: Tensor, attend: Any) -> Tensor:
        out = self.base.get_decoder()(
            input_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            # transformers would build a mask for None. Not a constant of this file, which may be imported in inference
            # mode: its tensors cannot be saved for a backward pass.
            attention_mask=torch.empty(0, 0, 0, 0),
            use_cache=False,
            attend=attend,
        )
        return out.last_hidden_state


def share_prefixes(model: Any) -> SharedPrefixes | None:
    """Shared prefixes, or None with a warning if the model's logits on a few dozen tokens change with them.

    The model must be in evaluation mode, with gradients disabled.
    """
    shared = SharedPrefixes(model)
    usual = shared.base.config._attn_implementation
    try:
        difference = _difference(shared)
    except Exception as error:  # an architecture can fail in any way on unknown keyword arguments
        difference = first_line(error)
    if difference is None:
        return shared
    shared.base.set_attn_implementation(usual)
    rank_zero_warn(f"prefix sharing is off, which is slower: {difference}")
    return None


def _difference(shared: SharedPrefixes) -> str | None:
    """Why this model does not support packed rows, None if it does; its attention is then the packed one."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    base, config, head = shared.base, shared.base.config.get_text_config(), shared.base.get_output_embeddings()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if special := kinds - {"full_attention", "sliding_attention"}:
        return f"the model has unsupported layers ({', '.join(sorted(special))})"
    if hasattr(head, "lora_A"):
        return "its output layer has an adapter"
    ids = [1 + i * 7919 % (shared.vocabulary - 1) for i in range(48)]
    # Two levels of sharing, and a row that shares nothing.
    prompts = [ids[:16] + ids[16:20], ids[:16] + ids[16:18] + ids[24:28], ids[:16] + ids[30:40], ids[40:]]
    [packed] = pack([Row(prompt, [], "", None, "") for prompt in prompts], 10**6)
    alone = [base(torch.tensor([prompts[i]], device=shared.device), use_cache=False).logits[0] for i in packed.rows]
    # Not compiled with the layers: its Python code runs differently for each packed sequence.
    AttentionInterface.register(NAME, torch.compiler.disable(attention_forward))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base.set_attn_implementation(NAME)
    windows, attention = set(), PackedAttention(packed)

    def attend(*arguments: Any) -> Tensor:
        windows.add(arguments[-1])
        return attention(*arguments)

    together = head(shared._hidden(packed.ids, packed.positions, attend)[0])
    window = getattr(config, "sliding_window", None)
    if window and "sliding_attention" in kinds and window not in windows:
        return "the model does not pass its sliding window to the attention"
    for path, logits in zip(packed.paths(), alone, strict=True):
        same = torch.cat([together[segment.start : segment.end] for segment in path])
        if (error := logits_error(same, logits)) is not None:
            return f"the model's logits differ by {error:.1%}"
    return None

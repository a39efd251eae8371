"""Greedy answers in batches, from the very ids that training used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def greedy(
    model: Any, prompts: Sequence[list[int]], stop_ids: Sequence[int], max_new_tokens: int, device: torch.device
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to and including a stop token.

    Args:
        model: Causal model in evaluation mode.
        prompts: Token ids, of any lengths; padded on the left here.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Tokens to decode at most; an answer that reaches it has no stop token at its end.
        device: Where the model is.
    """
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), stop_ids[0], dtype=torch.long)
    seen = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        seen[i, width - len(prompt) :] = 1
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        return_dict_in_generate=False,
    )
    out = model.generate(input_ids=ids.to(device), attention_mask=seen.to(device), generation_config=config)
    answers = []
    for new in out[:, width:].tolist():
        end = next((i for i, token in enumerate(new) if token in stop_ids), len(new) - 1)
        answers.append(new[: end + 1])
    return answers

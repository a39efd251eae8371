"""Next-token loss of the answers, with logits for the answers alone.

Rows are laid out so that all answers begin in the same column, and the logits needed are the last columns:

    . . P P P | A A A A          P prompt, A answer, . padding (masked by position, never by token id,
    P P P P P | A A . .          so that a pad token that equals the end of turn stays supervised)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formtune.rendering import Row


@dataclass(slots=True)
class TargetLoss:
    """Loss of a batch of answers, one entry per row and answer column; padding holds 0 and False.

    Args:
        nats: Negative log-likelihood in nats, float32, shape (rows, columns).
        correct: Whether the most likely token is the target, shape (rows, columns).
        mask: True where there is a target, shape (rows, columns).
    """

    nats: Tensor
    correct: Tensor
    mask: Tensor


def target_loss(model: Any, rows: Sequence[Row], device: torch.device) -> TargetLoss:
    """One teacher-forced pass over prompt and answer of each row."""
    left, right = max(len(r.prompt) for r in rows), max(len(r.target) for r in rows)
    ids = torch.zeros(len(rows), left + right, dtype=torch.long)
    seen = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start, end = left - len(row.prompt), left + len(row.target)
        ids[i, start:end] = torch.tensor(row.prompt + row.target)
        seen[i, start:end] = 1
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    mask = seen[:, left:].bool().to(device)
    # The last column predicts nothing that is wanted: it is not computed.
    logits = model(
        input_ids=ids[:, :-1].to(device),
        attention_mask=seen[:, :-1].to(device),
        position_ids=positions[:, :-1].to(device),
        logits_to_keep=right,
        use_cache=False,
    ).logits.float()
    targets = ids[:, left:].to(device)
    nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * mask
    return TargetLoss(nats, (logits.argmax(-1) == targets) & mask, mask)


def passes(rows: Sequence[Row], tokens: int, new_tokens: int = 0) -> Iterator[list[int]]:
    """Split rows into groups for one pass each: indices by falling length, padded area at most `tokens`.

    Args:
        rows: The rows of a step or of an evaluation batch.
        tokens: Padded tokens of one pass; a row longer than that gets a pass of its own.
        new_tokens: Tokens that decoding may add to each prompt; 0 for a teacher-forced pass over the whole row.
    """
    sizes = [len(r.prompt) + (new_tokens or len(r.target)) for r in rows]
    prompts, targets = [len(r.prompt) for r in rows], [new_tokens or len(r.target) for r in rows]
    group: list[int] = []
    width = [0, 0]
    for i in sorted(range(len(rows)), key=sizes.__getitem__, reverse=True):
        wider = [max(width[0], prompts[i]), max(width[1], targets[i])]
        if group and sum(wider) * (len(group) + 1) > tokens:
            yield group
            group, wider = [], [prompts[i], targets[i]]
        group.append(i)
        width = wider
    if group:
        yield group

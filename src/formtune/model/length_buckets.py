"""Passes over padded rows of similar length, for any causal model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from formtune.base.row import Row
from formtune.model.constrained import Documents
from formtune.model.loss import Predictions, judge
from formtune.model.micro_batches import Answers, Open, Passes, Stops, target_sizes


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows side by side, so that all answers begin in the same column:

        . . P P P | A A A A          P prompt, A answer, . padding (masked by position, never by token id,
        P P P P P | A A . .          so that a pad token that equals the end of turn stays supervised)

    Args:
        rows: Which rows, by their index among those given.
        ids: Shape (rows, columns); the last column predicts nothing that is wanted and is left out.
        seen: 0 for padding, of the same shape.
        targets: What the last columns should predict, -1 where there is no gold answer, shape (rows, answer columns).
        predicting: Which of them predict a target, of the same shape.
    """

    rows: list[int]
    ids: Tensor
    seen: Tensor
    targets: Tensor
    predicting: Tensor


class LengthBuckets(Passes):
    """Passes over padded rows of similar length, and decoding by transformers; any causal model can do it."""

    def split(self, rows: Sequence[Row], tokens: int, room: int = 0) -> Iterator[Padded]:
        group: list[int] = []
        width = [0, 0]
        answers = [max(len(row.target), 1) + room for row in rows]
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + answers[i], reverse=True):
            wider = [max(width[0], len(rows[i].prompt)), max(width[1], answers[i])]
            if group and sum(wider) * (len(group) + 1) > tokens:
                yield _pad(rows, group)
                group, wider = [], [len(rows[i].prompt), answers[i]]
            group.append(i)
            width = wider
        if group:
            yield _pad(rows, group)

    def predictions(self, group: Padded, keep: bool = False) -> tuple[Predictions, Any]:
        positions = (group.seen.cumsum(1) - 1).clamp_min(0)
        logits = self.base(
            input_ids=group.ids.to(self.device),
            attention_mask=group.seen.to(self.device),
            position_ids=positions.to(self.device),
            logits_to_keep=group.targets.size(1),
            use_cache=False,
        ).logits[group.predicting.to(self.device)]
        targets = group.targets[group.predicting].to(self.device)
        return judge(nn.Identity(), logits, targets, logits.size(-1)), group

    def _go_on(self, kept: Padded, open_: Open, stop: Stops, documents: Documents | None) -> Answers:
        from transformers import GenerationConfig

        width = kept.ids.size(1) - kept.targets.size(1) + 1
        answers: dict[int, list[int]] = {}
        # Rows near the end of the context have less room: decoded with others they would run over its edge.
        for limit in sorted(set(open_.limits)):
            rows = [j for j, most in zip(open_.places, open_.limits, strict=True) if most == limit]
            config = GenerationConfig(
                do_sample=False, max_new_tokens=limit, eos_token_id=list(stop), pad_token_id=stop[0]
            )
            # From the prompt again: this cache cannot be cut back to a mismatch.
            out = self.base.generate(
                input_ids=kept.ids[rows, :width].to(self.device),
                attention_mask=kept.seen[rows, :width].to(self.device),
                generation_config=config,
                logits_processor=documents and [documents.processor(rows, width)],
            )
            for j, new in zip(rows, out[:, width:].tolist(), strict=True):
                end = next((i for i, token in enumerate(new) if token in stop), len(new) - 1)
                answers[j] = new[: end + 1]
        return [answers[j] for j in open_.places]


def _pad(rows: Sequence[Row], group: list[int]) -> Padded:
    members = [rows[i] for i in group]
    left, right = max(len(row.prompt) for row in members), max(target_sizes(members))
    ids = torch.zeros(len(group), left + right, dtype=torch.long)
    seen, targets = torch.zeros_like(ids), torch.full((len(group), right), -1)
    predicting = torch.zeros_like(targets, dtype=torch.bool)
    for i, row in enumerate(members):
        start, end = left - len(row.prompt), left + len(row.target)
        ids[i, start:end] = torch.tensor(row.prompt + row.target)
        seen[i, start:end] = 1
        targets[i, : len(row.target)] = torch.tensor(row.target, dtype=torch.long)
        predicting[i, : max(len(row.target), 1)] = True
    return Padded(group, ids[:, :-1], seen[:, :-1], targets, predicting)

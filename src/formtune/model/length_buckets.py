"""Micro-batches of padded rows of similar length, for any causal model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from formtune.base.row import Row
from formtune.model.batch import TensorFields
from formtune.model.constrained import Documents
from formtune.model.loss import Predictions, judge
from formtune.model.micro_batches import Answers, MicroBatches, Stops, Unfinished, label_counts


@dataclass(frozen=True, slots=True)
class Padded(TensorFields):
    """Padded rows, aligned so that all answers begin in the same column:

    . . P P P | A A A A          P prompt, A answer, . padding (masked by position, never by token id,
    P P P P P | A A . .          so that a pad token that equals the end of turn stays supervised)
    """

    TENSORS: ClassVar = ("ids", "seen", "targets", "predicting")

    rows: list[int]  # their indices in the batch
    ids: Tensor  # (rows, columns); the last column predicts nothing and is left out
    seen: Tensor  # the attention mask: 0 for padding, of the same shape
    targets: Tensor  # labels of the last columns, -1 for rows without a target, (rows, target columns)
    predicting: Tensor  # which of them predict a label, of the same shape


class LengthBuckets(MicroBatches):
    """Padded rows of similar length, decoded by transformers' `generate`."""

    def split(self, rows: Sequence[Row], tokens: int, room: int = 0) -> Iterator[Padded]:
        group: list[int] = []
        width = [0, 0]
        answers = [max(len(row.target_ids), 1) + room for row in rows]
        for i in sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids) + answers[i], reverse=True):
            wider = [max(width[0], len(rows[i].prompt_ids)), max(width[1], answers[i])]
            if group and sum(wider) * (len(group) + 1) > tokens:
                yield _pad(rows, group)
                group, wider = [], [len(rows[i].prompt_ids), answers[i]]
            group.append(i)
            width = wider
        if group:
            yield _pad(rows, group)

    def predictions(self, padded: Padded, keep: bool = False) -> tuple[Predictions, Any]:
        positions = (padded.seen.cumsum(1) - 1).clamp_min(0)
        logits = self.base(
            input_ids=padded.ids.to(self.device),
            attention_mask=padded.seen.to(self.device),
            position_ids=positions.to(self.device),
            logits_to_keep=padded.targets.size(1),
            use_cache=False,
        ).logits[padded.predicting.to(self.device)]
        targets = padded.targets[padded.predicting].to(self.device)
        return judge(nn.Identity(), logits, targets, logits.size(-1)), padded

    def _finish(self, kept: Padded, unfinished: Unfinished, stop: Stops, documents: Documents | None) -> Answers:
        from transformers import GenerationConfig

        width = kept.ids.size(1) - kept.targets.size(1) + 1
        answers: dict[int, list[int]] = {}
        # Rows near the end of the context have lower limits: decoded with the others they would exceed it.
        for limit in sorted(set(unfinished.limits)):
            rows = [j for j, most in zip(unfinished.places, unfinished.limits, strict=True) if most == limit]
            config = GenerationConfig(
                do_sample=False, max_new_tokens=limit, eos_token_id=list(stop), pad_token_id=stop[0]
            )
            # From the prompt again: not every model's cache can be cut back to a mismatch.
            out = self.base.generate(
                input_ids=kept.ids[rows, :width].to(self.device),
                attention_mask=kept.seen[rows, :width].to(self.device),
                generation_config=config,
                logits_processor=documents and [documents.processor(rows, width)],
            )
            for j, new in zip(rows, out[:, width:].tolist(), strict=True):
                end = next((i for i, token in enumerate(new) if token in stop), len(new) - 1)
                answers[j] = new[: end + 1]
        return [answers[j] for j in unfinished.places]


def _pad(rows: Sequence[Row], group: list[int]) -> Padded:
    members = [rows[i] for i in group]
    left, right = max(len(row.prompt_ids) for row in members), max(label_counts(members))
    ids = torch.zeros(len(group), left + right, dtype=torch.long)
    seen, targets = torch.zeros_like(ids), torch.full((len(group), right), -1)
    predicting = torch.zeros_like(targets, dtype=torch.bool)
    for i, row in enumerate(members):
        start, end = left - len(row.prompt_ids), left + len(row.target_ids)
        ids[i, start:end] = torch.tensor(row.prompt_ids + row.target_ids)
        seen[i, start:end] = 1
        targets[i, : len(row.target_ids)] = torch.tensor(row.target_ids, dtype=torch.long)
        predicting[i, : max(len(row.target_ids), 1)] = True
    return Padded(group, ids[:, :-1], seen[:, :-1], targets, predicting)

"""Micro-batches of padded rows of similar length, for any causal model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from formtune.base.row import Row
from formtune.model.constrained import Documents
from formtune.model.loss import predict
from formtune.model.micro_batches import Decoded, Forward, MicroBatches, add_tokens


@dataclass(frozen=True, slots=True)
class Padded:
    """Padded rows, aligned so that all answers begin in the same column:

    . . P P P | A A A A          P prompt, A answer, . padding (masked by position, never by token id,
    P P P P P | A A . .          so that a pad token that equals the end of turn stays supervised)
    """

    rows: list[int]  # their indices in the batch
    sizes: list[int]  # for each row the number of its labels, at least 1
    ids: Tensor  # -1 for padding, (rows, columns); the last column predicts nothing and is left out
    targets: Tensor  # labels of the last columns, -1 where there is none, (rows, target columns)


class LengthBuckets(MicroBatches):
    """Padded rows of similar length, decoded by transformers' `generate`."""

    def split(self, rows: Sequence[Row], tokens: int, extra: int = 0) -> Iterator[Padded]:
        prompts, answers = [len(row.prompt_ids) for row in rows], [max(len(row.target_ids), 1) + extra for row in rows]
        group: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: prompts[i] + answers[i], reverse=True):
            wider = [*group, i]
            columns = max(prompts[j] for j in wider) + max(answers[j] for j in wider)
            if group and columns * len(wider) > tokens:
                yield _pad(rows, group)
                wider = [i]
            group = wider
        if group:
            yield _pad(rows, group)

    def predictions(self, padded: Padded, bitmask: Tensor | None = None) -> Forward:
        predicting = padded.targets >= 0
        predicting[:, 0] = True  # also in a row without a target, whose answer starts there
        inputs = self._inputs(padded.ids)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        logits = self.base(
            **inputs, position_ids=positions, logits_to_keep=padded.targets.size(1), use_cache=False
        ).logits[predicting.to(self.device)]
        targets = padded.targets[predicting].to(self.device)
        return predict(nn.Identity(), logits, targets, logits.size(-1), bitmask), None

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        ids = ids.to(self.device)
        return {"input_ids": ids.clamp_min(0), "attention_mask": (ids >= 0).long()}

    def _generate(
        self, padded: Padded, cache: None, unfinished: list[int], answers: list[Decoded], limits: list[int],
        stop: Sequence[int], documents: Documents | None,
    ) -> None:  # fmt: skip
        from transformers import GenerationConfig

        width = padded.ids.size(1) - padded.targets.size(1) + 1
        # From the prompt again: not every model's cache can be cut back to a mismatch.
        for j in unfinished:
            answers[j].ids, answers[j].logprobs = [], []
        if documents:
            documents.reset(unfinished)

        def choose(ids: Tensor, scores: Tensor) -> Tensor:
            """A logits processor that adds the next tokens to the answers of `group`, and leaves no others."""
            last = ids[:, -1].tolist()
            alive = [i for i in range(len(group)) if ids.size(1) == width or last[i] not in stop]
            tokens = add_tokens(answers, [group[i] for i in alive], scores[alive], documents)
            chosen = torch.full_like(scores, float("-inf"))
            chosen[alive, tokens] = 0.0
            return chosen

        # Rows near the end of the context have lower limits: decoded with the others they would exceed it.
        for limit in sorted({limits[j] for j in unfinished}):
            group = [j for j in unfinished if limits[j] == limit]
            ends = {"eos_token_id": list(stop), "pad_token_id": stop[0]}
            config = GenerationConfig(do_sample=False, max_new_tokens=limit, **ends)
            inputs = self._inputs(padded.ids[group, :width])
            self.base.generate(**inputs, generation_config=config, logits_processor=[choose])


def _pad(rows: Sequence[Row], group: list[int]) -> Padded:
    prompts = [torch.tensor(rows[i].prompt_ids) for i in group]
    labels = [torch.tensor(rows[i].target_ids or [-1]) for i in group]
    targets = pad_sequence(labels, batch_first=True, padding_value=-1)
    before = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
    ids = torch.cat([before, targets], 1)[:, :-1]
    return Padded(group, list(map(len, labels)), ids, targets)

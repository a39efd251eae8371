"""How the rows of a batch go through the model: split into micro-batches, teacher-forced, and decoded greedily."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from formtune.base.row import Row
from formtune.model.constrained import Documents, Grammar
from formtune.model.loss import Predictions

Stops = Sequence[int]  # tokens that end an answer
Answers = list[list[int]]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Answers that are still being generated."""

    places: list[int]  # of their rows in the micro-batch
    begun: Answers  # their tokens so far
    limits: list[int]  # tokens that each may have


class MicroBatches(ABC):
    """Splits rows into micro-batches, and computes their predictions and greedy answers.

    Args:
        model: A causal language model, with PEFT or without.
    """

    def __init__(self, model: Any) -> None:
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def device(self) -> torch.device:
        return self.base.device

    @abstractmethod
    def split(self, rows: Sequence[Row], tokens: int, room: int = 0) -> Iterator[Any]:
        """Micro-batches of at most `tokens` tokens, with `room` more for each row; their `rows` are indices."""

    def dummy(self) -> Any:
        """A micro-batch whose result is not used, so that all ranks do the same number of forward passes (FSDP)."""
        [micro_batch] = self.split([Row([0], [0], "", None, "")], 1)
        return micro_batch

    @abstractmethod
    def predictions(self, micro_batch: Any, keep: bool = False) -> tuple[Predictions, Any]:
        """One teacher-forced forward pass, and with `keep` what `_finish` continues from, such as its KV cache."""

    @abstractmethod
    def _finish(self, kept: Any, unfinished: Unfinished, stop: Stops, documents: Documents | None) -> Answers:
        """Generate the rest of the answers."""

    def evaluate(
        self, rows: Sequence[Row], tokens: int, stop: Stops, limits: Sequence[int], grammar: Grammar | None = None
    ) -> Iterator[tuple[list[int], Predictions, Answers]]:
        """For each micro-batch of at most `tokens` tokens: its rows' indices, their predictions and greedy answers."""
        for micro_batch in self.split(rows, tokens, max(limits, default=0)):
            yield (micro_batch.rows, *self.answers(rows, micro_batch, stop, limits, grammar))

    @torch.no_grad()
    def answers(
        self, rows: Sequence[Row], micro_batch: Any, stop: Stops, limits: Sequence[int], grammar: Grammar | None = None
    ) -> tuple[Predictions, Answers]:
        """Predictions and greedy answers of one micro-batch, each answer up to and including a stop token.

        As long as greedy decoding agrees with the target, it sees the same tokens as the teacher-forced pass. So if
        every predicted token is the target's, the answer is the target, and otherwise generation resumes at the first
        mismatch. With constrained decoding, a predicted token that the grammar refuses is chosen again among the
        allowed ones.

        Args:
            rows: All rows of the batch.
            micro_batch: Some of them.
            stop: Tokens that end an answer.
            limits: For each row the tokens that its answer may have.
            grammar: For constrained decoding.
        """
        documents = Documents(grammar, len(micro_batch.rows)) if grammar else None
        predictions, kept = self.predictions(micro_batch, keep=True)
        members = [rows[i] for i in micro_batch.rows]
        most = [limits[i] for i in micro_batch.rows]
        answers = []
        for j, (row, tokens) in enumerate(zip(members, predictions.tokens.split(label_counts(members)), strict=True)):
            ids, target = tokens.tolist(), row.target_ids
            same = next((i for i, (a, b) in enumerate(zip(ids, target, strict=False)) if a != b), len(target))
            answer = (target[:same] + ids[same : same + 1])[: most[j]]
            answers.append(answer[: documents.write(j, answer)] if documents else answer)
        places = [j for j, a in enumerate(answers) if not a or (a[-1] not in stop and len(a) < most[j])]
        if places:
            unfinished = Unfinished(places, [answers[j] for j in places], [most[j] for j in places])
            for j, answer in zip(places, self._finish(kept, unfinished, stop, documents), strict=True):
                answers[j] = answer
        return predictions, answers


def label_counts(rows: Sequence[Row]) -> list[int]:
    """Predictions of each row; a row without a target has one, from which its answer starts."""
    return [max(len(row.target_ids), 1) for row in rows]

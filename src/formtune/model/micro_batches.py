"""How the rows of a batch go through the model: split into micro-batches, teacher-forced, and decoded greedily."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from formtune.base.row import Row
from formtune.evaluation.metrics import LossMetrics
from formtune.model.constrained import Documents, Grammar
from formtune.model.loss import Predictions

Answers = list[list[int]]


class MicroBatches(ABC):
    """Splits rows into micro-batches, and computes their predictions and greedy answers.

    Every micro-batch has `rows`, the indices of its rows in the batch, and `sizes`, how many labels each of them has:
    at least one, from which the answer starts.
    """

    def __init__(self, model: Any) -> None:
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def device(self) -> torch.device:
        return self.base.device

    @abstractmethod
    def split(self, rows: Sequence[Row], tokens: int, extra: int = 0) -> Iterator[Any]:
        """Micro-batches of at most `tokens` tokens, where each row counts `extra` tokens more than it has."""

    @abstractmethod
    def predictions(self, micro_batch: Any, keep: bool = False) -> tuple[Predictions, Any]:
        """One teacher-forced forward pass, and with `keep` what `_generate` continues from, such as its KV cache."""

    @abstractmethod
    def _generate(
        self, kept: Any, unfinished: list[int], answers: Answers, limits: list[int], stop: Sequence[int],
        documents: Documents | None,
    ) -> None:  # fmt: skip
        """Complete the answers of the `unfinished` rows of a micro-batch, in place."""

    def dummy(self) -> Any:
        """A micro-batch whose result is not used, so that all ranks do the same number of forward passes (FSDP)."""
        return next(self.split([Row([0], [0], "", None, "")], 1))

    def decode(
        self, rows: Sequence[Row], micro_batches: Iterable[Any], stop: Sequence[int], limits: Sequence[int],
        grammar: Grammar | None = None, losses: LossMetrics | None = None,
    ) -> Answers:  # fmt: skip
        """Greedy answers to the rows, each up to a token of `stop` or its limit; the targets' loss goes to `losses`."""
        answers: Answers = [[] for _ in rows]
        for micro_batch in micro_batches:
            its_rows, most = [rows[i] for i in micro_batch.rows], [limits[i] for i in micro_batch.rows]
            predictions, decoded = self._decode(micro_batch, its_rows, stop, most, grammar)
            for i, answer in zip(micro_batch.rows, decoded, strict=True):
                answers[i] = answer
            if losses is not None:
                losses.update(predictions.nats, predictions.tokens == predictions.targets, micro_batch.sizes)
        return answers

    @torch.no_grad()
    def _decode(
        self, micro_batch: Any, rows: list[Row], stop: Sequence[int], limits: list[int], grammar: Grammar | None
    ) -> tuple[Predictions, Answers]:
        """Predictions and answers of one micro-batch.

        As long as greedy decoding agrees with the target, it sees the same tokens as the teacher-forced pass, so
        generation resumes at the first mismatch, or at the first token that the grammar refuses.
        """
        documents = Documents(grammar, rows) if grammar else None
        predictions, kept = self.predictions(micro_batch, keep=True)
        answers: Answers = []
        for j, tokens in enumerate(predictions.tokens.split(micro_batch.sizes)):
            target = rows[j].target_ids
            pairs = enumerate(zip(predicted := tokens.tolist(), target, strict=False))
            same = next((i for i, (token, label) in pairs if token != label), len(target))
            answer = predicted[: same + 1][: limits[j]]
            answers.append(answer[: documents.write(j, answer)] if documents else answer)
        unfinished = [j for j, answer in enumerate(answers) if not finished(answer, limits[j], stop)]
        if unfinished:
            self._generate(kept, unfinished, answers, limits, stop, documents)
        return predictions, answers


def finished(answer: list[int], limit: int, stop: Sequence[int]) -> bool:
    """Whether the answer has its stop token or all the tokens that it may have."""
    return len(answer) >= limit or (bool(answer) and answer[-1] in stop)

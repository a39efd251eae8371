"""How the rows of a batch go through the model: split into micro-batches, teacher-forced, and decoded greedily."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.evaluation.confidence import confidence
from formtune.evaluation.metrics import LossMetrics
from formtune.formats import Format
from formtune.model.batch import Answer
from formtune.model.constrained import Documents, Grammar
from formtune.model.loss import Predictions, greedy

# Predictions, and with `keep` what `_generate` continues from, such as its KV cache.
Forward = tuple[Predictions, Any]


@dataclass(slots=True)
class Decoded:
    """An answer as decoded so far."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, given those before it; see `Predictions`


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
    def predictions(self, micro_batch: Any, keep: bool = False, bitmask: torch.Tensor | None = None) -> Forward:
        """One teacher-forced forward pass, with the tokens that are allowed at each label (see `predict`)."""

    @abstractmethod
    def _generate(
        self, kept: Any, unfinished: list[int], answers: list[Decoded], limits: list[int], stop: Sequence[int],
        documents: Documents | None,
    ) -> None:  # fmt: skip
        """Complete the answers of the `unfinished` rows of a micro-batch, in place."""

    def dummy(self) -> Any:
        """A micro-batch whose result is not used, so that all ranks do the same number of forward passes (FSDP)."""
        return next(self.split([Row([0], [0], "", None, "")], 1))

    def decode(
        self, rows: Sequence[Row], micro_batches: Iterable[Any], stop: Sequence[int], limits: Sequence[int],
        grammar: Grammar | None = None, losses: LossMetrics | None = None,
    ) -> list[Decoded]:  # fmt: skip
        """Greedy answers to the rows, each up to a token of `stop` or its limit; the targets' loss goes to `losses`."""
        answers = [Decoded() for _ in rows]
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
    ) -> tuple[Predictions, list[Decoded]]:
        """Predictions and answers of one micro-batch.

        As long as greedy decoding agrees with the target, it sees the same tokens as the teacher-forced pass, so
        generation resumes at the first mismatch. With constrained decoding, the predicted tokens are the most likely
        ones among those allowed.
        """
        documents = Documents(grammar, rows) if grammar else None
        sizes = micro_batch.sizes
        bitmask = documents.bitmask([row.target_ids for row in rows], sizes) if documents else None
        predictions, kept = self.predictions(micro_batch, keep=True, bitmask=bitmask)
        answers: list[Decoded] = []
        chosen, logprobs = (values.tolist() for values in (predictions.chosen, predictions.logprobs))
        for j, end in enumerate(itertools.accumulate(sizes)):
            start, target = end - sizes[j], rows[j].target_ids
            pairs = enumerate(zip(chosen[start:end], target, strict=False))
            same = next((i for i, (token, label) in pairs if token != label), len(target))
            ids = chosen[start:end][: same + 1][: limits[j]]
            if documents:
                ids = ids[: documents.write(j, ids)]
            answers.append(Decoded(ids, logprobs[start : start + len(ids)]))
        unfinished = [j for j, answer in enumerate(answers) if not finished(answer.ids, limits[j], stop)]
        if unfinished:
            self._generate(kept, unfinished, answers, limits, stop, documents)
        return predictions, answers


def judge(row: Row, decoded: Decoded, renderer: Renderer, format: Format) -> Answer:
    """The answer to a row, with its verdict and confidence."""
    text, finished = renderer.answer(decoded.ids)
    own = format.of_row(row.schema)
    verdict = own.check(text, finished=finished, target=row.target, input=row.context)
    pieces = renderer.pieces(decoded.ids) if verdict.exact else ()  # an invalid format has confidence 0
    sure = confidence(pieces, decoded.logprobs, text, verdict, own)
    return Answer(row, text, verdict, sure)


def add_tokens(answers: list[Decoded], rows: list[int], logits: torch.Tensor, documents: Documents | None) -> list[int]:
    """Add the most likely token that the documents allow to the answers of `rows`; returns the tokens."""
    tokens, logprobs = documents.choose(rows, logits) if documents else (x.tolist() for x in greedy(logits))
    for j, token, logprob in zip(rows, tokens, logprobs, strict=True):
        answers[j].ids.append(token)
        answers[j].logprobs.append(logprob)
    return tokens


def finished(answer: list[int], limit: int, stop: Sequence[int]) -> bool:
    """Whether the answer has its stop token or all the tokens that it may have."""
    return len(answer) >= limit or (bool(answer) and answer[-1] in stop)

"""How the rows of a batch go through the model: split into micro-batches, teacher-forced, and decoded greedily."""

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.errors import Fault
from formtune.evaluation.metrics import LossMetrics
from formtune.evaluation.outcomes import Answer, confidence
from formtune.formats import Format
from formtune.model.constrained import Documents, Grammar
from formtune.model.loss import Predictions, greedy

# Predictions, and the KV cache that `_generate` continues from, if there is one.
Forward = tuple[Predictions, Any]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an evaluation decodes."""

    constrained: bool = False  # to the format, even if `model.constrained` is off
    max_new_tokens: int | None = None  # of an answer; None for the model's own limit
    logged: bool = True  # whether the figures go to the logger
    untuned: bool = False  # whether the base answers, without `model.adapter`


@dataclass(slots=True)
class Batch:
    """This process's rows of one optimizer step or of an evaluation, and the tensors that they are computed from."""

    rows: Sequence[Row]
    micro_batches: list[Any]  # `Packed` or `Padded`, each within the token budget
    limits: Sequence[int] = ()  # for each row, how many tokens its answer may have
    decoding: Decoding = Decoding()

    def to(self, *_: Any, **__: Any) -> Self:
        """The batch as it is: Lightning would move all of it, and each micro-batch is moved when it is computed."""
        return self


@dataclass(slots=True)
class Decoded:
    """An answer as decoded so far."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, given those before it; see `Predictions`


class MicroBatches(ABC):
    """Splits rows into micro-batches, and computes their predictions and greedy answers.

    A micro-batch has `rows`, their indices in the batch, and `sizes`, how many labels each of them has, at least 1.
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
    def predictions(self, micro_batch: Any, bitmask: torch.Tensor | None = None) -> Forward:
        """One teacher-forced forward pass, with the tokens that are allowed at each label (see `predict`)."""

    @abstractmethod
    def _generate(
        self, micro_batch: Any, cache: Any, unfinished: list[int], answers: list[Decoded], limits: list[int],
        stop: Sequence[int], documents: Documents | None,
    ) -> None:  # fmt: skip
        """Complete the answers of the `unfinished` rows, in place."""

    def dummy(self) -> Any:
        """A micro-batch whose result is not used, so that all ranks do the same number of forward passes (FSDP)."""
        return next(self.split([Row([0], [0], "", None, "")], 1))

    @torch.no_grad()
    def decode(
        self, rows: Sequence[Row], micro_batches: Iterable[Any], stop: Sequence[int], limits: Sequence[int],
        grammar: Grammar | None = None, losses: LossMetrics | None = None,
    ) -> list[Decoded]:  # fmt: skip
        """Greedy answers to the rows, each up to a token of `stop` or its limit; the targets' loss goes to `losses`.

        As long as greedy decoding agrees with the target, it sees the same tokens as the teacher-forced pass, so
        generation resumes at the first mismatch.
        """
        answers = [Decoded() for _ in rows]
        for micro_batch in micro_batches:
            sizes, targets = micro_batch.sizes, [rows[i].target_ids for i in micro_batch.rows]
            decoded, most_tokens = [answers[i] for i in micro_batch.rows], [limits[i] for i in micro_batch.rows]
            documents = Documents(grammar, [rows[i] for i in micro_batch.rows]) if grammar else None
            bitmask = documents.bitmask(targets, sizes) if documents else None
            predictions, cache = self.predictions(micro_batch, bitmask)
            if losses is not None:
                losses.update(predictions.nats, predictions.tokens == predictions.targets, sizes)
            tokens, logprobs = predictions.chosen.tolist(), predictions.logprobs.tolist()
            for j, end in enumerate(itertools.accumulate(sizes)):
                start = end - sizes[j]
                pairs = enumerate(zip(tokens[start:end], targets[j], strict=False))
                same = next((i for i, (token, label) in pairs if token != label), len(targets[j]))
                ids = tokens[start:end][: same + 1][: most_tokens[j]]
                if documents:
                    ids = ids[: documents.write(j, ids)]
                decoded[j].ids, decoded[j].logprobs = ids, logprobs[start : start + len(ids)]
            if unfinished := [j for j, answer in enumerate(decoded) if not finished(answer.ids, most_tokens[j], stop)]:
                self._generate(micro_batch, cache, unfinished, decoded, most_tokens, stop, documents)
            del cache  # before the next micro-batch fills its own
        return answers


def judge(row: Row, decoded: Decoded, renderer: Renderer, format: Format) -> Answer:
    """The answer to a row, with its verdict and confidence."""
    text, finished = renderer.answer(decoded.ids)
    own = format.of_row(row.schema)
    verdict = own.check(text, finished=finished, target=row.target, input=row.context)
    pieces = renderer.pieces(decoded.ids) if verdict.exact else ()  # an invalid format has confidence 0
    return Answer(row, text, verdict, *confidence(pieces, decoded.logprobs, text, verdict, own))


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


@contextlib.contextmanager
def out_of_memory_named(rows: Sequence[Row], tokens: int) -> Iterator[None]:
    """If memory runs out, say which rows were being computed and what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        longest = max(rows, key=len)
        raise Fault(
            f"out of memory in a step of {len(rows)} rows, the longest {longest.where} with {len(longest)} tokens; "
            f"lower model.tokens_per_micro_batch (now {tokens}) or set model.gradient_checkpointing: true"
        ) from error

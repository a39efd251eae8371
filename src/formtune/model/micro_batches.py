"""How the rows of a batch go through the model: split into micro-batches, teacher-forced, and decoded greedily."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, Self

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from formtune.base.row import Row
from formtune.errors import Fault
from formtune.evaluation.metrics import LossMetrics
from formtune.evaluation.outcomes import Decoded
from formtune.files import optional
from formtune.model.loss import NO_LABEL, Predictions, predict, summed_loss


@dataclass(frozen=True, slots=True)
class Decoding:
    constrained: bool = False  # constrained decoding, even if `model.constrained` is off
    max_new_tokens: int | None = None  # limit of an answer; None for the model's
    logged: bool = True  # whether the metrics go to the logger
    untuned: bool = False  # whether the base answers, without `model.adapter`


@dataclass(slots=True)
class Batch:
    """This process's rows of one optimizer step or of an evaluation, and the tensors that they are computed from."""

    rows: Sequence[Row]
    micro_batches: list[Any]  # `Packed` or `Padded`, each within the token budget
    limits: Sequence[int] = ()  # maximum tokens of each row's answer
    decoding: Decoding = Decoding()

    def to(self, *_: Any, **__: Any) -> Self:
        """The batch unchanged: Lightning would move all of it, but each micro-batch is moved when it is computed."""
        return self


class Constraint(Protocol):
    """What constrained decoding asks of a grammar; `constrained.decoder.Grammar` is one."""

    def matcher(self, row: Row) -> Any:
        """The state of a row's answer."""

    def accepted(self, matcher: Any, tokens: Sequence[int]) -> int:
        """Add tokens to an answer; returns how many are allowed."""

    def choose(self, matchers: Sequence[Any], logits: Tensor) -> tuple[list[int], list[float]]:
        """Add the likeliest allowed token to each answer; returns the tokens and their log-probabilities."""


class Answers:
    """The answers to the rows of a micro-batch, each decoded up to a token of `stop` or its limit."""

    def __init__(self, rows: list[Row], limits: list[int], stop: Sequence[int], grammar: Constraint | None) -> None:
        self.decoded = [Decoded() for _ in rows]
        self.limits, self.stop, self.grammar = limits, stop, grammar
        self.matchers = [grammar.matcher(row) for row in rows] if grammar else []

    def read(self, predictions: Predictions, targets: Tensor, sizes: list[int]) -> None:
        """Read the predicted tokens of each row up to the first that differs from its target."""
        columns = (targets.tolist(), predictions.tokens.tolist(), predictions.logprobs.tolist())
        for j, end in enumerate(accumulate(sizes)):
            labels, ids, logprobs = (column[end - sizes[j] : end] for column in columns)
            same = next((i for i, label in enumerate(labels) if ids[i] != label), len(labels))
            ids = ids[: min(same + 1, self.limits[j])]
            if self.grammar:
                ids = ids[: self.grammar.accepted(self.matchers[j], ids)]
            self.decoded[j] = Decoded(ids, logprobs[: len(ids)])

    def unfinished(self, rows: Iterable[int]) -> list[int]:
        """The rows whose answers may have more tokens."""
        ids = [answer.ids for answer in self.decoded]
        return [j for j in rows if len(ids[j]) < self.limits[j] and (not ids[j] or ids[j][-1] not in self.stop)]

    def add(self, rows: list[int], logits: Tensor) -> list[int]:
        """Add the most likely token that the format allows to the answers of `rows`; returns these tokens."""
        if self.grammar:
            tokens, logprobs = self.grammar.choose([self.matchers[j] for j in rows], logits)
        else:
            tokens, logprobs = logits.argmax(-1).tolist(), logits.float().log_softmax(-1).amax(-1).tolist()
        for j, token, logprob in zip(rows, tokens, logprobs, strict=True):
            self.decoded[j].ids.append(token)
            self.decoded[j].logprobs.append(logprob)
        return tokens


@dataclass(frozen=True, slots=True)
class Padded:
    """Padded rows, aligned so that all answers begin in the same column:

    . . P P P | A A A A          P prompt, A answer, . padding (masked by position, never by token id,
    P P P P P | A A . .          so that a pad token that equals the end of turn stays supervised)
    """

    rows: list[int]  # their indices in the batch
    sizes: list[int]  # for each row the number of its labels, at least 1
    ids: Tensor  # -1 for padding, (rows, columns); the last column, which predicts nothing, is removed
    predicting: Tensor  # which of the last columns predict a label, (rows, label columns)
    targets: Tensor  # the labels, row after row, NO_LABEL for rows without a target, (labels,)


class MicroBatches:
    """Padded rows of similar length, for any causal model; the optional `SharedPrefixes` are faster."""

    alone = False  # whether each row is a micro-batch: the model computes other logits for padded rows

    def __init__(self, model: Any) -> None:
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model
        self.vocabulary = self.base.get_input_embeddings().num_embeddings

    @property
    def device(self) -> torch.device:
        return self.base.device

    def split(self, rows: Sequence[Row], tokens: int, extra: int = 0) -> Iterator[Any]:
        """Micro-batches of at most `tokens` tokens, where each row counts `extra` tokens more than it has."""
        prompts, answers = [len(row.prompt_ids) for row in rows], [max(len(row.target_ids), 1) + extra for row in rows]
        group: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: prompts[i] + answers[i], reverse=True):
            wider = [*group, i]
            columns = max(prompts[j] for j in wider) + max(answers[j] for j in wider)
            if group and (self.alone or columns * len(wider) > tokens):
                yield _pad(rows, group)
                wider = [i]
            group = wider
        if group:
            yield _pad(rows, group)

    def dummy(self) -> Any:
        """A micro-batch whose result is not used, so that all ranks do the same number of forward passes (FSDP)."""
        return next(self.split([Row([0], [0], "", None, "")], 1))

    @torch.no_grad()
    def ignores_padding(self) -> bool:
        """Whether the model computes the same logits for padded rows; recurrent ones may not."""
        ids = [1 + i * 7919 % (self.vocabulary - 1) for i in range(24)]
        [batch] = self.split([Row(ids, [], "", None, ""), Row(ids[:8], [], "", None, "")], 10**6)
        alone = [self.base(torch.tensor([row], device=self.device), use_cache=False) for row in (ids, ids[:8])]
        return logits_error(self._forward(batch)[1], torch.stack([output.logits[0, -1] for output in alone])) is None

    def loss(self, micro_batch: Any) -> Tensor:
        """The negative log-likelihood of all labels, in nats."""
        head, hidden, _ = self._forward(micro_batch)
        return summed_loss(head, hidden, micro_batch.targets.to(self.device), self.vocabulary)

    def predictions(self, micro_batch: Any) -> tuple[Predictions, Any]:
        """Predictions at each label, and the KV cache for `_generate`, None if it needs none."""
        head, hidden, cache = self._forward(micro_batch)
        return predict(head, hidden, micro_batch.targets.to(self.device), self.vocabulary), cache

    @torch.no_grad()
    def decode(
        self, rows: Sequence[Row], micro_batches: Iterable[Any], stop: Sequence[int], limits: Sequence[int],
        grammar: Constraint | None = None, losses: LossMetrics | None = None,
    ) -> list[Decoded]:  # fmt: skip
        """Greedy answers to the rows, each up to a token of `stop` or its limit; the targets' loss goes to `losses`."""
        # Up to the first mismatch, greedy decoding sees the teacher-forced tokens; without one, nothing is generated.
        decoded = [Decoded() for _ in rows]
        for micro_batch in micro_batches:
            part = micro_batch.rows
            answers = Answers([rows[i] for i in part], [limits[i] for i in part], stop, grammar)
            predictions, cache = self.predictions(micro_batch)
            if losses is not None:
                losses.update(predictions.nll)
            answers.read(predictions, micro_batch.targets, micro_batch.sizes)
            if unfinished := answers.unfinished(range(len(part))):
                self._generate(micro_batch, cache, answers, unfinished)
            del cache  # before the next micro-batch fills its own
            for i, answer in zip(part, answers.decoded, strict=True):
                decoded[i] = answer
        return decoded

    def _forward(self, padded: Any) -> tuple[nn.Module, Tensor, Any]:
        """Output layer, its input at each label, and the KV cache for `_generate`, None if it needs none."""
        inputs = self._inputs(padded.ids)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        columns = padded.predicting.size(1)
        logits = self.base(**inputs, position_ids=positions, logits_to_keep=columns, use_cache=False).logits
        return nn.Identity(), logits[padded.predicting.to(self.device)], None

    def _generate(self, padded: Any, cache: Any, answers: Answers, unfinished: list[int]) -> None:
        from transformers import GenerationConfig

        for j in unfinished:  # from the prompt again: not every model's cache can be truncated at a mismatch
            answers.decoded[j] = Decoded()
            if answers.grammar:
                answers.matchers[j].reset()

        def choose(ids: Tensor, scores: Tensor) -> Tensor:
            """A logits processor that adds the next tokens to the answers of `group`, and allows no others."""
            alive = answers.unfinished(group)
            at = [group.index(j) for j in alive]
            chosen = torch.full_like(scores, float("-inf"))
            chosen[at, answers.add(alive, scores[at])] = 0.0
            return chosen

        # Rows near the end of the context have lower limits: decoded with the others they would exceed it.
        for limit in sorted({answers.limits[j] for j in unfinished}):
            group = [j for j in unfinished if answers.limits[j] == limit]
            ends = {"eos_token_id": list(answers.stop), "pad_token_id": answers.stop[0]}
            config = GenerationConfig(do_sample=False, max_new_tokens=limit, **ends)
            inputs = self._inputs(padded.ids[group, : padded.ids.size(1) - padded.predicting.size(1) + 1])
            self.base.generate(**inputs, generation_config=config, logits_processor=[choose])

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        ids = ids.to(self.device)
        return {"input_ids": ids.clamp_min(0), "attention_mask": (ids >= 0).long()}


def _pad(rows: Sequence[Row], group: list[int]) -> Padded:
    prompts = [torch.tensor(rows[i].prompt_ids) for i in group]
    labels = [torch.tensor(rows[i].target_ids or [NO_LABEL]) for i in group]
    targets = pad_sequence(labels, batch_first=True, padding_value=-1)
    before = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
    predicting = targets >= 0
    predicting[:, 0] = True  # also in a row without a target, whose answer starts there
    ids = torch.cat([before, targets], 1)[:, :-1]
    return Padded(group, list(map(len, labels)), ids, predicting, targets[predicting])


@torch.no_grad()
def choose_micro_batches(model: Any) -> MicroBatches:
    """How the rows of this model are computed: with shared prefixes if it allows them, else padded, else alone."""
    training, share_prefixes = model.training, optional("packing.shared_prefixes", "share_prefixes")
    model.eval()
    micro_batches: MicroBatches | None = share_prefixes(model) if share_prefixes else None
    if micro_batches is None:
        micro_batches = MicroBatches(model)
        micro_batches.alone = not micro_batches.ignores_padding()
        if micro_batches.alone:
            rank_zero_warn("each row is computed alone, which is slower: padding changes the model's logits")
    model.train(training)
    return micro_batches


def logits_error(logits: Tensor, expected: Tensor) -> float | None:
    """The relative error of logits, None if rounding explains it."""
    error = float((logits.float() - expected.float()).norm() / expected.float().norm())
    return None if error < (1e-3 if logits.dtype == torch.float32 else 0.05) else error


@contextlib.contextmanager
def explain_out_of_memory(rows: Sequence[Row], tokens: int) -> Iterator[None]:
    """If memory runs out, name the rows of the batch and the setting to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = "out of memory|(allocate|enough) memory"
        if not rows or not (isinstance(error, MemoryError) or re.search(text, str(error))):
            raise
        longest = max(rows, key=len)
        batch = f"a batch of {len(rows)} rows, the longest {longest.where} with {len(longest)} tokens"
        remedy = f"lower model.tokens_per_micro_batch (now {tokens})"
        if torch.is_grad_enabled():  # in training
            remedy += " or set model.gradient_checkpointing: true"
        raise Fault(f"out of memory in {batch}; {remedy}") from error

"""How the rows of a batch go through the model: sharing prefixes, or in length buckets where a model cannot do that.

Both say the same of every row; they differ in what it costs. Which one a model gets is not looked up in a list of
architectures but shown on the model itself, with a few dozen tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from formtune.errors import first_line
from formtune.model.attention import NAME, PackedAttention, register
from formtune.model.decoding import CachedAttention, greedy
from formtune.model.grammar import Documents, Grammar
from formtune.model.loss import Predictions, judge
from formtune.model.packing import Packed, pack
from formtune.rendering import Row

Stops = Sequence[int]  # tokens that end an answer
Answers = list[list[int]]


class Passes(ABC):
    """Splits rows into passes, and runs one: under teacher forcing, and on to the greedy answers.

    Args:
        model: A causal language model, under PEFT or not.
    """

    def __init__(self, model: Any) -> None:
        self.base = model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def device(self) -> torch.device:
        return self.base.device

    @abstractmethod
    def split(self, rows: Sequence[Row], tokens: int, room: int = 0) -> Iterator[Any]:
        """Passes of at most `tokens` tokens, `room` more for each row included; each has `rows`, their indices."""

    def blank(self) -> Any:
        """A pass that nobody needs, for a process that has none left where others have."""
        [group] = self.split([Row([0], [0], [False], "", None, "")], 1)
        return group

    @abstractmethod
    def predictions(self, group: Any, keep: bool = False) -> tuple[Predictions, Any]:
        """One teacher-forced pass; with `keep` also what answers can go on from."""

    @abstractmethod
    def _go_on(
        self,
        kept: Any,
        open_: list[int],
        begun: list[list[int]],
        stop: Stops,
        limits: list[int],
        documents: Documents | None,
    ) -> Answers:
        """The whole answers of the rows at the places `open_` of the pass, given their beginnings."""

    def evaluate(
        self, rows: Sequence[Row], tokens: int, stop: Stops, limits: Sequence[int], grammar: Grammar | None = None
    ) -> Iterator[tuple[list[int], Predictions, Answers]]:
        """Indices of some of the rows, their predictions and their greedy answers, pass after pass.

        Args:
            rows: All rows.
            tokens: Most tokens of a pass, those that answers may still have included.
            stop: Tokens that end an answer.
            limits: For each row the tokens that its answer may have.
            grammar: What answers must keep, None where every token may follow every other.
        """
        for group in self.split(rows, tokens, max(limits, default=0)):
            yield (group.rows, *self.answers(rows, group, stop, limits, grammar))

    @torch.no_grad()
    def answers(
        self, rows: Sequence[Row], group: Any, stop: Stops, limits: Sequence[int], grammar: Grammar | None = None
    ) -> tuple[Predictions, Answers]:
        """Predictions and greedy answers of one pass, the answers up to and including a stop token.

        Greedy decoding sees the same tokens as a teacher-forced pass for as long as it says what the target says. So an
        answer whose every predicted token is the target's is the target, and any other goes on from the first mismatch.
        The most likely token of all is also the most likely one that a grammar allows, if it allows it; where it does
        not, the token before it is fed once more, and its logits are chosen from anew.

        Args:
            rows: What `split` was given.
            group: One of the passes it made.
            stop: Tokens that end an answer.
            limits: For each of `rows` the tokens that its answer may have.
            grammar: What answers must keep, None where every token may follow every other.
        """
        documents = grammar.begin(len(group.rows)) if grammar else None
        found, kept = self.predictions(group, keep=True)
        members = [rows[i] for i in group.rows]
        limit = [limits[i] for i in group.rows]
        answers = []
        said_by = found.tokens.split(_sizes(members))
        for j, (row, tokens, most) in enumerate(zip(members, said_by, limit, strict=True)):
            said = tokens.tolist()
            same = next((i for i, (a, b) in enumerate(zip(said, row.target, strict=False)) if a != b), len(row.target))
            answer = (row.target[:same] + said[same : same + 1])[:most]
            answers.append(answer[: documents.write(j, answer)] if documents else answer)
        open_ = [j for j, a in enumerate(answers) if not a or (a[-1] not in stop and len(a) < limit[j])]
        if open_:
            begun, most = [answers[j] for j in open_], [limit[j] for j in open_]
            for j, answer in zip(open_, self._go_on(kept, open_, begun, stop, most, documents), strict=True):
                answers[j] = answer
        return found, answers


def _sizes(rows: Sequence[Row]) -> list[int]:
    return [max(len(row.target), 1) for row in rows]


class SharedPrefixes(Passes):
    """Passes over packed sequences; decoding reads the keys and values of the same pass."""

    def split(self, rows: Sequence[Row], tokens: int, room: int = 0) -> Iterator[Packed]:
        return pack(rows, tokens, room)

    def predictions(self, group: Packed, keep: bool = False) -> tuple[Predictions, Any]:
        attention = PackedAttention(group, keep)
        hidden = self._hidden(group.ids, group.positions, attention)[0, group.predicting.to(self.device)]
        vocabulary = self.base.get_input_embeddings().num_embeddings
        head = self.base.get_output_embeddings()
        return judge(head, hidden, group.targets.to(self.device), vocabulary), attention

    def _go_on(
        self,
        kept: PackedAttention,
        open_: list[int],
        begun: list[list[int]],
        stop: Stops,
        limits: list[int],
        documents: Documents | None,
    ) -> Answers:
        packed, paths = kept.packed, kept.packed.paths()
        ends = [paths[j][-1].end - packed.sizes[j] for j in open_]  # of the prompts, but for their last tokens
        before = packed.ids[0, ends].tolist()
        # What was fed of a target from the first mismatch on is no part of the answer.
        own = [end - paths[j][-1].start + len(a) for j, end, a in zip(open_, ends, begun, strict=True)]

        def choose(logits: Tensor, rows: list[int]) -> list[int]:
            if documents is None:
                return logits.argmax(-1).tolist()
            return documents.choose([open_[i] for i in rows], logits)

        cache = CachedAttention(kept.kept, [paths[j] for j in open_], own)
        return greedy(self._next, choose, cache, before, begun, stop, limits)

    def _next(self, ids: Tensor, positions: Tensor, cache: CachedAttention) -> Tensor:
        return self.base.get_output_embeddings()(self._hidden(ids, positions, cache)[:, -1])

    def _hidden(self, ids: Tensor, positions: Tensor, attend: Any) -> Tensor:
        out = self.base.get_decoder()(
            input_ids=ids.to(self.device), position_ids=positions.to(self.device), use_cache=False, attend=attend
        )
        return out.last_hidden_state


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

    def _go_on(
        self,
        kept: Padded,
        open_: list[int],
        begun: list[list[int]],
        stop: Stops,
        limits: list[int],
        documents: Documents | None,
    ) -> Answers:
        from transformers import GenerationConfig

        width = kept.ids.size(1) - kept.targets.size(1) + 1
        answers: dict[int, list[int]] = {}
        # Rows near the end of the context have less room: decoded with others they would run over its edge.
        for limit in sorted(set(limits)):
            rows = [j for j, most in zip(open_, limits, strict=True) if most == limit]
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
        return [answers[j] for j in open_]


def _pad(rows: Sequence[Row], group: list[int]) -> Padded:
    members = [rows[i] for i in group]
    left, right = max(len(row.prompt) for row in members), max(_sizes(members))
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


@torch.no_grad()
def passes(model: Any) -> Passes:
    """Shared prefixes if the model says the same with them as without, length buckets otherwise."""
    shared, training = SharedPrefixes(model), [module for module in model.modules() if module.training]
    usual = shared.base.config._attn_implementation
    model.eval()
    try:
        difference = _difference(shared)
    except Exception as error:  # whatever an architecture makes of keyword arguments that it does not know
        difference = first_line(error)
    for module in training:
        module.training = True
    if difference is None:
        return shared
    shared.base.set_attn_implementation(usual)
    rank_zero_warn(f"prefixes are not shared, each row is computed on its own: {difference}")
    return LengthBuckets(model)


def _difference(shared: SharedPrefixes) -> str | None:
    """Why this model cannot take packed rows, None if it can; leaves it with the attention for them."""
    base, config = shared.base, shared.base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        return f"the model has layers of other kinds ({', '.join(sorted(kinds))})"
    size = base.get_input_embeddings().num_embeddings
    ids = [1 + i * 7919 % (size - 1) for i in range(48)]
    # Two levels of sharing, and a row of its own.
    prompts = [ids[:16] + ids[16:20], ids[:16] + ids[16:18] + ids[24:28], ids[:16] + ids[30:40], ids[40:]]
    [group] = pack([Row(prompt, [], [], "", None, "") for prompt in prompts], 10**6)
    alone = [base(torch.tensor([prompts[i]], device=shared.device), use_cache=False).logits[0] for i in group.rows]
    register()
    base.set_attn_implementation(NAME)
    windows, attention = set(), PackedAttention(group)

    def attend(*arguments: Any) -> Tensor:
        windows.add(arguments[-1])
        return attention(*arguments)

    packed = base.get_output_embeddings()(shared._hidden(group.ids, group.positions, attend)[0])
    window = getattr(config, "sliding_window", None)
    if window and "sliding_attention" in kinds and window not in windows:
        return "the model keeps its attention's window to itself"
    for path, logits in zip(group.paths(), alone, strict=True):
        same = torch.cat([packed[segment.start : segment.end] for segment in path]).float()
        error = float((same - logits.float()).norm() / logits.float().norm())
        if not error < (1e-3 if packed.dtype == torch.float32 else 0.05):
            return f"the model's logits come out different (by {error:.1%})"
    return None

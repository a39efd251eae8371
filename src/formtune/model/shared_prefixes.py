"""Passes in which rows share what their prompts have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from formtune.base.row import Row
from formtune.model.attention import PackedAttention
from formtune.model.constrained import Documents
from formtune.model.decoding import CachedAttention, greedy
from formtune.model.loss import Predictions, judge
from formtune.model.micro_batches import Answers, Open, Passes, Stops
from formtune.model.packing import Packed, pack


class SharedPrefixes(Passes):
    """Passes over packed sequences; decoding reads the keys and values of the same pass."""

    def split(self, rows: Sequence[Row], tokens: int, room: int = 0) -> Iterator[Packed]:
        return pack(rows, tokens, room)

    def predictions(self, group: Packed, keep: bool = False) -> tuple[Predictions, Any]:
        attention = PackedAttention(group, keep)
        hidden = self.hidden(group.ids, group.positions, attention)[0, group.predicting.to(self.device)]
        vocabulary = self.base.get_input_embeddings().num_embeddings
        head = self.base.get_output_embeddings()
        return judge(head, hidden, group.targets.to(self.device), vocabulary), attention

    def _go_on(self, kept: PackedAttention, open_: Open, stop: Stops, documents: Documents | None) -> Answers:
        packed, paths = kept.packed, kept.packed.paths()
        ends = [paths[j][-1].end - packed.sizes[j] for j in open_.places]  # of the prompts, but for their last tokens
        before = packed.ids[0, ends].tolist()
        # What was fed of a target from the first mismatch on is no part of the answer.
        own = [end - paths[j][-1].start + len(a) for j, end, a in zip(open_.places, ends, open_.begun, strict=True)]

        def choose(logits: Tensor, rows: list[int]) -> list[int]:
            if documents is None:
                return logits.argmax(-1).tolist()
            return documents.choose([open_.places[i] for i in rows], logits)

        cache = CachedAttention(kept.kept, [paths[j] for j in open_.places], own)
        return greedy(self._next, choose, cache, before, open_.begun, stop, open_.limits)

    def _next(self, ids: Tensor, positions: Tensor, cache: CachedAttention) -> Tensor:
        return self.base.get_output_embeddings()(self.hidden(ids, positions, cache)[:, -1])

    def hidden(self, ids: Tensor, positions: Tensor, attend: Any) -> Tensor:
        """Hidden states of packed tokens, of which `attend` does the attention."""
        out = self.base.get_decoder()(
            input_ids=ids.to(self.device), position_ids=positions.to(self.device), use_cache=False, attend=attend
        )
        return out.last_hidden_state

"""How the rows of a batch go through the model, under teacher forcing and on to their greedy answers."""

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
class Open:
    """Answers of a pass that have not come to their end.

    Args:
        places: Of their rows in the pass.
        begun: What they say so far, in token ids.
        limits: Tokens that each may have.
    """

    places: list[int]
    begun: Answers
    limits: list[int]


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
    def _go_on(self, kept: Any, open_: Open, stop: Stops, documents: Documents | None) -> Answers:
        """The whole answers of which these are the beginnings."""

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
        said_by = found.tokens.split(target_sizes(members))
        for j, (row, tokens, most) in enumerate(zip(members, said_by, limit, strict=True)):
            said = tokens.tolist()
            same = next((i for i, (a, b) in enumerate(zip(said, row.target, strict=False)) if a != b), len(row.target))
            answer = (row.target[:same] + said[same : same + 1])[:most]
            answers.append(answer[: documents.write(j, answer)] if documents else answer)
        places = [j for j, a in enumerate(answers) if not a or (a[-1] not in stop and len(a) < limit[j])]
        if places:
            open_ = Open(places, [answers[j] for j in places], [limit[j] for j in places])
            for j, answer in zip(places, self._go_on(kept, open_, stop, documents), strict=True):
                answers[j] = answer
        return found, answers


def target_sizes(rows: Sequence[Row]) -> list[int]:
    """Predictions that each row takes part in with: one where there is no target, from which an answer begins."""
    return [max(len(row.target), 1) for row in rows]

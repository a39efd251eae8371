"""Repairs what is safe to repair in inputs and sets aside what cannot be trained on, each with its reason.

Inputs are repaired by named steps; the same steps run on the inputs of evaluation and prediction, so that the
model never meets a text in production that was prepared in another way. Answers are judged, never rewritten.
Nothing vanishes: every row is kept or stands in `Cleaned.quarantine` with a reason and a place.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from formtune.formats import Format
from formtune.rendering import Message

Step = Literal["unicode", "control", "edges", "html", "spaces"]

_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
# Joiners (U+200D) and direction marks carry meaning in emoji and in several scripts: they stay.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff\u00ad]")

STEPS: dict[str, Callable[[str], str]] = {
    "unicode": lambda text: unicodedata.normalize("NFC", text),
    "control": lambda text: _INVISIBLE.sub("", text),
    "html": lambda text: html.unescape(_TAG.sub(" ", text)).replace("\xa0", " "),
    "spaces": lambda text: re.sub(r"[^\S\n]+", " ", text),
    "edges": str.strip,
}


@dataclass(slots=True)
class Example:
    """A conversation on its way to training: its turns (the last one the answer) and the place it came from."""

    messages: list[Message]
    where: str

    @property
    def gold(self) -> str:
        return self.messages[-1]["content"]

    @property
    def text(self) -> str:
        """The input with white space folded: rows that share it are duplicates or conflicts."""
        return self._folded("system", "user", "assistant")

    @property
    def key(self) -> str:
        """The input with case folded as well: rows that share it never stand on both sides of a split.

        Coarser than `text` on purpose: "call anna" and "Call Anna" leak, but their answers may rightly differ, as they
        may under two system prompts.
        """
        return self._folded("user", "assistant").casefold()

    def _folded(self, *roles: str) -> str:
        return "\x1e".join(" ".join(m["content"].split()) for m in self.messages[:-1] if m["role"] in roles)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that was set aside."""

    where: str
    reason: str
    detail: str
    messages: list[Message]


@dataclass(slots=True)
class Cleaned:
    """The rows kept, the rows set aside, and how many inputs each step changed."""

    kept: list[Example] = field(default_factory=list)
    quarantine: list[Quarantined] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)

    def set_aside(self, example: Example, reason: str, detail: str) -> None:
        """Put a row into quarantine."""
        self.quarantine.append(Quarantined(example.where, reason, detail, example.messages))


def repair(messages: Sequence[Message], steps: Iterable[str], repairs: Counter[str] | None = None) -> list[Message]:
    """The turns with the user's texts (never an answer) repaired by `steps`; counts what each step changed."""
    repaired = []
    for message in messages:
        text = message["content"]
        if message["role"] == "user":
            for step in STEPS:
                if step in steps:
                    before, text = text, STEPS[step](text)
                    if repairs is not None and text != before:
                        repairs[step] += 1
        repaired.append({"role": message["role"], "content": text})
    return repaired


def clean(examples: Iterable[Example], contract: Format, steps: Sequence[str], held_out: dict[str, str]) -> Cleaned:
    """Repair, judge and deduplicate the rows of one split.

    Args:
        examples: Rows with a gold answer.
        contract: Judges every answer by the rule that will judge the model's.
        steps: Names of the repairs to run.
        held_out: Keys of inputs that belong to evaluation, with their places; such rows are leaks here.

    Rows are set aside as `empty`, `leak`, `format` (the answer breaks the contract), `duplicate` (same input, same
    answer: the first is kept) or `conflict` (same input, several answers: none can be trusted, none is kept).
    """
    done = Cleaned()
    groups: dict[str, list[Example]] = {}
    for example in examples:
        example = Example(repair(example.messages, steps, done.repairs), example.where)
        if not example.gold.strip() or all(not m["content"].strip() for m in example.messages if m["role"] == "user"):
            done.set_aside(example, "empty", "the input or the answer is empty")
        elif example.key in held_out:
            done.set_aside(example, "leak", f"the input also stands in {held_out[example.key]}")
        elif (verdict := contract.check(example.gold)).exact:
            groups.setdefault(example.text, []).append(example)
        else:
            done.set_aside(example, "format", f"{verdict.kind}: {verdict.detail}")
    for first, *others in groups.values():
        rival = next((o for o in others if o.gold != first.gold), None)
        if rival is None:
            done.kept.append(first)
            for other in others:
                done.set_aside(other, "duplicate", f"same input and answer as {first.where}")
        else:
            for example in (first, *others):
                with_ = rival if example is first else first
                done.set_aside(example, "conflict", f"same input as {with_.where}, another answer")
    return done

"""Repairs what is safe to repair and quarantines what cannot be trained on, each row with its reason.

Inputs are repaired by named steps; the same steps run on the inputs of evaluation and prediction, so that training
and production prepare texts alike. Answers are judged, and rewritten only by the steps that a user names for them.
Every row is kept or quarantined.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ftfy

from formtune.base.row import Message
from formtune.formats import Format

Step = Literal["encoding", "unicode", "control", "html", "spaces", "edges"]
AnswerStep = Literal["edges", "fence", "canonical"]

_FENCE = re.compile(r"```[^\n`]*\n(.*?)\n?```", re.S)
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
# Joiners (U+200D) and direction marks carry meaning in emoji and in several scripts: they are kept.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff\u00ad]")

# Punctuation that changes no meaning, unless there is a digit on both sides.
_MARKS = re.compile(r"(?<!\d)[.,:;!?…\"'“”‘’()\[\]]|[.,:;!?…\"'“”‘’()\[\]](?!\d)")

# In the order in which they run. Each is a function of the text alone.
STEPS: dict[str, Callable[[str], str]] = {
    "encoding": lambda text: text if text.isascii() else ftfy.fix_encoding(text),
    "unicode": lambda text: unicodedata.normalize("NFC", text),
    "control": lambda text: _INVISIBLE.sub("", text),
    "html": lambda text: html.unescape(_TAG.sub(" ", text)).replace("\xa0", " "),
    "spaces": lambda text: re.sub(r"[^\S\n]+", " ", text),
    "edges": str.strip,
}


@dataclass(slots=True)
class Example:
    """A conversation before it is encoded."""

    messages: list[Message]  # the last one is the answer
    where: str  # the place it came from
    origin: str = ""  # who wrote it: "human", the name of a model, or "" where the rows do not say
    value: Any = None  # the document that its answer is, once that was judged

    @property
    def target(self) -> str:
        return self.messages[-1]["content"]

    @property
    def input(self) -> str:
        """What the users' turns say."""
        return "\n".join(m["content"] for m in self.messages[:-1] if m["role"] == "user")

    @property
    def system(self) -> str:
        """What the system's turns say; equal inputs below different ones may rightly have different answers."""
        return "\n".join(m["content"] for m in self.messages[:-1] if m["role"] == "system")

    @property
    def text(self) -> str:
        """The input with white space folded: rows that share it are duplicates or conflicts."""
        return self._folded("system", "user", "assistant")

    @property
    def key(self) -> str:
        """The input without case, punctuation and spacing: rows that share it are never in two splits.

        Coarser than `text`: "call anna" and "Call Anna!" leak, but their answers may rightly differ.
        """
        return _folded_more(self._folded("user", "assistant"))

    @property
    def turns(self) -> list[str]:
        """The same turn by turn."""
        return [_folded_more(" ".join(m["content"].split())) for m in self.messages[:-1] if m["role"] != "system"]

    def _folded(self, *roles: str) -> str:
        return "\x1e".join(" ".join(m["content"].split()) for m in self.messages[:-1] if m["role"] in roles)


def _folded_more(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_MARKS.sub(" ", folded).split()) or folded


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that is not used."""

    where: str
    reason: str  # one word
    detail: str  # what is wrong, in one line
    messages: list[Message]  # repaired as far as they could be
    other: str = ""  # place of the row that it repeats or contradicts


def quarantine(example: Example, reason: str, detail: str, other: str = "") -> Quarantined:
    return Quarantined(example.where, reason, detail, example.messages, other)


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


def repair_answer(answer: str, format: Format, steps: Sequence[str], repairs: Counter[str]) -> str:
    """An answer that breaks its format, or is not canonical, repaired by `steps` as far as it then keeps it.

    `edges` strips white space, `fence` the code fence around it, `canonical` writes the document as the format would.
    A repair that does not lead to a valid answer is not made.
    """
    repaired, made = answer, []
    for step in ("edges", "fence", "canonical"):
        if step not in steps:
            continue
        before = repaired
        if step == "edges":
            repaired = repaired.strip()
        elif step == "fence" and (match := _FENCE.fullmatch(repaired.strip())):
            repaired = match[1]
        elif step == "canonical" and (verdict := format.check(repaired)).kind in ("ok", "layout"):
            repaired = format.write(verdict.value) or repaired
        made += [step] if repaired != before else []
    if not made or not format.check(repaired).exact:
        return answer
    repairs.update(f"answer {step}" for step in made)
    return repaired


def judge(
    examples: Iterable[Example],
    format: Format,
    steps: Sequence[str],
    answer_steps: Sequence[str],
    repairs: Counter[str],
) -> Iterator[Example | Quarantined]:
    """Repair and judge rows with a target by the rule that will judge the model's answers; counts the repairs made."""
    for example in examples:
        messages = repair(example.messages, steps, repairs)
        if answer_steps:
            messages[-1]["content"] = repair_answer(messages[-1]["content"], format, answer_steps, repairs)
        repaired = Example(messages, example.where, example.origin)
        if not repaired.target.strip() or not repaired.input.strip():
            yield quarantine(repaired, "empty", "the input or the answer is empty")
        elif (verdict := format.check(repaired.target)).exact:
            repaired.value = verdict.value
            yield repaired
        else:
            yield quarantine(repaired, "format", f"{verdict.kind}: {verdict.detail}")

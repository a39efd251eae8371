"""Repairs what is safe to repair and sets aside what cannot be trained on, each with its reason.

Inputs are repaired by named steps; the same steps run on the inputs of evaluation and prediction, so that the
model never meets a text in production that was prepared in another way. Answers are judged, and rewritten only by the
steps that a user names for them. Nothing vanishes: every row is kept or set aside with a reason and a place.
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
# Joiners (U+200D) and direction marks carry meaning in emoji and in several scripts: they stay.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff\u00ad]")

# Marks that change no meaning for a reader, unless a digit stands on both sides.
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
    """A conversation on its way to training.

    Args:
        messages: Its turns, the last one the answer.
        where: The place it came from.
        origin: Who wrote it: "human", the name of a model, or "" where the rows do not say.
        value: The document that its answer is, once that was judged.
    """

    messages: list[Message]
    where: str
    origin: str = ""
    value: Any = None

    @property
    def gold(self) -> str:
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
        """The input without its case, its marks and its spacing: rows that share it never stand in two splits.

        Coarser than `text` on purpose: "call anna" and "Call Anna!" leak, but their answers may rightly differ, as they
        may under two system prompts.
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
    """A row that was set aside.

    Args:
        where: Its place.
        reason: One word.
        detail: What is wrong, in one line.
        messages: Its turns, repaired as far as they could be.
        other: Place of the row that it repeats or contradicts, "" if there is none.
    """

    where: str
    reason: str
    detail: str
    messages: list[Message]
    other: str = ""


def set_aside(example: Example, reason: str, detail: str, other: str = "") -> Quarantined:
    """The example's entry in the quarantine."""
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


def repair_answer(answer: str, contract: Format, steps: Sequence[str], repairs: Counter[str]) -> str:
    """An answer that breaks its contract, or is not canonical, repaired by `steps` as far as it then keeps it.

    `edges` takes white space from its ends, `fence` the code fence around it, `canonical` writes the document anew as
    the contract would write it. A repair that does not lead to a good answer is not made.
    """
    mended, made = answer, []
    for step in ("edges", "fence", "canonical"):
        if step not in steps:
            continue
        before = mended
        if step == "edges":
            mended = mended.strip() + ("\n" if contract.trailing_newline else "")
        elif step == "fence" and (match := _FENCE.fullmatch(mended.strip())):
            mended = match[1]
        elif step == "canonical" and (verdict := contract.check(mended)).schema and verdict.no_extra_text:
            mended = contract.write(verdict.value) or mended
        made += [step] if mended != before else []
    if not made or not contract.check(mended).exact:
        return answer
    repairs.update(f"answer {step}" for step in made)
    return mended


def judge(
    examples: Iterable[Example],
    contract: Format,
    steps: Sequence[str],
    answer_steps: Sequence[str],
    repairs: Counter[str],
) -> Iterator[Example | Quarantined]:
    """Repair and judge rows with a gold answer; each comes back with its document, or with what is wrong with it.

    Args:
        examples: The rows.
        contract: Judges every answer by the rule that will judge the model's.
        steps: Names of the repairs to run on inputs.
        answer_steps: Names of the repairs to run on answers.
        repairs: Counts how many texts each step changed.

    A row is set aside as `empty`, or as `format` if its answer breaks the contract.
    """
    for example in examples:
        messages = repair(example.messages, steps, repairs)
        if answer_steps:
            messages[-1]["content"] = repair_answer(messages[-1]["content"], contract, answer_steps, repairs)
        done = Example(messages, example.where, example.origin)
        if not done.gold.strip() or not done.input.strip():
            yield set_aside(done, "empty", "the input or the answer is empty")
        elif (verdict := contract.check(done.gold)).exact:
            done.value = verdict.value
            yield done
        else:
            yield set_aside(done, "format", f"{verdict.kind}: {verdict.detail}")

"""Repairs inputs, in training, evaluation and prediction alike, and checks answers against the format."""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import ftfy

from formtune.base.row import SYSTEM_ROLES, Message, full_text
from formtune.errors import UserError
from formtune.formats import Format
from formtune.formats.format import unfenced

Step = Literal["encoding", "unicode", "control", "html", "spaces", "edges"]
AnswerStep = Literal["encoding", "unicode", "edges", "fence", "canonical"]

_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
# Without joiners (U+200D) and direction marks, which have a meaning in emoji and in several scripts.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff\u00ad]")
# Punctuation that changes no meaning, unless there is a digit on both sides.
_MARKS = re.compile(r"(?<!\d)[.,:;!?…\"'“”‘’()\[\]]|[.,:;!?…\"'“”‘’()\[\]](?!\d)")

# In the order in which they run.
STEPS: dict[str, Callable[[str], str]] = {
    "encoding": lambda text: text if text.isascii() else ftfy.fix_encoding(text),
    "unicode": lambda text: unicodedata.normalize("NFC", text),
    "control": lambda text: _INVISIBLE.sub("", text.replace("\r\n", "\n")),
    "html": lambda text: html.unescape(_TAG.sub(" ", text)).replace("\xa0", " "),
    "spaces": lambda text: re.sub(r"[^\S\n]+", " ", text),
    "edges": str.strip,
}


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that is not used."""

    where: str
    reason: str  # a short name, such as near_duplicate
    detail: str  # what is wrong, in one line
    messages: list[Message]  # with the repairs made so far
    other: str = ""  # place of the row that it repeats or contradicts
    fix: str = ""  # the option that would make it usable, as `key: value`
    split: str = ""


@dataclass(slots=True)
class Example:
    """A conversation before it is encoded."""

    messages: list[Message]  # the last one is the answer
    where: str  # the place it came from
    origin: str = ""  # author: "human", the name of a model, or "" if unknown
    value: Any = None  # the document of its answer, once checked
    tools: str | None = None  # JSON list of the tools that its prompt defines
    rendered: str | None = None  # the answer as the chat template writes it, if that is more than the last turn's text
    schema: str | None = None  # JSON text of the row's own schema, or of its tools
    group: str = ""  # rows of one group are never in two splits; "" for a group of one
    split: str = "train"

    @property
    def target(self) -> str:
        return self.messages[-1]["content"] if self.rendered is None else self.rendered

    @property
    def input(self) -> str:
        """The text of the user's turns."""
        return "\n".join(turn["content"] for turn in self.messages[:-1] if turn["role"] == "user")

    @property
    def system(self) -> str:
        """The system prompt and the tools; with different ones, equal inputs may have different answers."""
        texts = [turn["content"] for turn in self.messages[:-1] if turn["role"] in SYSTEM_ROLES]
        return "\n".join([*texts, *([self.tools] if self.tools else ())])

    @property
    def turn_texts(self) -> list[str]:
        """The text of every turn before the answer, without the system prompt."""
        return [full_text(turn) for turn in self.messages[:-1] if turn["role"] not in SYSTEM_ROLES]

    @property
    def text(self) -> str:
        """The prompt with single spaces, and the schema: rows that share it are duplicates or conflicts."""
        return "\x1e".join([*map(_single_spaced, [self.system, *self.turn_texts]), self.schema or ""])

    @property
    def key(self) -> str:
        """The input without case, punctuation and spacing: rows that share it are never in two splits."""
        # Coarser than `text`: "call anna" and "Call Anna!" leak, but their answers may differ.
        return "\x1e".join(self.turns)

    @property
    def turns(self) -> list[str]:
        """The text of each turn without case, punctuation and spacing."""
        return [folded(content) for content in self.turn_texts]

    def quarantined(self, reason: str, detail: str, other: str = "", fix: str = "") -> Quarantined:
        return Quarantined(self.where, reason, detail, self.messages, other, fix, self.split)


def _single_spaced(text: str) -> str:
    return " ".join(text.split())


def folded(text: str) -> str:
    """The text without case, punctuation and spacing."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return _single_spaced(_MARKS.sub(" ", text)) or text


def repair(messages: Sequence[Message], steps: Iterable[str], repairs: Counter[str] | None = None) -> list[Message]:
    """The turns with the user's texts (never an answer) repaired by `steps`; counts what each step changed."""
    repaired = []
    for message in messages:
        text = message["content"]
        for step in STEPS if message["role"] == "user" else ():
            if step in steps:
                before, text = text, STEPS[step](text)
                if repairs is not None and text != before:
                    repairs[step] += 1
        repaired.append(message | {"content": text})
    return repaired


def repair_answer(answer: str, format: Format, steps: Sequence[str], repairs: Counter[str]) -> str:
    """An answer repaired by `steps`, unchanged if it would then break the format; counts the repairs."""
    reasoning, text = format.split(answer)
    format, made = format.inner or format, []
    for step in [step for step in get_args(AnswerStep) if step in steps]:
        before = text
        if step in STEPS:
            text = STEPS[step](text)
        elif step == "fence":
            text = unfenced(text)
        elif step == "canonical" and (verdict := format.check(text)).kind in ("ok", "layout"):
            text = format.write(verdict.value) or text
        made += [f"answer {step}"] if text != before else []
    if not made or not format.check(text).exact:
        return answer
    repairs.update(made)
    return reasoning + text


def check_example(
    example: Example, format: Format, steps: Sequence[str], answer_steps: Sequence[str], repairs: Counter[str]
) -> Example | Quarantined:
    """Repair a row and check its target against the format that checks the model's answers; counts the repairs."""
    try:
        format = format.of_row(example.schema)
    except UserError as error:
        return example.quarantined("schema", str(error))
    example = replace(example, messages=repair(example.messages, steps, repairs))
    if example.rendered is None:
        example.messages[-1]["content"] = repair_answer(example.target, format, answer_steps, repairs)
    verdict = format.check(example.target)
    if verdict.kind == "empty" or not example.input.strip():
        return example.quarantined("empty", "the input or the answer is empty")
    if not verdict.exact:
        fix = helpful_repair(example.target, format, answer_steps)
        return example.quarantined("format", f"{verdict.kind}: {verdict.detail}", fix=fix)
    example.value = verdict.value
    return example


def helpful_repair(answer: str, format: Format, steps: Sequence[str]) -> str:
    """The `data.repair_answers` that would make an answer valid, "" if none does."""
    for more in (("edges",), ("fence",), ("canonical",), ("edges", "fence", "canonical")):
        steps_tried = list(dict.fromkeys([*steps, *more]))
        if repair_answer(answer, format, steps_tried, Counter()) != answer:
            return f"data.repair_answers: [{', '.join(steps_tried)}]"
    return ""

"""The base class of formats, and the verdict that a format gives on a text."""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from formtune.errors import UserError
from formtune.formats.bounded import CHECK_SECONDS, time_limit
from formtune.formats.content import Comparison, compare
from formtune.formats.key_orders import Orders

MAX_CHARACTERS = 100_000  # longer texts are not read: a verdict must be cheap whatever a model writes
MAX_FENCES = 8  # searched for a document

_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.S)

# In order of precedence: a text's kind is the first that applies. All but `ok` and `content` break the format.
KINDS = (
    *("ok", "empty", "truncated", "extra_text", "syntax", "wrong_root", "missing_key", "extra_key"),
    *("wrong_type", "bad_value_form", "layout", "content"),
)


class SyntaxProblem(ValueError):
    """Raised by `Format.parse` for a text that is not a document of the format."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a text breaks its format."""

    kind: str  # one of `KINDS`
    detail: str  # one line for a person, with the path of the value


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a format says of one text."""

    kind: str  # one of `KINDS`
    detail: str  # one line on what is wrong, "" if nothing is
    loose: bool  # whether the format is valid without the fence, prose and think block around the document
    value: Any  # the document, alone or within other text; None if there is none
    content: Comparison | None  # the document compared with the target; None without a target

    @property
    def exact(self) -> bool:
        """Whether the format is valid: nothing is wrong, or only the content."""
        return self.kind in ("ok", "content")

    @property
    def joint(self) -> bool:
        """Whether the format is valid and the content is the target's."""
        return self.exact and self.content is not None and self.content.equal


class Format(ABC):
    """A format; your own needs `parse`, and the other methods if it has more to say.

    Texts are judged as they are: nothing is stripped. Whitespace around a document is extra text. The constructor
    stores each argument as the attribute of the same name, so that the format can be written to a file.
    """

    #: Dotted paths of the values, for the accuracy of each field.
    fields: tuple[str, ...] = ()
    #: Paths of arrays whose order does not matter.
    sets: frozenset[str] = frozenset()
    #: Paths of values that need not occur in the input, such as labels.
    derived: frozenset[str] = frozenset()
    #: What the user should know of how the format was read, such as what it leaves unchecked; each one line.
    notes: tuple[str, ...] = ()
    #: Whether a document must have exactly the text that `write` gives.
    canonical: bool = False
    #: Whether each row has its own schema, which `of_row` needs.
    per_row: bool = False
    #: The tags around the reasoning before an answer, and the format of that answer; None without reasoning.
    tags: tuple[str, str] | None = None
    inner: "Format | None" = None

    def split(self, text: str) -> tuple[str, str]:
        """The reasoning with its tags and the white space after it, "" if there is none, and the answer."""
        return "", text

    def of_row(self, schema: str | None) -> "Format":
        """The format of one row, by the JSON text of its own schema; raises UserError if it cannot be read."""
        return self

    @abstractmethod
    def parse(self, text: str) -> Any:
        """The document that the whole text is, as plain Python data; raises SyntaxProblem if it is not one."""

    def problems(self, value: Any) -> list[Problem]:
        """What is wrong with a document that parsed."""
        return []

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        """Spans that may be a document within other text; think blocks are left out."""
        start = answer_start(text)
        yield _trimmed(text, start, len(text))
        for fence in islice(_FENCE.finditer(text, start), MAX_FENCES):
            yield _trimmed(text, *fence.span(1))

    def write(self, value: Any) -> str | None:
        """The plainest text of a document, None if the format has none."""
        return None

    def value_spans(self, text: str) -> dict[str, tuple[int, int]]:
        """Where values are in a valid text, by dotted path, with the next character if that shows that one ends."""
        return {}

    def grammar(self) -> str | None:
        """The format for constrained decoding, None if the format has no grammar.

        Lark rules in llguidance's dialect, of which `answer` is the whole text: `answer: "yes" | "no"`. They may allow
        less than the format, never more. Raises UserError if the format cannot be expressed.
        """
        return None

    def ordered_grammar(self, orders: Orders | None) -> str | None:
        """As `grammar`, with JSON keys in the orders that targets use, None for any; None if `grammar` allows these."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The format as plain data, complete without other files: `class_path` and `init_args`."""
        cls = type(self)
        names = inspect.signature(cls).parameters
        if missing := [name for name in names if not hasattr(self, name)]:
            raise UserError(f"data.format: {cls.__name__} must store its argument {missing[0]} as self.{missing[0]}")
        values = {name: getattr(self, name) for name in names}
        init_args = {name: sorted(v) if isinstance(v, frozenset) else v for name, v in values.items()}
        init_args |= {name: v.to_dict() for name, v in values.items() if isinstance(v, Format)}
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args}

    @time_limit()
    def check(self, text: str, *, finished: bool = True, target: str | None = None) -> Verdict:
        """Judge an answer without its stop token; every text gets a verdict.

        `finished` is False for an answer that was cut for length.
        """
        is_document, value, problems = self._read(text)
        content, is_loose = None, finished and is_document and all(p.kind == "extra_text" for p in problems)
        if not finished:
            why = "the document is complete" if is_document else "cut before its end"
            problems.append(Problem("truncated", f"no stop token: {why}"))
        if target is not None:
            try:
                expected = self._parse(target)
            except SyntaxProblem as error:
                raise UserError(f"a target has an invalid format ({error}): {target[:80]!r}") from None
            content = compare(value, expected, is_document, self.fields, self.sets)
            if content.difference:
                problems.append(Problem("content", content.difference))
        first = min(problems, key=lambda problem: KINDS.index(problem.kind), default=Problem("ok", ""))
        return Verdict(first.kind, " ".join(first.detail.split()), is_loose, value, content)

    def _read(self, text: str) -> tuple[bool, Any, list[Problem]]:
        """Whether the text holds a document, the document, and what is wrong.

        Of documents within other text, it is the first valid one, else the first that is not part of another.
        """
        empty = False, None, [Problem("empty", "the answer is empty")]
        if text and not text.strip():  # a document can be empty, and not white space
            return empty
        if len(text) > MAX_CHARACTERS:
            return False, None, [Problem("syntax", f"longer than {MAX_CHARACTERS:,} characters")]
        errors, first = [], None
        for start, end in chain([(0, len(text))], self.documents(text)):
            try:
                value, problems = self._judge(text[start:end])
            except SyntaxProblem as error:
                errors.append(str(error))
                continue
            if end - start == len(text):
                return (True, value, problems) if text or not problems else empty
            extra = Problem("extra_text", f"{(text[:start] or text[end:])[:60]!r} is outside the document")
            if not problems:
                return True, value, [extra]
            # A part of a broken document is not the document.
            if first is None and not re.search(r"[\[{]", text[answer_start(text) : start]):
                first = True, value, [extra, *problems]
        return first or ((False, None, [Problem("syntax", errors[0])]) if text else empty)

    def _judge(self, text: str) -> tuple[Any, list[Problem]]:
        """The document that the whole text is, and what is wrong with it."""
        value = self._parse(text)
        try:
            problems = [*self.problems(value)]
            if self.canonical and self.write(value) != text:
                problems.append(Problem("layout", "key order or whitespace is not canonical"))
        except (TimeoutError, RecursionError, MemoryError):  # the last of a pattern that calls itself
            why = f"the check took more than {CHECK_SECONDS} s of CPU time or recursed too deeply"
            problems = [Problem("bad_value_form", why)]
        return value, problems

    def _parse(self, text: str) -> Any:
        try:
            return self.parse(text)
        except SyntaxProblem:
            raise
        except Exception as error:  # your own parser may fail in any way on an unexpected text
            raise SyntaxProblem(f"{type(error).__name__}: {error}") from error


def answer_start(text: str) -> int:
    """Where the answer begins: after a think block, also one that the prompt opened, and never within one."""
    end = text.find("</think>")
    if end >= 0:
        return end + len("</think>")
    return len(text) if text.lstrip().startswith("<think>") else 0


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    inner = text[start:end]
    return start + len(inner) - len(inner.lstrip()), max(start, end - len(inner) + len(inner.rstrip()))

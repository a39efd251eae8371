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

MAX_CHARACTERS = 100_000  # longer texts are not read: a verdict must be cheap whatever a model writes
MAX_FENCES = 8  # code fences searched for a document

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
    """A format's verdict on one text."""

    kind: str  # one of `KINDS`
    detail: str  # one line on what is wrong, "" if nothing is
    loose: bool  # whether the format is valid without the fence, prose and think block around the document
    value: Any  # the document, also if there is other text around it; None if there is none
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
    """Base class of formats; a subclass needs `parse`, the rest is optional.

    Texts are checked as they are: nothing is stripped. Whitespace around a document is extra text. The constructor
    stores each argument as the attribute of the same name, so that the format can be written to a file.
    """

    #: Dotted paths of the values, for the accuracy of each field.
    fields: tuple[str, ...] = ()
    #: Paths of arrays whose order does not matter.
    sets: frozenset[str] = frozenset()
    #: Paths of values that need not occur in the input, such as labels.
    derived: frozenset[str] = frozenset()
    #: Notes for the user on how the format was read, such as what is not checked; each one line.
    notes: tuple[str, ...] = ()
    #: Whether a document must have exactly the text that `write` gives.
    canonical: bool = False
    #: Whether each row has its own schema, which `of_row` needs.
    per_row: bool = False
    #: The tags around the reasoning before an answer, and the format of that answer; None without reasoning.
    tags: tuple[str, str] | None = None
    inner: "Format | None" = None

    @property
    def is_custom(self) -> bool:
        """Whether the class is a user's, whose code may change between runs."""
        return not type(self.inner or self).__module__.startswith("formtune.formats.")

    def split(self, text: str) -> tuple[str, str]:
        """The reasoning with its tags and the whitespace after it, "" if there is none, and the answer."""
        return "", text

    def of_row(self, schema: str | None) -> "Format":
        """The format of one row, from its schema as JSON text; raises UserError if the schema cannot be read."""
        return self

    @abstractmethod
    def parse(self, text: str) -> Any:
        """Parse the whole text to a document of plain Python data; raises SyntaxProblem if it is not one."""

    def problems(self, value: Any) -> list[Problem]:
        """What is wrong with a parsed document."""
        return []

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        """Spans that may be a document within other text; think blocks are skipped."""
        start = answer_start(text)
        yield _trimmed(text, start, len(text))
        for fence in islice(_FENCE.finditer(text, start), MAX_FENCES):
            yield _trimmed(text, *fence.span(1))

    def write(self, value: Any) -> str | None:
        """The canonical text of a document, None if the format has none."""
        return None

    def value_spans(self, text: str) -> dict[str, tuple[int, int]]:
        """Spans of the values in a valid text, by dotted path, each up to and including the character that ends it."""
        return {}

    def grammar(self) -> str | None:
        """The format for constrained decoding; None without one, and for JSON, which `constrained.grammar` writes.

        Lark rules in llguidance's dialect, of which `answer` is the whole text: `answer: "yes" | "no"`. They may allow
        less than the format, and should not allow more. Raises UserError if the format cannot be expressed.
        """
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
        """Check an answer without its stop token; every text gets a verdict. `finished` is False if it is truncated."""
        if target is not None:  # first, before the answer uses up the time
            try:
                expected = self._parse(target)
            except SyntaxProblem as error:
                raise UserError(f"a target has an invalid format ({error}): {target[:80]!r}") from None
        is_document, value, problems = self._read(text)
        content, is_loose = None, finished and is_document and all(p.kind == "extra_text" for p in problems)
        if not finished:
            state = "complete" if is_document else "incomplete"
            problems.append(Problem("truncated", f"no stop token: the document is {state}"))
        if target is not None:
            content = compare(value, expected, is_document, self.fields, self.sets)
            if content.difference:
                problems.append(Problem("content", content.difference))
        first = min(problems, key=lambda problem: KINDS.index(problem.kind), default=Problem("ok", ""))
        return Verdict(first.kind, " ".join(first.detail.split()), is_loose, value, content)

    def _read(self, text: str) -> tuple[bool, Any, list[Problem]]:
        """Whether a text contains a document, the document (the first valid one, else the first) and its problems."""
        empty = False, None, [Problem("empty", "the answer is empty")]
        if text and not text.strip():  # a document can be empty, but not whitespace
            return empty
        if len(text) > MAX_CHARACTERS:
            return False, None, [Problem("syntax", f"longer than {MAX_CHARACTERS:,} characters")]
        errors, first = [], None
        for start, end in chain([(0, len(text))], self.documents(text)):
            try:
                value, problems = self._check_document(text[start:end])
            except SyntaxProblem as error:
                errors.append(str(error))
                continue
            if end - start == len(text):
                return (True, value, problems) if text or not problems else empty
            extra = Problem("extra_text", f"{(text[:start] or text[end:])[:60]!r} is outside the document")
            if not problems:
                return True, value, [extra]
            # JSON inside a truncated or malformed document does not count.
            if first is None and not re.search(r"[\[{]", text[answer_start(text) : start]):
                first = True, value, [extra, *problems]
        return first or ((False, None, [Problem("syntax", errors[0])]) if text else empty)

    def _check_document(self, text: str) -> tuple[Any, list[Problem]]:
        value = self._parse(text)
        try:
            problems = [*self.problems(value)]
            if self.canonical and self.write(value) != text:
                problems.append(Problem("layout", "key order or whitespace is not canonical"))
        except (TimeoutError, RecursionError, MemoryError):  # MemoryError: a recursive pattern
            why = f"the check took more than {CHECK_SECONDS} s of CPU time or recursed too deeply"
            problems = [Problem("bad_value_form", why)]
        return value, problems

    def _parse(self, text: str) -> Any:
        try:
            return self.parse(text)
        except SyntaxProblem:
            raise
        except Exception as error:  # a custom parser may raise anything
            raise SyntaxProblem(f"{type(error).__name__}: {error}") from error


def unfenced(text: str) -> str:
    """The text within the code fence around all of it; unchanged if there is none."""
    match = _FENCE.fullmatch(text.strip())
    return match[1].strip() if match else text


def answer_start(text: str) -> int:
    """Where the answer begins: after a think block (also one that the prompt opened), never within one."""
    end = text.find("</think>")
    if end >= 0:
        return end + len("</think>")
    return len(text) if text.lstrip().startswith("<think>") else 0


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    inner = text[start:end]
    return start + len(inner) - len(inner.lstrip()), max(start, end - len(inner) + len(inner.rstrip()))

"""The base class of formats, and the verdict that a format gives on a text."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from formtune.errors import UserError
from formtune.formats.content import Comparison, compare

MAX_CHARACTERS = 100_000  # longer texts are not read: a verdict must be cheap whatever a model writes
MAX_FENCES = 8  # searched for a document

_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.S)

# In order of precedence: a text's kind is the first that applies. All but `ok` and `content` break the format.
KINDS = (
    *("ok", "empty", "truncated", "extra_text", "syntax", "wrong_root", "missing_key", "extra_key"),
    *("wrong_type", "bad_value_form", "layout", "content"),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a text breaks its format."""

    kind: str  # one of `KINDS`
    detail: str  # one line for a person, with the path of the value
    timeout: bool = False  # the check ran out of time: no other part of the text is tried


class SyntaxProblem(ValueError):
    """Raised by `Format.parse` for a text that is not a document of the format."""

    def __init__(self, detail: str, timeout: bool = False) -> None:
        super().__init__(detail)
        self.problem = Problem("syntax", detail, timeout)


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
    """A format; your own needs `parse`, and the other methods where it has more to say.

    Texts are judged as they are: nothing is stripped. White space around a document is extra text.
    """

    #: Dotted paths of the values, for the accuracy of each field.
    fields: tuple[str, ...] = ()
    #: Paths of arrays whose order does not matter.
    sets: frozenset[str] = frozenset()
    #: Paths of values that need not occur in the input, such as labels.
    derived: frozenset[str] = frozenset()

    _init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Records the arguments for `to_dict`, so that your own format cannot forget one.
        format = super().__new__(cls)
        format._init_args = {}
        if cls.__init__ is not object.__init__:
            bound = inspect.signature(cls.__init__).bind(format, *args, **kwargs)
            bound.apply_defaults()
            for name, value in list(bound.arguments.items())[1:]:
                is_kwargs = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
                format._init_args |= value if is_kwargs else {name: value}
        return format

    def __reduce__(self) -> Any:
        # Validators and patterns cannot be pickled; the arguments make them again.
        return partial(type(self), **self.to_dict()["init_args"]), ()

    @abstractmethod
    def parse(self, text: str) -> Any:
        """The document that the whole text is, as plain Python data.

        Raises:
            SyntaxProblem: The text is not a document; any other exception says the same, less precisely.
        """

    def problems(self, value: Any) -> list[Problem]:
        """What is wrong with a document that parsed."""
        return []

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        """Spans that may be a document within other text, for the loose view; think blocks are left out."""
        start = answer_start(text)
        yield _trimmed(text, start, len(text))
        for fence in islice(_FENCE.finditer(text, start), MAX_FENCES):
            yield _trimmed(text, *fence.span(1))

    def write(self, value: Any) -> str | None:
        """The plainest text of a document, None where the format has none."""
        return None

    def canonical(self, value: Any) -> str | None:
        """The one text that a document must have, None where any text of it is valid."""
        return None

    def grammar(self) -> str | None:
        """The format for constrained decoding, None where the format has no grammar.

        Lark rules in llguidance's dialect, of which `answer` is the whole text: `answer: "yes" | "no"`. They may allow
        less than the format, never more.

        Raises:
            UserError: This format cannot be expressed.
        """
        return None

    def to_dict(self) -> dict[str, Any]:
        """The format as plain data, complete without other files: `class_path` and `init_args`."""
        cls = type(self)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dict(self._init_args)}

    def check(
        self, text: str, *, finished: bool = True, target: str | None = None, input: str | None = None
    ) -> Verdict:
        """Judge a text; every text gets a verdict.

        Args:
            text: The answer without its stop token.
            finished: False if the answer was cut for length before a stop token.
            target: The target, which itself has a valid format.
            input: The input, to tell made-up values from misread ones.

        Raises:
            UserError: `target` is not a document of the format.
        """
        value, found, within, around = self._judge(text)
        problems, content = [*around, *within], None
        if not finished:
            why = "a document, then no end" if found else "cut before its end"
            problems.append(Problem("truncated", f"no stop token: {why}"))
        if target is not None:
            content = compare(value, self._target(target), found, input, self.fields, self.sets, self.derived)
            if content.difference:
                problems.append(Problem("content", content.difference))
        first = min(problems, key=lambda problem: KINDS.index(problem.kind), default=Problem("ok", ""))
        loose = finished and found and not within
        return Verdict(first.kind, " ".join(first.detail.split()), loose, value, content)

    def _judge(self, text: str) -> tuple[Any, bool, list[Problem], list[Problem]]:
        """The document, whether there is one, the problems within it and those around it."""
        if not text.strip():
            return None, False, [], [Problem("empty", "the answer is empty")]
        if len(text) > MAX_CHARACTERS:
            return None, False, [], [Problem("syntax", f"longer than {MAX_CHARACTERS:,} characters")]
        try:
            value, within = self._read(text)
            return value, True, within, []
        except SyntaxProblem as error:
            embedded = None if error.problem.timeout else self._find(text)
            return embedded or (None, False, [], [error.problem])

    def _find(self, text: str) -> tuple[Any, bool, list[Problem], list[Problem]] | None:
        """As `_judge`, of the first valid document within the text, else of the first that is not part of another."""
        first = None
        for start, end in self.documents(text):
            try:
                value, within = self._read(text[start:end])
            except SyntaxProblem as error:
                if error.problem.timeout:
                    break
                continue
            found = value, True, within, [_extra_text(text[:start], text[end:])]
            if not within:
                return found
            # A part of a broken document is not the document.
            if first is None and not re.search(r"[\[{]", text[answer_start(text) : start]):
                first = found
            if any(problem.timeout for problem in within):
                break
        return first

    def _read(self, text: str) -> tuple[Any, list[Problem]]:
        value = self._parse(text)
        problems = self.problems(value)
        if self.canonical(value) not in (None, text):
            problems = [*problems, Problem("layout", "key order or white space is not canonical")]
        return value, problems

    def _parse(self, text: str) -> Any:
        try:
            return self.parse(text)
        except SyntaxProblem:
            raise
        except Exception as error:  # your own parser may fail in any way on an unexpected text
            raise SyntaxProblem(f"{type(error).__name__}: {error}") from error

    def _target(self, target: str) -> Any:
        try:
            return self._parse(target)
        except SyntaxProblem as error:
            raise UserError(f"a target breaks its format ({error}): {target[:80]!r}") from None


def answer_start(text: str) -> int:
    """Where the answer begins: after a think block, also one that the prompt opened, and never within one."""
    end = text.find("</think>")
    if end >= 0:
        return end + len("</think>")
    return len(text) if text.lstrip().startswith("<think>") else 0


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    inner = text[start:end]
    return start + len(inner) - len(inner.lstrip()), max(start, end - len(inner) + len(inner.rstrip()))


def _extra_text(before: str, after: str) -> Problem:
    if "</think>" in before:
        what = "think block"
    elif "```" in before or "```" in after:
        what = "code fence"
    elif after.lstrip()[:1] in ("{", "["):
        what = "second document"
    else:
        what = "prefix" if before else "suffix"
    return Problem("extra_text", f"{what}: {(before or after)[:60]!r} is beside the document")

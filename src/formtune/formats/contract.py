"""The contract and its verdicts: a pure function of the text, of how it ended, and of the wanted answer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from formtune.errors import UserError
from formtune.formats.content import Comparison, compare

# In order of precedence: a text's primary kind is the first that applies. 1 to 10 are failures of format.
KINDS = (
    "ok",
    "empty",
    "truncated",
    "extra_text",
    "syntax",
    "wrong_root",
    "missing_key",
    "extra_key",
    "wrong_type",
    "bad_value_form",
    "layout",
    "content",
)
MAX_CHARACTERS = 1_000_000  # nothing longer is looked at: a verdict must be cheap whatever a model writes

_KEYS = {"wrong_root", "missing_key", "extra_key"}
_SCHEMA = _KEYS | {"wrong_type", "bad_value_form"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a text does not keep its contract.

    Args:
        kind: One of `KINDS`.
        subkind: What exactly, such as `code_fence` or `null_not_allowed`.
        detail: One line for a person, with the path of the value.
    """

    kind: str
    subkind: str
    detail: str


class SyntaxProblem(ValueError):
    """Raised by `Format.parse` for a text that is no document of the format."""

    def __init__(self, subkind: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = Problem("syntax", subkind, detail)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a contract says of one text.

    Args:
        problems: All problems found, the primary one first; empty if there are none.
        loose: Whether it would comply without fence, prose and think block around it.
        terminated: Whether a stop token ended it.
        no_extra_text: Whether there is a document and nothing else.
        parse: Whether the text as it stands is a document.
        schema: Whether that document keeps the schema too.
        keys_exact: Whether that document has all declared keys and no others.
        canonical: Whether the text is the canonical form of its document.
        value: The document found, as it stands or within other text; None if there is none.
        content: How the document compares with the wanted one, None where none was given.
    """

    problems: tuple[Problem, ...]
    loose: bool
    terminated: bool
    no_extra_text: bool
    parse: bool
    schema: bool
    keys_exact: bool
    canonical: bool
    value: Any
    content: Comparison | None

    @property
    def kind(self) -> str:
        """The primary kind."""
        return self.problems[0].kind if self.problems else "ok"

    @property
    def subkind(self) -> str:
        """The primary problem's subkind."""
        return self.problems[0].subkind if self.problems else ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds that apply, in order of precedence."""
        return tuple(dict.fromkeys(p.kind for p in self.problems)) or ("ok",)

    @property
    def detail(self) -> str:
        """One line that says what is wrong."""
        return self.problems[0].detail if self.problems else ""

    @property
    def exact(self) -> bool:
        """Whether the format is kept: nothing is wrong, or only the content."""
        return self.kind in ("ok", "content")

    @property
    def joint(self) -> bool:
        """Whether the format is kept and the content is the wanted one."""
        return self.exact and self.content is not None and self.content.equal


class Format(ABC):
    """A contract; a format of your own needs `parse`, and the rest where it has more to say.

    Texts are judged as they are: nothing is stripped. White space around a document is extra text.
    """

    #: Dotted paths of the values, for the accuracy of each field.
    fields: tuple[str, ...] = ()
    #: Paths of arrays whose order does not matter.
    sets: frozenset[str] = frozenset()
    #: Paths of values that need not occur in the input, such as labels.
    derived: frozenset[str] = frozenset()

    @abstractmethod
    def parse(self, text: str) -> Any:
        """The document that the whole text is, as plain Python data.

        Raises:
            SyntaxProblem: The text is none.
        """

    def problems(self, value: Any) -> list[Problem]:
        """What is wrong with a document that parsed."""
        return []

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        """Spans that may be a document within other text, for the loose view."""
        stripped = text.strip()
        if stripped:
            start = text.index(stripped)
            yield start, start + len(stripped)

    def canonical(self, value: Any) -> str | None:
        """The one text that a document should have, None where every text of it is as good."""
        return None

    def value_spans(self, text: str) -> list[tuple[int, int]]:
        """Spans of the values in a text that complies; the rest is structure."""
        return [(0, len(text))]

    def to_dict(self) -> dict[str, Any]:
        """The contract as plain data, whole in itself: `class_path` and `init_args`."""
        cls = type(self)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": {}}

    def check(self, text: str, *, finished: bool = True, gold: str | None = None, source: str | None = None) -> Verdict:
        """Judge a text.

        Args:
            text: The answer without its stop token.
            finished: False if the answer was cut for length before a stop token came.
            gold: The wanted answer, which itself keeps the contract.
            source: The input, to tell values that were made up from values that were misread.
        """
        problems: list[Problem] = []
        value: Any = None
        span: tuple[int, int] | None = None
        parsed = False
        inner: list[Problem] = []
        if not text.strip():
            problems.append(Problem("empty", "", "the answer is empty"))
        elif len(text) > MAX_CHARACTERS:
            problems.append(Problem("syntax", "other", f"longer than {MAX_CHARACTERS:,} characters"))
        else:
            try:
                value = self.parse(text)
                parsed, span, inner = True, (0, len(text)), self.problems(value)
            except SyntaxProblem as error:
                found = self._find(text)
                if found is None:
                    problems.append(error.problem)
                else:
                    value, span, inner = found
                    problems.append(_extra_text(text, *span))
        wanted = self.canonical(value) if parsed else None
        if wanted is not None and wanted != text:
            inner = [*inner, Problem("layout", "", "key order or white space is not canonical")]
        problems += inner
        if not finished:
            whole = span is not None and not text[: span[0]].strip()
            subkind, why = ("runaway", "a whole document, then no end") if whole else ("unclosed", "cut before its end")
            problems.append(Problem("truncated", subkind, f"no stop token: {why}"))
        content = None
        if gold is not None:
            content = compare(value, self._gold(gold), source, self.fields, self.sets, self.derived)
            if content.difference is not None:
                problems.append(Problem("content", *content.difference))
        problems.sort(key=lambda problem: KINDS.index(problem.kind))
        kinds = {problem.kind for problem in problems}
        return Verdict(
            problems=tuple(problems),
            loose=finished and span is not None and not inner,
            terminated=finished,
            no_extra_text=parsed,
            parse=parsed,
            schema=parsed and not kinds & _SCHEMA,
            keys_exact=parsed and not kinds & _KEYS,
            canonical=parsed and "layout" not in kinds,
            value=value,
            content=content,
        )

    def _find(self, text: str) -> tuple[Any, tuple[int, int], list[Problem]] | None:
        """The first document within the text that complies, else one that the text begins with, else None."""
        first = None
        for start, end in self.documents(text):
            try:
                value = self.parse(text[start:end])
            except SyntaxProblem:
                continue
            problems = self.problems(value)
            if not problems:
                return value, (start, end), problems
            # A part of a broken document is not the document: only what stands in the open counts.
            if first is None and not re.search(r"[\[{]", _outside(text[:start])):
                first = value, (start, end), problems
        return first

    def _gold(self, gold: str) -> Any:
        try:
            return self.parse(gold)
        except SyntaxProblem as error:
            raise UserError(f"a target breaks its contract ({error}): {gold[:80]!r}") from None


def _outside(text: str) -> str:
    return re.sub(r"<think>.*?</think>", "", text, flags=re.S)


def _extra_text(text: str, start: int, end: int) -> Problem:
    before, after = text[:start], text[end:]
    if "<think>" in before:
        subkind = "think_block"
    elif "```" in before or "```" in after:
        subkind = "code_fence"
    elif after.lstrip()[:1] in ("{", "["):
        subkind = "second_document"
    else:
        subkind = "prefix" if before else "suffix"
    extra = before or after
    return Problem("extra_text", subkind, f"{subkind.replace('_', ' ')}: {extra[:60]!r} stands beside the document")

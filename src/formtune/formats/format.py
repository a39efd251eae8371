"""The contract and its verdicts: a pure function of the text, of how it ended, and of the wanted answer."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial, wraps
from itertools import islice
from typing import Any

from formtune.errors import UserError
from formtune.formats.content import compare
from formtune.formats.verdict import KINDS, Problem, SyntaxProblem, Verdict

MAX_CHARACTERS = 100_000  # nothing longer is looked at: a verdict must be cheap whatever a model writes
MAX_FENCES = 8  # looked at for a document
TIMEOUT = "timeout"  # the subkind after which a text is given up: another look would take as long

_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.S)

_KEYS = {"wrong_root", "missing_key", "extra_key"}
_SCHEMA = _KEYS | {"wrong_type", "bad_value_form"}


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
    #: Whether `canonical` says how a document must be written.
    is_canonical = False
    #: Whether exactly one line feed must follow the document.
    trailing_newline = False

    _init_args: dict[str, Any] = {}  # noqa: RUF012 (replaced, never changed)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]

    def __reduce__(self) -> Any:
        # Validators and patterns do not pickle; the arguments make them again.
        return partial(type(self), **self.to_dict()["init_args"]), ()

    @abstractmethod
    def parse(self, text: str) -> Any:
        """The document that the whole text is, as plain Python data.

        Raises:
            SyntaxProblem: The text is none; any other exception says the same, less precisely.
        """

    def problems(self, value: Any) -> list[Problem]:
        """What is wrong with a document that parsed."""
        return []

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        """Spans that may be a document within other text, for the loose view; what was only thought is left out."""
        start = answer_start(text)
        yield _trimmed(text, start, len(text))
        for fence in islice(_FENCE.finditer(text, start), MAX_FENCES):
            yield _trimmed(text, *fence.span(1))

    def write(self, value: Any) -> str | None:
        """The plainest text of a document, None where the format has none."""
        return None

    def canonical(self, value: Any) -> str | None:
        """The one text that a document must have, None where every text of it is as good."""
        return self.write(value) if self.is_canonical else None

    def value_spans(self, text: str) -> list[tuple[int, int]]:
        """Spans of the values in a text that complies; the rest is structure."""
        return [(0, len(text))]

    def grammar(self) -> str | None:
        """The contract for constrained decoding, None where the format has no grammar.

        Lark rules in llguidance's dialect, of which `answer` is the whole text: `answer: "yes" | "no"`. They may say
        less than the contract allows, never more.

        Raises:
            UserError: This contract cannot be expressed.
        """
        return None

    def to_dict(self) -> dict[str, Any]:
        """The contract as plain data, whole in itself: `class_path` and `init_args`."""
        cls = type(self)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dict(self._init_args)}

    def check(self, text: str, *, finished: bool = True, gold: str | None = None, source: str | None = None) -> Verdict:
        """Judge a text; whatever it is, this returns.

        Args:
            text: The answer without its stop token.
            finished: False if the answer was cut for length before a stop token came.
            gold: The wanted answer, which itself keeps the contract.
            source: The input, to tell values that were made up from values that were misread.

        Raises:
            UserError: `gold` is no document of the format.
        """
        body = self._body(text)
        value, span, inner, problems = self._judge(body)
        if self.trailing_newline and body == text and span is not None:
            problems.append(Problem("layout", "trailing_newline", "the line feed at the end is missing"))
        if not finished:
            subkind, why = (
                ("unclosed", "cut before its end") if span is None else ("runaway", "a document, then no end")
            )
            problems.append(Problem("truncated", subkind, f"no stop token: {why}"))
        content = None
        if gold is not None:
            wanted = self._gold(gold)
            content = compare(value, wanted, span is not None, source, self.fields, self.sets, self.derived)
            if content.difference is not None:
                problems.append(Problem("content", *content.difference))
        problems = [Problem(p.kind, p.subkind, " ".join(p.detail.split())) for p in (*problems, *inner)]
        problems.sort(key=lambda problem: KINDS.index(problem.kind))
        found, kinds = span is not None, {problem.kind for problem in problems}
        return Verdict(
            problems=tuple(problems),
            loose=finished and found and not inner,
            terminated=finished,
            no_extra_text=span == (0, len(body)),
            parse=found,
            schema=found and not kinds & _SCHEMA,
            keys_exact=found and not kinds & _KEYS,
            canonical=found and "layout" not in kinds,
            value=value,
            content=content,
        )

    def _judge(self, text: str) -> tuple[Any, tuple[int, int] | None, list[Problem], list[Problem]]:
        """The document, its span (None if there is none), what is wrong with it, and what is wrong around it."""
        if not text.strip():
            return None, None, [], [Problem("empty", "", "the answer is empty")]
        if len(text) > MAX_CHARACTERS:
            return None, None, [], [Problem("syntax", "other", f"longer than {MAX_CHARACTERS:,} characters")]
        try:
            value, inner = self._read(text)
            return value, (0, len(text)), inner, []
        except SyntaxProblem as error:
            if error.problem.subkind != TIMEOUT and (found := self._find(text)) is not None:
                value, span, inner = found
                return value, span, inner, [_extra_text(text, *span)]
            return None, None, [], [error.problem]

    def _find(self, text: str) -> tuple[Any, tuple[int, int], list[Problem]] | None:
        """The first document within the text that complies, else one that stands in the open, else None."""
        first = None
        for start, end in self.documents(text):
            try:
                value, problems = self._read(text[start:end])
            except SyntaxProblem as error:
                if error.problem.subkind == TIMEOUT:
                    break
                continue
            if not problems:
                return value, (start, end), problems
            # A part of a broken document is not the document: only what stands in the open counts.
            if first is None and not re.search(r"[\[{]", text[answer_start(text) : start]):
                first = value, (start, end), problems
            if any(problem.subkind == TIMEOUT for problem in problems):
                break
        return first

    def _read(self, text: str) -> tuple[Any, list[Problem]]:
        value = self._parse(text)
        problems = self.problems(value)
        wanted = self.canonical(value)
        if wanted is not None and wanted != text:
            problems = [*problems, Problem("layout", "", "key order or white space is not canonical")]
        return value, problems

    def _parse(self, text: str) -> Any:
        try:
            return self.parse(text)
        except SyntaxProblem:
            raise
        except Exception as error:  # a parser of one's own may fail in any way on a text that it did not expect
            raise SyntaxProblem("other", f"{type(error).__name__}: {error}") from error

    def _gold(self, gold: str) -> Any:
        try:
            return self._parse(self._body(gold))
        except SyntaxProblem as error:
            raise UserError(f"a target breaks its contract ({error}): {gold[:80]!r}") from None

    def _body(self, text: str) -> str:
        return text.removesuffix("\n") if self.trailing_newline else text


def _remembering(init: Callable[..., None]) -> Callable[..., None]:
    """Keep the arguments for `to_dict`, so that no format of one's own can forget one there."""
    signature = inspect.signature(init)

    @wraps(init)
    def remember(self: Format, *args: Any, **kwargs: Any) -> None:
        if "_init_args" not in vars(self):  # else a subclass hands its own arguments on
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            self._init_args = dict(list(bound.arguments.items())[1:])
        init(self, *args, **kwargs)

    return remember


def answer_start(text: str) -> int:
    """Where the answer begins: after a think block, also one that the prompt opened, and never within one."""
    end = text.find("</think>")
    if end >= 0:
        return end + len("</think>")
    return len(text) if text.lstrip().startswith("<think>") else 0


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    inner = text[start:end]
    return start + len(inner) - len(inner.lstrip()), max(start, end - len(inner) + len(inner.rstrip()))


def _extra_text(text: str, start: int, end: int) -> Problem:
    before, after = text[:start], text[end:]
    if "</think>" in before:
        subkind = "think_block"
    elif "```" in before or "```" in after:
        subkind = "code_fence"
    elif after.lstrip()[:1] in ("{", "["):
        subkind = "second_document"
    else:
        subkind = "prefix" if before else "suffix"
    extra = before or after
    return Problem("extra_text", subkind, f"{subkind.replace('_', ' ')}: {extra[:60]!r} stands beside the document")

"""Contracts for texts that are not JSON: a pattern, a label, tagged sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import regex
from jsonargparse.typing import PositiveFloat

from formtune.errors import UserError
from formtune.formats.contract import Format, Problem, SyntaxProblem


class Regex(Format):
    """A text that a regular expression matches from end to end.

    Args:
        pattern: Regular expression in the syntax of the `regex` package; named groups are the values.
        seconds: Time after which a match is given up and counts as none.
    """

    def __init__(self, pattern: str, seconds: PositiveFloat = 1.0) -> None:
        try:
            self._pattern = regex.compile(pattern)
        except regex.error as error:
            raise UserError(f"data.format.pattern: no regular expression ({error})") from None
        self.pattern, self.seconds = pattern, seconds
        self.fields = tuple(self._pattern.groupindex)

    def parse(self, text: str) -> Any:
        match = self._match(text)
        return match.groupdict() if self.fields else text

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        yield from super().documents(text)
        try:
            if (match := self._pattern.search(text, timeout=self.seconds)) and match.end() > match.start():
                yield match.span()
        except TimeoutError:
            return

    def value_spans(self, text: str) -> list[tuple[int, int]]:
        match = self._match(text)
        return [match.span(name) for name in self.fields if match[name]] if self.fields else super().value_spans(text)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"init_args": {"pattern": self.pattern, "seconds": self.seconds}}

    def _match(self, text: str) -> Any:
        try:
            match = self._pattern.fullmatch(text, timeout=self.seconds)
        except TimeoutError:
            raise SyntaxProblem("timeout", f"matching took longer than {self.seconds} s") from None
        if match is None:
            raise SyntaxProblem("other", f"{text[:60]!r} does not match the pattern")
        return match


class Labels(Format):
    """One label out of a set, and nothing else.

    Args:
        labels: The labels, letter for letter.
    """

    def __init__(self, labels: list[str]) -> None:
        if not labels or len(set(labels)) < len(labels) or any(not x or x != x.strip() for x in labels):
            raise UserError("data.format.labels: name at least one label; each once, without spaces at its ends")
        self.labels = labels
        self.derived = frozenset({""})

    def parse(self, text: str) -> Any:
        if "\n" in text or text != text.strip():
            raise SyntaxProblem("other", "a label is one line without spaces at its ends")
        return text

    def problems(self, value: Any) -> list[Problem]:
        if value in self.labels:
            return []
        return [Problem("bad_value_form", "enum", f"{value[:60]!r} is none of the {len(self.labels)} labels")]

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        yield from super().documents(text)
        for label in sorted(self.labels, key=len, reverse=True):
            if match := regex.search(rf"(?<!\w){regex.escape(label)}(?!\w)", text):
                yield match.span()

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"init_args": {"labels": self.labels}}


class Tagged(Format):
    """Sections such as `<reason>...</reason><answer>...</answer>`, all of them, in order, nothing else between.

    Args:
        sections: Names of the sections in their order; white space between two sections is free.
    """

    def __init__(self, sections: list[str]) -> None:
        names = [name for name in sections if regex.fullmatch(r"[A-Za-z_][\w-]*", name)]
        if not names or len(set(names)) < len(sections):
            raise UserError("data.format.sections: name at least one section; each once, letters, digits, _ and -")
        self.sections = sections
        self.fields = tuple(sections)

    def parse(self, text: str) -> Any:
        found = list(regex.finditer(r"<([A-Za-z_][\w-]*)>(.*?)</\1>", text, regex.S))
        rest = regex.sub(r"\s+", "", _between(text, [m.span() for m in found]))
        if not found or rest or text != text.strip():
            raise SyntaxProblem(
                "unbalanced" if "<" in rest or not found else "other", f"not sections alone: {rest[:60]!r}"
            )
        names = [m[1] for m in found]
        if len(set(names)) < len(names):
            raise SyntaxProblem("duplicate_key", "a section stands twice")
        return {m[1]: m[2] for m in found}

    def problems(self, value: Any) -> list[Problem]:
        problems = [Problem("missing_key", "section", f"no <{s}>") for s in self.sections if s not in value]
        problems += [Problem("extra_key", "section", f"<{s}> is not declared") for s in value if s not in self.sections]
        if not problems and list(value) != self.sections:
            problems.append(Problem("layout", "order", "the sections are in another order"))
        return problems

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        yield from super().documents(text)
        start, end = text.find(f"<{self.sections[0]}>"), text.rfind(f"</{self.sections[-1]}>")
        if 0 <= start < end:
            yield start, end + len(self.sections[-1]) + 3

    def value_spans(self, text: str) -> list[tuple[int, int]]:
        return [m.span(2) for m in regex.finditer(r"<([A-Za-z_][\w-]*)>(.*?)</\1>", text, regex.S)]

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"init_args": {"sections": self.sections}}


def _between(text: str, spans: list[tuple[int, int]]) -> str:
    at, rest = 0, []
    for start, end in spans:
        rest.append(text[at:start])
        at = end
    return " ".join([*rest, text[at:]])

"""Formats for text other than JSON: a pattern, a label, tagged sections, and reasoning before another format."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import regex

from formtune.errors import UserError
from formtune.formats.bounded import CHECK_SECONDS, compile_pattern, escape_class, seconds_left
from formtune.formats.format import Format, Problem, SyntaxProblem, answer_start

MAX_MATCHES = 64  # of a pattern, tried within other text

_TAG = re.compile(r"(\s*)<([A-Za-z_][\w-]*)>")


class Regex(Format):
    """A text that a regular expression matches from end to end.

    Args:
        pattern: Regular expression in the syntax of the `regex` package; named groups are the values.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = compile_pattern(pattern)
        except regex.error as error:
            raise UserError(f"data.format.pattern: not a regular expression ({error})") from None
        self.pattern = pattern
        self.fields = tuple(self._pattern.groupindex)

    def parse(self, text: str) -> Any:
        try:
            match = self._pattern.fullmatch(text, timeout=seconds_left())
        except TimeoutError:
            raise SyntaxProblem(f"matching took more than {CHECK_SECONDS} s") from None
        if match is None:
            raise SyntaxProblem(f"{text[:60]!r} does not match the pattern")
        return match.groupdict() if self.fields else text

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        yield from super().documents(text)
        yield from _only_match(self._pattern, text)

    def value_spans(self, text: str) -> dict[str, tuple[int, int]]:
        match = self._pattern.fullmatch(text)
        spans = ((name, *match.span(name)) for name in self.fields)
        return {name: (start, end + 1) for name, start, end in spans if start >= 0}

    def grammar(self) -> str | None:
        escapes = {"/": r"\/", "\n": r"\n"}
        pattern = re.sub(r"(?s)\\.|\[\^?\]?(?:\\.|[^\\\]])*\]", lambda match: escape_class(match[0]), self.pattern)
        escaped = re.sub(r"\\.|[/\n]", lambda match: escapes.get(match[0], match[0]), pattern, flags=re.S)
        return f"answer: /(?:{escaped})/"


class Labels(Format):
    """One label out of a set, and nothing else.

    Args:
        labels: The labels, letter for letter; one may be empty.
    """

    def __init__(self, labels: list[str]) -> None:
        if not labels or len(set(labels)) < len(labels) or any(x != x.strip() for x in labels):
            raise UserError("data.format.labels: name at least one label; each once, without surrounding spaces")
        self.labels, self._set = labels, frozenset(labels)
        self.derived = frozenset({""})
        longest_first = sorted(filter(None, labels), key=len, reverse=True)
        self._any = regex.compile(rf"(?<!\w)(?:{'|'.join(map(regex.escape, longest_first))})(?!\w)")

    def parse(self, text: str) -> Any:
        if text not in self._set and ("\n" in text or text != text.strip() or self._any.search(text)):
            raise SyntaxProblem("not one label alone")
        return text

    def problems(self, value: Any) -> list[Problem]:
        if value in self._set:
            return []
        return [Problem("bad_value_form", f"{value[:60]!r} is not one of the {len(self.labels)} labels")]

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        yield from super().documents(text)
        yield from _only_match(self._any, text)

    def grammar(self) -> str | None:
        return f"answer: {' | '.join(map(json.dumps, self.labels))}"


class Tagged(Format):
    """Sections such as `<reason>...</reason><answer>...</answer>`, all of them, in order, nothing else between.

    Args:
        sections: Names of the sections in their order; whitespace between two sections is allowed.
    """

    def __init__(self, sections: list[str]) -> None:
        if not sections or len({s for s in sections if regex.fullmatch(r"[A-Za-z_][\w-]*", s)}) < len(sections):
            raise UserError("data.format.sections: name at least one section, each once, in letters, digits, _ and -")
        self.sections = sections
        self.fields = tuple(sections)

    def parse(self, text: str) -> Any:
        return {name: text[start:end] for name, (start, end) in self._sections(text).items()}

    def _sections(self, text: str) -> dict[str, tuple[int, int]]:
        sections: dict[str, tuple[int, int]] = {}
        at = 0
        while at < len(text):  # stops where no section follows, so that time is linear
            tag = _TAG.match(text, at)
            if tag is None or (tag[1] and not at) or (tag[2] == "think" and "think" not in self.sections):
                raise SyntaxProblem(f"text outside the sections: {text[at : at + 60]!r}")
            name, end = tag[2], text.find(f"</{tag[2]}>", tag.end())
            if end < 0 or name in sections:
                raise SyntaxProblem(f"<{name}> has no end" if end < 0 else f"duplicate section <{name}>")
            sections[name] = tag.end(), end
            at = end + len(name) + 3
        return sections

    def problems(self, value: Any) -> list[Problem]:
        problems = [Problem("missing_key", f"no <{s}>") for s in self.sections if s not in value]
        problems += [Problem("extra_key", f"<{s}> is not declared") for s in value if s not in self.sections]
        if not problems and list(value) != self.sections:
            problems.append(Problem("layout", "the sections are in the wrong order"))
        return problems

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        yield from super().documents(text)
        start, end = text.find(f"<{self.sections[0]}>"), text.rfind(f"</{self.sections[-1]}>")
        if 0 <= start < end:
            yield start, end + len(self.sections[-1]) + 3

    def value_spans(self, text: str) -> dict[str, tuple[int, int]]:
        return {name: (start, end + 1) for name, (start, end) in self._sections(text).items()}

    def grammar(self) -> str | None:
        sections = " /[ \\t\\r\\n]+/? ".join(f'"<{name}>" section{i}' for i, name in enumerate(self.sections))
        # Lazy: a section ends at the first closing tag.
        bodies = [f"section{i}[lazy]: /(?s:.*)<\\/{name}>/" for i, name in enumerate(self.sections)]
        return "\n".join([f"answer: {sections}", *bodies])


def _only_match(pattern: Any, text: str) -> list[tuple[int, int]]:
    """The span of the only match of whole words, none if several differ: "yes or no" is not an answer."""
    try:
        matches = list(islice(pattern.finditer(text, answer_start(text), timeout=seconds_left()), MAX_MATCHES))
    except TimeoutError:
        return []
    spans = [match.span() for match in matches if match[0]]
    words = [(a, b) for a, b in spans if not re.search(r"\w", text[max(a - 1, 0) : a] + text[b : b + 1])]
    return words[:1] if len({text[start:end] for start, end in words}) == 1 else []


class Reasoning(Format):
    """Free-text reasoning between two tags, followed by an answer with its own format.

    Fields, metrics and key orders are those of the answer; whitespace before it is allowed. Thinking is on if the chat
    template knows the closing tag.

    Args:
        format: Format of the answer after the reasoning.
        open: Tag before the reasoning; empty if the chat template writes it at the end of the prompt.
        close: Tag after the reasoning.
    """

    def __init__(self, format: Format, open: str = "<think>", close: str = "</think>") -> None:
        if format.tags or not close or open == close or any(tag != tag.strip() for tag in (open, close)):
            raise UserError("data.format: Reasoning needs another format, and two tags without surrounding spaces")
        self.inner = self.format = format
        self.open, self.close = open, close
        self.fields, self.sets, self.derived = format.fields, format.sets, format.derived
        self.notes, self.per_row, self.tags = format.notes, format.per_row, (open, close)

    def of_row(self, schema: str | None) -> Format:
        return Reasoning(self.format.of_row(schema), self.open, self.close) if self.per_row else self

    def split(self, text: str) -> tuple[str, str]:
        start = text.find(self.open)
        end = text.find(self.close, start + len(self.open)) if start >= 0 else -1
        answer = text[end + len(self.close) :].lstrip(" \t\r\n") if end >= 0 else text
        return text[: len(text) - len(answer)], answer

    def parse(self, text: str) -> Any:
        reasoning, answer = self.split(text)
        if not reasoning:
            raise SyntaxProblem(f"no {self.open}...{self.close} before the answer")
        return self.format.parse(answer)

    def _read(self, text: str) -> tuple[bool, Any, list[Problem]]:
        reasoning, answer = self.split(text)
        if not reasoning and text.strip() and text.startswith(self.open):
            return False, None, [Problem("syntax", f"the reasoning has no {self.close}")]
        is_document, value, problems = self.format._read(answer)
        start = reasoning.find(self.open)
        if not reasoning:
            problems.insert(0, Problem("missing_key", f"no {self.open}...{self.close} before the answer"))
        elif start:
            problems.insert(0, Problem("extra_text", f"{text[:start][:60]!r} is before {self.open}"))
        return is_document, value, problems

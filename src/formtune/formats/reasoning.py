"""Reasoning between two tags, and after it an answer with its own format."""

import json
from typing import Any

from formtune.errors import UserError
from formtune.formats.format import Format, Problem, SyntaxProblem
from formtune.formats.key_orders import Orders


class Reasoning(Format):
    """Reasoning, which is free text between two tags, and after it an answer with its own format.

    Fields, metrics and key orders are those of the answer; whitespace before it is free. Thinking is on if the chat
    template knows the closing tag.

    Args:
        format: Format of the answer that comes after the reasoning.
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

    def grammar(self) -> str | None:
        return self._around(self.format.grammar())

    def ordered_grammar(self, orders: Orders | None) -> str | None:
        return self._around(self.format.ordered_grammar(orders))

    def _around(self, rules: str | None) -> str | None:
        if rules is None:
            return None
        opening, closing = (json.dumps(tag, ensure_ascii=False) if tag else "" for tag in (self.open, self.close))
        # A tag may be a single token, which then is not part of a text. Lazy: the first closing tag ends the reasoning.
        return (
            f"answer: {opening} reasoning SPACE? body\nreasoning: tagged | ( TEXT? {closing} )\n"
            f"tagged[lazy]: TEXT? {closing}\nTEXT: /(?s:.+)/ & ~(ANY?{closing}ANY?)\nANY: /(?s:.+)/\n"
            f"SPACE: /[ \\t\\r\\n]{{1,4}}/\nbody: %lark {{\nstart: answer\n{rules}\n}}"
        )

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

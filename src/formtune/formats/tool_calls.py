"""Tool calls as chat templates write them, judged by the tools that each row defines."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from formtune.errors import UserError
from formtune.formats.format import Format, Problem, SyntaxProblem, answer_start
from formtune.formats.json_schema import JsonSchema
from formtune.formats.strict_json import loads_strict

KEPT = 1000  # formats of rows

_CALL = {  # the JSON of a call, or of all of them
    "hermes": re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.S),
    "llama": re.compile(r"(?:<\|python_tag\|>)?(\{\s*\"name\".*\})", re.S),
    "mistral": re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])", re.S),
}
_OPENING = {
    "hermes": re.compile(r"</?tool_call>"),
    "llama": re.compile(r"\A(?:<\|python_tag\|>)?\s*\{\s*\"name\""),
    "mistral": re.compile(r"\[TOOL_CALLS\]"),
}
_LIST = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "arguments": {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    },
}


class ToolCalls(Format):
    """Calls of the row's `tools` as the chat template writes them, and nothing around them.

    Each call names one of the tools, with arguments that its `parameters` allow. The answer to a row without tools is
    text. The document is a list of objects with `name` and `arguments`, or the text.

    Args:
        syntax: How the chat template writes calls: in `<tool_call>` tags (hermes: Qwen), as JSON with `name` and
            `parameters` (llama: Llama 3), or after `[TOOL_CALLS]` (mistral).
        tool_choice: Whether the answer to a row with tools must be a call (required), or may be text (auto).
    """

    per_row = True

    def __init__(
        self,
        syntax: Literal["hermes", "llama", "mistral"] = "hermes",
        tool_choice: Literal["required", "auto"] = "required",
    ) -> None:
        self.syntax, self.tool_choice = syntax, tool_choice
        self._list = JsonSchema(_LIST)
        self._tools: dict[str, JsonSchema] | None = None  # parameters by name; None before `of_row`

    def of_row(self, schema: str | None) -> ToolCalls:
        """The format for a row's tools; without any the answer is text."""
        return _of_row(self, schema)

    def parse(self, text: str) -> Any:
        found = list(_CALL[self.syntax].finditer(text))
        rest = _CALL[self.syntax].sub("", text)
        for name, opening in _OPENING.items():
            if opening.search(rest) and name == self.syntax:
                raise SyntaxProblem("a tool call without its end")
            if opening.search(rest) and not found:
                raise SyntaxProblem(f"a tool call in the syntax of {name}; set data.format.init_args.syntax: {name}")
        if text != text.strip() or (found and rest.strip()):
            raise SyntaxProblem("text or white space around the tool calls" if found else "white space around the text")
        values = [loads_strict(match[1]) for match in found]
        calls = values[0] if self.syntax == "mistral" and values else values
        return [_common(call, self.syntax) for call in calls] if found else text

    def problems(self, value: Any) -> list[Problem]:
        if isinstance(value, str):
            if not self._tools or self.tool_choice == "auto":
                return []
            return [Problem("wrong_root", "text instead of a tool call; allowed with tool_choice: auto")]
        if (problems := self._list.problems(value)) or self._tools is None:
            return problems
        for number, call in enumerate(value):
            if (tool := self._tools.get(call["name"])) is None:
                names = ", ".join(map(repr, self._tools)) or "none"
                problems.append(Problem("bad_value_form", f"$[{number}].name: {call['name']!r}; the tools are {names}"))
                continue
            for problem in tool.problems(call["arguments"]):
                problems.append(Problem(problem.kind, f"$[{number}].arguments{problem.detail.removeprefix('$')}"))
        return problems

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        if spans := [match.span() for match in _CALL[self.syntax].finditer(text, answer_start(text))]:
            yield spans[0][0], spans[-1][1]

    def grammar(self) -> str | None:
        if self.syntax == "mistral" or self.tool_choice == "auto" or not self._tools:
            raise UserError(
                "model.constrained: ToolCalls has a grammar where every row has tools, syntax is hermes or llama and "
                "tool_choice is required; decode without a grammar"
            )
        key = "parameters" if self.syntax == "llama" else "arguments"
        calls, rules = [], []
        for number, (name, parameters) in enumerate(self._tools.items()):
            opening = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '
            calls.append(f'{json.dumps(opening, ensure_ascii=False)} arguments{number} "}}"')
            rules.append(f"arguments{number}:" + parameters.grammar().removeprefix("answer:"))
        if self.syntax == "llama":
            answer = "answer: call"
        else:
            answer = 'answer: tagged ("\\n" tagged)*\ntagged: "<tool_call>" "\\n" call "\\n" "</tool_call>"'
        return "\n".join([answer, f"call: {' | '.join(calls)}", *rules])


def tool_name(tool: Any) -> str | None:
    """The name in a tool's definition, with or without OpenAI's `function` around it; None if it has none."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


@functools.lru_cache(maxsize=KEPT)
def _of_row(format: ToolCalls, schema: str | None) -> ToolCalls:
    own, derived = copy.copy(format), {"name"}
    own._tools = {}
    for tool in json.loads(schema or "[]"):
        name, function = str(tool_name(tool)), tool.get("function", tool)
        try:
            parameters = JsonSchema(function.get("parameters") or {"type": "object", "properties": {}})
        except UserError as error:
            raise UserError(f"the parameters of {name}: {str(error).removeprefix('data.format.schema: ')}") from None
        own._tools[name] = parameters
        derived |= {f"arguments.{path}" for path in parameters.derived}
    own.derived = frozenset(derived)
    return own


def _common(call: Any, syntax: str) -> Any:
    """A call with the keys that all syntaxes have in common."""
    if not isinstance(call, dict):
        return call
    names = {"parameters": "arguments"} if syntax == "llama" else {}
    dropped = ("id",) if syntax == "mistral" else ()
    return {names.get(key, key): value for key, value in call.items() if key not in dropped}

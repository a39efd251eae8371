"""Tool calls as chat templates write them, checked by the tools that each row defines."""

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

_SYNTAXES = {  # how calls begin, and the JSON of a call (mistral: of all calls)
    "hermes": (re.compile(r"</?tool_call>"), re.compile(r"<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", re.S)),
    "llama": (re.compile(r"\A\s*\{\s*\"name\""), re.compile(r"(\{\s*\"name\".*\})", re.S)),
    "mistral": (re.compile(r"\[TOOL_CALLS\]"), re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])", re.S)),
}
NO_PARAMETERS = {"type": "object", "properties": {}}
_CALL = {"name": {"type": "string"}, "arguments": {"type": "object"}}
_CALLS = {"type": "array", "items": {
    "type": "object", "properties": _CALL, "required": [*_CALL], "additionalProperties": False,
}}  # fmt: skip
# Reads a schema as data: the constructor would read a string as a file or import it as a class.
_PARAMETERS = JsonSchema()


class ToolCalls(Format):
    """Calls of the row's `tools` as the chat template writes them, and nothing around them.

    Each call names one of the tools, with arguments that conform to its `parameters`. The answer to a row without tools
    is text. The document is a list of objects with `name` and `arguments`, or the text.

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
        self._calls, self.derived = JsonSchema(_CALLS), frozenset({"name"})
        self.parameters: dict[str, JsonSchema] = {}  # the parameters of the row's tools

    @functools.lru_cache(maxsize=1000)  # noqa: B019 - a format is kept as long as the process
    def of_row(self, schema: str | None) -> "ToolCalls":
        row_format = copy.copy(self)
        row_format.parameters = {}
        for tool in json.loads(schema or "[]"):
            name, function = str(tool_name(tool)), tool.get("function", tool)
            try:
                schemas = filter(None, map(function.get, ("parameters", "input_schema", "inputSchema")))
                parameters = json.dumps(next(schemas, NO_PARAMETERS))
                row_format.parameters[name] = _PARAMETERS.of_row(parameters)  # type: ignore[assignment]
            except UserError as error:
                detail = str(error).removeprefix("the row's schema: ")
                raise UserError(f"the parameters of {name}: {detail}") from None
            row_format.derived |= {f"arguments.{path}" for path in row_format.parameters[name].derived}
        return row_format

    def parse(self, text: str) -> Any:
        pattern = _SYNTAXES[self.syntax][1]
        matches, rest = pattern.findall(text), pattern.sub("", text)
        for name, (opening, _) in _SYNTAXES.items():
            if opening.search(rest) and (name == self.syntax or (self.parameters and not matches)):
                remedy = f"; set data.format.init_args.syntax: {name}" if name != self.syntax else ", without its end"
                raise SyntaxProblem(f"a tool call in the syntax of {name}{remedy}")
        if text != text.strip() or (matches and rest.strip()):
            raise SyntaxProblem("text or whitespace around the answer")
        if not matches:
            return text
        documents = [loads_strict(match.strip()) for match in matches]
        calls = documents[0] if self.syntax == "mistral" else documents
        for call in calls:
            if isinstance(call, dict) and self.syntax == "mistral":
                call.pop("id", None)  # the model invents it
            if isinstance(call, dict) and self.syntax == "llama" and "parameters" in call:
                call["arguments"] = call.pop("parameters")
        return calls

    def problems(self, value: Any) -> list[Problem]:
        if isinstance(value, str):
            if not value:
                return [Problem("empty", "the answer is empty")]
            if not self.parameters or self.tool_choice == "auto":
                return []
            return [Problem("wrong_root", "text instead of a tool call; tool_choice: auto allows it")]
        if problems := self._calls.problems(value):
            return problems
        for number, call in enumerate(value):
            if call["name"] not in self.parameters:
                names = ", ".join(map(repr, self.parameters)) or "none"
                problems.append(Problem("bad_value_form", f"$[{number}].name: {call['name']!r}; the tools are {names}"))
                continue
            for problem in self.parameters[call["name"]].problems(call["arguments"]):
                problems.append(Problem(problem.kind, f"$[{number}].arguments{problem.detail.removeprefix('$')}"))
        return problems

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        if spans := [match.span() for match in _SYNTAXES[self.syntax][1].finditer(text, answer_start(text))]:
            yield spans[0][0], spans[-1][1]


def tool_name(tool: Any) -> str | None:
    """The name in a tool or a call, with or without OpenAI's `function` around it; None if it has none."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None

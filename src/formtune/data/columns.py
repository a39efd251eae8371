"""Turns records into conversations, by their columns or by the layout of another tool."""

import json
import re
from contextlib import suppress
from copy import deepcopy
from typing import Any

from formtune.data.turns import REFUSED, empty, kind, parsed, read_tools, read_turns, unread
from formtune.errors import UserError
from formtune.formats import Format
from formtune.formats.bounded import time_limit

ANSWERS = (str, dict, list, bool, int, float)
DEFAULT = ("prompt", "completion", "messages")
_FIELD = re.compile(r"\{([\w .,()/%-]+)\}")  # of a template over columns


class Columns:
    """How a record becomes a conversation.

    Args:
        prompt: Column of the input, or a template such as `"Title: {title}\\n{body}"` over several columns.
        completion: Column of the target.
        messages: Column of chat turns; if a record has it, `prompt` and `completion` are not read.
        system: Column of the row's own system prompt, in place of `data.system`; may be absent or empty.
        source: Column that says who wrote the row: "human", or the name of the model that did; may be absent.
        schema: Column of the row's own JSON Schema, an object or JSON text; read if `data.format` names none.
    """

    def __init__(
        self,
        prompt: str = "prompt",
        completion: str = "completion",
        messages: str = "messages",
        system: str | None = "system",
        source: str | None = None,
        schema: str = "schema",
    ) -> None:
        self.prompt, self.completion, self.messages = prompt, completion, messages
        self.source, self.schema = source, schema
        self.system = None if system in (*_fields(prompt), completion) else system
        if not _fields(prompt):
            raise UserError(f"data.columns.prompt: {prompt!r} names no column; write {{column}} for each")

    def conversation(
        self, record: dict[str, Any], where: str, with_target: bool | str, ignored: set[str] | None = None
    ) -> list[dict[str, Any]]:
        """The record's turns, see `read_turns`; `ignored` collects unread keys. The answer need not be a string."""
        ignored = set() if ignored is None else ignored
        prompt, completion, column = self._layout(record)
        is_chat = column in record and (record[column] is not None or not record.keys() & {*_fields(prompt)})
        columns = [column] if is_chat else [*_fields(prompt), completion]
        ignored |= unread(record, {*columns, self.system, self.source, "tools"}, REFUSED, where)
        if is_chat:
            turns = read_turns(record[column], column, where, with_target, ignored)
        elif _is_turns(record.get(prompt)):  # TRL's conversations
            turns, answer = record[prompt], _read(record, completion, where, ANSWERS) if with_target else []
            turns = [*turns, *(answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])]
            turns = read_turns(turns, f"{prompt}+{completion}", where, with_target, ignored)
        else:
            turns = [{"role": "user", "content": _filled(record, prompt, where)}]
            if with_target:
                turns.append({"role": "assistant", "content": _read(record, completion, where, ANSWERS)})
        if self.system is None or empty(record.get(self.system)):
            return turns
        remedy = "write the row's system prompt as a string, or set data.columns.system: null"
        system = _read(record, self.system, where, remedy=remedy)
        if turns[0]["role"] == "system":
            raise UserError(f"{where}: the turns and the column `{self.system}` both have a system prompt; {remedy}")
        return [{"role": "system", "content": system}, *turns]

    def _layout(self, record: dict[str, Any]) -> tuple[str, str, str]:
        """The columns of prompt, answer and turns; those of ShareGPT or Alpaca if the row has no others."""
        columns = self.prompt, self.completion, self.messages
        if columns != DEFAULT or any(record.get(name) is not None for name in columns):
            return columns
        if not empty(record.get("conversations")):
            return self.prompt, self.completion, "conversations"
        if "instruction" in record:
            prompt = "instruction" if record.get("input") in (None, "") else "{instruction}\n\n{input}"
            return prompt, "output", self.messages
        return columns

    def tools(self, record: dict[str, Any], where: str) -> str | None:
        """The record's tools as JSON text, None if it has none or the prompt's template writes them."""
        return None if "tools" in _fields(self.prompt) else read_tools(record.get("tools"), "tools", where)

    def origin(self, record: dict[str, Any], where: str) -> str:
        """Who wrote a record, "" if unknown."""
        if self.source is None or record.get(self.source) is None:
            return ""
        remedy = "write `human` or the name of the model that wrote the row, or set data.columns.source: null"
        name = _read(record, self.source, where, remedy=remedy)
        return "human" if name.strip().casefold() == "human" else name


def _fields(prompt: str) -> list[str]:
    """The columns that a template names, or the column itself if it is not a template."""
    return _FIELD.findall(prompt) if "{" in prompt else [prompt]


def _filled(record: dict[str, Any], prompt: str, where: str) -> str:
    if "{" not in prompt:
        return _read(record, prompt, where)
    # A column may be null, but not all columns of the template.
    if any(record.get(name) is not None for name in _fields(prompt)):
        record = {name: "" if value is None else value for name, value in record.items()}
    # Not str.format: it would look up attributes, and replace braces in the data.
    return _FIELD.sub(lambda match: str(_read(record, match[1], where, (str, int, float))), prompt)


def _read(record: dict[str, Any], column: str, where: str, types: tuple[type, ...] = (str,), remedy: str = "") -> Any:
    if column not in record:
        raise UserError(f"{where}: no column `{column}` among {', '.join(record)}; fill it, or set data.columns")
    if not isinstance(record[column], types):
        remedy = remedy or (
            "fill it or remove the row" if record[column] is None else "write it as a string, JSON answers too"
        )
        raise UserError(f"{where}: `{column}` is {kind(record[column])}, not text; {remedy}")
    return record[column]


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def row_schema(value: Any) -> str | None:
    """A row's schema as normalized JSON text; unchanged if it is not JSON, None if it is empty."""
    value = parsed(value)
    if isinstance(value, str):
        return value.strip() or None
    return None if empty(value) else json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def serialize(value: Any, format: Format, where: str) -> str:
    """The text of an answer that is not a string, as the format writes it."""
    try:
        text = format.write(value)
        if text and "null" in text and not format.check(text).exact:
            with suppress(TimeoutError):
                shorter = format.write(_without_nulls(value, format))
                text = shorter if shorter and format.check(shorter).exact else text
    except (TypeError, ValueError) as error:  # such as a date in a Parquet file
        raise UserError(f"{where}: the answer is not JSON ({error}); write it as a string") from None
    if text is None and type(value) is int and format.check(str(value)).exact:
        text = str(value)
    if text is None:
        remedy = "write it as a string, or set data.columns.completion to the column that holds its text"
        raise UserError(f"{where}: the answer is {kind(value)}, not text; {remedy}")
    return text


@time_limit()
def _without_nulls(value: Any, format: Format) -> Any:
    """A copy without the null keys that the format refuses: tables write absent keys as null."""
    value, dropped = deepcopy(value), False
    stack, before = [value], format.problems(value)
    while stack:
        holder = stack.pop()
        is_object = isinstance(holder, dict)
        stack += [x for x in reversed([*holder.values()] if is_object else holder) if isinstance(x, dict | list)]
        for key in [key for key, inner in holder.items() if inner is None] if is_object else []:
            del holder[key]
            after = format.problems(value)
            if before == after or len(after) > len(before):
                holder[key] = None
            else:
                before, dropped = after, True
    # A format lists only the first problems.
    return _without_nulls(value, format) if dropped and format.problems(value) else value

"""Rows as other tools write them, recognized by their columns, and answers that are not text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

from formtune.data.turns import empty, kind
from formtune.errors import UserError
from formtune.formats import Format
from formtune.formats.bounded import time_limit

KINDS = {dict: "objects", list: "arrays", bool: "booleans", int: "numbers", float: "numbers"}
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its roles; the others have the names that are read anyway
# Columns that a row must have, `?` for those that it may have: the input's, and the answer's last.
SHAPES = {
    "conversations": ("conversations",),
    "Alpaca rows (instruction, input, output)": ("instruction", "input?", "output"),
    "questions and answers (question, answer)": ("question", "answer"),
    "questions on a text (context, question, answer)": ("context", "question", "answer"),
    "texts and labels (text, label)": ("text", "label"),
}


def recognize(record: dict[str, Any], where: str, with_target: bool) -> tuple[str, dict[str, str]] | None:
    """The shape of a row and the `data.columns` that read it, None if it has none; a UserError if it may have two."""
    needs = {shape: [name for name in names if name[-1] != "?"] for shape, names in SHAPES.items()}
    shapes = [shape for shape, names in needs.items() if set(names) <= record.keys()]
    if not with_target:
        shapes = shapes or [shape for shape, names in needs.items() if set(names[:-1] or names) <= record.keys()]
    if len(shapes) > 1:  # a table may have columns for which a row has no value
        shapes = [it for it in shapes if not any(empty(record.get(name)) for name in needs[it])] or shapes
    readings = [(shape, _columns(shape, record)) for shape in shapes]
    if len(readings) > 1:
        one, other = (f"{shape}, data.columns: {columns}" for shape, columns in readings[:2])
        raise UserError(f"{where}: the row may be {one}, or {other}; set data.columns to what it is")
    return readings[0] if readings else None


def _columns(shape: str, record: dict[str, Any]) -> dict[str, str]:
    *inputs, answer = (name.rstrip("?") for name in SHAPES[shape])
    if not inputs:
        return {"messages": answer}
    if answer == "label" and not empty(record.get("label_text")):
        answer = "label_text"
    filled = [name for name in inputs if not empty(record.get(name))] or inputs[:1]
    return {"prompt": "\n\n".join(f"{{{name}}}" for name in filled), "completion": answer}


def is_turns(value: Any) -> bool:
    """Whether a value is a list of chat turns."""
    return isinstance(value, list) and bool(value) and all(isinstance(it, dict) and "role" in it for it in value)


def from_sharegpt(turn: Any) -> Any:
    """A turn with `from` and `value` as one with `role` and `content`; any other as it is."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys() or {"role", "content"} & turn.keys():
        return turn
    rest = {key: turn[key] for key in turn.keys() - {"from", "value"}}
    return {"role": SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn["value"], **rest}


def written(value: Any, format: Format, where: str) -> tuple[str, str]:
    """The text of an answer that is not text, as the format writes it, and a line that says what was done."""
    done = f"answers were {KINDS.get(type(value), 'numbers')}, written in the format's form"
    try:
        text = format.write(value)
        if text and "null" in text and not format.check(text).exact:
            with suppress(TimeoutError):
                shorter = format.write(_without_nulls(value, format))
                if shorter and format.check(shorter).exact:
                    return shorter, done + " without the nulls that it refuses"
    except (TypeError, ValueError) as error:  # such as a date in a Parquet file
        raise UserError(f"{where}: the answer is not JSON ({error}); write it as a string") from None
    if text is None and type(value) is int and format.check(str(value)).exact:
        text = str(value)
    if text is None:
        remedy = "write it as a string, or set data.columns.completion to the column that holds its text"
        raise UserError(f"{where}: the answer is {kind(value)}, not text; {remedy}")
    return text, done


@time_limit()
def _without_nulls(value: Any, format: Format) -> Any:
    """A copy without the null keys that the format refuses: tables write a key that is absent as null."""
    value = deepcopy(value)
    for holder, key in list(_null_keys(value)):
        before = format.problems(value)
        del holder[key]
        after = format.problems(value)
        if before == after or len(after) > len(before):
            holder[key] = None
    return value


def _null_keys(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(value, dict):
        yield from ((value, key) for key, inner in value.items() if inner is None)
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _null_keys(inner)

"""Chat turns as other tools write them. A key is read, refused by name, or noted as ignored; never silently dropped."""

import json
from collections.abc import Mapping, Set
from typing import Any

from formtune.base.row import Message
from formtune.errors import UserError, as_user_error
from formtune.formats.strict_json import loads_strict
from formtune.formats.tool_calls import tool_name

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its roles; other roles have the usual names
WEIGHTS = ("weight", "loss", "loss_scale", "train", "training")  # names that other tools give a turn's weight

_ROLE_KEYS = {"assistant": ("tool_calls", "reasoning_content"), "tool": ("tool_call_id", "name")}

# Keys that would change the rendered prompt or the target.
REFUSED = {"functions", "tool_calls", "function_call", "reasoning_content", "thinking", "chat_template_kwargs"}
# Refused only in turns; a column of such a name may mean anything.
_REFUSED_IN_TURNS = REFUSED.union(
    ("tools", "reasoning", "reasoning_details", "thinking_blocks", "thought", "thoughts", "tool_plan", "refusal"),
    ("audio", "audios", "image", "images", "image_url", "video", "videos"),
)


def read_turns(turns: Any, column: str, where: str, with_target: bool | str, ignored: set[str]) -> list[Message]:
    """The turns in a column; without a target, a last answer is dropped; for "all", answers of weight 0 are marked."""
    if not isinstance(turns, list):
        raise UserError(f"{where}: `{column}` is {kind(turns)}; it must be a list of turns with `role` and `content`")
    turns = [*map(_from_sharegpt, turns)]
    if not with_target and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    messages = []
    for number, turn in enumerate(turns):
        is_answer = with_target is True and number == len(turns) - 1
        message, keys = _read_turn(turn, f"{where}: {column}[{number}]", is_answer)
        if with_target == "all" and message["role"] == "assistant" and any(turn.get(key) == 0 for key in WEIGHTS):
            message["weight"] = "0"
        messages.append(message)
        ignored |= {f"{column}[].{key}" for key in keys}
    last = ("assistant",) if with_target else ("user", "tool")
    if not messages or messages[-1]["role"] not in last or all(m["role"] != "user" for m in messages):
        expected = "an assistant turn, after a user turn" if with_target else "a user turn"
        raise UserError(f"{where}: `{column}` must end with {expected}")
    return messages


def read_tools(tools: Any, column: str, where: str) -> str | None:
    """A row's tools as the text of a JSON list, None if it has none."""
    if empty(tools):
        return None
    tools = parsed(tools)
    names = [*map(tool_name, tools)] if isinstance(tools, list) else [None]
    if None in names or len(set(names)) < len(names):
        raise UserError(
            f"{where}: `{column}` must be a list of tools with different names, as in OpenAI's chat completions: "
            '{"type": "function", "function": {"name": ..., "parameters": ...}}; fix it, or rename the column'
        )
    return json.dumps(tools, ensure_ascii=False)


def unread(holder: Mapping[str, Any], read: Set[Any], refused: Set[str], where: str) -> set[str]:
    """The keys that have a value and are not read; those that would change the prompt or the target are refused."""
    keys = [key for key, value in holder.items() if key not in read and not empty(value)]
    for key in keys:
        if key in refused and holder[key] is not False:
            raise UserError(
                f"{where}: `{key}` is neither rendered nor trained; write it into the text of a turn, or remove it"
            )
    return set(keys)


def empty(value: Any) -> bool:
    """Whether a value is empty; tables write that as a struct of nulls, or as JSON in a string."""
    if isinstance(value, dict):
        return all(map(empty, value.values()))
    return value is None or value == [] or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def parsed(value: Any) -> Any:
    """The value of a JSON text; other values and texts unchanged."""
    try:
        return loads_strict(value.strip()) if isinstance(value, str) else value
    except ValueError:
        return value


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _from_sharegpt(turn: Any) -> Any:
    """A turn with `from` and `value` rewritten with `role` and `content`; other turns unchanged."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys() or {"role", "content"} & turn.keys():
        return turn
    rest = {key: turn[key] for key in turn.keys() - {"from", "value"}}
    return {"role": SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn["value"], **rest}


def _read_turn(turn: Any, here: str, is_answer: bool) -> tuple[Message, set[str]]:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        actual = f"has the role {turn.get('role')!r}" if isinstance(turn, dict) else f"is {kind(turn)}"
        raise UserError(f"{here} {actual}; a turn is an object with `content` and a `role`: {', '.join(ROLES)}")
    message = {key: turn[key] for key in _ROLE_KEYS.get(turn["role"], ()) if not empty(turn.get(key))}
    keys = unread(turn, {"role", "content", *message, *WEIGHTS}, _REFUSED_IN_TURNS, here)
    for key in WEIGHTS:
        if (weight := turn.get(key)) not in (None, 0, 1) or (weight == 0 and is_answer):
            raise UserError(
                f"{here}: `{key}` is {weight!r}; write 1, or 0 to exclude it from the loss (the last answer only with "
                "data.train_on: all), or remove the row"
            )
    if not isinstance(message.get("reasoning_content", ""), str):
        raise UserError(f"{here}: `reasoning_content` is {kind(message['reasoning_content'])}; write it as a string")
    if "tool_calls" in message:
        message["tool_calls"] = _read_calls(message["tool_calls"], f"{here}.tool_calls")
    content = turn.get("content")
    if content is None and "tool_calls" in message:
        content = ""
    if isinstance(content, list):
        for number, part in enumerate(content):
            place = f"{here}.content[{number}]"
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UserError(f'{place}: only text is read, as a string or {{"type": "text", "text": ...}}')
            keys |= {f"content[].{key}" for key in unread(part, {"type", "text"}, _REFUSED_IN_TURNS, place)}
        content = "".join(part["text"] for part in content)
    if not isinstance(content, (str, dict, int, float) if is_answer else str):  # a format may write other answers
        raise UserError(f"{here}: `content` is {kind(content)}, not text; write it as a string, JSON answers too")
    return {"role": turn["role"], "content": content} | message, keys


def _read_calls(calls: Any, here: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object, as chat templates expect them."""
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        name, function = tool_name(call), call.get("function", call) if isinstance(call, dict) else {}
        arguments = parsed(function.get("arguments") or {}) if name else None
        if not isinstance(arguments, dict):
            raise UserError(f'{here}: write {{"type": "function", "function": {{"name": ..., "arguments": {{...}}}}}}')
        with as_user_error(f"{here}: the arguments are not JSON", "; write them as JSON text"):
            json.dumps(arguments)  # a table may have dates in them
        call_id = {"id": call["id"]} if call.get("id") else {}
        read.append(call_id | {"type": "function", "function": {"name": name, "arguments": arguments}})
    return read

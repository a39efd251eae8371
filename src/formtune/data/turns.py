"""Chat turns as other tools write them. A key is read, refused by name, or noted as ignored; never silently dropped."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from formtune.errors import UserError

ROLES = ("system", "user", "assistant")
WEIGHTS = ("weight", "loss", "loss_scale", "train", "training")  # names that other tools give a turn's weight

# Keys that would change what is trained or rendered.
REFUSED = {"tools", "functions", "tool_calls", "function_call", "reasoning_content", "thinking", "chat_template_kwargs"}
# These as well in a turn; a column of such a name may mean anything.
_REFUSED_IN_TURNS = REFUSED.union(
    ("reasoning", "reasoning_details", "thinking_blocks", "thought", "thoughts", "tool_plan", "refusal"),
    ("audio", "audios", "image", "images", "image_url", "video", "videos"),
)


def read_turns(turns: Any, column: str, where: str, with_target: bool | str, ignored: set[str]) -> list[dict[str, str]]:
    """The turns in a row's column; without a target, an answer at the end is left out.

    With `with_target="all"` each answer is one; those of weight 0 get the key `weight`.
    `ignored` collects the names of the keys that have a value and are not read.
    """
    if not isinstance(turns, list):
        raise UserError(f"{where}: `{column}` is {kind(turns)}; it must be a list of turns with `role` and `content`")
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
    last = "assistant" if with_target else "user"
    if not messages or messages[-1]["role"] != last or all(m["role"] != "user" for m in messages):
        raise UserError(f"{where}: the last turn of `{column}` must be the {last}'s, after one of the user's")
    return messages


def unread(holder: Mapping[str, Any], read: Set[Any], refused: Set[str], where: str) -> set[str]:
    """The keys that have a value and are not read; refuses those that would change what is trained or rendered."""
    keys = [key for key, value in holder.items() if key not in read and not empty(value)]
    for key in keys:
        if key in refused and holder[key] is not False:
            raise UserError(
                f"{where}: `{key}` is neither rendered nor trained; write what matters into the text of a turn and "
                "remove the key, or remove the row"
            )
    return set(keys)


def empty(value: Any) -> bool:
    """Whether a value is empty; tables write that as a struct of nulls, or as JSON in a string."""
    if isinstance(value, dict):
        return all(map(empty, value.values()))
    return value is None or value == [] or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _read_turn(turn: Any, here: str, is_answer: bool) -> tuple[dict[str, str], set[str]]:
    """A turn's role and text, and the keys that are not read."""
    if not isinstance(turn, dict):
        raise UserError(f"{here} is {kind(turn)}; a turn is an object with `role` and `content`")
    if "role" not in turn:
        raise UserError(f"{here}: no key `role` among {', '.join(turn)}; a turn is an object with `role` and `content`")
    if turn["role"] not in ROLES:
        remedy = f"use {', '.join(ROLES)}, and write a tool's result into a user's turn"
        raise UserError(f"{here}: the role {turn['role']!r} is not read; {remedy}")
    keys = unread(turn, {"role", "content", *WEIGHTS}, _REFUSED_IN_TURNS, here)
    for key in WEIGHTS:
        # The last answer alone is trained: weight 0 is what every other turn has.
        if (weight := turn.get(key)) is not None and weight != 1 and (is_answer or weight != 0):
            raise UserError(
                f"{here}: `{key}` is {weight!r}, but the last answer is trained, with weight 1, and no other turn "
                "(data.train_on: all trains each of weight 1); end the row at the answer to train, or remove the row"
            )
    if "content" not in turn:
        raise UserError(f"{here}: no key `content` among {', '.join(turn)}; write the turn's text")
    content = turn["content"]
    if isinstance(content, list):
        for number, part in enumerate(content):
            place = f"{here}.content[{number}]"
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                actual = f"of type {part['type']!r}" if isinstance(part, dict) and "type" in part else kind(part)
                only = 'only text is read, as a string or {"type": "text", "text": ...}'
                raise UserError(f"{place} is {actual}; {only}")
            keys |= {f"content[].{key}" for key in unread(part, {"type", "text"}, _REFUSED_IN_TURNS, place)}
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{here}: `content` is {kind(content)}, not text; write it as a string, JSON answers too")
    return {"role": turn["role"], "content": content}, keys

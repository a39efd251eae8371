"""Chat turns as other tools write them. A key is read, refused by name, or noted as ignored; never silently dropped."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from formtune.errors import UserError

ROLES = ("system", "user", "assistant")
WEIGHTS = ("weight", "loss", "loss_scale", "train", "training")  # names that other tools give a turn's weight
_READ = frozenset(("role", "content", *WEIGHTS))

_DEFINITIONS = "tool definitions are not rendered; write them into the system prompt and remove the key"
_CALLS = "tool calls are not rendered; write the call as the turn's text, in the format to learn, and remove the key"
_REASONING = "reasoning is not trained; remove the key, or write into the turn's text what is to be learned"
_RESULTS = "tool results are not rendered; write the result into a user's turn"

# Keys that would change what is trained or rendered, each with the remedy.
REFUSED = {
    **dict.fromkeys(("tools", "functions"), _DEFINITIONS),
    **dict.fromkeys(("tool_calls", "function_call"), _CALLS),
    **dict.fromkeys(("reasoning_content", "thinking"), _REASONING),
    "chat_template_kwargs": "every row is rendered with the same options; remove the key",
}
# These as well in a turn; a column of such a name may mean anything.
_REFUSED_IN_TURNS = REFUSED | {
    **dict.fromkeys(("reasoning", "reasoning_details", "thinking_blocks", "thought", "thoughts"), _REASONING),
    **dict.fromkeys(
        ("audio", "audios", "image", "images", "image_url", "video", "videos"), "only text is read; remove the row"
    ),
    "refusal": "a refusal is not rendered; write it as the turn's text, or remove the row",
    "tool_plan": _REASONING,
}
_ROLE_REMEDIES = {"developer": "write it as `system`", "tool": _RESULTS, "function": _RESULTS}


def read_turns(turns: Any, column: str, where: str, with_target: bool, ignored: set[str]) -> list[dict[str, str]]:
    """The turns in a row's column; without a target, an answer at the end is left out.

    `ignored` takes the names of the keys that have a value and are not read.
    """
    if not isinstance(turns, list):
        raise UserError(f"{where}: `{column}` is {kind(turns)}; it must be a list of turns with `role` and `content`")
    if not with_target and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    answer = len(turns) - 1 if with_target else None
    read = [
        _turn(turn, f"{where}: {column}[{n}]", f"{column}[].", n == answer, ignored) for n, turn in enumerate(turns)
    ]
    last = "assistant" if with_target else "user"
    if not read or read[-1]["role"] != last or all(t["role"] != "user" for t in read):
        raise UserError(f"{where}: the last turn of `{column}` must be the {last}'s, after one of the user's")
    return read


def note_unread(
    holder: Mapping[str, Any], read: Set[Any], refused: Mapping[str, str], where: str, inside: str, ignored: set[str]
) -> None:
    """Refuse a key that would change what is trained or rendered; note every other that has a value and is not read.

    `holder` is a row, a turn or a part of its content, `refused` has the remedy for each key, and `inside` comes before
    the names that are noted.
    """
    for key, value in holder.items():
        if key in read or empty(value):
            continue
        if key in refused and value is not False:
            raise UserError(f"{where}: `{key}`: {refused[key]}")
        ignored.add(f"{inside}{key}")


def empty(value: Any) -> bool:
    """Whether a value is empty; tables write that as a struct of nulls, or as JSON in a string."""
    if isinstance(value, dict):
        return all(map(empty, value.values()))
    return value is None or value == [] or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _turn(turn: Any, here: str, inside: str, is_answer: bool, ignored: set[str]) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise UserError(f"{here} is {kind(turn)}; a turn is an object with `role` and `content`")
    if "role" not in turn:
        raise UserError(f"{here}: no key `role` among {', '.join(turn)}; a turn is an object with `role` and `content`")
    role = turn["role"]
    if role not in ROLES:
        remedy = _ROLE_REMEDIES.get(role) if isinstance(role, str) else None
        raise UserError(f"{here}: the role {role!r} is not read; {remedy or 'use ' + ', '.join(ROLES)}")
    note_unread(turn, _READ, _REFUSED_IN_TURNS, here, inside, ignored)
    for key in WEIGHTS:
        # The last answer alone is trained: weight 0 is what every other turn has.
        if (weight := turn.get(key)) is not None and weight != 1 and (is_answer or weight != 0):
            raise UserError(
                f"{here}: `{key}` is {weight!r}, but the last answer is trained, with weight 1, and no other turn; "
                "end the row at the answer to train, or remove the row"
            )
    if "content" not in turn:
        raise UserError(f"{here}: no key `content` among {', '.join(turn)}; write the turn's text")
    content = turn["content"]
    if isinstance(content, list):
        content = "".join(_part(part, f"{here}.content[{n}]", inside, ignored) for n, part in enumerate(content))
    if not isinstance(content, str):
        raise UserError(f"{here}: `content` is {kind(content)}, not text; write it as a string, JSON answers too")
    return {"role": role, "content": content}


def _part(part: Any, here: str, inside: str, ignored: set[str]) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        actual = f"of type {part['type']!r}" if isinstance(part, dict) and "type" in part else kind(part)
        raise UserError(f'{here} is {actual}; only text is read, as a string or {{"type": "text", "text": ...}}')
    note_unread(part, {"type", "text"}, _REFUSED_IN_TURNS, here, f"{inside}content[].", ignored)
    return part["text"]

"""The JSON Schema of a set of documents, all of which it takes. Where they leave a doubt, it is the laxer one."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from formtune.formats.bounded import FORMATS
from formtune.formats.content import Words

FEW = 10  # values that a rule about them needs
RARE = 0.01  # share of values seen once, which is about the chance that the next one is new
CHOICES, REPEATS = 200, 10  # values of an enum at most, and how often each is seen on average
COPIED = 0.8  # share of a field's values that are in their inputs from which on another input may give a new one
NAMES = ("date", "date-time", "time", "uuid", "ipv4", "email", "uri")
TYPES = {str: "string", int: "integer", float: "number", dict: "object", list: "array", bool: "boolean"}

Found = Sequence[tuple[Any, Words]]  # values, each with the input of its document


def infer(found: Found) -> dict[str, Any]:
    """The schema of the values that documents have at one place."""
    kinds = {TYPES.get(type(value), "null") for value, _ in found}
    types = sorted(kinds - ({"integer"} if "number" in kinds else set()))
    schema: dict[str, Any] = {"type": types[0] if len(types) == 1 else types}
    if {*types} <= {"string", "null"}:
        texts = [(value, input) for value, input in found if value is not None]
        values = Counter(text for text, _ in texts)
        if is_closed(values) and sum(input.hold(text) for text, input in texts) < COPIED * len(texts):
            return {"enum": [*sorted(values), *([None] if "null" in types else [])]}
        schema |= form([*values])
    if items := [(inner, input) for value, input in found if isinstance(value, list) for inner in value]:
        schema["items"] = infer(items)
    if objects := [(value, input) for value, input in found if isinstance(value, dict)]:
        schema |= _object(objects)
    return schema


def _object(found: Found) -> dict[str, Any]:
    keys: dict[str, list[tuple[Any, Words]]] = defaultdict(list)
    for value, input in found:
        for key, inner in value.items():
            keys[key].append((inner, input))
    required = [key for key, inner in keys.items() if len(inner) == len(found)]
    is_open = has_more([*map(len, keys.values())], len(found))
    known = [key for key, inner in keys.items() if len(inner) >= FEW or key in required or not is_open]
    schema = {"properties": {key: infer(keys[key]) for key in known}, "required": required}
    return schema if is_open else schema | {"additionalProperties": False}


def has_more(counts: list[int], total: int) -> bool:
    """Whether another value may follow those that were counted, in so many documents."""
    return counts.count(1) > RARE * total + 1


def is_closed(values: Counter[Any]) -> bool:
    """Whether values repeat so often that no other one will follow."""
    total = values.total()
    return 0 < len(values) <= CHOICES and total >= REPEATS * len(values) and not has_more([*values.values()], total)


def form(texts: list[str]) -> dict[str, str]:
    """The format or the pattern that all texts have."""
    for name in NAMES:
        if len(texts) >= FEW and all(FORMATS.conforms(text, name) for text in texts):
            return {"format": name}
    pattern = common_pattern(texts)
    return {"pattern": f"^{pattern}$"} if pattern else {}


def common_pattern(texts: list[str]) -> str:
    """The pattern of texts with numbers that all match, such as `[A-Z]{2}-[0-9]+`; "" if there is none."""
    classes = {"0": "[0-9]+", "A": "[A-Z]", "a": "[a-z]"}
    shapes = {re.sub("[a-z]", "a", re.sub("[A-Z]", "A", re.sub("[0-9]+", "0", text))) for text in texts}
    if len(texts) < FEW or len(shapes) > 1 or "0" not in (shape := shapes.pop()):
        return ""
    pattern = ""
    for run in re.finditer(r"(?s)(.)\1*", shape):
        part = classes.get(run[1]) or re.sub(r"[\\^$.|?*+()\[\]{}/]", r"\\\g<0>", run[1])
        pattern += part + (f"{{{len(run[0])}}}" if len(run[0]) > 1 else "")
    return pattern

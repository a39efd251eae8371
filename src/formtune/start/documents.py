"""Infers the JSON Schema that accepts all documents of a set; in doubt, the laxer one."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from formtune.formats.bounded import FORMATS
from formtune.formats.content import Words

MIN_VALUES = 10  # to infer a rule about them
MAX_NEW_SHARE = 0.01  # chance that the next value is new: about the share of values seen once (Good-Turing)
MAX_CHOICES, MIN_REPEATS = 200, 10  # values of an enum, and occurrences of each on average
MIN_COPIED = 0.8  # share of values that are in their inputs, from which a field is copied and no enum
NAMES = ("date", "date-time", "time", "uuid", "ipv4", "email", "uri")
TYPES = {str: "string", int: "integer", float: "number", dict: "object", list: "array", bool: "boolean"}

Found = Sequence[tuple[Any, Words]]  # values, each with the input of its document


def infer(found: Found) -> dict[str, Any]:
    """Infer the schema of the values at one place of the documents."""
    kinds = {TYPES.get(type(value), "null") for value, _ in found}
    types = sorted(kinds - ({"integer"} if "number" in kinds else set()))
    schema: dict[str, Any] = {"type": types[0] if len(types) == 1 else types}
    if {*types} <= {"string", "null"}:
        texts = [(value, input) for value, input in found if value is not None]
        values = Counter(text for text, _ in texts)
        if is_closed(values) and sum(input.hold(text) for text, input in texts) < MIN_COPIED * len(texts):
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
    known = [key for key, inner in keys.items() if len(inner) >= MIN_VALUES or key in required or not is_open]
    schema = {"properties": {key: infer(keys[key]) for key in known}, "required": required}
    return schema if is_open else schema | {"additionalProperties": False}


def has_more(counts: list[int], total: int) -> bool:
    """Whether new values are likely, by how many of the counted ones occur once."""
    return counts.count(1) > MAX_NEW_SHARE * total + 1


def is_closed(values: Counter[Any]) -> bool:
    """Whether the values repeat so often that no new one is likely."""
    total, count = values.total(), len(values)
    return 0 < count <= MAX_CHOICES and total >= MIN_REPEATS * count and not has_more([*values.values()], total)


def form(texts: list[str]) -> dict[str, str]:
    """The format or the pattern that all texts match."""
    for name in NAMES:
        if len(texts) >= MIN_VALUES and all(FORMATS.conforms(text, name) for text in texts):
            return {"format": name}
    pattern = common_pattern(texts)
    return {"pattern": f"^{pattern}$"} if pattern else {}


def common_pattern(texts: list[str]) -> str:
    """The pattern that all texts match if they contain numbers, such as `[A-Z]{2}-[0-9]+`; "" if there is none."""
    classes = {"0": "[0-9]+", "A": "[A-Z]", "a": "[a-z]"}
    shapes = {re.sub("[a-z]", "a", re.sub("[A-Z]", "A", re.sub("[0-9]+", "0", text))) for text in texts}
    if len(texts) < MIN_VALUES or len(shapes) > 1 or "0" not in (shape := shapes.pop()):
        return ""
    pattern = ""
    for run in re.finditer(r"(?s)(.)\1*", shape):
        part = classes.get(run[1]) or re.sub(r"[\\^$.|?*+()\[\]{}/]", r"\\\g<0>", run[1])
        pattern += part + (f"{{{len(run[0])}}}" if len(run[0]) > 1 else "")
    return pattern

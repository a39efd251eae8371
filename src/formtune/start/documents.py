"""The JSON Schema of a set of documents, all of which it takes. Where they leave a doubt, it is the laxer one."""

import re
from collections import Counter
from typing import Any

from formtune.formats.bounded import FORMATS
from formtune.formats.content import Words

FEW = 10  # values that a rule about them needs
RARE = 0.01  # share of values seen once, which is about the chance that the next one is new
CHOICES, REPEATS = 200, 10  # values of an enum at most, and how often each is seen on average
COPIED = 0.8  # share of a field's values that are in their inputs from which on another input may give a new one
NAMES = ("date", "date-time", "time", "uuid", "ipv4", "email", "uri")
SCALARS = {str: "string", int: "integer", float: "number"}
TYPES = SCALARS | {dict: "object", list: "array", bool: "boolean"}


class Observed:
    """What documents have at one place."""

    def __init__(self) -> None:
        self.types: Counter[str] = Counter()
        self.keys: dict[str, Observed] = {}
        self.items: Observed | None = None
        self.values: Counter[Any] = Counter()  # texts and numbers
        self.copied = 0  # of these, those that are in their inputs

    def add(self, value: Any, input: Words) -> None:
        kind = type(value)
        self.types[TYPES.get(kind, "null")] += 1
        if kind is dict:
            for key, inner in value.items():
                self.keys.setdefault(key, Observed()).add(inner, input)
        elif kind is list:
            self.items = self.items or Observed()
            for inner in value:
                self.items.add(inner, input)
        elif kind in SCALARS:
            self.copied += input.hold(value)
            self.values[value] += 1

    def schema(self) -> dict[str, Any]:
        types = sorted(self.types.keys() - ({"integer"} if self.types["number"] else set()))
        texts = {*types} <= {"string", "null"}
        if texts and is_closed(self.values) and self.copied < COPIED * self.values.total():
            return {"enum": [*sorted(self.values), *([None] if "null" in types else [])]}
        schema: dict[str, Any] = {"type": types[0] if len(types) == 1 else types}
        if texts:
            schema |= form([*self.values])
        if self.items and self.items.types:
            schema["items"] = self.items.schema()
        return schema | (self._object() if "object" in types else {})

    def _object(self) -> dict[str, Any]:
        total, counts = self.types["object"], {key: inner.types.total() for key, inner in self.keys.items()}
        required = [key for key, count in counts.items() if count == total]
        is_open = has_more([*counts.values()], total)
        known = [key for key, count in counts.items() if count >= FEW or key in required or not is_open]
        schema = {"properties": {key: self.keys[key].schema() for key in known}, "required": required}
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

"""The JSON Schema of a set of documents: as strict as they are many, and closed to what only few of many do."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from formtune.formats.bounded import FORMATS
from formtune.formats.content import Words

RARE, MANY = 0.01, 100  # share of at least so many documents that is a mistake
FEW = 10  # values that a rule about them needs
CHOICES, REPEATS = 100, 10  # values of an enum at most, and how often each is seen on average
COPIED = 0.8  # share of a field's values that are in their inputs from which on another input may give a new one
DERIVED = 0.5  # share of them below which answers work the field out
NEAR, GAP = 0.85, 20  # a rare value is a mistake if it is so similar to another one, or so many times rarer
KEYS = 30  # of an object; more, if most of them are seen once, are data
NAMES = ("date", "date-time", "time", "uuid", "ipv4", "email", "uri")
SCALARS = {str: "string", int: "integer", float: "number"}
TYPES = SCALARS | {dict: "object", list: "array", bool: "boolean"}


class Observed:
    """What documents have at one place."""

    def __init__(self) -> None:
        self.types: Counter[str] = Counter()
        self.keys: dict[str, Observed] = {}
        self.items: Observed | None = None
        self.values: Counter[str | int] = Counter()  # not of booleans: true would be 1
        self.copied = 0  # texts and numbers that are in their inputs

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
        total = self.types.total() - self.types["null"]
        usual = {kind for kind, count in self.types.items() if kind == "null" or not is_rare(count, total)}
        if self.types["number"]:
            usual = usual - {"integer"} | {"number"}
        if self.items and self.items.types.keys() <= usual:  # several of what is usually one
            usual.add("array")
        if usual <= {"string", "integer", "null"} and (choices := self._choices()):
            return {"enum": [*choices, None] if "null" in usual else choices}
        schema: dict[str, Any] = {"type": next(iter(usual)) if len(usual) == 1 else sorted(usual)}
        if "string" in usual:
            schema |= form(Counter({text: n for text, n in self.values.items() if isinstance(text, str)}))
        if self.items and self.items.types:
            schema["items"] = self.items.schema()
        return schema | (self._object() if "object" in usual else {})

    def _object(self) -> dict[str, Any]:
        total = self.types["object"]
        counts = {key: inner.types.total() for key, inner in self.keys.items()}
        if len(counts) > KEYS and list(counts.values()).count(1) > len(counts) / 2:
            types = {kind for inner in self.keys.values() for kind in inner.types}
            return {"additionalProperties": {"type": sorted(types)}}
        required = [key for key, count in counts.items() if is_all(count, total)]
        # Where other keys come and go too, a rare one is one of these.
        closed = all(key in required or is_rare(count, total) for key, count in counts.items())
        properties = {key: self.keys[key].schema() for key in (required if closed else counts)}
        return {"properties": properties, "required": required, "additionalProperties": False}

    def _choices(self) -> list[Any]:
        """The values of a closed set; none if new ones may follow."""
        values, total = self.values, self.values.total()
        kinds = {*map(type, values)}
        if len(kinds) != 1 or self.copied >= COPIED * total or not is_closed(values):
            return []
        # Counts of things have a tail: the next one may be larger.
        is_tailed = int in kinds and min(values.values()) < max(FEW, RARE * total)
        return [] if is_tailed else sorted(without_mistakes(values))

    def derived(self, schema: Any, path: str = "") -> Iterator[str]:
        """The paths of values that answers work out instead of copying them."""
        scalars = sum(self.types[kind] for kind in SCALARS.values())
        if path and scalars >= FEW and self.copied < DERIVED * scalars and "enum" not in schema:
            yield path
        for key, inner in schema.get("properties", {}).items():
            if "." not in key:
                yield from self.keys[key].derived(inner, f"{path}.{key}" if path else key)
        if self.items and "items" in schema:
            yield from self.items.derived(schema["items"], path)


def is_rare(count: int, total: int) -> bool:
    return total >= MANY and count <= RARE * total


def is_all(count: int, total: int) -> bool:
    """Whether so many are all but mistakes."""
    return count == total or is_rare(total - count, total)


def is_closed(values: Counter[Any], most: int = CHOICES) -> bool:
    """Whether no other value will follow: the share of values seen once is about the chance of a new one."""
    total, once = values.total(), list(values.values()).count(1)
    return 0 < len(values) <= most and total >= REPEATS * len(values) and once <= RARE * total + 1


def without_mistakes(values: Counter[Any]) -> list[Any]:
    """The values without rare ones that are nearly another one, or far rarer than all others."""
    kept: list[Any] = []
    for value, count in values.most_common():
        texts = [str(other).casefold() for other in kept]
        is_near = difflib.get_close_matches(str(value).casefold(), texts, 1, NEAR)
        if not is_rare(count, values.total()) or not (is_near or count * GAP <= values[kept[-1]]):
            kept.append(value)
    return kept


def form(texts: Counter[str]) -> dict[str, str]:
    """The format or the pattern that nearly all texts have."""
    total = texts.total()
    for name in NAMES if total >= FEW else ():
        if is_all(sum(count for text, count in texts.items() if FORMATS.conforms(text, name)), total):
            return {"format": name}
    pattern = common_pattern(texts)
    return {"pattern": f"^{pattern}$"} if pattern else {}


def common_pattern(texts: Counter[str]) -> str:
    """The pattern of texts with digits that nearly all match, such as `[A-Z]{2}-[0-9]{5}`; "" if there is none."""
    for digits in ("[0-9]", "[0-9]+"):
        classes = {"0": digits, "A": "[A-Z]", "a": "[a-z]"}
        shapes: Counter[str] = Counter()
        for text, count in texts.items():
            for letter, members in classes.items():
                text = re.sub(members, letter, text)
            shapes[text] += count
        [(shape, count)] = shapes.most_common(1)
        if "0" in shape and len(texts) >= FEW and is_all(count, texts.total()):
            parts = ((match[1], len(match[0])) for match in re.finditer(r"(?s)(.)\1*", shape))
            escaped = (
                (classes.get(letter) or re.sub(r"[\\^$.|?*+()\[\]{}/]", r"\\\g<0>", letter), n) for letter, n in parts
            )
            return "".join(part + (f"{{{n}}}" if n > 1 else "") for part, n in escaped)
    return ""

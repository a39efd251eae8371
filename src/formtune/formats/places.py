"""The places of a document, and the parts of a JSON Schema (`$ref`, allOf, anyOf, then, ...) that describe each one."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice, product
from typing import Any

from formtune.formats.bounded import resolver, seconds_left
from formtune.formats.dialect import types

MAX_WAYS = 1000  # of combining alternatives at one place; each union multiplies them

_ANY = object()  # stands for any value
_CHILDREN = ("properties", "prefixItems", "items")

Subschema = dict[str, Any]
Ordered = tuple[int, bool, Any]  # number of undeclared keys, whether keys were moved, and the value in order


class Places:
    """The places of a validator's schema."""

    def __init__(self, validator: Any) -> None:
        self._validator, self._root = validator, validator.schema
        self._resolve = resolver(self._root)

    def paths(
        self, nodes: Sequence[Any], path: str = "", above: frozenset[int] = frozenset(), in_array: bool = False
    ) -> Iterator[tuple[str, list[Subschema], bool]]:
        """Every dotted path that may hold a value, some twice: its parts, and whether it is within an array."""
        parts = self._parts(nodes)
        new = [part for part in parts if id(part) not in above]
        names: dict[str, list[Any]] = {}
        for part in new:
            for name, node in part.get("properties", {}).items():
                names.setdefault(name, []).append(node)
        again = any("properties" in part for part in parts if id(part) in above)
        if not names or again or any(map(_is_value, parts)):
            yield path, parts, in_array
        inside = above | {id(part) for part in new}
        for name, inner in names.items():
            if "." not in name:  # such a key cannot be named by a dotted path
                yield from self.paths(inner, f"{path}.{name}" if path else name, inside, in_array)
        items = [item for part in new for item in (*part.get("prefixItems", ()), part.get("items")) if item is not None]
        if items:
            yield from self.paths(items, path, inside, True)

    def ordered(self, value: Any) -> Any:
        """The document with its keys in an order of the schema, its own if possible, then undeclared keys, sorted."""
        # Parts come from top to bottom, with one valid alternative of each union; llguidance writes the same order.
        return self._ordered(value, [self._root], {})[2]

    def _parts(self, nodes: Sequence[Any]) -> list[Subschema]:
        parts: dict[int, Subschema] = {}
        stack = [*reversed(nodes)]
        while stack:
            node = stack.pop()
            if isinstance(node, dict) and id(node) not in parts:
                parts[id(node)] = node
                stack += reversed([option for options in self._added(node, _ANY) for option in options or ()])
        return [*parts.values()]

    def _added(self, node: Subschema, value: Any) -> Iterator[Sequence[Any] | None]:
        """For each keyword that adds parts: the parts of which one applies to `value`; None for the node itself."""
        first = next((key for key in _CHILDREN if key in node), None)
        for key, inner in node.items():
            if key == first:
                yield None
            elif key == "$ref":
                yield [self._resolve(inner)]
            elif key == "allOf":
                yield from ([part] for part in inner)
            elif key in ("anyOf", "oneOf"):
                yield [option for option in inner if self._holds(option, value)] or inner
            elif key in ("then", "else"):
                holds = self._holds(node.get("if", True), value)  # `if` itself declares nothing
                if value is _ANY or holds == (key == "then"):
                    yield [inner]

    def _holds(self, node: Any, value: Any) -> bool:
        return value is _ANY or self._validator.evolve(schema=node).is_valid(value)

    def _choices(self, node: Any, value: Any) -> list[list[Subschema]]:
        """Each way to choose one alternative of every union: the parts that then apply."""
        seconds_left()
        if not isinstance(node, dict):
            return [[]]
        groups = [
            [[node]] if options is None else [way for option in options for way in self._choices(option, value)]
            for options in self._added(node, value)
        ]
        return [list(chain(*ways)) for ways in islice(product(*groups), MAX_WAYS)]

    def _ordered(self, value: Any, nodes: Sequence[Any], done: dict[Any, Ordered]) -> Ordered:
        if not value or not isinstance(value, dict | list):
            return 0, False, value
        place = (id(value), *map(id, nodes))  # alternatives that refer to themselves meet the same place again
        if place not in done:
            orders = [self._arranged(value, way, done) for way in self._choices({"allOf": nodes}, value)]
            done[place] = min(orders, key=lambda order: order[:2])
        return done[place]

    def _arranged(self, value: Any, way: list[Subschema], done: dict[Any, Ordered]) -> Ordered:
        if isinstance(value, list):
            items = [self._ordered(item, [_item(part, i) for part in way], done) for i, item in enumerate(value)]
            return sum(item[0] for item in items), any(item[1] for item in items), [item[2] for item in items]
        nodes: dict[str, list[Any]] = {}
        for part in way:
            for key, node in part.get("properties", {}).items():
                nodes.setdefault(key, []).append(node)
        others = sorted(value.keys() - nodes)
        inner = {
            key: self._ordered(value[key], nodes.get(key, ()), done)
            for key in (*(key for key in nodes if key in value), *others)
        }
        unknown = len(others) + sum(order[0] for order in inner.values())
        moved = list(inner) != list(value) or any(order[1] for order in inner.values())
        return unknown, moved, {key: order[2] for key, order in inner.items()}


def is_array(part: Subschema) -> bool:
    return "array" in types(part) or "items" in part or "prefixItems" in part


def is_label(part: Subschema) -> bool:
    """Whether a part lists the allowed values."""
    allowed = part.get("enum", [part.get("const")])
    return "boolean" in types(part) or any(isinstance(value, str | int | float) for value in allowed)


def _is_value(part: Subschema) -> bool:
    """Whether a part describes something other than an object and null."""
    return is_array(part) or is_label(part) or not {"object", "null"}.issuperset(types(part))


def _item(part: Subschema, index: int) -> Any:
    first = part.get("prefixItems", ())
    return first[index] if index < len(first) else part.get("items", True)

"""What a JSON Schema says of each place in a document, whichever keywords it is composed with.

A place is described by parts: the schema itself and all that `$ref`, allOf, anyOf, oneOf, then, else and
dependentSchemas add to it. The fields are those of all parts. The order of keys is that of the alternatives that the
document keeps, read from top to bottom; llguidance writes keys in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from itertools import chain, islice, product
from typing import Any, TypeVar

from formtune.formats.bounded import seconds_left, start_clock
from formtune.formats.schema import resolver, types

MAX_WAYS = 1000  # of combining alternatives at one place; each union multiplies them

_ANY = object()  # any value at all
_OWN = ("properties", "prefixItems", "items")
_BRANCHES = {"anyOf", "oneOf", "then", "else", "dependentSchemas"}

Part = dict[str, Any]
Way = tuple[Part, ...]  # parts that hold together, in the order in which they are written
Ordered = tuple[int, bool, Any]  # how many keys no part names, whether keys were moved, and the value in order
T = TypeVar("T")


def _once_per_node(method: Callable[[Any, Any], T]) -> Callable[[Any, Any], T]:
    """Keep a method's result by the identity of a node, which lives as long as the schema."""

    @wraps(method)
    def kept(self: Places, node: Any) -> T:
        key = method.__name__, id(node)
        if key not in self._results:
            self._results[key] = method(self, node)
        result: T = self._results[key]
        return result

    return kept


class Places:
    """The places of the schema by which `validator` judges documents."""

    def __init__(self, validator: Any) -> None:
        self._validator, self._root = validator, validator.schema
        self._referenced = cache(lambda reference: resolver(self._root).lookup(reference).contents)
        self._results: dict[tuple[str, int], Any] = {}

    def paths(
        self, nodes: Sequence[Any], path: str = "", above: frozenset[int] = frozenset(), in_array: bool = False
    ) -> Iterator[tuple[str, list[Part], bool]]:
        """Every dotted path that may hold a value: its parts, and whether it is within an array.

        A path can come more than once. One that leads back into itself ends where it does.
        """
        parts = self._parts(nodes)
        new = [part for part in parts if id(part) not in above]
        names = dict.fromkeys(name for part in new for name in part.get("properties", ()))
        again = any("properties" in part for part in parts if id(part) in above)
        if not names or again or any(map(_is_value, parts)):
            yield path, parts, in_array
        inside = above | {id(part) for part in new}
        for name in names:
            if "." not in name:  # such a key cannot be named by a dotted path
                inner = [part["properties"][name] for part in new if name in part.get("properties", ())]
                yield from self.paths(inner, f"{path}.{name}" if path else name, inside, in_array)
        items = [item for part in new for item in (*part.get("prefixItems", ()), part.get("items")) if item is not None]
        if items:
            yield from self.paths(items, path, inside, True)

    def ordered(self, value: Any, keep: bool) -> Any:
        """The document with its keys in the schema's order, and then those that it does not name, sorted.

        Where several alternatives fit, `keep` leaves an order that one of them gives; else the first one's is taken.
        Raises TimeoutError and RecursionError as a check does.
        """
        start_clock()
        return self._ordered(value, (self._root,), keep, {})[2]

    def _parts(self, nodes: Sequence[Any]) -> list[Part]:
        """Everything that may hold where `nodes` do, each part once."""
        parts: dict[int, Part] = {}
        stack = list(reversed(nodes))
        while stack:
            node = stack.pop()
            if isinstance(node, dict) and id(node) not in parts:
                parts[id(node)] = node
                stack += reversed([option for options in self._added(node, _ANY) for option in options or ()])
        return list(parts.values())

    def _added(self, node: Part, value: Any) -> Iterator[Sequence[Any] | None]:
        """For each keyword that adds parts: those of which one holds for `value`; None for the node's own."""
        own = next((key for key in _OWN if key in node), None)
        for key, inner in node.items():
            if key == own:
                yield None
            elif key in ("$ref", "$dynamicRef"):
                yield [self._referenced(inner)]
            elif key == "allOf":
                yield from ([part] for part in inner)
            elif key in ("anyOf", "oneOf"):
                yield self._fitting(inner, value)
            elif key in ("then", "else") and "if" in node:  # `if` itself declares nothing
                if value is _ANY or self._validator_of(node["if"]).is_valid(value) == (key == "then"):
                    yield [inner]
            elif key == "dependentSchemas":
                yield from ([part] for name, part in inner.items() if value is _ANY or name in value)
            elif key in ("enum", "const") and (literals := self._literals(node)):
                yield self._fitting(literals, value)

    @_once_per_node
    def _literals(self, node: Part) -> list[Part]:
        """The objects and arrays that a node gives to choose from, as schemas that name their keys."""
        return [_as_schema(literal) for literal in _allowed(node) if isinstance(literal, dict | list)]

    def _fitting(self, options: Sequence[Any], value: Any) -> Sequence[Any]:
        """The alternatives that order something and that the value keeps."""
        if value is _ANY:
            return options
        shaped = [option for option in options if self._is_shaped(option)]
        if len(shaped) > 1:
            shaped = [option for option in shaped if self._validator_of(option).is_valid(value)] or shaped
        return shaped or [True]

    @_once_per_node
    def _is_shaped(self, node: Any) -> bool:
        return any(key in part for part in self._parts([node]) for key in _OWN)

    @_once_per_node
    def _validator_of(self, node: Any) -> Any:
        return self._validator.evolve(schema=node)

    def _ways(self, node: Any, value: Any) -> Sequence[Way]:
        """Each way to take one alternative of every union: the parts that hold then."""
        return self._only_ways(node) or self._combined(node, value)

    @_once_per_node
    def _only_ways(self, node: Any) -> Sequence[Way]:
        """The ways of a node that leaves no choice, none for others."""
        if not isinstance(node, dict):
            return [()]
        choice = any(part.keys() & _BRANCHES or self._literals(part) for part in self._parts([node]))
        return [] if choice else self._combined(node, _ANY)

    def _combined(self, node: Part, value: Any) -> Sequence[Way]:
        return _product(
            [
                [(node,)] if options is None else [way for option in options for way in self._ways(option, value)]
                for options in self._added(node, value)
            ]
        )

    def _ordered(self, value: Any, nodes: Sequence[Any], keep: bool, done: dict[Any, Ordered]) -> Ordered:
        if not value or not isinstance(value, dict | list):
            return 0, False, value
        ways = _product([self._ways(node, value) for node in nodes])
        if len(ways) == 1:
            return self._arranged(value, ways[0], keep, done)
        seconds_left()
        place = (id(value), *map(id, nodes))  # alternatives that lead back to themselves meet the same place again
        if place not in done:
            orders = [self._arranged(value, way, keep, done) for way in ways]
            done[place] = min(orders, key=lambda order: order[: 1 + keep])
        return done[place]

    def _arranged(self, value: Any, way: Way, keep: bool, done: dict[Any, Ordered]) -> Ordered:
        if isinstance(value, list):
            items = [
                self._ordered(item, [_item(part, index) for part in way], keep, done)
                for index, item in enumerate(value)
            ]
            return sum(item[0] for item in items), any(item[1] for item in items), [item[2] for item in items]
        named: dict[str, list[Any]] = {}
        for part in way:
            for key, node in part.get("properties", {}).items():
                named.setdefault(key, []).append(node)
        others = sorted(value.keys() - named)
        unknown, moved, arranged = len(others), False, {}
        for key in (*(key for key in named if key in value), *others):
            more, shifted, arranged[key] = self._ordered(value[key], named.get(key, ()), keep, done)
            unknown, moved = unknown + more, moved or shifted
        return unknown, moved or list(arranged) != list(value), arranged


def is_array(part: Part) -> bool:
    """Whether a part describes an array."""
    return "array" in types(part) or "items" in part or "prefixItems" in part


def is_label(part: Part) -> bool:
    """Whether a part gives the values to choose from."""
    return "boolean" in types(part) or any(isinstance(literal, str | int | float) for literal in _allowed(part))


def _is_value(part: Part) -> bool:
    """Whether a part describes something other than an object and null."""
    return is_array(part) or is_label(part) or not {"object", "null"}.issuperset(types(part))


def _allowed(part: Part) -> list[Any]:
    return part.get("enum", [part["const"]] if "const" in part else [])


def _item(part: Part, index: int) -> Any:
    first = part.get("prefixItems", ())
    return first[index] if index < len(first) else part.get("items", True)


def _product(groups: Sequence[Sequence[Way]]) -> Sequence[Way]:
    return [tuple(chain(*ways)) for ways in islice(product(*groups), MAX_WAYS)]


def _as_schema(literal: Any) -> Part:
    if isinstance(literal, dict):
        inner = {key: {"const": value} for key, value in literal.items()}
        return {"type": "object", "properties": inner, "required": list(literal), "additionalProperties": False}
    items = [{"const": item} for item in literal]
    return {"type": "array", "prefixItems": items, "minItems": len(literal), "items": False}

"""What a JSON Schema says of each place in a document, whichever keywords it is composed with.

A place is described by parts: the schema that stands there and all that `$ref`, allOf, anyOf, oneOf, then, else and
dependentSchemas add to it. The fields are those of all parts. The order of keys is that of the alternatives that the
document keeps, read from top to bottom; llguidance writes keys in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice, product
from typing import Any

from formtune.formats.keywords import seconds_left, start_clock
from formtune.formats.schema import resolver, types

MAX_WAYS = 1000  # of combining alternatives at one place; each union multiplies them

_ANY = object()  # any value at all
_OWN = ("properties", "prefixItems", "items")
_CHOICES = {"anyOf", "oneOf", "then", "else", "dependentSchemas"}

Way = tuple[dict[str, Any], ...]  # parts that hold together, in the order in which they are written
Ordered = tuple[int, bool, Any]  # how many keys no part names, whether keys were moved, and the value in order


class Places:
    """The places of a schema.

    Args:
        validator: Judges documents by the schema.
    """

    def __init__(self, validator: Any) -> None:
        self._validator, self.root = validator, validator.schema
        self._lookup = resolver(self.root).lookup
        # By the identity of nodes, which live as long as the schema.
        self._targets: dict[str, Any] = {}
        self._validators: dict[int, Any] = {}
        self._spelled: dict[int, list[Any]] = {}
        self._shaped: dict[int, bool] = {}
        self._fixed: dict[int, Sequence[Way] | None] = {}
        self._named: dict[tuple[int, ...], dict[str, list[Any]]] = {}

    def paths(self) -> Iterator[tuple[str, list[dict[str, Any]], bool]]:
        """Every dotted path that may hold a value: its parts, and whether it lies within an array.

        A path can come more than once. One that leads back into itself ends where it does.
        """
        return self._paths([self.root])

    def ordered(self, value: Any, keep: bool) -> Any:
        """The document with its keys in the schema's order, those that it does not name at the end, sorted.

        Args:
            value: The document.
            keep: Where several alternatives fit: whether an order that one of them gives stays as it is, else the
                first one's is taken.

        Raises:
            TimeoutError: As for a check.
            RecursionError: As for a check.
        """
        start_clock()
        return self._ordered(value, (self.root,), keep, {})[2]

    def _paths(
        self, nodes: list[Any], path: str = "", above: frozenset[int] = frozenset(), listed: bool = False
    ) -> Iterator[tuple[str, list[dict[str, Any]], bool]]:
        parts = self._parts(nodes)
        new = [part for part in parts if id(part) not in above]
        names = dict.fromkeys(name for part in new for name in part.get("properties", ()))
        again = any("properties" in part for part in parts if id(part) in above)
        if not names or again or any(map(_is_value, parts)):
            yield path, parts, listed
        inside = above | {id(part) for part in new}
        for name in names:
            if "." not in name:  # such a key cannot be named by a dotted path
                inner = [part["properties"][name] for part in new if name in part.get("properties", ())]
                yield from self._paths(inner, f"{path}.{name}" if path else name, inside, listed)
        items = [one for part in new for key in ("prefixItems", "items") if key in part for one in _listed(part[key])]
        if items:
            yield from self._paths(items, path, inside, True)

    def _parts(self, nodes: Sequence[Any]) -> list[dict[str, Any]]:
        """Everything that may hold where `nodes` stand, each part once."""
        found: dict[int, dict[str, Any]] = {}
        todo = list(reversed(nodes))
        while todo:
            node = todo.pop()
            if isinstance(node, dict) and id(node) not in found:
                found[id(node)] = node
                added = [one for options in self._added(node, _ANY) for one in options or ()]
                todo += reversed(added)
        return list(found.values())

    def _added(self, node: dict[str, Any], value: Any) -> Iterator[Sequence[Any] | None]:
        """For each keyword that adds parts: those of which one holds for `value`; None where the node's own come."""
        own = next((key for key in _OWN if key in node), None)
        for key, inner in node.items():
            if key == own:
                yield None
            elif key in ("$ref", "$dynamicRef"):
                if inner not in self._targets:
                    self._targets[inner] = self._lookup(inner).contents
                yield [self._targets[inner]]
            elif key == "allOf":
                yield from ([one] for one in inner)
            elif key in ("anyOf", "oneOf"):
                yield self._fitting(inner, value)
            elif key in ("then", "else") and "if" in node:  # `if` itself declares nothing
                if value is _ANY or self._fits(node["if"], value) == (key == "then"):
                    yield [inner]
            elif key == "dependentSchemas":
                yield from ([one] for name, one in inner.items() if value is _ANY or name in value)
            elif key in ("enum", "const") and (spelled := self._literals(node)):
                yield self._fitting(spelled, value)

    def _literals(self, node: dict[str, Any]) -> list[Any]:
        """The objects and arrays that a node gives to choose from, as schemas that name their keys."""
        if id(node) not in self._spelled:
            self._spelled[id(node)] = [_spell(one) for one in _literals(node) if isinstance(one, dict | list)]
        return self._spelled[id(node)]

    def _fitting(self, options: Sequence[Any], value: Any) -> Sequence[Any]:
        """The alternatives that order something and that the value keeps."""
        if value is _ANY:
            return options
        shaped = [one for one in options if self._is_shaped(one)]
        if len(shaped) > 1:
            shaped = [one for one in shaped if self._fits(one, value)] or shaped
        return shaped or [True]

    def _is_shaped(self, node: Any) -> bool:
        if id(node) not in self._shaped:
            self._shaped[id(node)] = any(key in part for part in self._parts([node]) for key in _OWN)
        return self._shaped[id(node)]

    def _fits(self, node: Any, value: Any) -> bool:
        if id(node) not in self._validators:
            self._validators[id(node)] = self._validator.evolve(schema=node)
        return bool(self._validators[id(node)].is_valid(value))

    def _ways(self, node: Any, value: Any) -> Sequence[Way]:
        """Each way to take one alternative of every union: the parts that hold then."""
        if not isinstance(node, dict):
            return [()]
        if id(node) not in self._fixed:
            choice = any(part.keys() & _CHOICES or self._literals(part) for part in self._parts([node]))
            self._fixed[id(node)] = None if choice else self._combined(node, _ANY)
        return self._fixed[id(node)] or self._combined(node, value)

    def _combined(self, node: dict[str, Any], value: Any) -> Sequence[Way]:
        groups = [
            [(node,)] if options is None else [way for one in options for way in self._ways(one, value)]
            for options in self._added(node, value)
        ]
        return _product(groups)

    def _ordered(self, value: Any, nodes: Sequence[Any], keep: bool, done: dict[Any, Ordered]) -> Ordered:
        if not value or not isinstance(value, dict | list):
            return 0, False, value
        groups = [self._ways(node, value) for node in nodes]
        ways = groups[0] if len(groups) == 1 else _product(groups)
        if len(ways) == 1:
            return self._arranged(value, ways[0], keep, done)
        seconds_left()
        place = (id(value), *map(id, nodes))  # alternatives that lead back to themselves meet the same place again
        if place not in done:
            found = [self._arranged(value, way, keep, done) for way in ways]
            done[place] = min(found, key=lambda one: one[: 1 + keep])
        return done[place]

    def _arranged(self, value: Any, way: Way, keep: bool, done: dict[Any, Ordered]) -> Ordered:
        if isinstance(value, list):
            items = [
                self._ordered(item, [node for part in way for node in _item(part, index)], keep, done)
                for index, item in enumerate(value)
            ]
            return sum(one[0] for one in items), any(one[1] for one in items), [one[2] for one in items]
        named = self._names(way)
        others = sorted(key for key in value if key not in named)
        unknown, moved, found = len(others), False, {}
        for key in (*(key for key in named if key in value), *others):
            more, shifted, found[key] = self._ordered(value[key], named.get(key, ()), keep, done)
            unknown, moved = unknown + more, moved or shifted
        return unknown, moved or list(found) != list(value), found

    def _names(self, way: Way) -> dict[str, list[Any]]:
        """The keys that parts name, in order, each with its schemas."""
        ids = tuple(map(id, way))
        if ids not in self._named:
            found: dict[str, list[Any]] = {}
            for part in way:
                for key, inner in part.get("properties", {}).items():
                    found.setdefault(key, []).append(inner)
            self._named[ids] = found
        return self._named[ids]


def is_array(part: dict[str, Any]) -> bool:
    """Whether a part describes an array."""
    return "array" in types(part) or "items" in part or "prefixItems" in part


def is_label(part: dict[str, Any]) -> bool:
    """Whether a part gives the values to choose from."""
    return "boolean" in types(part) or any(isinstance(one, str | int | float) for one in _literals(part))


def _is_value(part: dict[str, Any]) -> bool:
    """Whether a part describes something other than an object and null."""
    return is_array(part) or is_label(part) or not {"object", "null"}.issuperset(types(part))


def _literals(part: dict[str, Any]) -> list[Any]:
    return part.get("enum", [part["const"]] if "const" in part else [])


def _listed(inner: Any) -> list[Any]:
    return inner if isinstance(inner, list) else [inner]


def _item(part: dict[str, Any], index: int) -> list[Any]:
    first = part.get("prefixItems", ())
    return [first[index]] if index < len(first) else [part["items"]] if "items" in part else []


def _product(groups: Sequence[Sequence[Way]]) -> Sequence[Way]:
    return [tuple(chain(*ways)) for ways in islice(product(*groups), MAX_WAYS)]


def _spell(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        inner = {key: {"const": one} for key, one in value.items()}
        return {"type": "object", "properties": inner, "required": list(value), "additionalProperties": False}
    items = [{"const": one} for one in value]
    return {"type": "array", "prefixItems": items, "minItems": len(value), "items": False}

"""What a JSON Schema says of each place in a document, however it is composed.

Several parts can describe one place: the schema itself, and what `$ref`, allOf, anyOf, oneOf, then, else and
dependentSchemas add to it. Keys come in the order of the parts, read from top to bottom; llguidance writes them so too.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from formtune.formats.bounded import resolver, seconds_left
from formtune.formats.dialect import types

_ANY = object()  # any value at all
_OWN = ("properties", "prefixItems", "items")

Part = dict[str, Any]


class Places:
    """The places of the schema by which `validator` judges documents."""

    def __init__(self, validator: Any) -> None:
        self._validator, self._root = validator, validator.schema
        self._resolve = resolver(self._root)

    def paths(
        self, nodes: Sequence[Any], path: str = "", above: frozenset[int] = frozenset(), in_array: bool = False
    ) -> Iterator[tuple[str, list[Part], bool]]:
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

    def _parts(self, nodes: Sequence[Any]) -> list[Part]:
        parts: dict[int, Part] = {}
        stack = [*reversed(nodes)]
        while stack:
            node = stack.pop()
            if isinstance(node, dict) and id(node) not in parts:
                parts[id(node)] = node
                stack += reversed([option for options in self._added(node, _ANY) for option in options or ()])
        return [*parts.values()]

    def _added(self, node: Part, value: Any) -> Iterator[Sequence[Any] | None]:
        """For each keyword that adds parts: those of which one holds for `value`; None for the node's own."""
        own = next((key for key in _OWN if key in node), None)
        for key, inner in node.items():
            if key == own:
                yield None
            elif key == "$ref":
                yield [self._resolve(inner)]
            elif key == "allOf":
                yield from ([part] for part in inner)
            elif key in ("anyOf", "oneOf"):
                yield [option for option in inner if self._holds(option, value)] or inner
            elif key in ("then", "else"):  # `if` itself declares nothing
                if value is _ANY or self._holds(node.get("if", True), value) == (key == "then"):
                    yield [inner]
            elif key == "dependentSchemas":
                yield from ([part] for name, part in inner.items() if value is _ANY or name in value)

    def _holds(self, node: Any, value: Any) -> bool:
        return value is _ANY or self._validator.evolve(schema=node).is_valid(value)

    def _chosen(self, node: Any, value: Any) -> list[Part]:
        """The parts that hold for a value, with one alternative of each union: that whose keys fit best."""
        seconds_left()
        parts: list[Part] = []
        for options in self._added(node, value) if isinstance(node, dict) else ():
            if options is None:
                parts.append(node)
            else:
                parts += min((self._chosen(option, value) for option in options), key=lambda way: _misfit(way, value))
        return parts

    def ordered(self, value: Any, nodes: Sequence[Any] | None = None) -> Any:
        """The document with its keys in an order of the schema, its own if possible, then the others, sorted."""
        if not isinstance(value, dict | list):
            return value
        parts = [part for node in ([self._root] if nodes is None else nodes) for part in self._chosen(node, value)]
        if isinstance(value, list):
            return [self.ordered(item, [_item(part, i) for part in parts]) for i, item in enumerate(value)]
        inner: dict[str, list[Any]] = {}
        for part in parts:
            for key, node in part.get("properties", {}).items():
                inner.setdefault(key, []).append(node)
        keys = [*(key for key in inner if key in value), *sorted(value.keys() - inner)]
        return {key: self.ordered(value[key], inner.get(key, ())) for key in keys}


def _misfit(parts: Iterable[Part], value: Any) -> tuple[int, bool]:
    """How many keys of an object no part names, and whether its other keys are in another order than the parts'."""
    if not isinstance(value, dict):
        return 0, False
    names = dict.fromkeys(key for part in parts for key in part.get("properties", ()))
    return len(value.keys() - names), [key for key in value if key in names] != [key for key in names if key in value]


def is_array(part: Part) -> bool:
    return "array" in types(part) or "items" in part or "prefixItems" in part


def is_label(part: Part) -> bool:
    """Whether a part gives the values to choose from."""
    allowed = part.get("enum", [part.get("const")])
    return "boolean" in types(part) or any(isinstance(value, str | int | float) for value in allowed)


def _is_value(part: Part) -> bool:
    """Whether a part describes something other than an object and null."""
    return is_array(part) or is_label(part) or not {"object", "null"}.issuperset(types(part))


def _item(part: Part, index: int) -> Any:
    first = part.get("prefixItems", ())
    return first[index] if index < len(first) else part.get("items", True)

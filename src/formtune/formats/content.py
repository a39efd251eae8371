"""Compares two documents value by value, types included: 1, 1.0, true and "1" are four different values."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Key of the object ("" for the root) -> one of its keys -> the next key -> count.
Orders = dict[str, dict[str, dict[str, int]]]

MAX_NAMES = 1000  # different keys of the objects at one key: more are data, not names

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Comparison:
    """A document compared with the target; nulls are not counted as values."""

    equal: bool = False  # whether they are the same
    matched: int = 0  # values that both have at the same path
    values: int = 0  # values of the document and values of the target
    fields: tuple[bool, ...] = ()  # for each field of the format, whether both agree on it
    difference: str = ""  # one line on the first difference, "" if there is none


def compare(value: Any, target: Any, is_document: bool, fields: tuple[str, ...], sets: frozenset[str]) -> Comparison:
    """Compare a document with the target; without a document nothing is right, not even absent values."""
    got, expected = dict(leaves(value, sets)), dict(leaves(target, sets))
    missing, extra = [p for p in expected if p not in got], [p for p in got if p not in expected]
    mismatched = [p for p in expected if p in got and _exact(got[p][0]) != _exact(expected[p][0])]
    equal = is_document and typed(value, sets) == typed(target, sets)
    difference = "" if equal else "nulls, empty values or types differ" if is_document else "no document"
    for path in [*missing, *extra, *mismatched][:1]:
        shown = (repr(values[path][0])[:60] if path in values else "nothing" for values in (got, expected))
        difference = f"{path or '$'}: {' instead of '.join(shown)}"
    return Comparison(
        equal=equal,
        matched=len(expected) - len(missing) - len(mismatched),
        values=len(got) + len(expected),
        fields=tuple(is_document and typed(_at(value, f), sets, f) == typed(_at(target, f), sets, f) for f in fields),
        difference=difference,
    )


def _exact(value: Any) -> Any:
    return type(value).__name__, value


def typed(value: Any, sets: frozenset[str] = frozenset(), path: str = "", scalar: Callable[[Any], Any] = _exact) -> Any:
    """A hashable form; two are equal only if values and types are. Arrays in `sets` lose their order."""
    if isinstance(value, dict):
        items = ((k, typed(v, sets, f"{path}.{k}" if path else k, scalar)) for k, v in value.items())
        return "object", frozenset(items)
    if isinstance(value, list):
        inner = [typed(v, sets, path, scalar) for v in value]
        return "array", frozenset(Counter(inner).items()) if path in sets else tuple(inner)
    return scalar(value)


def leaves(
    value: Any, sets: frozenset[str] = frozenset(), path: str = "", schema_path: str = ""
) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Every value that is not null: its path (with the value in place of the index in a set), and its schema path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, sets, *(f"{above}.{key}" if above else key for above in (path, schema_path)))
    elif isinstance(value, list):
        seen: Counter[Any] = Counter()
        for index, inner in enumerate(value):
            mark: Any = index
            if schema_path in sets:
                mark = json.dumps(inner, sort_keys=True, ensure_ascii=False, default=str)  # in any order of its keys
                seen[mark] += 1
                mark = f"{mark}#{seen[mark]}"
            yield from leaves(inner, sets, f"{path}[{mark}]", schema_path)
    elif value is not None:
        yield path, (value, schema_path)


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        value = value[key]
    return value


def learn_orders(values: Iterable[Any]) -> Orders:
    """How often each key follows another, by the key of their object."""
    orders: Orders = {}
    stack = [("", value) for value in values]
    while stack:
        parent_key, value = stack.pop()
        if isinstance(value, list):
            stack += [(parent_key, item) for item in value]
        elif isinstance(value, dict):
            stack += value.items()
            keys, counts = list(value), orders.setdefault(parent_key, {})
            for key, following in pairwise(keys):
                after = counts.setdefault(key, {})
                after[following] = after.get(following, 0) + 1
    return {parent_key: counts for parent_key, counts in orders.items() if len(counts) <= MAX_NAMES}

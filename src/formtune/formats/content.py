"""Compare two documents value by value, types included: 1, 1.0, true and "1" are four different values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a document compares with the wanted one.

    Args:
        equal: Whether they are the same.
        matched: Values that both have at the same path; nulls are not counted, here and below.
        predicted: Values of the document.
        gold: Values of the wanted document.
        fields: For each field of the contract, whether both agree on it.
        omitted: Whether a wanted value is null or absent.
        invented: Whether there is a value where none is wanted.
        ungrounded: Whether a wrong value does not even occur in the input.
        difference: Subkind and one line on the first difference, None if there is none.
    """

    equal: bool
    matched: int
    predicted: int
    gold: int
    fields: tuple[bool, ...]
    omitted: bool
    invented: bool
    ungrounded: bool
    difference: tuple[str, str] | None


def compare(
    value: Any,
    gold: Any,
    source: str | None,
    fields: tuple[str, ...],
    sets: frozenset[str],
    derived: frozenset[str],
) -> Comparison:
    """Compare a document (None where there is none) with the wanted one.

    Args:
        value: The document, plain data.
        gold: The wanted document.
        source: The input that values should come from, None to leave `ungrounded` out.
        fields: Dotted paths to report one by one.
        sets: Paths of arrays whose order does not matter.
        derived: Paths of values that need not occur in the input.
    """
    got, wanted = dict(_leaves(value, sets)), dict(_leaves(gold, sets))
    omitted = [p for p in wanted if p not in got]
    invented = [p for p in got if p not in wanted]
    mismatched = [p for p in wanted if p in got and not _same(got[p], wanted[p])]
    equal = not (omitted or invented or mismatched) and typed(value, sets) == typed(gold, sets)
    difference = None
    for subkind, paths in (("omitted", omitted), ("invented", invented), ("mismatch", mismatched)):
        if paths and difference is None:
            path = paths[0]
            difference = subkind, f"{path or '$'}: {_show(got, path)} instead of {_show(wanted, path)}"
    if difference is None and not equal:
        difference = "mismatch", "nulls, empty values or types differ"
    text = None if source is None else _normal(source)
    return Comparison(
        equal=equal,
        matched=sum(p in got and _same(got[p], wanted[p]) for p in wanted),
        predicted=len(got),
        gold=len(wanted),
        fields=tuple(typed(_at(value, f), sets, f) == typed(_at(gold, f), sets, f) for f in fields),
        omitted=bool(omitted),
        invented=bool(invented),
        ungrounded=text is not None
        and any(_is_ungrounded(got[p], text) for p in (*invented, *mismatched) if _plain(p) not in derived),
        difference=difference,
    )


def typed(value: Any, sets: frozenset[str] = frozenset(), path: str = "") -> Any:
    """A hashable form in which values are equal only if their types are; arrays in `sets` lose their order."""
    if isinstance(value, dict):
        return "object", frozenset((k, typed(v, sets, f"{path}.{k}" if path else k)) for k, v in value.items())
    if isinstance(value, list):
        items = [typed(v, sets, path) for v in value]
        return "array", frozenset(Counter(items).items()) if path in sets else tuple(items)
    return type(value).__name__, value


def _leaves(value: Any, sets: frozenset[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not null with its path; in a set, the value itself and its count stand for the index."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, sets, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        seen: Counter[Any] = Counter()
        for index, inner in enumerate(value):
            mark: Any = index
            if path in sets:
                seen[typed(inner)] += 1
                mark = f"{inner!r}#{seen[typed(inner)]}"
            yield from _leaves(inner, sets, f"{path}[{mark}]")
    elif value is not None:
        yield path, value


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return _MISSING if path else value
        value = value[key]
    return value


def _plain(path: str) -> str:
    return re.sub(r"\[.*?\]", "", path)


def _show(values: dict[str, Any], path: str) -> str:
    return repr(values[path])[:60] if path in values else "nothing"


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _is_ungrounded(value: Any, source: str) -> bool:
    return not isinstance(value, bool) and _normal(str(value)) not in source

"""Compare two documents value by value, types included: 1, 1.0, true and "1" are four different values."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
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
    found: bool,
    source: str | None,
    fields: tuple[str, ...],
    sets: frozenset[str],
    derived: frozenset[str],
) -> Comparison:
    """Compare a document with the wanted one.

    Args:
        value: The document, plain data.
        gold: The wanted document.
        found: False where there is no document: then nothing is right, not even what should be null or absent.
        source: The input that values should come from, None to leave `ungrounded` out.
        fields: Dotted paths to report one by one.
        sets: Paths of arrays whose order does not matter.
        derived: Paths of values that need not occur in the input.
    """
    got, wanted = dict(leaves(value, sets)), dict(leaves(gold, sets))
    omitted = [p for p in wanted if p not in got]
    invented = [p for p in got if p not in wanted]
    mismatched = [p for p in wanted if p in got and not _same(got[p][0], wanted[p][0])]
    equal = found and typed(value, sets) == typed(gold, sets)
    difference = None
    for subkind, paths in (("omitted", omitted), ("invented", invented), ("mismatch", mismatched)):
        if paths and difference is None:
            path = paths[0]
            difference = subkind, f"{path or '$'}: {_show(got, path)} instead of {_show(wanted, path)}"
    if difference is None and not equal:
        difference = "mismatch", "nulls, empty values or types differ" if found else "there is no document"
    wrong = [value for value, path in (got[p] for p in (*invented, *mismatched)) if path not in derived]
    return Comparison(
        equal=equal,
        matched=len(wanted) - len(omitted) - len(mismatched),
        predicted=len(got),
        gold=len(wanted),
        fields=tuple(found and typed(_at(value, f), sets, f) == typed(_at(gold, f), sets, f) for f in fields),
        omitted=bool(omitted),
        invented=bool(invented),
        ungrounded=bool(wrong) and source is not None and not all(map(Words(source).hold, wrong)),
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


def leaves(
    value: Any, sets: frozenset[str] = frozenset(), path: str = "", plain: str = ""
) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Every value that is not null: its path, and the value with its path in the schema (without indices).

    In a set, the value itself and its count stand for the index.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            dot = "." if path else ""
            yield from leaves(inner, sets, f"{path}{dot}{key}", f"{plain}{dot}{key}")
    elif isinstance(value, list):
        seen: Counter[Any] = Counter()
        for index, inner in enumerate(value):
            mark: Any = index
            if plain in sets:
                seen[typed(inner)] += 1
                mark = f"{inner!r}#{seen[typed(inner)]}"
            yield from leaves(inner, sets, f"{path}[{mark}]", plain)
    elif value is not None:
        yield path, (value, plain)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _show(values: dict[str, tuple[Any, str]], path: str) -> str:
    return repr(values[path][0])[:60] if path in values else "nothing"


class Words:
    """What a text says, to look values up in.

    Args:
        text: The text.
    """

    def __init__(self, text: str) -> None:
        self._words, self._numbers = _words(text), _numbers(text)

    def hold(self, value: Any) -> bool:
        """Whether the text holds a value: texts as their words, numbers by what they amount to, all else always."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return abs(value) in self._numbers
        return not isinstance(value, str) or _words(value) in self._words


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _numbers(text: str) -> set[float]:
    """The numbers in a text, read with a comma both between thousands and before decimals (1,200.50 and 1.200,50)."""
    found = set()
    for token in re.findall(r"\d+(?:[.,]\d+)*", text, re.ASCII):
        for thousands, point in ((",", "."), (".", ",")):
            with suppress(ValueError):
                found.add(float(token.replace(thousands, "").replace(point, ".")))
    return found

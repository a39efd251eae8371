"""Styles: the different ways in which answers write the same thing, field by field.

A format may leave open how a date is written, or whether an empty field is null or absent. A model trained on a
mixture writes a mixture, so this module finds the less frequent styles and their rows. It ignores values that answers
copy from their inputs. Where the row's own system prompt spells a value, that spelling is the right one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from formtune.data.cleaning import Example

MOST = 0.8  # share of a field's values that must be dates (or numbers) for it to be a field of dates
COPIED = 0.95  # share of a field's values that must be in their inputs for it to be a copied one
ALWAYS = 0.95  # share of the objects that must have a key for its place to be a style
FORMS = 50  # different values at most for a field whose casing is looked at: a category, not free text

_ESCAPE = re.compile(r"\\u[0-9a-fA-F]{4}|\\.")
_SHORT = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LAYOUT = '{}[]:," \\\n\r\t'  # unescaped, these are never inside a string
_LETTERS = "é"  # stands for all characters beyond ASCII that can be seen
_PROMPTED = "the spelling of the row's system prompt"

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATES = {
    "YYYY-MM-DD": r"\d{4}-\d\d-\d\d",
    "YYYY-MM-DDThh:mm": r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d.*",
    "YYYY/MM/DD": r"\d{4}/\d\d?/\d\d?",
    "D/M/YYYY": r"\d\d?/\d\d?/(?:\d{4}|\d\d)",
    "D.M.YYYY": r"\d\d?\.\d\d?\.(?:\d{4}|\d\d)",
    "D-M-YYYY": r"\d\d?-\d\d?-(?:\d{4}|\d\d)",
    "D Month YYYY": rf"\d\d?(?:st|nd|rd|th)?\.? (?:of )?{_MONTH},? \d{{4}}",
    "Month D, YYYY": rf"{_MONTH} \d\d?(?:st|nd|rd|th)?,? \d{{4}}",
}
_NUMBERS = {
    "1234.5": r"[+-]?\d+(?:\.\d+)?",
    "1,234.5": r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?",
    "1.234,5": r"[+-]?(?:\d{1,3}(?:\.\d{3})+(?:,\d+)?|\d+,\d+)",
    "with a unit": r"(?:[^\w\s.,+-]|[A-Za-z]{1,4})? ?[+-]?\d[\d.,]*(?: ?(?:[^\w\s.,]|[A-Za-z]{1,4}))?",
}


@dataclass(frozen=True, slots=True)
class Mixture:
    """One thing that answers write in several ways."""

    path: str  # dotted path of the field, "" for the whole answer
    what: str  # layout, escapes, key order, empty, date, number or case
    forms: dict[str, int]  # how many rows write it in each way, the most frequent first
    minority: dict[str, list[str]]  # for each other way, the places of the rows that use it


def mixtures(examples: Sequence[Example], fields: Sequence[str] = ()) -> list[Mixture]:
    """What the answers of judged rows write in more than one way.

    `fields` are the dotted paths that the format declares; in these, null and absent are two ways of saying nothing.
    """
    result = [
        _mixture("", "layout", [(form, e.where) for e in examples if (form := _layout(e.target, e.value))]),
        *_escapes(examples),
        *_key_orders(examples),
        *_empties(examples, fields),
    ]
    by_path: dict[str, list[tuple[Any, str, bool, str]]] = defaultdict(list)
    for example in examples:
        text, system = example.input, example.system
        for path, value in _scalars(example.value):
            copied = isinstance(value, str) and value in text
            by_path[path].append((value, example.where, copied, system))
    for path, values in by_path.items():
        result += _values(path, values)
    return [mixture for mixture in result if mixture is not None]


def _mixture(path: str, what: str, seen: Sequence[tuple[str, str]]) -> Mixture | None:
    """The mixture of (form, place) pairs, None if all have the same form."""
    forms = Counter(form for form, _ in seen)
    if len(forms) < 2:
        return None
    usual = forms.most_common(1)[0][0]
    minority: dict[str, list[str]] = defaultdict(list)
    for form, where in seen:
        if form != usual and where not in minority[form][-1:]:
            minority[form].append(where)
    return Mixture(path, what, dict(forms.most_common()), dict(minority))


def _layout(text: str, value: Any) -> str | None:
    """How a JSON object or array is laid out, None where it has no separators to tell."""
    if not isinstance(value, dict | list):
        return "with a line feed at its end" if text.endswith("\n") else "without a line feed at its end"
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    end = " and a line feed at its end" if text.endswith("\n") else ""
    if "\n" in outside.strip():
        return f"over several lines{end}"
    if re.search(r"[:,] ", outside):
        return f"with spaces{end}"
    return f"without spaces{end}" if re.search(r"[:,]", outside) else None


def _escapes(examples: Sequence[Example]) -> Iterator[Mixture | None]:
    """Characters that JSON answers write as they are in some rows and escaped in others."""
    texts = [
        (e.target, e.where) for e in examples if isinstance(e.value, dict | list) and e.target.lstrip()[:1] in "{["
    ]
    escaped = [_escaped(text) if "\\" in text else {} for text, _ in texts]
    # Short escapes other than that of "/" are required, so they are a style only if some row writes a longer one.
    kinds = {
        kind: None for ways in escaped for kind, forms in ways.items() if kind == "/" or any("u" in f for f in forms)
    }
    for kind in kinds:
        seen = []
        for (text, where), ways in zip(texts, escaped, strict=True):
            forms = set(ways.get(kind, ()))
            bare = _ESCAPE.sub("", text) if ways else text
            if _letters(bare) if kind == _LETTERS else len(kind) == 1 and kind not in _LAYOUT and kind in bare:
                forms.add(kind)
            seen += [(" and ".join(sorted(forms)), where)] if forms else []
        yield _mixture("", "escapes", seen)


def _escaped(text: str) -> dict[str, set[str]]:
    """How a JSON text escapes each character, letters beyond ASCII as one."""
    found: dict[str, set[str]] = defaultdict(set)
    for escape in _ESCAPE.findall(text):
        kind, form = _SHORT.get(escape[1], escape[1]), escape.lower()
        if len(escape) > 2:
            kind = chr(int(escape[2:], 16))
        if _letters(kind) or "\ud800" <= kind <= "\udfff":
            kind, form = _LETTERS, r"\u00e9"
        found[kind].add(form)
        digits = escape[2:]
        if digits.lower() != digits.upper():
            found["hex digits"].add(r"\u00e9" if digits == digits.lower() else r"\u00E9")
    return found


def _letters(text: str) -> bool:
    """Whether a text holds a character beyond ASCII that can be seen."""
    return not text.isascii() and any(c > "\x7f" and c.isprintable() for c in text)


def _objects(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object with its path."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from _objects(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner, path)


def _scalars(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every text and number with its path, indices left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _scalars(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _scalars(inner, path)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield path, value


def _key_orders(examples: Sequence[Example]) -> Iterator[Mixture | None]:
    """Objects with another order of keys than most: each pair of keys votes on which one comes first."""
    orders: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
    for example in examples:
        for path, value in _objects(example.value):
            orders[path].append((tuple(value), example.where))
    for path, seen in orders.items():
        tuples = Counter(keys for keys, _ in seen)
        if len(tuples) < 2:
            continue
        usual: Counter[str] = Counter()
        for keys, count in tuples.items():
            usual.update(dict.fromkeys(keys, count))
        # Keys that only some objects have are data, in the order in which the input names them.
        always = {key for key, count in usual.items() if count >= ALWAYS * len(seen)}
        before: Counter[tuple[str, str]] = Counter()
        for keys, count in tuples.items():
            for pair in combinations([key for key in keys if key in always], 2):
                before[pair] += count
        labels = {}
        for keys in tuples:
            turned = [p for p in combinations([k for k in keys if k in always], 2) if before[p] < before[p[::-1]]]
            labels[keys] = f"{turned[0][0]} before {turned[0][1]}" if turned else "the usual order"
        yield _mixture(path, "key order", [(labels[keys], where) for keys, where in seen])


def _empties(examples: Sequence[Example], fields: Sequence[str]) -> Iterator[Mixture | None]:
    """Fields for which some rows write null, some an empty text and some leave the key out."""
    for path in fields:
        *parents, key = path.split(".")
        holders, beside, seen = [], set[str](), []
        for example in examples:
            holder = example.value
            for parent in parents:
                holder = holder.get(parent) if isinstance(holder, dict) else None
            if isinstance(holder, dict):
                holders.append((holder, example.where))
                beside |= holder.keys() if key in holder else set()
        for holder, where in holders:
            value = holder.get(key, ...)
            form = "absent" if value is ... else "null" if value is None else "empty text" if value == "" else ""
            # An object with keys that never come with this one is of another alternative, which may not have it.
            if form and (key in holder or holder.keys() <= beside):
                seen.append((form, where))
        yield _mixture(path, "empty", seen)


def _values(path: str, values: list[tuple[Any, str, bool, str]]) -> Iterator[Mixture | None]:
    integral = [(v, where) for v, where, *_ in values if not isinstance(v, str) and v == v // 1]
    yield _mixture(path, "number", [("5.0" if isinstance(v, float) else "5", where) for v, where in integral])
    texts = [entry for entry in values if isinstance(entry[0], str)]
    if not texts or sum(copied for _, _, copied, _ in texts) >= COPIED * len(texts):
        return
    for what, patterns in (("date", _DATES), ("number", _NUMBERS)):
        forms = [(form, *entry) for entry in texts if (form := _form(entry[0], patterns))]
        if len(forms) >= MOST * len(texts):
            yield _mixture(path, what, [(form, at) for form, value, at, _, said in forms if not _named(value, said)])
            return
    cases: dict[str, Counter[str]] = defaultdict(Counter)
    for value, *_ in texts:
        cases[value.casefold()][value] += 1
    if len(cases) <= FORMS:
        for variants in cases.values():
            if len(variants) > 1:
                yield from _case(path, [(v, where, said) for v, where, _, said in texts if v in variants], variants)


def _case(path: str, seen: list[tuple[str, str, str]], variants: Iterable[str]) -> Iterator[Mixture | None]:
    """Values that differ in case alone: where the system prompt has one of them, whether the row keeps to it."""
    free, held = [], []
    for value, where, system in seen:
        named = [variant for variant in variants if _named(variant, system)]
        if len(named) == 1:
            held.append((_PROMPTED if value == named[0] else value, where))
        else:
            free.append((value, where))
    yield _mixture(path, "case", free)
    yield _mixture(path, "case", held)


def _named(value: str, system: str) -> bool:
    """Whether a system prompt holds a value, and not as a part of a word."""
    return value in system and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", system) is not None


def _form(text: str, patterns: dict[str, str]) -> str | None:
    return next((name for name, pattern in patterns.items() if re.fullmatch(pattern, text, re.I)), None)

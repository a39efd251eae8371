"""Styles: what answers write in several ways. A model trained on a mixture writes a mixture."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formtune.data.cleaning import Example

MOST = 0.8  # share of a field's values that must be dates (or numbers) for it to be a field of dates
COPIED = 0.95  # share of a field's values that must be in their inputs for it to be a copied one
ALWAYS = 0.95  # share of the objects that must have a key for its position to be a style
SPELLINGS = 50  # different values at most for a field whose case is compared: a category, not free text

_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')  # in JSON
_ESCAPE = re.compile(r'\\u[0-9a-fA-F]{4}|\\["\\/bfnrt]')

Entry = tuple[Any, Example]  # a value and the row it is in
Forms = list[tuple[str, Example]]  # rows, each with the way in which it writes a thing

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


def mixtures(examples: Sequence[Example], fields: Mapping[str | None, Sequence[str]]) -> list[Mixture]:
    """What the answers of judged rows write in more than one way; only rows of one schema are compared field by field.

    `fields` are the dotted paths that each schema declares; in these, null and absent are two ways of saying nothing.
    """
    answers = [e for e in examples if isinstance(e.value, dict | list) and e.target[e.reasoning :][:1] in "{["]
    layouts = [(form, e) for e in answers if (form := _layout(e.target[e.reasoning :]))]
    compared = [("", "layout", layouts), *(("", "escapes", forms) for forms in _escapes(answers))]
    same_schema: dict[str | None, list[Example]] = defaultdict(list)
    for example in examples:
        same_schema[example.schema].append(example)
    for schema, rows in same_schema.items():
        values: dict[str, list[Entry]] = defaultdict(list)
        for example in rows:
            for path, value in _walk(example.value):
                values[path].append((value, example))
        objects = {path: [(v, e) for v, e in entries if isinstance(v, dict)] for path, entries in values.items()}
        compared += [(path, "key order", _key_orders(entries)) for path, entries in objects.items()]
        compared += [(path, "empty", _empties(path, objects)) for path in fields.get(schema, ())]
        compared += [(path, *ways) for path, entries in values.items() for ways in _values(entries)]
    return [mixture for path, what, forms in compared if (mixture := _mixture(path, what, forms))]


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within a document with its path, indices left out."""
    if isinstance(value, list):
        for inner in value:
            yield from _walk(inner, path)
        return
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}" if path else key)


def _mixture(path: str, what: str, forms: Forms) -> Mixture | None:
    """The mixture of the forms that examples use, None if all use the same."""
    counts = dict(Counter(form for form, _ in forms).most_common())
    minority: dict[str, list[str]] = defaultdict(list)
    for form, example in forms:
        usual = form == next(iter(counts)) or (what == "case" and _in_system(form, example))
        if not usual and example.where not in minority[form][-1:]:
            minority[form].append(example.where)
    return Mixture(path, what, counts, dict(minority)) if minority else None


def _layout(text: str) -> str | None:
    """How JSON is laid out, None where it has no separators to tell."""
    outside = _STRING.sub("", text)
    if "\n" in outside:
        return "over several lines"
    if re.search(r"[:,] ", outside):
        return "with spaces"
    return "without spaces" if re.search(r"[:,]", outside) else None


def _escapes(answers: Sequence[Example]) -> Iterator[Forms]:
    """Characters that some JSON answers write as they are and others escape; letters beyond ASCII count as one."""
    if not any("\\" in example.target for example in answers):
        return
    forms: dict[str, Forms] = defaultdict(list)
    for example in answers:
        written: dict[str, set[str]] = defaultdict(set)
        text = "".join(_STRING.findall(example.target[example.reasoning :]))
        for form in sorted({*_ESCAPE.findall(text), *_ESCAPE.sub("", text)}):
            character = json.loads(f'"{form}"') if len(form) > 1 else form
            if character > "\x7f" and (character.isprintable() or "\ud800" <= character <= "\udfff"):
                character, form = "é", "é" if character == form else r"\u00e9"
            written[character].add(form if len(form) == 1 else form.lower())
        for character, ways in written.items():
            forms[character].append((" and ".join(sorted(ways)), example))
    yield from forms.values()


def _key_orders(objects: Sequence[Entry]) -> Forms:
    counts = Counter(key for holder, _ in objects for key in holder)
    # Keys that only some objects have are data, in the order in which the input names them.
    always = {key for key, count in counts.items() if count >= ALWAYS * len(objects)}
    orders = [([key for key in holder if key in always], e) for holder, e in objects if always <= holder.keys()]
    usual = Counter(tuple(keys) for keys, _ in orders).most_common(1)[0][0] if orders else ()
    forms = []
    for keys, example in orders:
        form = next((f"{a} before {b}" for a, b in zip(keys, usual, strict=True) if a != b), "the usual order")
        forms.append((form, example))
    return forms


def _empties(path: str, objects: Mapping[str, Sequence[Entry]]) -> Forms:
    """A field for which some rows write null, some an empty text and some leave the key out."""
    parent, _, key = path.rpartition(".")
    holders = objects.get(parent, ())
    beside = {name for holder, _ in holders if key in holder for name in holder}
    forms = []
    for holder, example in holders:
        value = holder.get(key, ...)
        form = "absent" if value is ... else "null" if value is None else "empty text" if value == "" else ""
        # An object with keys that never come with this one is of another alternative, which may not have it.
        if form and (key in holder or holder.keys() <= beside):
            forms.append((form, example))
    return forms


def _values(entries: Sequence[Entry]) -> Iterator[tuple[str, Forms]]:
    """Whole numbers with and without a point; texts that write dates, numbers or the same word in several ways."""
    whole = [(v, e) for v, e in entries if type(v) in (int, float) and v == v // 1]
    yield "number", [("5.0" if isinstance(v, float) else "5", e) for v, e in whole]
    texts = [(v, e) for v, e in entries if isinstance(v, str)]
    if sum(v in e.input for v, e in texts) >= COPIED * len(texts):
        return
    for what, patterns in (("date", _DATES), ("number", _NUMBERS)):
        forms = [(form, v, e) for v, e in texts if (form := _form(v, patterns))]
        if len(forms) >= MOST * len(texts):
            yield what, [(form, e) for form, v, e in forms if not _in_system(v, e)]
            return
    spellings: dict[str, Forms] = defaultdict(list)
    for value, example in texts:
        spellings[value.casefold()].append((value, example))
    if len(spellings) <= SPELLINGS:
        yield from (("case", same_word) for same_word in spellings.values())


def _in_system(text: str, example: Example) -> bool:
    """Whether the row's system prompt holds a text, and not as a part of a word."""
    return text in example.system and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", example.system) is not None


def _form(text: str, patterns: dict[str, str]) -> str | None:
    return next((name for name, pattern in patterns.items() if re.fullmatch(pattern, text, re.I)), None)

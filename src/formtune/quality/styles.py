"""Mixtures of styles in answers: a model trained on a mixture writes a mixture."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from formtune.data.cleaning import Example, Quarantined, helpful_repair
from formtune.data.encoded import Mixture
from formtune.formats import Format

MIN_DATES = 0.8  # fraction of dates among the strings of a date field
MIN_COPIED = 0.95  # fraction of strings that are in their prompts, from which a field is copied
MIN_PRESENT = 0.95  # fraction of the objects that have a key, from which its position is a style

_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')  # in JSON

Entry = tuple[Any, Example]  # a value and the row it is in
Forms = list[tuple[str, Example]]  # a style, and a row that uses it

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


def by_style(
    examples: Sequence[Example], format: Format, repairs: Sequence[str]
) -> tuple[list[Example], list[Quarantined], list[Mixture]]:
    """The checked rows whose answers have the usual styles, the others, and the mixtures.

    `repairs` are the repairs of answers that are on (`data.repair_answers`).
    """
    mixed = mixtures(examples, format)
    details: dict[str, str] = {}
    for mixture in mixed:
        usual = next(iter(mixture.forms))
        for form, places in mixture.minority.items():
            detail = f"{mixture.what} of {mixture.path or 'the answer'}: {form} (most rows: {usual})"
            for place in places:
                details.setdefault(place, detail)
    unusual = []
    for example in (e for e in examples if e.where in details):
        detail, fix = details[example.where], ""
        if detail.startswith(("layout", "key order")):
            fix = helpful_repair(example.target, format.of_row(example.schema), repairs)
        unusual.append(example.quarantined("style", detail, fix=fix))
    return [example for example in examples if example.where not in details], unusual, mixed


def mixtures(examples: Sequence[Example], format: Format) -> list[Mixture]:
    """Mixtures of styles in the answers of checked rows; fields are compared only among rows of one schema."""
    texts = [(format.split(e.target)[1], e) for e in examples if isinstance(e.value, dict | list)]
    compared = [("", "layout", [(form, e) for text, e in texts if text[:1] in "{[" and (form := _layout(text))])]
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
        compared += [(path, "empty", _empties(path, objects)) for path in format.of_row(schema).fields]
        compared += [(path, "date", _dates(entries)) for path, entries in values.items()]
        compared += [(path, "number", _whole_numbers(entries)) for path, entries in values.items()]
    return [mixture for path, what, forms in compared if (mixture := _mixture(path, what, forms))]


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within a document with its path, without indices; arguments of two tools are different fields."""
    if isinstance(value, list):
        for inner in value:
            yield from _walk(inner, path)
        return
    yield path, value
    if isinstance(value, dict):
        tool = str(value["name"]) if value.keys() == {"name", "arguments"} else ""
        for key, inner in value.items():
            yield from _walk(inner, ".".join(filter(None, [path, tool if key == "arguments" else "", key])))


def _mixture(path: str, what: str, forms: Forms) -> Mixture | None:
    counts = dict(Counter(form for form, _ in forms).most_common())
    minority = {form: [*dict.fromkeys(e.where for f, e in forms if f == form)] for form in [*counts][1:]}
    return Mixture(path, what, counts, minority) if minority else None


def _layout(text: str) -> str | None:
    outside = _STRING.sub("", text)
    if "\n" in outside:
        return "over several lines"
    if re.search(r"[:,] ", outside):
        return "with spaces"
    return "without spaces" if re.search(r"[:,]", outside) else None


def _key_orders(objects: Sequence[Entry]) -> Forms:
    counts = Counter(key for holder, _ in objects for key in holder)
    # Keys that only some objects have are data, in the order of the input.
    always = {key for key, count in counts.items() if count >= MIN_PRESENT * len(objects)}
    orders = [([key for key in holder if key in always], e) for holder, e in objects if always <= holder.keys()]
    usual = Counter(tuple(keys) for keys, _ in orders).most_common(1)[0][0] if orders else ()
    forms = []
    for keys, example in orders:
        form = next((f"{a} before {b}" for a, b in zip(keys, usual, strict=True) if a != b), "the usual order")
        forms.append((form, example))
    return forms


def _empties(path: str, objects: Mapping[str, Sequence[Entry]]) -> Forms:
    """The style of an empty value of a declared field: null, an empty string or no key."""
    parent, _, key = path.rpartition(".")
    holders = objects.get(parent, ())
    beside = set().union(*(holder for holder, _ in holders if key in holder))
    forms = []
    for holder, example in holders:
        value = holder.get(key, ...)
        form = "absent" if value is ... else "null" if value is None else "empty text" if value == "" else ""
        # An object with keys that never occur beside this one is of another alternative, which may not have it.
        if form and (key in holder or holder.keys() <= beside):
            forms.append((form, example))
    return forms


def _dates(entries: Sequence[Entry]) -> Forms:
    """The styles of a date field, unless its strings are copied from the prompts."""
    texts = [(v, e) for v, e in entries if isinstance(v, str)]
    forms = [(f, e) for v, e in texts for f, pattern in _DATES.items() if re.fullmatch(pattern, v, re.I)]
    # In this order: the prompt's text takes time, and few fields are dates.
    is_style = len(forms) >= MIN_DATES * len(texts) and sum(v in e.text for v, e in texts) < MIN_COPIED * len(texts)
    return forms if is_style else []


def _whole_numbers(entries: Sequence[Entry]) -> Forms:
    whole = [(v, e) for v, e in entries if type(v) in (int, float) and v == v // 1]
    return [("5.0" if isinstance(v, float) else "5", e) for v, e in whole]

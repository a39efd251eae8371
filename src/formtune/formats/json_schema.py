"""JSON that keeps a JSON Schema (draft 2020-12), judged by the `jsonschema` library and read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from jsonschema.exceptions import ValidationError

from formtune.errors import UserError
from formtune.formats.format import Format, answer_start
from formtune.formats.grammar import json_rules
from formtune.formats.keywords import CHECK_SECONDS, errors_in_time
from formtune.formats.places import Places, is_array, is_label
from formtune.formats.schema import make_validator, read_schema
from formtune.formats.strict_json import find_documents, first_error, loads_strict
from formtune.formats.verdict import Problem, SyntaxProblem

MAX_PROBLEMS = 20  # per text: more do not help a reader
MAX_FIELDS, MAX_PATHS = 1000, 10_000  # of a contract, outside arrays and in all; references can multiply without end

_KINDS = {
    "required": "missing_key",
    "dependentRequired": "missing_key",
    "additionalProperties": "extra_key",
    "unevaluatedProperties": "extra_key",
    "propertyNames": "extra_key",
}
_NAMES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
_LEAF = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|-?\d[\d.eE+-]*|true|false|null')


class JsonSchema(Format):
    """One JSON document that keeps a JSON Schema, and nothing around it.

    What the schema allows is allowed: keys that it does not name too, unless it says `additionalProperties: false`.

    Args:
        schema: File of the schema, or the schema itself; draft 2020-12, without remote references.
        canonical: Whether key order (the schema's, of alternatives one that the document keeps) and white space (none)
            are part of the contract.
        trailing_newline: Whether exactly one line feed must follow the document.
        sets: Dotted paths of arrays whose order does not matter for content.
        derived: Dotted paths of values that answers work out instead of copying them from the input, such as a date
            written in another form; enums, constants and booleans are known to be.
    """

    def __init__(
        self,
        schema: str | dict[str, Any],
        canonical: bool = False,
        trailing_newline: bool = False,
        sets: list[str] | None = None,
        derived: list[str] | None = None,
    ) -> None:
        name = schema if isinstance(schema, str) else "data.format.schema"
        self.schema = read_schema(schema) if isinstance(schema, str) else schema
        self._validator = make_validator(self.schema, name)
        self._root = self._validator.schema
        self._places = Places(self._validator)
        self.is_canonical, self.trailing_newline = canonical, trailing_newline
        self.sets = frozenset(sets or ())
        parts: dict[str, list[dict[str, Any]]] = {}
        fields: dict[str, None] = {}
        try:
            for path, found, listed in self._places.paths():
                parts.setdefault(path, []).extend(found)
                fields |= {path: None} if path and not listed else {}
                if len(fields) > MAX_FIELDS or len(parts) > MAX_PATHS:
                    most = f"{MAX_FIELDS:,} fields or {MAX_PATHS:,} within arrays"
                    raise UserError(f"{name}: more than {most}; say `additionalProperties` for the rest")
        except RecursionError:
            raise UserError(f"{name}: the schema is nested too deeply; use fewer $ref within each other") from None
        self.fields = tuple(fields)
        # One alternative that gives labels is enough: else each wrong label of it would be called made up.
        labels = [path for path, found in parts.items() if any(map(is_label, found))]
        self.derived = frozenset([*labels, *(derived or ())])
        if unknown := self.sets - {path for path, found in parts.items() if any(map(is_array, found))}:
            raise UserError(f"data.format.sets: {name} declares no array at {', '.join(sorted(unknown))}")
        if wrong := set(derived or ()) - set(parts):
            raise UserError(f"data.format.derived: {name} declares no value at {', '.join(sorted(wrong))}")
        # "See [1]" holds no document where only an object is wanted.
        self._brackets = {"object": "{", "array": "["}.get(str(self._root.get("type")), "{[")

    def parse(self, text: str) -> Any:
        if text[:1] in (" ", "\t", "\n", "\r") or text[-1:] in (" ", "\t", "\n", "\r"):
            raise SyntaxProblem("other", "white space stands around the document")
        try:
            return loads_strict(text)
        except SyntaxProblem as error:
            # "Expecting value at column 1" says nothing of what broke behind a fence or a sentence.
            start = min((at for b in self._brackets if (at := text.find(b, answer_start(text))) >= 0), default=0)
            raise (start and first_error(text, start)) or error from None

    def problems(self, value: Any) -> list[Problem]:
        found: list[Problem] = []
        try:
            for error in islice(errors_in_time(self._validator, value), MAX_PROBLEMS):
                found.append(_problem(error))
        except TimeoutError:
            found.append(
                Problem("bad_value_form", "timeout", f"$: the check took more than {CHECK_SECONDS} s of processor time")
            )
        except RecursionError:
            found.append(Problem("wrong_type", "too_deep", "$: nested deeper than the schema can be followed"))
        return found

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        yield from super().documents(text)
        yield from find_documents(text, answer_start(text), self._brackets)

    def write(self, value: Any) -> str | None:
        return self._written(value, keep=False) or _dump(value)

    def canonical(self, value: Any) -> str | None:
        # Where alternatives give the same keys in another order, a text in either is as good; the grammar writes both.
        return self._written(value, keep=True) if self.is_canonical else None

    def _written(self, value: Any, keep: bool) -> str:
        try:
            return _dump(self._places.ordered(value, keep))
        except (TimeoutError, RecursionError):  # no text is known to be right, as no document is that is not checked
            return ""

    def value_spans(self, text: str) -> list[tuple[int, int]]:
        spans = []
        for match in _LEAF.finditer(text):
            if not match[1]:
                quoted = match[0].startswith('"')
                spans.append((match.start() + quoted, match.end() - quoted))
        return spans

    def grammar(self) -> str | None:
        return json_rules(self._root, self.is_canonical, self.trailing_newline)

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        return found | {"init_args": found["init_args"] | {"schema": self.schema}}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _problem(error: ValidationError) -> Problem:
    while error.context:  # anyOf, oneOf: the alternative that came closest says what is wrong
        branches: dict[Any, list[ValidationError]] = {}
        for inner in error.context:
            branches.setdefault(next(iter(inner.schema_path), None), []).append(inner)  # none for `false`
        deepest = lambda found: max(len(e.absolute_path) for e in found)  # noqa: E731
        error = min(branches.values(), key=lambda found: (-deepest(found), len(found)))[0]
    keyword, value, limit = str(error.validator), error.instance, error.validator_value
    message = error.message
    if keyword == "enum":
        message = f"{value!r} is not one of {', '.join(map(repr, limit))}"
    elif error.schema is False:  # `"key": false` in the schema
        keyword, message = "additionalProperties", "the key is not allowed"
    detail = f"{error.json_path}: {message[:200]}"
    if keyword == "type":
        got = "null" if value is None else _NAMES.get(type(value), type(value).__name__)
        wanted = next((t for t in ([limit] if isinstance(limit, str) else limit) if t != "null"), "null")
        wanted = "number" if wanted == "integer" else wanted
        subkind = "null_not_allowed" if value is None else f"{wanted}_as_{got}"
        return Problem("wrong_type" if error.absolute_path else "wrong_root", subkind, detail)
    return Problem(_KINDS.get(keyword, "bad_value_form"), keyword, detail)

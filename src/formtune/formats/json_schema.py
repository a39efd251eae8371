"""JSON that keeps a JSON Schema (draft 2020-12), judged by the `jsonschema` library and read strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from jsonschema.exceptions import ValidationError

from formtune.errors import UserError
from formtune.formats.bounded import CHECK_SECONDS, start_clock
from formtune.formats.format import Format, Problem, SyntaxProblem, answer_start
from formtune.formats.grammar import json_rules
from formtune.formats.places import Places, is_array, is_label
from formtune.formats.schema import make_validator, read_schema
from formtune.formats.strict_json import find_documents, first_error, loads_strict

MAX_PROBLEMS = 20  # per text: more do not help a reader
MAX_FIELDS, MAX_PATHS = 1000, 10_000  # of a format, outside arrays and in all; references can multiply without end

_KINDS = {
    "required": "missing_key",
    "dependentRequired": "missing_key",
    "additionalProperties": "extra_key",
    "unevaluatedProperties": "extra_key",
    "propertyNames": "extra_key",
    "type": "wrong_type",
}


class JsonSchema(Format):
    """One JSON document that keeps a JSON Schema, and nothing around it.

    What the schema allows is allowed: keys that it does not name too, unless it says `additionalProperties: false`.

    Args:
        schema: File of the schema, or the schema itself; draft 2020-12, without remote references.
        canonical: Whether key order (the schema's, of alternatives one that the document keeps) and white space (none)
            are part of the format.
        sets: Dotted paths of arrays whose order does not matter for content.
        derived: Dotted paths of values that answers work out instead of copying them from the input, such as a date
            written in another form; enums, constants and booleans are known to be.
    """

    def __init__(
        self,
        schema: str | dict[str, Any],
        canonical: bool = False,
        sets: list[str] | None = None,
        derived: list[str] | None = None,
    ) -> None:
        name = schema if isinstance(schema, str) else "data.format.schema"
        self.schema = read_schema(schema) if isinstance(schema, str) else schema
        self._validator = make_validator(self.schema, name)
        self._root = self._validator.schema
        self._places = Places(self._validator)
        self._is_canonical = canonical
        fields: dict[str, None] = {}
        parts: dict[str, list[dict[str, Any]]] = {}
        try:
            for path, parts_here, in_array in self._places.paths([self._root]):
                parts.setdefault(path, []).extend(parts_here)
                fields |= {path: None} if path and not in_array else {}
                if len(fields) > MAX_FIELDS or len(parts) > MAX_PATHS:
                    most = f"{MAX_FIELDS:,} fields or {MAX_PATHS:,} within arrays"
                    raise UserError(f"{name}: more than {most}; say `additionalProperties` for the rest")
        except RecursionError:
            raise UserError(f"{name}: the schema is nested too deeply; use fewer $ref within each other") from None
        self.fields, self.sets = tuple(fields), frozenset(sets or ())
        # One alternative with labels is enough: else each of its labels would be called made up.
        labels = [path for path, parts_here in parts.items() if any(map(is_label, parts_here))]
        self.derived = frozenset([*labels, *(derived or ())])
        if unknown := self.sets - {path for path, parts_here in parts.items() if any(map(is_array, parts_here))}:
            raise UserError(f"data.format.sets: {name} declares no array at {', '.join(sorted(unknown))}")
        if unknown := frozenset(derived or ()) - parts.keys():
            raise UserError(f"data.format.derived: {name} declares no value at {', '.join(sorted(unknown))}")
        # "See [1]" holds no document where the schema asks for an object.
        self._brackets = {"object": "{", "array": "["}.get(str(self._root.get("type")), "{[")

    def parse(self, text: str) -> Any:
        if text != text.strip(" \t\n\r"):
            raise SyntaxProblem("white space around the document")
        try:
            return loads_strict(text)
        except SyntaxProblem as error:
            # "Expecting value at column 1" does not say what is wrong behind a fence or a sentence.
            start = min((at for b in self._brackets if (at := text.find(b, answer_start(text))) >= 0), default=0)
            raise (start and first_error(text, start)) or error from None

    def problems(self, value: Any) -> list[Problem]:
        problems: list[Problem] = []
        start_clock()
        try:
            for error in islice(self._validator.iter_errors(value), MAX_PROBLEMS):
                problems.append(_problem(error))
        except TimeoutError:
            detail = f"$: the check took more than {CHECK_SECONDS} s of processor time"
            problems.append(Problem("bad_value_form", detail, timeout=True))
        except RecursionError:
            problems.append(Problem("wrong_type", "$: nested deeper than the schema can be followed"))
        return problems

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        yield from super().documents(text)
        yield from find_documents(text, answer_start(text), self._brackets)

    def write(self, value: Any) -> str | None:
        return self._written(value, keep=False) or _dump(value)

    def canonical(self, value: Any) -> str | None:
        # Where alternatives give the same keys in another order, either text is valid; the grammar writes both.
        return self._written(value, keep=True) if self._is_canonical else None

    def _written(self, value: Any, keep: bool) -> str:
        try:
            return _dump(self._places.ordered(value, keep))
        except (TimeoutError, RecursionError):  # no text is known to be right
            return ""

    def grammar(self) -> str | None:
        return json_rules(self._root, self._is_canonical)

    def to_dict(self) -> dict[str, Any]:
        whole = super().to_dict()
        if "schema" in whole["init_args"]:  # its content instead of its file
            whole["init_args"]["schema"] = self.schema
        return whole


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _problem(error: ValidationError) -> Problem:
    while error.context:  # anyOf, oneOf: the alternative that came closest says what is wrong
        branches: dict[Any, list[ValidationError]] = {}
        for inner in error.context:
            branches.setdefault(next(iter(inner.schema_path), None), []).append(inner)  # none for `false`
        error = min(branches.values(), key=lambda errors: (-max(len(e.absolute_path) for e in errors), len(errors)))[0]
    kind, message = _KINDS.get(str(error.validator), "bad_value_form"), error.message
    if error.validator == "enum":
        message = f"{error.instance!r} is not one of {', '.join(map(repr, error.validator_value))}"
    elif error.schema is False:  # `"key": false` in the schema
        kind, message = "extra_key", "the key is not allowed"
    elif kind == "wrong_type" and not error.absolute_path:
        kind = "wrong_root"
    return Problem(kind, f"{error.json_path}: {message[:200]}")

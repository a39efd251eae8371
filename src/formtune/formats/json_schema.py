"""JSON that conforms to a JSON Schema, parsed strictly and checked by the `jsonschema` library."""

import copy
import functools
import importlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from jsonschema.exceptions import ValidationError

from formtune.errors import UserError
from formtune.formats.bounded import bounded_validator, time_limit
from formtune.formats.dialect import KEYWORDS, TYPES, read_draft
from formtune.formats.format import Format, Problem, SyntaxProblem, answer_start
from formtune.formats.places import Places, Subschema, is_array, is_label
from formtune.formats.strict_json import find_documents, loads_strict, value_spans

MAX_CHARACTERS = 2_000_000  # of a schema's file
MAX_PROBLEMS = 20  # per text
MAX_PATHS = 2000  # of a format: references can multiply without end
PER_ROW = "per row"  # in place of a schema: each row has its own

_KINDS = dict.fromkeys(("required", "dependentRequired"), "missing_key") | {"type": "wrong_type"}
_KINDS |= dict.fromkeys(("additionalProperties", "propertyNames"), "extra_key")
# Keys that contain the schema in a request to OpenAI (response_format, tool) or Anthropic, and in an MCP tool.
_WRAPPERS = ("schema", "json_schema", "response_format", "function", "parameters", "input_schema", "inputSchema")


class JsonSchema(Format):
    """One JSON document that conforms to a JSON Schema, with nothing around it.

    Keys that the schema does not name are allowed, unless it says `additionalProperties: false`.

    Args:
        schema: File of the schema, the schema itself, or a Pydantic class as `module:Class`; draft 7 or 2020-12, all in
            one file. By default each row has its own, in the column that `data.columns.schema` names.
        canonical: Whether the format fixes the key order (the schema's, or that of a valid alternative) and allows no
            whitespace.
        sets: Dotted paths of arrays whose order does not matter for content.
        derived: Dotted paths of values that answers derive instead of copying them from the input, such as a date in
            another form; enums, constants and booleans always count as derived.
    """

    def __init__(
        self,
        schema: str | dict[str, Any] = PER_ROW,
        canonical: bool = False,
        sets: list[str] | None = None,
        derived: list[str] | None = None,
    ) -> None:
        self.schema, self.canonical, self.per_row = schema, canonical, schema == PER_ROW
        self.sets, self.derived = frozenset(sets or ()), frozenset(derived or ())
        if self.per_row:
            return
        name = schema if isinstance(schema, str) else "data.format.schema"
        places = self._adopt(read_schema(schema), name)
        if len(places) == MAX_PATHS:
            return
        arrays = {path for path, parts, _ in places if any(map(is_array, parts))}
        if unknown := (self.sets - arrays) | (self.derived - {path for path, *_ in places}):
            paths = ", ".join(sorted(unknown))
            raise UserError(f"data.format: {name} has no array (sets) or no value (derived) at {paths}")

    def _adopt(self, schema: Any, name: str) -> list[tuple[str, list[Subschema], bool]]:
        """Set the schema to validate with; returns its places, see `Places.paths`."""
        self.schema, keys = unwrap(schema)
        self.per_row = False
        try:
            self.root, notes = read_draft(self.schema, name)
            self._validator = bounded_validator(self.root)
            self._places = Places(self._validator)
            places = list(islice(self._places.paths([self.root]), MAX_PATHS))
            with time_limit():
                self._validator.is_valid({})
        except RecursionError:
            raise UserError(f"{name}: an endless $ref loop, or a schema that is nested too deeply") from None
        except TimeoutError:
            raise UserError(f"{name}: the schema takes too long to check; its references multiply") from None
        notes += [f"the schema is read from {keys!r}"] if keys else []
        notes += [f"only the first {MAX_PATHS:,} fields are compared one by one"] if len(places) == MAX_PATHS else []
        self.notes = tuple(f"{name}: {note}" for note in notes)
        self.fields = tuple(dict.fromkeys(path for path, _, in_array in places if path and not in_array))
        # One alternative with labels is enough: else the audit would call its labels invented.
        self.derived |= {path for path, parts, _ in places if any(map(is_label, parts))}
        # "See [1]" contains no document if the schema requires an object.
        self._brackets = {"object": "{", "array": "["}.get(str(self.root.get("type")), "{[")
        return places

    @functools.lru_cache(maxsize=10_000)  # noqa: B019 - a format is kept as long as the process
    def of_row(self, schema: str | None) -> Format:
        if not self.per_row:
            return self
        if schema is None:
            remedy = "write it into the column that data.columns.schema names, or set data.format.init_args.schema"
            raise UserError(f"the row has no schema; {remedy}")
        row_format, name = copy.copy(self), "the row's schema"
        try:
            row_format._adopt(loads_strict(schema), name)
        except ValueError as error:
            raise UserError(f"{name}: not valid JSON ({error})") from None
        return row_format

    def parse(self, text: str) -> Any:
        if text != text.strip(" \t\n\r"):
            raise SyntaxProblem("whitespace around the document")
        return loads_strict(text)

    def problems(self, value: Any) -> list[Problem]:
        return [_problem(error) for error in islice(self._validator.iter_errors(value), MAX_PROBLEMS)]

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        yield from super().documents(text)
        yield from find_documents(text, answer_start(text), self._brackets)

    def write(self, value: Any) -> str:
        # If alternatives are recursive or too many, the document keeps its order.
        with suppress(RecursionError, TimeoutError), time_limit():
            value = self._places.ordered(value)
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def value_spans(self, text: str) -> dict[str, tuple[int, int]]:
        return dict(value_spans(text))


def _problem(error: ValidationError) -> Problem:
    while error.context:  # anyOf, oneOf: what is wrong with the alternative that came closest
        error = error.context[0]
    kind, message = _KINDS.get(str(error.validator), "bad_value_form"), error.message
    if error.validator == "enum":
        message = f"{error.instance!r} is not one of {', '.join(map(repr, error.validator_value))}"
    elif error.schema is False:  # `"key": false` in the schema
        kind, message = "extra_key", "the key is not allowed"
    elif kind == "wrong_type" and not error.absolute_path:
        kind = "wrong_root"
    return Problem(kind, f"{error.json_path}: {message[:200]}")


def read_schema(source: str | dict[str, Any]) -> Any:
    """The schema of a file, a Pydantic class (`module:Class`), or as it is; no object is in it twice."""
    if not isinstance(source, str):
        try:
            return json.loads(json.dumps(source, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"data.format.schema: not valid JSON ({error})") from None
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) and not Path(source).exists():
        return read_schema(_class_schema(*source.split(":")))
    try:
        with Path(source).open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS + 1)
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"{source}: longer than {MAX_CHARACTERS:,} characters; a format is not that large")
        return loads_strict(text.strip())
    except OSError as error:
        raise UserError(f"data.format.schema: {source}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{source}: not valid JSON ({error})") from None


def _class_schema(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name).model_json_schema()
    except Exception as error:  # the module is the user's
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"data.format.schema: {module}:{name} must be a Pydantic model ({why})") from None


def unwrap(schema: Any) -> tuple[Any, str]:
    """The schema within a request or tool, and the dotted keys that lead to it, "" if it is the schema itself."""
    keys = []
    while isinstance(schema, dict) and not schema.keys() & KEYWORDS - {"type"} and schema.get("type") not in TYPES:
        inner = [key for key in _WRAPPERS if isinstance(schema.get(key), dict)]
        if len(inner) != 1:
            break
        keys += inner
        schema = schema[inner[0]]
    return schema, ".".join(keys)

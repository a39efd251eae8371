"""What a user can get wrong in a JSON Schema, found before training and said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import referencing
import referencing.exceptions
import referencing.jsonschema
import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from formtune.errors import UserError
from formtune.formats.bounded import FORMATS, BoundedValidator, compile_ecma, start_clock
from formtune.formats.strict_json import MAX_DEPTH, loads_strict

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ROOT_ONLY = ("$schema", "$id")
MAX_CHARACTERS = 4 * 2**20  # of a schema's file
MAX_VALUES = 20_000  # of a schema, keys and all they hold: checking a schema by its schema takes time

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLES = (
    *("items", "contains", "unevaluatedItems", "additionalProperties", "propertyNames", "unevaluatedProperties"),
    *("not", "if", "then", "else"),
)
_KEYWORDS = {
    *(*Draft202012Validator.VALIDATORS, *_MAPS, *_LISTS, *_SINGLES, *ROOT_ONLY, "minContains", "maxContains"),
    *("$anchor", "$dynamicAnchor", "$comment", "$vocabulary", "title", "description", "default", "examples"),
    *("deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema", "discriminator"),
}


def read_schema(path: str) -> Any:
    """The schema in a file."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS + 1)
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"{path}: longer than {MAX_CHARACTERS:,} characters; a format is not that large")
        return loads_strict(text.strip())
    except OSError as error:
        raise UserError(f"data.format.schema: {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def make_validator(schema: Any, name: str) -> Any:
    """The validator of a schema that can judge every text: complete, without network, without unknown keywords.

    Messages call the schema by `name`.
    """
    if not isinstance(schema, dict):
        raise UserError(f"{name}: expected an object as schema, found {schema!r:.40}")
    _check_size(schema, name)
    if str(schema.get("$schema", DIALECT)).rstrip("#") != DIALECT:
        raise UserError(f"{name}: $schema is {schema['$schema']}, but only draft 2020-12 is read; convert the schema")
    try:
        # Without formats: "regex" would be checked by `re`, which knows less than what patterns run on.
        meta = Draft202012Validator(Draft202012Validator.META_SCHEMA)
        if error := best_match(meta.iter_errors(schema)):
            raise UserError(f"{name}: not a JSON Schema ({error.json_path}: {error.message[:120]})")
        # With `$schema` in it a reference to the root would leave the bounded keywords for the library's own.
        root = {key: value for key, value in schema.items() if key not in ROOT_ONLY}
        validator = BoundedValidator(root, registry=referencing.Registry(), format_checker=FORMATS)
        nodes = list(schema_nodes(root))
        for path, node in nodes:
            _check_node(f"{name}: {path}", node)
        entries = [root, *_referenced(root, nodes, name)]
    except RecursionError:
        raise UserError(f"{name}: the schema is nested too deeply; flatten it with $defs") from None
    used = {key for _, node in nodes for key in node}
    if used >= {"patternProperties", "unevaluatedProperties"}:  # the library would match these by `re`
        raise UserError(f"{name}: patternProperties with unevaluatedProperties is not read; use additionalProperties")
    values: tuple[Any, ...] = (None, True, 0, "", [], {})
    try:
        for entry, value in product(entries, values):
            start_clock()
            validator.evolve(schema=entry).is_valid(value)
    except (RecursionError, TimeoutError):
        raise UserError(f"{name}: a $ref leads back to itself without end; put a property or items between") from None
    return validator


def _check_size(schema: Any, name: str) -> None:
    level, values = [schema], 0
    for _ in range(MAX_DEPTH):
        containers = [node for node in level if isinstance(node, dict | list)]
        level = [inner for node in containers for inner in (node.values() if isinstance(node, dict) else node)]
        values += len(level)
        if values > MAX_VALUES:
            raise UserError(f"{name}: more than {MAX_VALUES:,} keys and values; a format is not that large")
        if not level:
            return
    raise UserError(f"{name}: the schema is nested deeper than {MAX_DEPTH} levels; flatten it with $defs")


def resolver(root: Any) -> Any:
    """Looks up `$ref` within a schema; never fetches anything."""
    resource = referencing.jsonschema.DRAFT202012.create_resource(root)
    return referencing.Registry().with_resource("", resource).resolver()


def types(node: dict[str, Any]) -> list[str]:
    """The types that a schema names."""
    names = node.get("type", [])
    return [names] if isinstance(names, str) else names


def schema_nodes(node: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within a schema; what enum, const, default and examples hold is data."""
    if not isinstance(node, dict):
        return
    yield path, node
    for key in _MAPS:
        for name, inner in node.get(key, {}).items():
            yield from schema_nodes(inner, f"{path}.{key}.{name}")
    for key in _LISTS:
        for index, inner in enumerate(node.get(key, ())):
            yield from schema_nodes(inner, f"{path}.{key}[{index}]")
    for key in _SINGLES:
        yield from schema_nodes(node.get(key), f"{path}.{key}")


def _check_node(place: str, node: dict[str, Any]) -> None:
    for key in node:
        if key not in _KEYWORDS and not key.startswith("x-"):  # a typo here would let every answer pass
            raise UserError(f"{place}.{key}: not a keyword of draft 2020-12, so it would be ignored; fix or remove it")
        if key in ROOT_ONLY:
            raise UserError(f"{place}.{key}: allowed at the root only; remove it")
    for pattern in (*node.get("patternProperties", ()), *([node["pattern"]] if "pattern" in node else ())):
        try:
            compile_ecma(pattern)
        except regex.error as error:
            raise UserError(f"{place}: not a JSON Schema (pattern {pattern!r}: {error})") from None
    if node.get("format", "date") not in FORMATS.checkers:
        known = ", ".join(FORMATS.checkers)
        raise UserError(f"{place}.format: {node['format']!r} cannot be checked, only {known}; use a pattern")


def _referenced(root: Any, nodes: list[tuple[str, dict[str, Any]]], name: str) -> Iterator[Any]:
    """What all references lead to."""
    known, lookup = {id(node) for _, node in nodes}, resolver(root).lookup
    for path, node in nodes:
        for key in [key for key in ("$ref", "$dynamicRef") if key in node]:
            if not node[key].startswith("#"):
                raise UserError(f"{name}: {key} {node[key]!r} leads out of the file; copy what it names into $defs")
            try:
                entry = lookup(node[key]).contents
            except referencing.exceptions.Unresolvable:
                entry = None
            if not isinstance(entry, bool) and id(entry) not in known:
                raise UserError(f"{name}: {path}: a $ref leads nowhere ({node[key]!r}); fix it or add what it names")
            yield entry

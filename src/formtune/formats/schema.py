"""What a user can get wrong in a JSON Schema, found before training and said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing.exceptions import Unresolvable

from formtune.errors import UserError
from formtune.formats.bounded import FORMATS, ROOT_ONLY, bounded_validator, compile_ecma, resolver, time_limit
from formtune.formats.strict_json import loads_strict

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCES = ("$ref", "$dynamicRef")
MAX_CHARACTERS = 500_000  # of a schema's file: to check a schema takes time

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
    for problem in _problems(schema):
        raise UserError(f"{name}: {problem}")
    return bounded_validator(schema)


def _problems(schema: Any) -> Iterator[str]:
    """What keeps a schema from judging every text; no step makes sense unless those before it yield nothing."""
    if not isinstance(schema, dict):
        yield f"expected an object as schema, found {schema!r:.40}"
        return
    if str(schema.get("$schema", DIALECT)).rstrip("#") != DIALECT:
        yield f"$schema is {schema['$schema']}, but only draft 2020-12 is read; convert the schema"
    # Without formats: "regex" would be checked by `re`, which knows less than what patterns run on.
    meta = Draft202012Validator(Draft202012Validator.META_SCHEMA)
    if error := best_match(meta.iter_errors(schema)):
        yield f"not a JSON Schema ({error.json_path}: {error.message[:120]})"
    validator = bounded_validator(schema)
    nodes = list(schema_nodes(validator.schema))
    for path, node in nodes:
        yield from _node_problems(path, node)
    if {"patternProperties", "unevaluatedProperties"} <= {key for _, node in nodes for key in node}:
        # The library would match these by `re`.
        yield "patternProperties with unevaluatedProperties is not read; use additionalProperties"
    yield from _reference_problems(validator, nodes)


def _node_problems(path: str, node: dict[str, Any]) -> Iterator[str]:
    for key in node:
        if key not in _KEYWORDS and not key.startswith("x-"):  # a typo here would let every answer pass
            yield f"{path}.{key}: not a keyword of draft 2020-12, so it would be ignored; fix or remove it"
        if key in ROOT_ONLY:
            yield f"{path}.{key}: allowed at the root only; remove it"
    for pattern in (*node.get("patternProperties", ()), *([node["pattern"]] if "pattern" in node else ())):
        try:
            compile_ecma(pattern)
        except regex.error as error:
            yield f"{path}: not a JSON Schema (pattern {pattern!r}: {error})"
    if node.get("format", "date") not in FORMATS.checkers:
        known = ", ".join(FORMATS.checkers)
        yield f"{path}.format: {node['format']!r} cannot be checked, only {known}; use a pattern"


def _reference_problems(validator: Any, nodes: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    schemas, resolve = {id(node) for _, node in nodes}, resolver(validator.schema)
    references = [(path, node, key) for path, node in nodes for key in REFERENCES if key in node]
    for path, node, key in references:
        reference = node[key]
        if not reference.startswith("#"):
            yield f"{key} {reference!r} leads out of the file; copy what it names into $defs"
        try:
            target = resolve(reference)
        except Unresolvable:
            target = None
        if not isinstance(target, bool) and id(target) not in schemas:
            yield f"{path}: a $ref leads nowhere ({reference!r}); fix it or add what it names"
    values: tuple[Any, ...] = (None, True, 0, "", [], {})
    try:
        for (_, node, _), value in product(references, values):
            with time_limit():
                validator.evolve(schema=node).is_valid(value)
    except (RecursionError, TimeoutError):
        yield "a $ref leads back to itself without end; put a property or items between"


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

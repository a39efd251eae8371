"""Translates a JSON Schema of draft 7 or 2020-12 to 2020-12, and finds everything wrong with it."""

import copy
import difflib
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import Any

import regex
from jsonschema import Draft7Validator, Draft202012Validator, FormatChecker

from formtune.errors import UserError
from formtune.formats.bounded import FORMATS, bounded_validator, compile_ecma, resolver

MAX_PROBLEMS = 10  # problems of a schema, listed at once
MIN_SIMILARITY = 0.84  # of a key to a keyword, from which it is likely a misspelling
TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")

_REFUSED = {  # unsupported keywords, which no tool writes for language models, and what to use instead
    "additionalItems": "prefixItems and items",
    "dependencies": "dependentRequired, or if and then",
    "dependentSchemas": "if and then",
    "unevaluatedItems": "items",
    "unevaluatedProperties": "additionalProperties",
    "$dynamicRef": "$ref",
    "$recursiveRef": "$ref",
    "nullable": 'a list of types, such as ["string", "null"]',  # of OpenAPI, else ignored
}
_DEFINITIONS = {"$defs", "definitions"}
KEYWORDS = {*Draft202012Validator.VALIDATORS, "then", "else", "minContains", "maxContains", *_DEFINITIONS} - {*_REFUSED}
_MAPS = {"properties", "patternProperties", *_DEFINITIONS}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_SINGLES = {"items", "contains", "additionalProperties", "propertyNames", "not", "if", "then", "else"}

# Schemas of the keywords' values. The library's metaschema of 2020-12 takes ten times as long.
_DRAFT7: Any = Draft7Validator.META_SCHEMA["properties"]
_VALUES = {key: value for key, value in _DRAFT7.items() if key in KEYWORDS} | {
    "prefixItems": _DRAFT7["allOf"],
    "dependentRequired": {"type": "object", "additionalProperties": _DRAFT7["required"]},
    "$defs": _DRAFT7["definitions"],
    "minContains": _DRAFT7["maxItems"],
    "maxContains": _DRAFT7["maxItems"],
}
_PATTERNS = FormatChecker(())
_PATTERNS.checkers["regex"] = (lambda value: not isinstance(value, str) or compile_ecma(value), regex.error)
_METASCHEMA = bounded_validator(Draft7Validator.META_SCHEMA | {"properties": _VALUES}, _PATTERNS)


def types(node: dict[str, Any]) -> list[str]:
    names = node.get("type", [])
    return [names] if isinstance(names, str) else names


def schema_nodes(node: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within a schema, with its path; values of enum, const, default and examples are data."""
    if not isinstance(node, dict):
        return
    yield path, node
    for key, value in node.items():
        if key in _MAPS and isinstance(value, dict):
            for name, inner in value.items():
                yield from schema_nodes(inner, f"{path}.{key}.{name}")
        elif key in _LISTS | _SINGLES:
            for index, inner in enumerate(value if isinstance(value, list) else ()):
                yield from schema_nodes(inner, f"{path}.{key}[{index}]")
            yield from schema_nodes(value, f"{path}.{key}")


def read_draft(schema: Any, name: str) -> tuple[dict[str, Any], list[str]]:
    """The schema as draft 2020-12 with only its checked keywords, and notes on the others; raises UserError."""
    # Nodes are translated in place: no object may be in the schema twice.
    if not isinstance(schema, dict):
        raise UserError(f"{name}: the schema must be a JSON object, got {schema!r:.40}")
    draft = re.match(r"https?://json-schema\.org/draft[-/]0?([\d-]+)", str(schema.get("$schema")))
    number = draft[1] if draft else "2020-12"
    root, unchecked = copy.deepcopy(schema), list[str]()
    if not (problems := [*_mistakes(schema, number)]):
        unchecked = _translate(root, number == "7")
        problems = [*_structural_problems(root)]
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError(f"{name}: {' | '.join([*problems[:MAX_PROBLEMS], *more])}")
    return root, [f"not checked: {', '.join(dict.fromkeys(unchecked))}"] if unchecked else []


def _mistakes(schema: dict[str, Any], draft: str) -> Iterator[str]:
    if draft not in ("7", "2020-12"):
        yield f"$.$schema: draft {draft} is not supported; write the schema as draft-07 or 2020-12"
    for error in _METASCHEMA.iter_errors(schema):
        while error.context:  # a keyword with several types: the first is the usual one
            error = error.context[0]
        cause = f": {error.cause}" if error.cause else ""
        yield f"{error.json_path}: not a JSON Schema ({error.message:.150}{cause})"
    for path, node in schema_nodes(schema):
        if node is not schema and not str(node.get("$id", "#")).startswith("#"):
            yield f"{path}.$id: `$id` in a subschema is not supported; remove it and refer by #/$defs/name"
        for key in node:
            if key in _REFUSED and (key, node[key]) != ("nullable", False):
                yield f"{path}.{key}: not supported; use {_REFUSED[key]}"
            elif key not in KEYWORDS and not key.startswith("x-") and (keyword := _likely_keyword(key)):
                hint = f"did you mean {keyword!r}? If not, write 'x-{key}'"
                yield f"{path}.{key}: not a keyword, so it would be ignored; {hint}"


@cache
def _likely_keyword(key: str) -> str | None:
    word = _letters(key)
    spelled = {_letters(keyword): keyword for keyword in KEYWORDS - {*_DEFINITIONS, "not", "if"}}
    close = difflib.get_close_matches(word, spelled, 1, MIN_SIMILARITY)
    moved = [other for other in spelled if sorted(other) == sorted(word)]
    return next((spelled[other] for other in [*close, *moved]), None)


def _letters(key: str) -> str:
    return re.sub("[^a-z]", "", key.lower())


def _translate(root: dict[str, Any], is_draft7: bool) -> list[str]:
    """Translate a schema in place to 2020-12 with checked keywords only; returns what is not checked."""
    unchecked = []
    for _, node in schema_nodes(root):
        if isinstance(node.get("items"), list):
            node["prefixItems"] = node.pop("items")
        for key in [*node]:
            if is_draft7 and "$ref" in node and key in KEYWORDS - {"$ref", *_DEFINITIONS}:
                unchecked.append(f"{key} beside $ref, which draft 7 ignores")
            elif key == "format" and node[key] not in FORMATS.checkers:
                unchecked.append(f"format {node[key]!r:.40}")
            elif key in KEYWORDS or key == "discriminator":  # grammars need `discriminator`
                continue
            del node[key]
    return unchecked


def _structural_problems(root: dict[str, Any]) -> Iterator[str]:
    """Problems of the schema as a whole, such as unresolved or endless references."""
    nodes, resolve, applied = [*schema_nodes(root)], resolver(root), dict[int, list[int]]()
    for path, node in nodes:
        inner = [option for key in ("allOf", "anyOf", "oneOf") for option in node.get(key, ())]
        inner += [node[key] for key in ("not", "if", "then", "else") if key in node]
        if "$ref" in node:
            inner.append(resolve(node["$ref"]))
            if not isinstance(inner[-1], dict | bool):
                remedy = "copy what it names into $defs, and write #/$defs/name"
                yield f"{path}.$ref: {node['$ref']!r:.150} points to nothing in the schema; {remedy}"
        applied[id(node)] = [*map(id, inner)]
    if not root.keys() - _DEFINITIONS:
        yield "the schema checks nothing, so any JSON would be valid; add `type`"
    try:
        TopologicalSorter(applied).prepare()
    except CycleError as error:
        path = next(path for path, node in nodes if id(node) in error.args[1] and "$ref" in node)
        yield f"{path}: an endless $ref loop; a recursive schema must recurse through properties or items"

"""Reads a JSON Schema of draft 7 or 2020-12 as one of 2020-12, and finds everything wrong with it."""

import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import Any

import regex
from jsonschema import Draft7Validator, Draft202012Validator, FormatChecker

from formtune.errors import UserError
from formtune.formats.bounded import FORMATS, bounded_validator, compile_ecma, resolver

MAX_PROBLEMS = 10  # of a schema, named at once
TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")

_NEEDS = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
_DEFINITIONS = {"$defs", "definitions"}
KEYWORDS = {*Draft7Validator.VALIDATORS, *Draft202012Validator.VALIDATORS, *_NEEDS, *_DEFINITIONS} - {"$dynamicRef"}
_MAPS = {"properties", "patternProperties", "dependentSchemas", "dependencies", *_DEFINITIONS}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_SINGLES = {"items", "contains", "unevaluatedItems", "additionalItems", "additionalProperties", "propertyNames"}
_SINGLES |= {"unevaluatedProperties", "not", "if", "then", "else"}


def _list_or(items: Any, single: Any) -> dict[str, Any]:
    return {"if": {"type": "array"}, "then": {"items": items}, "else": single}


# What keywords hold. The library's metaschema of 2020-12 takes ten times as long.
_DRAFT7: Any = Draft7Validator.META_SCHEMA["properties"]
_VALUES = {key: value for key, value in _DRAFT7.items() if key in KEYWORDS} | {
    "type": {"minItems": 1} | _list_or({"enum": TYPES}, {"enum": TYPES}),
    "items": _list_or({"$ref": "#"}, {"$ref": "#"}),
    "dependencies": {"additionalProperties": _list_or({"type": "string"}, {"$ref": "#"})},
    "dependentRequired": {"type": "object", "additionalProperties": _DRAFT7["required"]},
    "prefixItems": _DRAFT7["allOf"],
    **dict.fromkeys(("$defs", "dependentSchemas"), _DRAFT7["definitions"]),
    **dict.fromkeys(("unevaluatedItems", "unevaluatedProperties"), _DRAFT7["not"]),
    **dict.fromkeys(("minContains", "maxContains"), _DRAFT7["maxItems"]),
}
_PATTERNS = FormatChecker(())
_PATTERNS.checkers["regex"] = (lambda value: not isinstance(value, str) or compile_ecma(value), regex.error)
_METASCHEMA = bounded_validator(Draft7Validator.META_SCHEMA | {"properties": _VALUES}, _PATTERNS)


def types(node: dict[str, Any]) -> list[str]:
    names = node.get("type", [])
    return [names] if isinstance(names, str) else names


def schema_nodes(node: Any, path: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within a schema; what enum, const, default and examples hold is data."""
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


@cache
def _spellings(key: str) -> set[str]:
    """A key without case and number, and the same with one letter less."""
    word = re.sub(r"(?:ies|y|s)$", "", re.sub("[^a-z]", "", key.lower()))
    return {word, *(word[:index] + word[index + 1 :] for index in range(1, len(word)))}


@cache
def _meant(key: str) -> str | None:
    """The keyword that a key is likely to mean: a letter more, less, wrong or moved after the first."""
    if key in ("$dynamicRef", "$recursiveRef"):
        return "$ref"
    checked = sorted(KEYWORDS - {*_DEFINITIONS, "not", "if"})
    return next((keyword for keyword in checked if _spellings(key) & _spellings(keyword)), None)


def read_draft(schema: Any, name: str) -> tuple[dict[str, Any], list[str]]:
    """A schema in draft 2020-12, with checked keywords only, and notes on what is not checked.

    No object may be in it twice. A keyword that only one of the two drafts has means what it means there. Raises
    UserError with all that is wrong.
    """
    if not isinstance(schema, dict):
        raise UserError(f"{name}: expected an object as schema, found {schema!r:.40}")
    draft = re.match(r"https?://json-schema\.org/draft[-/]0?([\d-]+)", str(schema.get("$schema")))
    root, unchecked = schema, dict[str, None]()
    if not (problems := [*_mistakes(schema, draft[1] if draft else "2020-12")]):
        root = _translated(schema, draft is not None and draft[1] == "7", unchecked)
        problems = [*_wrong_whole(root)]
    if problems:
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise UserError(f"{name}: {count}{' | '.join([*problems[:MAX_PROBLEMS], *more])}")
    return root, [f"not checked: {', '.join(unchecked)}"] if unchecked else []


def _mistakes(schema: dict[str, Any], draft: str) -> Iterator[str]:
    if draft not in ("7", "2020-12"):
        yield f"$.$schema: draft {draft} is not supported; write the schema as draft-07 or 2020-12"
    for error in _METASCHEMA.iter_errors(schema):
        expected = f"{error.validator} {error.validator_value!r}" + (f": {error.cause}" if error.cause else "")
        yield f"{error.json_path}: not a JSON Schema (expected {expected}, found {error.instance!r:.40})"
    for path, node in schema_nodes(schema):
        if node is not schema and not str(node.get("$id", "#")).startswith("#"):
            yield f"{path}.$id: an address within a schema is not supported; remove it and refer by #/$defs/name"
        for key in node:
            if key not in KEYWORDS and not key.startswith("x-") and (keyword := _meant(key)):
                hint = f"did you mean {keyword!r}? If not, write 'x-{key}'"
                yield f"{path}.{key}: not a keyword, so it would be ignored; {hint}"


def _translated(node: Any, is_draft7: bool, unchecked: dict[str, None]) -> Any:
    """A schema in draft 2020-12; what it says without a check is added to `unchecked`."""

    def read(inner: Any) -> Any:
        return _translated(inner, is_draft7, unchecked)

    if not isinstance(node, dict):
        return node
    out: dict[str, Any] = {}
    for key, value in node.items():
        if is_draft7 and "$ref" in node and key in KEYWORDS - {"$ref", *_DEFINITIONS}:
            unchecked[f"{key} beside $ref, which draft 7 ignores"] = None
        elif key == "format" and value not in FORMATS.checkers:
            unchecked[f"format {value!r:.40}"] = None
        elif key == "dependencies":
            out["dependentRequired"] = {name: inner for name, inner in value.items() if isinstance(inner, list)}
            out["dependentSchemas"] = {
                name: read(inner) for name, inner in value.items() if not isinstance(inner, list)
            }
        elif key == "items" and isinstance(value, list):
            out["prefixItems"] = [*map(read, value)]
        elif key == "additionalItems":
            out |= {"items": read(value)} if isinstance(node.get("items"), list) else {}
        elif key in _MAPS:
            out[key] = {name: read(inner) for name, inner in value.items()}
        elif key in _LISTS:
            out[key] = [*map(read, value)]
        elif key == "discriminator" or (key in KEYWORDS and _NEEDS.get(key, key) in node):  # grammars need the first
            out[key] = read(value) if key in _SINGLES else value
    return out


def _wrong_whole(root: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a schema as a whole, such as references to nowhere or back to itself."""
    nodes, resolve, applied = [*schema_nodes(root)], resolver(root), dict[int, list[int]]()
    for path, node in nodes:
        inner = [option for key in ("allOf", "anyOf", "oneOf") for option in node.get(key, ())]
        inner += [node[key] for key in ("not", "if", "then", "else") if key in node]
        if "$ref" in node:
            inner.append(resolve(node["$ref"]))
            if not isinstance(inner[-1], dict | bool):
                remedy = "copy what it names into $defs, and write #/$defs/name"
                yield f"{path}.$ref: {node['$ref']!r:.150} points to nothing in the schema; {remedy}"
        applied[id(node)] = [*map(id, (*inner, *node.get("dependentSchemas", {}).values()))]
    if not root.keys() - _DEFINITIONS:
        yield "the schema checks nothing, so any JSON would be valid; add `type`"
    if {"patternProperties", "unevaluatedProperties"} <= {key for _, node in nodes for key in node}:
        # The library would match these by `re`.
        yield "patternProperties with unevaluatedProperties is not supported; use additionalProperties"
    try:
        TopologicalSorter(applied).prepare()
    except CycleError as error:
        path = next(path for path, node in nodes if id(node) in error.args[1] and "$ref" in node)
        yield f"{path}: refers to itself endlessly; put a property or items between"

"""JSON that keeps a JSON Schema (draft 2020-12), judged by the `jsonschema` library and read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import regex
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import extend

from formtune.errors import UserError
from formtune.formats.contract import Format, Problem, SyntaxProblem
from formtune.formats.strict_json import document_end, loads_strict

PATTERN_SECONDS = 0.2  # a pattern that backtracks without end counts as not matched
MAX_PROBLEMS = 20  # per text: more do not help a reader
MAX_STARTS = 64  # brackets tried as the beginning of a document within other text

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

    Args:
        schema: File of the schema, or the schema itself; draft 2020-12, without remote references.
        canonical: Whether key order (the schema's) and white space (none) are part of the contract.
        sets: Dotted paths of arrays whose order does not matter for content.
    """

    def __init__(self, schema: str | dict[str, Any], canonical: bool = False, sets: list[str] | None = None) -> None:
        name = schema if isinstance(schema, str) else "data.format.schema"
        self.schema = _read(schema) if isinstance(schema, str) else schema
        _check_schema(self.schema, name)
        self._validator = _Validator(self.schema, format_checker=FormatChecker())
        self._is_canonical = canonical
        self.sets = frozenset(sets or ())
        leaves = dict(self._walk(self.schema))
        self.fields = tuple(leaves)
        self.derived = frozenset(path for path, node in leaves.items() if _is_derived(node))
        if unknown := self.sets - leaves.keys():
            raise UserError(f"data.format.sets: {name} declares no array at {', '.join(sorted(unknown))}")

    def parse(self, text: str) -> Any:
        if text[:1] in (" ", "\t", "\n", "\r") or text[-1:] in (" ", "\t", "\n", "\r"):
            raise SyntaxProblem("other", "white space stands around the document")
        return loads_strict(text)

    def problems(self, value: Any) -> list[Problem]:
        try:
            errors = list(islice(self._validator.iter_errors(value), MAX_PROBLEMS))
        except RecursionError:
            return [Problem("wrong_type", "too_deep", "$: nested deeper than the schema can be followed")]
        return [_problem(error) for error in errors]

    def documents(self, text: str) -> Iterator[tuple[int, int]]:
        yield from super().documents(text)
        end = 0
        for match in islice(re.finditer(r"[{\[]", text), MAX_STARTS):
            if match.start() >= end and (found := document_end(text, match.start())) is not None:
                end = found
                yield match.start(), end

    def canonical(self, value: Any) -> str | None:
        if not self._is_canonical:
            return None
        return json.dumps(self._ordered(value, self.schema), ensure_ascii=False, separators=(",", ":"))

    def value_spans(self, text: str) -> list[tuple[int, int]]:
        spans = []
        for match in _LEAF.finditer(text):
            if not match[1]:
                quoted = match[0].startswith('"')
                spans.append((match.start() + quoted, match.end() - quoted))
        return spans

    def to_dict(self) -> dict[str, Any]:
        args = {"schema": self.schema, "canonical": self._is_canonical, "sets": sorted(self.sets)}
        return super().to_dict() | {"init_args": args}

    def _walk(self, node: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
        """The declared leaves: paths of all properties that are not themselves objects with properties."""
        node = self._resolve(node)
        for key, inner in node.get("properties", {}).items() if isinstance(node, dict) and depth < 8 else ():
            inner_path = f"{path}.{key}" if path else key
            nested = list(self._walk(inner, inner_path, depth + 1))
            yield from nested or [(inner_path, self._resolve(inner))]

    def _resolve(self, node: Any) -> Any:
        for _ in range(8):
            if not (isinstance(node, dict) and str(node.get("$ref", "")).startswith("#/")):
                break
            target: Any = self.schema
            for part in node["$ref"][2:].split("/"):
                part = part.replace("~1", "/").replace("~0", "~")
                target = target.get(part, {}) if isinstance(target, dict) else {}
            node = target
        return node

    def _ordered(self, value: Any, node: Any) -> Any:
        node = self._resolve(node)
        node = node if isinstance(node, dict) else {}
        if isinstance(value, dict):
            properties = node.get("properties", {})
            keys = [k for k in properties if k in value] + sorted(k for k in value if k not in properties)
            return {k: self._ordered(value[k], properties.get(k)) for k in keys}
        if isinstance(value, list):
            return [self._ordered(item, node.get("items")) for item in value]
        return value


def _read(path: str) -> Any:
    try:
        return loads_strict(Path(path).read_text(encoding="utf-8-sig").strip())
    except OSError as error:
        raise UserError(f"data.format.schema: {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def _check_schema(schema: Any, name: str) -> None:
    try:
        Draft202012Validator.check_schema(schema)
        for node in _nodes(schema):
            for key in ("$ref", "$dynamicRef"):
                if isinstance(node.get(key), str) and not node[key].startswith("#"):
                    raise UserError(f"{name}: {key} {node[key]!r} leads out of the file; copy what it names into $defs")
        _Validator(schema).is_valid({})  # a reference that leads nowhere shows itself here, not in training
    except SchemaError as error:
        raise UserError(f"{name}: not a JSON Schema ({error.json_path}: {error.message[:120]})") from None
    except RecursionError:
        raise UserError(f"{name}: a $ref leads back to itself without end") from None
    except UserError:
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("referencing", "jsonschema"):
            raise
        raise UserError(f"{name}: a $ref leads nowhere ({str(error)[:120]})") from None


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for inner in schema.values():
            yield from _nodes(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _nodes(inner)


def _is_derived(node: Any) -> bool:
    items = node.get("items") if isinstance(node, dict) else None
    return isinstance(node, dict) and (
        "enum" in node or "const" in node or node.get("type") == "boolean" or (items is not None and _is_derived(items))
    )


def _matches(pattern: str, text: str) -> bool:
    try:
        return regex.search(pattern, text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        return False


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not _matches(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, dict):
        for pattern, subschema in patterns.items():
            for key, value in instance.items():
                if _matches(pattern, key):
                    yield from validator.descend(value, subschema, path=key, schema_path=pattern)


_Validator = extend(Draft202012Validator, {"pattern": _pattern, "patternProperties": _pattern_properties})


def _problem(error: ValidationError) -> Problem:
    while error.context:  # anyOf, oneOf: the alternative that came closest says what is wrong
        branches: dict[Any, list[ValidationError]] = {}
        for inner in error.context:
            branches.setdefault(inner.schema_path[0], []).append(inner)
        deepest = lambda found: max(len(e.absolute_path) for e in found)  # noqa: E731
        error = min(branches.values(), key=lambda found: (-deepest(found), len(found)))[0]
    keyword, value = str(error.validator), error.instance
    detail = f"{error.json_path}: {' '.join(error.message.split())[:200]}"
    if keyword == "type":
        got = "null" if value is None else _NAMES.get(type(value), type(value).__name__)
        wanted = error.validator_value if isinstance(error.validator_value, str) else "other"
        wanted = "number" if wanted == "integer" else wanted
        subkind = "null_not_allowed" if value is None else f"{wanted}_as_{got}"
        return Problem("wrong_type" if error.absolute_path else "wrong_root", subkind, detail)
    return Problem(_KINDS.get(keyword, "bad_value_form"), keyword, detail)

"""JSON that keeps a JSON Schema (draft 2020-12), judged by the `jsonschema` library and read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from jsonschema.exceptions import ValidationError

from formtune.errors import UserError
from formtune.formats.contract import Format, answer_start
from formtune.formats.grammar import json_rules
from formtune.formats.keywords import CHECK_SECONDS, errors_in_time
from formtune.formats.schema import make_validator, read_schema, resolver, schema_nodes
from formtune.formats.strict_json import find_documents, first_error, loads_strict
from formtune.formats.verdict import Problem, SyntaxProblem

MAX_PROBLEMS = 20  # per text: more do not help a reader
MAX_FIELDS = 1000  # of a contract; references to references can multiply without end

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
        canonical: Whether key order (the schema's) and white space (none) are part of the contract.
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
        self._lookup = resolver(self._root).lookup
        self.is_canonical, self.trailing_newline = canonical, trailing_newline
        self.sets = frozenset(sets or ())
        try:
            leaves = dict(islice(self._leaves(self._root), MAX_FIELDS + 1))
        except RecursionError:
            raise UserError(f"{name}: the schema is nested too deeply; use fewer $ref within each other") from None
        if len(leaves) > MAX_FIELDS:
            raise UserError(f"{name}: more than {MAX_FIELDS} fields; say `additionalProperties` or items for the rest")
        self.fields = tuple(leaves)
        worked_out = [path for path, node in leaves.items() if self._is_derived(node)]
        self.derived = frozenset([*worked_out, *(derived or ())])
        arrays = {path for path, node in leaves.items() if any("items" in part for part in self._parts(node))}
        if unknown := self.sets - arrays:
            raise UserError(f"data.format.sets: {name} declares no array at {', '.join(sorted(unknown))}")
        if wrong := set(derived or ()) - set(leaves):
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
        return json.dumps(self._ordered(value, self._root), ensure_ascii=False, separators=(",", ":"))

    def value_spans(self, text: str) -> list[tuple[int, int]]:
        spans = []
        for match in _LEAF.finditer(text):
            if not match[1]:
                quoted = match[0].startswith('"')
                spans.append((match.start() + quoted, match.end() - quoted))
        return spans

    def grammar(self) -> str | None:
        if self.is_canonical:
            self._check_key_order()
        return json_rules(self._root, self.is_canonical, self.trailing_newline)

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        return found | {"init_args": found["init_args"] | {"schema": self.schema}}

    def _parts(self, node: Any, seen: set[int] | None = None) -> Iterator[dict[str, Any]]:
        """The node and all that `$ref`, allOf, anyOf and oneOf add to it, each once."""
        seen = set() if seen is None else seen
        if isinstance(node, dict) and id(node) not in seen:
            seen.add(id(node))
            yield node
            added = [self._lookup(node["$ref"]).contents] if "$ref" in node else []
            for inner in (*added, *node.get("allOf", ()), *node.get("anyOf", ()), *node.get("oneOf", ())):
                yield from self._parts(inner, seen)

    def _properties(self, node: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part in self._parts(node):
            found = part.get("properties", {}) | found
        return found

    def _check_key_order(self) -> None:
        """A grammar takes an object's keys part by part; refuse where their canonical order is another one."""
        for path, node in schema_nodes(self._root):
            sources = node.keys() & {"properties", "$ref", "allOf", "anyOf", "oneOf"}
            parts = [list(part["properties"]) for part in self._parts(node) if "properties" in part]
            order = list(self._properties(node))
            mixed = (
                len(sources) > 1 or "allOf" in sources or any(part != sorted(part, key=order.index) for part in parts)
            )
            if len(parts) > 1 and mixed:
                raise UserError(
                    f"data.format.schema: {path}: the canonical order of keys from several places cannot be put in a "
                    "grammar; name all keys in one place or decode without one"
                )

    def _leaves(self, node: Any, path: str = "", above: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
        """Paths of the declared properties that are no objects with properties, or that hold themselves again."""
        own = {id(part) for part in self._parts(node) if "properties" in part}
        if path and (not own or own & above):
            yield path, node
            return
        for key, inner in self._properties(node).items():
            if "." not in key:  # such a key cannot be named by a dotted path
                yield from self._leaves(inner, f"{path}.{key}" if path else key, above | own)

    def _is_derived(self, node: Any) -> bool:
        parts = [inner for part in self._parts(node) for inner in (part, *self._parts(part.get("items")))]
        return any("enum" in part or "const" in part or part.get("type") == "boolean" for part in parts)

    def _ordered(self, value: Any, node: Any) -> Any:
        if isinstance(value, dict):
            properties = self._properties(node)
            keys = [k for k in properties if k in value] + sorted(k for k in value if k not in properties)
            return {k: self._ordered(value[k], properties.get(k)) for k in keys}
        if isinstance(value, list):
            items = next((part["items"] for part in self._parts(node) if "items" in part), None)
            return [self._ordered(item, items) for item in value]
        return value


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

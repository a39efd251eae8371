"""Reads a JSON Schema of any draft from 4 as draft 2020-12, and finds everything wrong with it."""

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import regex
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with

from formtune.errors import UserError
from formtune.formats.bounded import FORMATS, compile_ecma, resolver

MAX_PROBLEMS = 10  # of a schema, named at once
TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")

_DRAFTS: dict[str, Any] = {
    **{"4": jsonschema.Draft4Validator, "6": jsonschema.Draft6Validator, "7": jsonschema.Draft7Validator},
    **{"2019-09": jsonschema.Draft201909Validator, "2020-12": jsonschema.Draft202012Validator},
}
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_SINGLES = {"items", "contains", "unevaluatedItems", "additionalItems", "additionalProperties", "propertyNames"}
_SINGLES |= {"unevaluatedProperties", "not", "if", "then", "else"}
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_LIMITS = {"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}  # booleans in draft 4
_LATER = {"prefixItems", "unevaluatedItems", "unevaluatedProperties", "dependentSchemas", "dependentRequired"}
_NEEDS = {"then": "if", "else": "if", "minContains": "contains", "maxContains": "contains"}
_NAMES: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
_VALUES: dict[str, tuple[str, dict[str, Any]]] = {  # what a keyword holds, if not one schema: in words, as a schema
    **dict.fromkeys(("minimum", "maximum", *_LIMITS), ("a number", {"type": "number"})),
    **dict.fromkeys(
        [f"{end}{what}" for end in ("min", "max") for what in ("Length", "Items", "Properties", "Contains")],
        ("a whole number from 0", {"type": "integer", "minimum": 0}),
    ),
    **dict.fromkeys(("pattern", "format", *_REFERENCES), ("a string", {"type": "string"})),
    **dict.fromkeys((*_MAPS, "dependencies"), ("an object", {"type": "object"})),
    **dict.fromkeys(_LISTS, ("a list of schemas", {"type": "array", "minItems": 1})),
    "type": (
        f"{', '.join(TYPES)} or a list of them",
        {"if": {"type": "array"}, "then": {"minItems": 1, "items": {"enum": TYPES}}, "else": {"enum": TYPES}},
    ),
    "enum": ("a list", {"type": "array"}),
    "required": ("a list of keys, beside `properties`", _NAMES),
    "dependentRequired": ("lists of keys", {"type": "object", "additionalProperties": _NAMES}),
    "multipleOf": ("a number above 0", {"type": "number", "exclusiveMinimum": 0}),
    "uniqueItems": ("true or false", {"type": "boolean"}),
    "const": ("", {}),
}
KEYWORDS = {*_VALUES, *_SINGLES}


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
        elif key in _LISTS and isinstance(value, list):
            for index, inner in enumerate(value):
                yield from schema_nodes(inner, f"{path}.{key}[{index}]")
        elif key in _SINGLES:
            yield from schema_nodes(value, f"{path}.{key}")


@cache
def _spellings(key: str) -> set[str]:
    """A key without case and number, and the same with one letter less."""
    word = re.sub(r"(?:ies|y|s)$", "", re.sub("[^a-z]", "", key.lower()))
    return {word, *(word[:index] + word[index + 1 :] for index in range(1, len(word)))}


@cache
def _meant(key: str) -> str | None:
    """The keyword of which a key is a likely typo: a letter more, less, wrong or moved after the first."""
    checked = sorted(KEYWORDS - {"$defs", "definitions", "not", "if"})
    return next((keyword for keyword in checked if _spellings(key) & _spellings(keyword)), None)


class Reading:
    """A schema, of which no object is at two places, as it is read; raises UserError with all that is wrong with it.

    `root` is in draft 2020-12, with checked keywords only and `$ref` by JSON pointer; `notes` say how it was read.
    """

    def __init__(self, schema: Any, name: str) -> None:
        if not isinstance(schema, dict):
            raise UserError(f"{name}: expected an object as schema, found {schema!r:.40}")
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._unchecked: dict[str, None] = {}
        self._places: dict[int, str] = {}  # where in `root` each schema is, as a pointer
        self._references: list[tuple[dict[str, Any], str, str, Any]] = []
        self._dynamic: list[str] = []  # names of dynamic anchors
        self.root: Any = {}
        self.draft = self._find_draft(schema)
        names = ("$schema", "$anchor", "$dynamicAnchor", "id" if self.draft == "4" else "$id")
        nodes = schema_nodes(schema)
        wrong = [f"{path}.{key}" for path, node in nodes for key in names if not _is_uri(node.get(key, ""))]
        self.problems += [f"{shown}: not a JSON Schema (expected a string that a URI may be)" for shown in wrong]
        if not wrong:  # these names are needed to read the rest
            self._read_all(schema)
        if not self.problems and not self.root.keys() - {"$defs", "definitions"}:
            self.problems = ["the schema has no keyword that is checked, so every JSON text would be valid; say `type`"]
        if self.problems:
            count = f"{len(self.problems)} problems: " if len(self.problems) > 1 else ""
            more = [f"and {len(self.problems) - MAX_PROBLEMS} more"] if len(self.problems) > MAX_PROBLEMS else []
            raise UserError(f"{name}: {count}{' | '.join([*self.problems[:MAX_PROBLEMS], *more])}")

    def _read_all(self, schema: dict[str, Any]) -> None:
        self._keywords = {*_DRAFTS[self.draft].VALIDATORS, *_LIMITS, "$defs", "definitions"}
        self._is_legacy = "unevaluatedItems" not in self._keywords  # up to draft 7
        self._specification = specification_with(_DRAFTS[self.draft].META_SCHEMA["$schema"])
        resource = self._specification.create_resource(schema)
        registry = Registry().with_resource(resource.id() or "", resource)
        with suppress(AttributeError, TypeError):  # raised for a malformed part, which is named below
            registry = registry.crawl()
        self.root = self._read(schema, "", "$", registry.resolver(resource.id() or ""))
        for reference in self._references:  # it grows: what a reference leads to may hold more
            self._resolve(*reference)
        nodes = list(schema_nodes(self.root))
        if {"patternProperties", "unevaluatedProperties"} <= {key for _, node in nodes for key in node}:
            # The library would match these by `re`.
            self.problems.append("patternProperties with unevaluatedProperties is not read; use additionalProperties")
        if not self.problems:
            self._find_loop(nodes)
        if self._unchecked:
            self.notes.append(f"not checked: {', '.join(self._unchecked)}")

    def _find_draft(self, schema: dict[str, Any]) -> str:
        uri = schema.get("$schema")
        if match := re.fullmatch(r"https?://json-schema\.org/draft[-/]0?([\d-]+)/(?:hyper-)?schema#?", str(uri)):
            if match[1] in _DRAFTS:
                return match[1]
            drafts = ", ".join(_DRAFTS)
            self.problems.append(f"$.$schema: draft {match[1]} is not read, only {drafts}; convert the schema")
        nodes, draft = [node for _, node in schema_nodes(schema)], "2020-12"
        keys = {key for node in nodes for key in node}
        has_tuple = any(isinstance(node.get("items"), list) for node in nodes)
        if any(isinstance(node.get(key), bool) for node in nodes for key in _LIMITS):
            draft = "4"
        elif (has_tuple or keys & {"dependencies", "additionalItems"}) and not keys & _LATER:
            draft = "7"
        if uri is not None or draft != "2020-12":
            unknown = "there is no $schema" if uri is None else f"$schema {uri!r:.150} is not a draft"
            self.notes.append(f"{unknown}; its keywords are read as those of draft {draft}")
        return draft

    def _read(self, node: Any, place: str, shown: str, within: Any, boolean: bool = False) -> Any:
        """A schema in draft 2020-12; `place` points to it there, `shown` is its path in the file."""
        if isinstance(node, bool) and (boolean or self.draft != "4"):
            return node
        if not isinstance(node, dict):
            hint = "; a list of schemas is `prefixItems` in this draft" if isinstance(node, list) else ""
            self.problems.append(f"{shown}: not a JSON Schema (expected a schema, found {node!r:.40}{hint})")
            return True
        if "$id" in node or "id" in node:
            within = within.in_subresource(self._specification.create_resource(node))
        self._places[id(node)] = place
        self._dynamic += [str(node[key]) for key in ("$dynamicAnchor", "$recursiveAnchor") if node.get(key)]
        out: dict[str, Any] = {}
        more: list[Any] = []
        for key, value in node.items():
            here = f"{shown}.{key}"
            if not self._is_read(node, key, value, here):
                continue
            to = {"additionalItems": "items", "dependencies": "dependentSchemas"}.get(key, key)
            if key == "items" and isinstance(value, list) and self.draft != "2020-12":
                to = "prefixItems"
            if key in _REFERENCES:
                part: dict[str, Any] = {} if "$ref" in out else out
                part["$ref"] = value
                self._references.append((part, key, here, within))
                more += [part] if part is not out else []
            elif to in _MAPS:
                if key == "dependencies":
                    out["dependentRequired"] = {name: inner for name, inner in value.items() if isinstance(inner, list)}
                    value = {name: inner for name, inner in value.items() if not isinstance(inner, list)}
                out[to] = {
                    name: self._read(inner, f"{place}/{to}/{_escaped(name)}", f"{here}.{name}", within)
                    for name, inner in value.items()
                }
            elif to in _LISTS:
                inner = enumerate(value)
                out[to] = [self._read(part, f"{place}/{to}/{i}", f"{here}[{i}]", within) for i, part in inner]
            elif to in _SINGLES:
                out[to] = self._read(value, f"{place}/{to}", here, within, key.startswith("additional"))
            elif key not in _LIMITS or not isinstance(value, bool):
                out[key] = value
        for key, limit in _LIMITS.items():
            if node.get(key) is True and limit in out:
                out[key] = out.pop(limit)
        if more:
            out["allOf"] = [*out.get("allOf", ()), *more]
        return out

    def _is_read(self, node: dict[str, Any], key: str, value: Any, shown: str) -> bool:
        """Whether a key says something that is checked; if not, it is among the problems or the unchecked."""
        expected, rule = _VALUES.get(key, ("", {}))
        if self.draft == "4" and key in _LIMITS:
            rule = {"type": ["boolean", "number"]}
        if key == "discriminator":  # grammars need it
            return isinstance(value, dict)
        if key not in KEYWORDS:
            if not key.startswith("x-") and (keyword := _meant(key)):
                hint = f"did you mean {keyword!r}? If not, write 'x-{key}'"
                self.problems.append(f"{shown}: not a keyword, so it would be ignored; {hint}")
        elif self._is_legacy and "$ref" in node and key not in ("$ref", "$defs", "definitions"):
            self._unchecked[f"{key} beside $ref, which draft {self.draft} ignores"] = None
        elif _NEEDS.get(key, key) not in self._keywords:
            self._unchecked[f"{key}, which draft {self.draft} does not have"] = None
        elif _NEEDS.get(key, key) not in node or (key == "additionalItems" and not isinstance(node.get("items"), list)):
            return False
        elif not jsonschema.Draft202012Validator(rule).is_valid(value):
            self.problems.append(f"{shown}: not a JSON Schema (expected {expected}, found {value!r:.40})")
        elif key == "format" and value not in FORMATS.checkers:
            self._unchecked[f"format {value!r:.40}"] = None
        else:
            for pattern in [value] if key == "pattern" else value if key == "patternProperties" else ():
                try:
                    compile_ecma(pattern)
                except regex.error as error:
                    self.problems.append(f"{shown}: not a JSON Schema (pattern {pattern!r:.200}: {error})")
            return True
        return False

    def _resolve(self, part: dict[str, Any], key: str, shown: str, within: Any) -> None:
        """Point a reference to its place in `root`."""
        reference, problem, target = part["$ref"], "leads nowhere; fix it or add what it names", None
        try:
            resolved = within.lookup(reference)
            target = resolved.contents
        except (Unresolvable, ValueError, TypeError, AttributeError) as error:
            if type(error) is Unresolvable:
                problem = "leads out of the file; copy what it names into $defs and refer to it there"
        if key != "$ref" and self._dynamic.count(reference.partition("#")[2] or "True") > 1:
            target, problem = None, "can mean more than one schema here; name the one by $ref"
        if not isinstance(target, dict | bool):
            self.problems.append(f"{shown}: {key} {reference!r:.150} {problem}")
        elif id(target) in self._places:
            part["$ref"] = f"#{self._places[id(target)]}"
        else:  # not where schemas are looked for
            parts = self.root.setdefault("$defs", {})
            name = next(name for number in range(len(parts) + 1) if (name := f"_{number}") not in parts)
            part["$ref"], parts[name] = f"#/$defs/{name}", {}
            parts[name] = self._read(target, f"/$defs/{name}", f"{shown}({reference})", resolved.resolver)

    def _find_loop(self, nodes: list[tuple[str, dict[str, Any]]]) -> None:
        resolve, applied = resolver(self.root), dict[int, list[int]]()
        for _, node in nodes:
            inner = [resolve(node["$ref"])] if "$ref" in node else []
            inner += [option for key in ("allOf", "anyOf", "oneOf") for option in node.get(key, ())]
            inner += [node[key] for key in ("not", "if", "then", "else") if key in node]
            applied[id(node)] = [*map(id, (*inner, *node.get("dependentSchemas", {}).values()))]
        try:
            TopologicalSorter(applied).prepare()
        except CycleError as error:
            path = next(path for path, node in nodes if id(node) in error.args[1] and "$ref" in node)
            self.problems.append(f"{path}: leads back to itself without end; put a property or items between")


def _is_uri(value: Any) -> bool:
    """Whether a value may be a URI, also a relative one such as "ticket"."""
    with suppress(ValueError):
        return isinstance(value, str) and bool(urlsplit(value))
    return False


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1").replace("%", "%25")

"""Formats as grammars for llguidance, which may allow less than their format, and more only where noted."""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from formtune.errors import UserError
from formtune.formats import Format, JsonSchema, Reasoning, ToolCalls
from formtune.formats.bounded import ecma, resolver
from formtune.formats.content import Orders
from formtune.formats.dialect import KEYWORDS, schema_nodes, types

_DAYS = "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DATE = f"(?:{_YEAR}-{_DAYS}|{_LEAP}-02-29)"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:[zZ]|[+-]{_CLOCK})"
# llguidance's own versions of these formats allow too much, such as 29 February of every year.
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"{}|\\^`]+",
}

Pairs = dict[tuple[str, str], int]

MAX_KEYS = 64  # of an object in any order: llguidance's rules have one 64-bit parameter

# Enough to indent; bounded, so that a model cannot fill its answer with whitespace.
WHITESPACE = r"([\x20\x09]{1,2}|\x0D?\x0A[\x20\x09]{0,20})"
_SCALARS = {"null", "string", "boolean", "integer"}


def declared(schema: dict[str, Any]) -> str:
    """The rules of a schema as `closed` returns it, with the keys in its own order."""
    return f"answer: %json {json.dumps(schema)}"


def grammar(format: Format, rules: Callable[[dict[str, Any]], str] = declared) -> str | None:
    """The Lark rules of a format, see `Format.grammar`; `rules` writes those of each JSON Schema in it."""
    if type(format).grammar is not Format.grammar:
        return format.grammar()
    if isinstance(format, JsonSchema):
        schema = closed(format.root, format.canonical)
        return declared(schema) if format.canonical else rules(schema)  # a canonical format includes the key order
    if isinstance(format, Reasoning):
        return _after_reasoning(format, grammar(format.format, rules))
    return _tool_calls(format, rules) if isinstance(format, ToolCalls) else None


def _after_reasoning(format: Reasoning, rules: str | None) -> str | None:
    if rules is None:
        return None
    opening, closing = (json.dumps(tag, ensure_ascii=False) if tag else "" for tag in (format.open, format.close))
    # A tag may be a single token, which text does not match. Lazy: the first closing tag ends the reasoning.
    return (
        f"answer: {opening} reasoning SPACE? body\nreasoning: tagged | ( TEXT? {closing} )\n"
        f"tagged[lazy]: TEXT? {closing}\nTEXT: /(?s:.+)/ & ~(ANY?{closing}ANY?)\nANY: /(?s:.+)/\n"
        f"SPACE: /[ \\t\\r\\n]{{1,4}}/\nbody: %lark {{\nstart: answer\n{rules}\n}}"
    )


def _tool_calls(format: ToolCalls, rules: Callable[[dict[str, Any]], str]) -> str:
    if format.syntax == "mistral" or format.tool_choice == "auto" or not format.parameters:
        need = "every row has tools, syntax is hermes or llama and tool_choice is required"
        raise UserError(f"model.constrained: ToolCalls has a grammar only if {need}; turn constrained decoding off")
    key, calls, arguments = "parameters" if format.syntax == "llama" else "arguments", [], []
    for number, (name, parameters) in enumerate(format.parameters.items()):
        opening = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": '
        calls.append(f'{json.dumps(opening, ensure_ascii=False)} arguments{number} "}}"')
        arguments.append(f"arguments{number}:" + str(grammar(parameters, rules)).removeprefix("answer:"))
    tagged = 'tagged ("\\n" tagged)*\ntagged: ( "<tool_call>" "\\n" call "\\n" "</tool_call>" )'
    answer = "call" if format.syntax == "llama" else tagged
    return "\n".join([f"answer: {answer}", f"call: {' | '.join(calls)}", *arguments])


def closed(schema: dict[str, Any], canonical: bool) -> dict[str, Any]:
    """The schema for llguidance: without undeclared keys, with bounded whitespace (none if the format is canonical)."""
    schema = copy.deepcopy(schema)
    nodes = list(schema_nodes(schema))
    # Closing a part of an object would forbid the keys of its other parts.
    can_close = not any(
        "allOf" in node or _is_object(node) + len(node.keys() & {"$ref", "anyOf", "oneOf"}) > 1 for _, node in nodes
    )
    for path, node in nodes:
        place = f"data.format.schema: {path}"
        if "pattern" in node:
            # llguidance reads possessive quantifiers as greedy ones, which can allow more than the format.
            node["pattern"] = ecma(node["pattern"])
        for key in node.keys() & {"enum", "const"} if canonical else ():  # keys without a schema are sorted
            node[key] = json.loads(json.dumps(node[key], sort_keys=True))
        _close(place, node, can_close)
        if node.get("format") in _FORMATS:
            node.setdefault("allOf", []).append({"pattern": f"^{_FORMATS[node.pop('format')]}$"})
        if "number" in types(node) and not node.keys() & {"minimum", "exclusiveMinimum"}:
            node["minimum"] = -1e18  # without any bound llguidance also writes 1e999, which is not finite
    options: dict[str, Any] = {"whitespace_pattern": WHITESPACE}
    if canonical:  # numbers may still differ, such as 1.50 for 1.5
        options = {"whitespace_flexible": False, "json_allowed_escapes": 'nrbtf\\"'}  # no \u000a for \n
    return schema | {"x-guidance": options}


def _close(place: str, node: dict[str, Any], can_close: bool) -> None:
    """Close objects that declare their keys, and tuples; refuse what llguidance would read in another sense."""
    if _is_object(node):
        node.setdefault("type", "object")
        if can_close and "properties" in node:
            node.setdefault("additionalProperties", False)
        if node.get("additionalProperties") is not False or "patternProperties" in node:
            raise UserError(
                f"{place}: constrained decoding needs closed objects: list the keys in `properties`, set "
                "additionalProperties: false, or turn constrained decoding off"
            )
    first = node.get("prefixItems", ())
    if first and (can_close or node.get("maxItems", math.inf) <= len(first)):
        node.setdefault("items", False)
    typed_by = {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}
    inner = {f".properties.{name}": value for name, value in node.get("properties", {}).items()}
    for key in ("prefixItems", "anyOf", "oneOf"):
        inner |= {f".{key}[{index}]": value for index, value in enumerate(node.get(key, ()))}
    inner |= {".items": node.get("items", True)} if "array" in types(node) else {}
    anything = next((below for below, value in inner.items() if value is True), "")
    if anything or not (node.keys() & typed_by or re.search(r"\.allOf\[\d+\]$", place)):
        raise UserError(
            f"{place}{anything}: a grammar needs the type of every value; add it or turn constrained decoding off"
        )


def _is_object(node: dict[str, Any]) -> bool:
    return bool({"properties", "patternProperties"} & node.keys()) or "object" in types(node)


class OrderedRules:
    """Rules for a schema as `closed` returns it, with the keys of its objects in these orders; None allows any order.

    `text` is None if the schema's own order is right. The order is always fixed in parts of allOf, beside a union or
    `$ref`, in tuples, in objects of more than 64 keys, and in a root that may be a scalar. The rules allow no more than
    the schema if llguidance accepts it: then the alternatives of each `oneOf` exclude one another.
    """

    def __init__(self, root: dict[str, Any], orders: Orders | None) -> None:
        self._root, self._resolve = root, resolver(root)
        self._names: dict[int, str] = {}  # of the rules, by schema
        self._rules: dict[str, str] = {}
        self._terminals: dict[str, str] = {}  # by key
        self._free: set[int] = set()  # objects whose keys come in any order
        self.text = f"answer: {self._json(root)}" if self._arrange(orders) else None
        if self._free and not self._starts_with_json(start := self._rule(root)):
            self.text = self._lark(start)

    def _starts_with_json(self, name: str) -> bool:
        """Whether an alternative of the root is a %json, before which llguidance would allow whitespace."""
        options = self._rules[name].split(" | ")
        return any(o.startswith("%json") or (o in self._rules and self._starts_with_json(o)) for o in options)

    def _lark(self, start: str) -> str:
        lines = [
            "answer: %lark {",
            '%llguidance {"ignore_once": true}',
            f"start: {start}",
            *(f"{name}: {body}" for name, body in self._rules.items()),
        ]
        for key, name in self._terminals.items():
            text = json.dumps(json.dumps(key, ensure_ascii=False), ensure_ascii=False)
            lines.append(f'{name}: {text} SPACE? ":" SPACE?')
        # The terminals before a %json include the whitespace between the two.
        lines += ['OPEN: "[" SPACE?', 'COMMA: "," SPACE?', f"SPACE: /{WHITESPACE}/", f"%ignore /{WHITESPACE}/", "}"]
        return "\n".join(lines)

    def _arrange(self, orders: Orders | None) -> bool:
        """Put each object's properties in the order that fits most targets; returns whether any was moved."""
        objects: dict[int, tuple[dict[str, Any], Counter[tuple[str, str]]]] = {}
        seen, stack = set[tuple[int, str]](), [(self._root, "")]
        while stack:
            node, parent_key = stack.pop()
            if not isinstance(node, dict) or (id(node), parent_key) in seen:
                continue
            seen.add((id(node), parent_key))
            stack += [(inner, parent_key) for inner in self._same_place(node)]
            stack += [(inner, key) for key, inner in node.get("properties", {}).items()]
            if node.get("properties"):
                pairs = objects.setdefault(id(node), (node, Counter()))[1]
                for key, following in (orders or {}).get(parent_key, {}).items():
                    pairs.update({(key, other): count for other, count in following.items()})
        is_moved = False
        for number, (node, pairs) in objects.items():
            names = list(node["properties"])
            keys, agrees = _majority_order(names, pairs)
            if len(names) > 1 and (orders is None or not agrees):
                self._free.add(number)
            is_moved |= keys != names
            node["properties"] = {key: node["properties"][key] for key in keys}
        return is_moved

    def _same_place(self, node: dict[str, Any]) -> Iterator[Any]:
        """The schemas that describe the same place as a schema, or its items."""
        yield from (part for key in ("anyOf", "oneOf", "allOf", "prefixItems") for part in node.get(key, ()))
        yield node.get("items")
        if "$ref" in node:
            yield self._resolve(node["$ref"])

    def _rule(self, node: Any) -> str:
        keywords = node.keys() & KEYWORDS - {"$defs", "definitions"} if isinstance(node, dict) else set()
        if keywords == {"$ref"}:
            return self._rule(self._resolve(node["$ref"]))
        if id(node) not in self._names:
            name = self._names[id(node)] = f"part{len(self._names)}"
            self._rules[name] = ""  # keeps the schema's order, and lets a schema refer to itself
            self._rules[name] = self._body(node, name, keywords)
        return self._names[id(node)]

    def _body(self, node: Any, name: str, keywords: set[str]) -> str:
        # Every object is a rule: in a union, the keys of a %json would be other tokens than those of a rule.
        if not {"properties", "$ref"} & {key for _, inner in schema_nodes(node) for key in inner}:
            return self._json(node)
        if keywords in ({"anyOf"}, {"oneOf"}):
            return " | ".join(self._rule(option) for key in keywords for option in node[key])
        kinds, body = {*types(node)}, ""
        if "properties" in keywords <= {"type", "properties", "required", "additionalProperties"}:
            body = self._object(node, name) if kinds <= {"object", *_SCALARS} and node["properties"] else ""
        elif "items" in keywords <= {"type", "items", "minItems", "maxItems"} and kinds <= {"array", *_SCALARS}:
            body = self._array(node)
        if not body:
            return self._json(node)
        others = sorted(kinds & _SCALARS)
        return body + (f" | {self._json({'type': others})}" if others else "")

    def _object(self, node: dict[str, Any], name: str) -> str:
        """The rule of an object, "" if there is none; the bits of its parameter are the keys written so far."""
        keys = [key for key, value in node["properties"].items() if value is not False]
        required, is_free = {*node.get("required", ())}, id(node) in self._free
        if len(keys) > MAX_KEYS or not required <= {*keys}:
            return ""
        if is_free:
            keys.sort(key=lambda key: key not in required)
        needed = f"is_ones([0:{len(required)}])" if is_free and required else "true"
        items, size = [], len(keys)
        for bit, key in enumerate(keys):
            may_come = f"bit_clear({bit})" if is_free else f"and(is_zeros([{bit}:{size}]), {needed})"
            terminal = self._terminals.setdefault(key, f"KEY{len(self._terminals)}")
            value = self._rule(node["properties"][key])
            items.append(f"{terminal} {value} {name}end::set_bit({bit}) %if {may_come}")
            if key in required and not is_free:
                needed = f"bit_set({bit})"  # the next keys come after this one
        # After a comma there must be a key left.
        more = f"not(is_ones([0:{size}]))" if is_free else f"bit_clear({size - 1})"
        self._rules[f"{name}key::_"] = "\n | ".join(items)
        self._rules[f"{name}end::_"] = f'"" %if {needed}\n | COMMA {name}key::_ %if {more}'
        return f'"{{" {name}key::0x0 "}}"' + ("" if required else ' | "{" "}"')

    def _array(self, node: dict[str, Any]) -> str:
        min_items, max_items = int(node.get("minItems", 0)), node.get("maxItems", "")
        if max_items != "" and max_items < max(min_items, 1):
            return ""
        count = f"{max(min_items - 1, 0)},{max_items and int(max_items) - 1}"
        item = self._rule(node["items"])
        return f'OPEN {item} (COMMA {item}){{{count}}} "]"' + ("" if min_items else ' | OPEN "]"')

    def _json(self, node: Any) -> str:
        if not isinstance(node, dict):
            return f"%json {json.dumps(node)}"
        text = json.dumps(node | {"x-guidance": self._root["x-guidance"]})
        if node is not self._root and '"$ref"' in text:  # the root becomes a definition of the part
            text = json.dumps(json.loads(text) | {"$defs": {"root": self._root}})
            text = text.replace('"$ref": "#', '"$ref": "#/$defs/root')
        return f"%json {text}"


def _majority_order(keys: list[str], pairs: Pairs) -> tuple[list[str], bool]:
    """The keys in the order of most pairs, unchanged if these contradict; and whether all pairs have that order."""
    counts = {(a, b): count for (a, b), count in pairs.items() if a in keys and b in keys}
    majority = {(a, b) for (a, b), count in counts.items() if count > counts.get((b, a), 0)}
    before = {key: {a for a, b in majority if b == key} for key in keys}
    order: list[str] = []
    rest = dict.fromkeys(keys)  # keys without a pair stay near their place
    while (first := next((key for key in rest if before[key].isdisjoint(rest)), None)) is not None:
        order.append(first)
        del rest[first]
    return (keys, False) if rest else (order, len(majority) == len(counts))

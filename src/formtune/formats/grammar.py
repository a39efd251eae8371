"""Contracts as grammars: Lark rules in llguidance's dialect, of which `answer` is the whole text.

A grammar may be narrower than its contract (keys come in the schema's order), never wider: what cannot be said so is
refused in one line. llguidance itself refuses most of it; here stands what it would read in another sense.
"""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

from formtune.errors import UserError
from formtune.formats.schema import schema_nodes, types

_REMEDY = "change the contract or decode without a grammar"

# Escapes and sets are read as one; the rest is what the `regex` package and Rust's take for different things.
_TOKEN = re.compile(
    r"\\.|(?P<set>\[\^?\]?(?:\\.|[^\\\]])*\])|(?P<possessive>[*+?}]\+)|(?P<group>\(\?(?!:|P?<\w|[ims]+[:)])..?)", re.S
)
_IN_SET = re.compile(r"\\.|(\[|&&|--|~~)", re.S)

_DAYS = "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DATE = f"(?:{_YEAR}-{_DAYS}|{_LEAP}-02-29)"
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:[zZ]|[+-]{_CLOCK})"
# llguidance knows these formats too, with days and seconds that the contract does not: 29 February of every year.
_FORMATS = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}[Tt]{_TIME}", "uri": "[^:]+:.+"}


def regex_rules(pattern: str) -> str:
    """The grammar of what a regular expression matches from end to end.

    Raises:
        UserError: The expression is none of a regular language, or one that llguidance reads otherwise.
    """
    _check_pattern(pattern, "data.format.pattern")
    escaped = re.sub(r"\\.|[/\n]", lambda match: {"/": r"\/", "\n": r"\n"}.get(match[0], match[0]), pattern, flags=re.S)
    return f"answer: /(?:{escaped})/"


def label_rules(labels: list[str]) -> str:
    """The grammar of one label."""
    return f"answer: {' | '.join(map(json.dumps, labels))}"


def section_rules(sections: list[str]) -> str:
    """The grammar of tagged sections in their order, white space between them free."""
    opened = " /[ \\t\\r\\n]+/? ".join(f'"<{name}>" section{i}' for i, name in enumerate(sections))
    # Lazy: a section ends at the first closing tag.
    bodies = [f"section{i}[lazy]: /(?s:.*)<\\/{name}>/" for i, name in enumerate(sections)]
    return "\n".join([f"answer: {opened}", *bodies])


def json_rules(schema: dict[str, Any], canonical: bool, trailing_newline: bool) -> str:
    """The grammar of JSON that keeps a schema, without keys that the schema does not name.

    Numbers are the exception to "never wider": where the contract is canonical, 1.50 can still be written for 1.5.

    Args:
        schema: A valid schema, draft 2020-12.
        canonical: Whether there is no white space; else it is free.
        trailing_newline: Whether a line feed follows the document.

    Raises:
        UserError: A key could be written twice, or a pattern is none of a regular language.
    """
    schema = copy.deepcopy(schema)
    every = list(schema_nodes(schema))
    # Closing a part of an object would forbid the keys of its other parts.
    whole = not any(
        "allOf" in node or _is_object(node) + len(node.keys() & {"$ref", "anyOf", "oneOf"}) > 1 for _, node in every
    )
    for path, node in every:
        place = f"data.format.schema: {path}"
        for pattern in [node["pattern"]] if "pattern" in node else []:
            _check_pattern(pattern, f"{place}.pattern")
        _check_open(place, node, whole)
        if node.get("format") in _FORMATS:
            node.setdefault("allOf", []).append({"pattern": f"^{_FORMATS[node.pop('format')]}$"})
        if "number" in types(node) and not node.keys() & {"minimum", "exclusiveMinimum"}:
            node["minimum"] = -1e18  # without any bound llguidance also writes 1e999, which is no finite number
    options: dict[str, Any] = {"whitespace_flexible": not canonical}
    if canonical:
        options["json_allowed_escapes"] = 'nrbtf\\"'  # no \u000a for \n
    return f"answer: %json {json.dumps(schema | {'x-guidance': options})}" + (r' "\n"' if trailing_newline else "")


def _check_open(place: str, node: dict[str, Any], whole: bool) -> None:
    """Close objects that name their keys and tuples, refuse other open ones.

    llguidance lets a key in an open object be written twice.
    """
    if _is_object(node):
        node.setdefault("type", "object")
        if whole and "properties" in node:
            node.setdefault("additionalProperties", False)
        if node.get("additionalProperties") is not False or "patternProperties" in node:
            raise UserError(
                f"{place}: a grammar cannot keep keys apart that the schema does not name; name them and say "
                "additionalProperties: false, or decode without a grammar"
            )
    first = node.get("prefixItems", ())
    if first and (whole or node.get("maxItems", math.inf) <= len(first)):
        node.setdefault("items", False)
    says = {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}
    inner = {f".properties.{name}": one for name, one in node.get("properties", {}).items()}
    for key in ("prefixItems", "anyOf", "oneOf"):
        inner |= {f".{key}[{index}]": one for index, one in enumerate(node.get(key, ()))}
    inner |= {".items": node.get("items", True)} if "array" in types(node) else {}
    anything = next((below for below, one in inner.items() if one is True), "")
    if anything or not (node.keys() & says or re.search(r"\.allOf\[\d+\]$", place)):
        raise UserError(
            f"{place}{anything}: a grammar needs the type of every value; add it or decode without a grammar"
        )


def _is_object(node: dict[str, Any]) -> bool:
    return bool({"properties", "patternProperties"} & node.keys()) or "object" in types(node)


def _check_pattern(pattern: str, place: str) -> None:
    for match in _TOKEN.finditer(pattern):
        found = match["possessive"] or match["group"]
        if match["set"]:
            found = next((inner[1] for inner in _IN_SET.finditer(match["set"][1:-1]) if inner[1]), None)
        if found:
            raise UserError(f"{place}: {found!r} has no place in a grammar or another meaning there; {_REMEDY}")

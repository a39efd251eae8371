"""JSON Schemas rewritten for llguidance: a grammar may allow less than its format, more only where noted."""

import copy
import json
import math
import re
from typing import Any

from formtune.errors import UserError
from formtune.formats.bounded import ecma
from formtune.formats.dialect import schema_nodes, types
from formtune.formats.key_orders import WHITESPACE

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
                f"{place}: a grammar cannot rule out duplicates of keys that the schema does not name; name them, set "
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

"""Verdicts and metrics are those of the `jsonschema` library and of a plain count, on thousands of documents."""

import json
import random

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from formtune.base.row import Row
from formtune.evaluation.metrics import count
from formtune.evaluation.outcomes import outcome
from formtune.formats import JsonSchema

CLOSED = {"type": "object", "additionalProperties": False}
SCHEMAS = {
    "ticket": CLOSED
    | {
        "properties": {
            "kind": {"enum": ["new", "old", None, 3]},
            "name": {"type": "string", "minLength": 1, "maxLength": 8, "pattern": "^[A-Za-zé ]*$"},
            "amount": {"type": ["number", "null"], "minimum": 0, "exclusiveMaximum": 1000},
            "urgent": {"type": "boolean"},
            "lines": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": CLOSED
                | {
                    "properties": {"n": {"type": "integer", "maximum": 99}, "code": {"type": "string"}},
                    "required": ["n"],
                },
            },
        },
        "required": ["kind", "name", "lines"],
    },
    "open": {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
    "choice": {
        "oneOf": [
            CLOSED | {"properties": {"ok": {"const": True}, "n": {"type": "integer"}}, "required": ["ok", "n"]},
            CLOSED | {"properties": {"ok": {"const": False}, "why": {"type": "string"}}, "required": ["ok", "why"]},
        ]
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": CLOSED
            | {
                "properties": {
                    "v": {"type": "integer", "multipleOf": 2},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["v"],
            }
        },
    },
    "list": {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "date"}},
}
SCALARS = [
    None,
    True,
    False,
    0,
    1,
    2,
    7,
    -3,
    100,
    1.0,
    0.5,
    1e3,
    "",
    "a",
    "new",
    "Zoé",
    "1",
    "2024-02-29",
    "2023-02-29",
]


def document(dice, schema, root):
    """A document that keeps the schema, or nearly: some are wrong by a maximum or an item too many."""
    if "$ref" in schema:
        schema = root["$defs"]["node"]
    for key in ("oneOf", "enum"):
        if key in schema:
            one = dice.choice(schema[key])
            return document(dice, one, root) if key == "oneOf" else one
    if "const" in schema:
        return schema["const"]
    kinds = schema.get("type", "string")
    kind = dice.choice(kinds) if isinstance(kinds, list) else kinds
    if kind == "object":
        properties = schema["properties"]
        names = [k for k in properties if k in schema.get("required", ()) or dice.random() < 0.5]
        if "kids" in names and dice.random() < 0.6:
            names.remove("kids")
        fields = {key: document(dice, properties[key], root) for key in names}
        if isinstance(extra := schema.get("additionalProperties"), dict) and dice.random() < 0.5:
            fields["more"] = document(dice, extra, root)
        return fields
    if kind == "array":
        return [document(dice, schema["items"], root) for _ in range(dice.randint(schema.get("minItems", 0), 3))]
    if kind == "string":
        return dice.choice(["2024-02-29", "1999-12-31"]) if "format" in schema else dice.choice(["Ann", "Zoé", "b c"])
    step = schema.get("multipleOf", 1)
    return {"integer": step * dice.randint(0, 40), "number": dice.choice([0, 1.5, 999]), "null": None}.get(
        kind, dice.random() < 0.5
    )


def mutated(dice, value):
    """The document with one thing changed at a random depth."""
    if isinstance(value, dict) and value and dice.random() < 0.8:
        key, changed = dice.choice(list(value)), dict(value)
        how = dice.randrange(4)
        if how == 0:
            del changed[key]
        elif how == 1:
            changed[dice.choice(["more", "x", ""])] = dice.choice(SCALARS)
        else:
            changed[key] = mutated(dice, value[key])
        return changed
    if isinstance(value, list) and value and dice.random() < 0.8:
        at, changed = dice.randrange(len(value)), list(value)
        changed[at : at + 1] = dice.choice([[], [value[at], value[at]], [mutated(dice, value[at])]])
        return changed
    return dice.choice([*SCALARS, [], {}, [1], {"a": 1}])


def values(document, path=()):
    """Path and value of all that is neither null nor a container."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, one in inner:
        yield from values(one, (*path, key))
    if not isinstance(document, dict | list | None):
        yield path, type(document), document


@pytest.mark.parametrize("name", SCHEMAS)
def test_verdicts_and_metrics_are_those_of_jsonschema_and_of_a_plain_count(name):
    schema, dice = SCHEMAS[name], random.Random(name)
    format, judge = JsonSchema(schema), Draft202012Validator(schema, format_checker=FormatChecker())
    outcomes, rows = [], 1200
    valid = right = shared = either = 0
    for number in range(rows):
        target = document(dice, schema, schema)
        while not judge.is_valid(target):
            target = document(dice, schema, schema)
        answer = target if number % 3 == 0 else document(dice, schema, schema)
        for _ in range(number % 4):
            answer = mutated(dice, answer)
        text = json.dumps(answer, ensure_ascii=dice.random() < 0.5, indent=dice.choice([None, 1]))
        verdict = format.check(text, target=json.dumps(target))
        assert verdict.exact == judge.is_valid(json.loads(text)), (text, verdict.detail)
        outcomes.append(outcome(Row([], [], "", json.dumps(target), "f:1"), text, verdict, format))
        # `repr` tells 1, 1.0 and True apart; keys have no order.
        same = repr(sorted_keys(answer)) == repr(sorted_keys(target))
        valid, right = valid + verdict.exact, right + (verdict.exact and same)
        both = [set(values(one)) for one in (answer, target)]
        shared, either = shared + 2 * len(both[0] & both[1]), either + len(both[0]) + len(both[1])
    assert 0.2 * rows < valid < 0.9 * rows and 0 < right < valid, "nothing is tested where all are alike"
    counts = count(outcomes, format)
    assert counts["format/exact"] == (valid, rows) and counts["joint/exact"] == (right, rows)
    assert counts["content/field_f1"] == (shared, either)


def sorted_keys(value):
    if isinstance(value, dict):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(one) for one in value] if isinstance(value, list) else value

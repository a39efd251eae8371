"""Every text gets the one verdict it deserves, and no text breaks the judge."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formtune.errors import UserError
from formtune.formats import KINDS, Format, JsonSchema, Labels, Regex, SyntaxProblem, Tagged
from formtune.formats.content import typed

SCHEMA = {
    "type": "object",
    "properties": {
        "p": {"enum": ["low", "high"]},
        "c": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "mail": {"type": ["string", "null"]}},
            "required": ["name", "mail"],
            "additionalProperties": False,
        },
        "i": {"type": "array", "items": {"type": "string"}},
        "n": {"type": "integer", "minimum": 0},
        "d": {"type": "string", "format": "date"},
    },
    "required": ["p", "c", "i", "n", "d"],
    "additionalProperties": False,
}
FORMAT = JsonSchema(SCHEMA)
TARGET = '{"p":"low","c":{"name":"Ann","mail":null},"i":["a","b"],"n":1,"d":"2026-01-02"}'


def swap(old, new):
    assert old in TARGET
    return TARGET.replace(old, new)


CASES = [
    (TARGET, "ok", "", True),
    ("", "empty", "the answer is empty", False),
    (" \n", "empty", "the answer is empty", False),
    (f"```json\n{TARGET}\n```", "extra_text", r"'```json\n' is outside the document", True),
    (f"Sure: {TARGET}", "extra_text", "'Sure: ' is outside", True),
    (f"{TARGET} Done.", "extra_text", "' Done.' is outside", True),
    (TARGET + "\n", "extra_text", r"'\n' is outside", True),
    (" " + TARGET, "extra_text", "' ' is outside", True),
    ("\ufeff" + TARGET, "extra_text", r"'\ufeff' is outside", True),
    (f"<think>{{}}</think>{TARGET}", "extra_text", "'<think>{}</think>' is outside", True),
    (f"Hm.</think>{TARGET}", "extra_text", "'Hm.</think>' is outside", True),  # the prompt opened the block
    (f"<think>{TARGET}", "syntax", "Expecting value at column 1", False),  # only thought, never answered
    (f"See [1]: {TARGET}", "extra_text", "'See [1]: ' is outside", True),
    ("See [1].", "syntax", "Expecting value at column 1", False),
    (f'{{"result":{TARGET},', "syntax", "Expecting property name enclosed in double quotes at column 91", False),
    (f"{TARGET}\n{TARGET}", "extra_text", "", True),
    ('{"a": 1}nosj', "extra_text", "'nosj' is outside", False),
    (TARGET[:-1], "syntax", "Expecting ',' delimiter at column 79", False),
    (swap(":1,", ":1,,"), "syntax", "Expecting property name enclosed in double quotes at column 63", False),
    (f"```json\n{swap('null', 'None')}\n```", "syntax", "Expecting value at column 1", False),
    (swap('"p":', "p:"), "syntax", "Expecting property name enclosed in double quotes at column 2", False),
    (swap('02"}', '02",}'), "syntax", "", False),  # Python 3.13 has better words
    (swap('"', "'"), "syntax", "Expecting property name enclosed in double quotes at column 2", False),
    (swap("null", "None"), "syntax", "Expecting value at column 37", False),
    (swap(":1,", ":NaN,"), "syntax", "NaN is not JSON", False),
    (swap(":1,", ":-Infinity,"), "syntax", "-Infinity is not JSON", False),
    (swap(":1,", ":1e999,"), "syntax", "1e999 is too large for a number", False),
    (swap(":1,", ":1,\"n\":1,"), "syntax", "duplicate key 'n'", False),
    (swap("Ann", "A\nn"), "syntax", "Invalid control character at column 26", False),
    (swap("Ann", "\\ud800"), "syntax", "a lone surrogate is not a character", False),
    (swap(":1,", ":" + "9" * 5000 + ","), "syntax", "an integer of 5000 digits", False),
    ("[" * 99_000, "syntax", "nested deeper than 64 levels", False),
    ("[" * 65 + "]" * 65, "syntax", "nested deeper than 64 levels", False),
    ("I cannot help.", "syntax", "Expecting value at column 1", False),
    ("x" * 100_001, "syntax", "longer than 100,000 characters", False),
    ("[1]", "wrong_root", "$: [1] is not of type 'object'", False),
    ("null", "wrong_root", "$: None is not of type 'object'", False),
    ("[" * 64 + "]" * 64, "wrong_root", "$: [[", False),
    (swap(',"n":1', ""), "missing_key", "$: 'n' is a required property", False),
    (swap(":1,", ":1,\"z\":2,"), "extra_key", "$: the key 'z' is not declared", False),
    (swap(":1,", ':"1",'), "wrong_type", "$.n: '1' is not of type 'integer'", False),
    (swap(":1,", ":true,"), "wrong_type", "$.n: True is not of type 'integer'", False),
    (swap('"Ann"', "null"), "wrong_type", "$.c.name: None is not of type 'string'", False),
    (swap("low", "urgent"), "bad_value_form", "$.p: 'urgent' is not one of 'low', 'high'", False),
    (swap(":1,", ":-1,"), "bad_value_form", "$.n: -1 is less than the minimum of 0", False),
    (swap("01-02", "1-2"), "bad_value_form", "$.d: '2026-1-2' is not a 'date'", False),
    (swap("null", '"x@y"'), "content", "c.mail: 'x@y' instead of nothing", True),
    (swap('["a","b"]', '["a"]'), "content", "i[1]: nothing instead of 'b'", True),
    (swap("Ann", "Bob"), "content", "c.name: 'Bob' instead of 'Ann'", True),
    (swap(":1,", ":1.0,"), "content", "n: 1.0 instead of 1", True),
    (swap('["a","b"]', '["b","a"]'), "content", "i[0]: 'b' instead of 'a'", True),
    (swap("Ann", "\\u0041nn"), "ok", "", True),
    (json.dumps(json.loads(TARGET), indent=2, sort_keys=True), "ok", "", True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "detail", "loose"), CASES)
def test_each_text_gets_its_kind(text, kind, detail, loose):
    verdict = FORMAT.check(text, target=TARGET)
    assert (verdict.kind, verdict.loose) == (kind, loose) and verdict.detail.startswith(detail), verdict.detail
    assert verdict.exact == (kind in ("ok", "content")) and verdict.joint == (kind == "ok")
    assert "\n" not in verdict.detail and (verdict.detail != "") == (kind != "ok")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (TARGET, "the document is complete"),
        (TARGET[:20], "the document is incomplete"),
        (TARGET + " and", "the document is complete"),
        ("Sure: " + TARGET + " and", "the document is complete"),
        (f"<think>{TARGET}", "the document is incomplete"),
    ],
)
def test_an_answer_without_a_stop_token_is_truncated(text, detail):
    verdict = FORMAT.check(text, finished=False, target=TARGET)
    assert (verdict.kind, verdict.detail) == ("truncated", f"no stop token: {detail}")
    assert not verdict.exact and not verdict.loose and not verdict.joint


def test_of_several_problems_the_first_in_order_of_precedence_counts():
    text = swap("low", "urgent")
    for more, kind in (
        (text, "bad_value_form"),
        (text.replace(',"n":1', ""), "missing_key"),
        ("W " + text, "extra_text"),
    ):
        assert FORMAT.check(more, target=TARGET).kind == kind


def test_a_part_of_a_broken_document_is_not_the_document():
    verdict = FORMAT.check(swap(":1,", ":1,,"))
    assert verdict.kind == "syntax" and verdict.value is None


def test_canonical_form_counts_only_where_the_format_says_so():
    strict = JsonSchema(SCHEMA, canonical=True)
    for text in (json.dumps(json.loads(TARGET)), json.dumps(json.loads(TARGET), sort_keys=True, separators=(",", ":"))):
        assert FORMAT.check(text, target=TARGET).joint
        verdict = strict.check(text, target=TARGET)
        assert verdict.kind == "layout"
    assert strict.check(TARGET, target=TARGET).joint


def test_the_document_after_the_thought_is_the_answer():
    verdict = FORMAT.check(f"<think>{swap('Ann', 'Bob')}</think>{TARGET}", target=TARGET)
    assert verdict.content.equal and verdict.loose


def test_null_is_a_valid_document_where_the_schema_allows_it():
    assert JsonSchema({"type": ["object", "null"]}).check("null").exact


def test_arrays_declared_as_sets_are_compared_without_order_but_with_counts():
    format = JsonSchema(SCHEMA, sets=["i"])
    assert format.check(swap('["a","b"]', '["b","a"]'), target=TARGET).joint
    for other in ('["a","a","b"]', '["a","a"]', "[]"):
        assert not format.check(swap('["a","b"]', other), target=TARGET).joint


def test_types_make_values_different():
    assert len({typed(v) for v in (1, 1.0, True, "1", None)}) == 5
    assert typed({"a": [1, {"b": 2}]}) == typed({"a": [1, {"b": 2}]}) != typed({"a": [1, {"b": 2.0}]})


def test_fields_are_compared_one_by_one_and_an_unparseable_answer_has_none_right():
    assert FORMAT.fields == ("p", "c.name", "c.mail", "i", "n", "d")
    assert FORMAT.check(swap("Ann", "Bob"), target=TARGET).content.fields == (True, False, True, True, True, True)
    assert not any(FORMAT.check("no", target=TARGET).content.fields)
    format = JsonSchema({"type": ["object", "null"], "properties": {"a": {}, "b": {}}})
    assert format.check('{"a":1}', target='{"a":1}').content.fields == (True, True)
    for target in ("null", "{}"):  # the target has no values, but an answer without a document is still wrong
        content = format.check("no", target=target).content
        assert not content.equal and not any(content.fields)


def test_references_within_the_schema_are_followed():
    schema = {"$defs": {"who": SCHEMA["properties"]["c"]}, "properties": {"c": {"$ref": "#/$defs/who"}}}
    format = JsonSchema(schema)
    assert format.fields == ("c.name", "c.mail") and format.check('{"c":{"name":1}}').kind == "missing_key"


def test_the_closest_alternative_says_what_is_wrong():
    schema = {
        "anyOf": [{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}, {"type": "null"}]
    }
    verdict = JsonSchema(schema).check('{"a": "x"}')
    assert (verdict.kind, verdict.detail) == ("wrong_type", "$.a: 'x' is not of type 'integer'")


def test_optional_objects_as_pydantic_writes_them_have_their_fields():
    schema = {
        "$defs": {"Who": {"properties": {"name": {}, "kind": {"$ref": "#/$defs/Kind"}}}, "Kind": {"enum": ["x"]}},
        "properties": {"who": {"anyOf": [{"$ref": "#/$defs/Who"}, {"type": "null"}]}},
    }
    format = JsonSchema(schema, canonical=True)
    assert format.fields == ("who.name", "who.kind") and format.derived == {"who.kind"}
    assert format.check('{"who":{"kind":"x","name":1}}').kind == "layout"


def call(method, **parameters):
    inner = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"type": "object", "properties": {"method": {"const": method}, "parameters": inner}, "required": ["method"]}


TEXT, LABEL = {"type": "string"}, {"enum": ["drama", "comedy"]}
CALLS = {
    "$defs": {
        "A": call("hotel", city=TEXT, tags={"type": "array", "items": TEXT}),
        "B": call("movie", title=TEXT, date=TEXT, genre=LABEL, seats={"type": "array", "items": LABEL}),
    },
    "discriminator": {"mapping": {"hotel": "#/$defs/A", "movie": "#/$defs/B"}, "propertyName": "method"},
    "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
}


def test_every_alternative_of_a_union_has_its_fields():
    names = ("city", "tags", "title", "date", "genre", "seats")
    format = JsonSchema(CALLS, derived=["parameters.date"], sets=["parameters.seats"])
    assert format.fields == ("method", *(f"parameters.{name}" for name in names))
    assert format.derived == {"method", "parameters.genre", "parameters.seats", "parameters.date"}
    target = '{"method":"movie","parameters":{"title":"Heat","date":"2026-01-02","genre":"drama","seats":["drama","comedy"]}}'
    text = target.replace('["drama","comedy"]', '["comedy","drama"]')
    assert format.check(text, target=target).joint
    for old, new, field in (
        ('"genre":"drama"', '"genre":"comedy"', "genre"),
        ("2026-01-02", "2026-01-03", "date"),
        ("Heat", "Alien", "title"),
    ):
        content = format.check(target.replace(old, new), target=target).content
        wrong = [path for path, right in zip(format.fields, content.fields, strict=True) if not right]
        assert wrong == [f"parameters.{field}"]
    # A field that is neither in the target nor in the answer is right.
    other = '{"method":"hotel","parameters":{"city":"Rome","tags":[]}}'
    assert format.check(other, target=target).content.fields == (False,) * 7
    assert format.check(other, target=other).content.fields == (True,) * 7


A, B = {"properties": {"a": TEXT}}, {"properties": {"b": LABEL}}
WITHIN = {"type": "array", "items": {"anyOf": [A, B]}}


@pytest.mark.parametrize(
    ("schema", "fields", "derived"),
    [
        ({"anyOf": [A, B]}, "a b", "b"),
        ({"oneOf": [A, B, {"type": "null"}]}, "a b", "b"),
        ({"allOf": [A, B]}, "a b", "b"),
        (A | {"$ref": "#/$defs/x", "$defs": {"x": B}}, "a b", "b"),
        ({"if": {"properties": {"c": {"const": 1}}}, "then": A, "else": B}, "a b", "b"),  # `if` only asks
        ({"anyOf": [{"anyOf": [A, {"$ref": "#/$defs/x"}]}, {"allOf": [B]}], "$defs": {"x": {"properties": {"c": {}}}}},
         "a c b", "b"),
        (A | {"type": ["object", "null"]}, "a", ""),
        ({"properties": {"x": {"anyOf": [B, {"type": "null"}]}}}, "x.b", "x.b"),
        ({"properties": {"x": {"anyOf": [A, {"type": "string"}]}}}, "x x.a", ""),
        ({"properties": {"x": {"anyOf": [A, B | {"type": ["object", "integer"]}]}}}, "x x.a x.b", "x.b"),
        ({"anyOf": [A, {"properties": {"a": LABEL}}]}, "a", "a"),
        ({"anyOf": [A, {"properties": {"a": {"type": ["boolean", "null"]}}}]}, "a", "a"),
        ({"anyOf": [A, {"properties": {"a": {"const": None}}}]}, "a", ""),  # null is not a label
        ({"anyOf": [A, {"properties": {"a": B}}]}, "a a.b", "a.b"),
        ({"properties": {"x": WITHIN}}, "x", "x.b"),
        ({"anyOf": [{"properties": {"x": WITHIN}}, {"properties": {"x": A}}]}, "x x.a", "x.b"),
        ({"properties": {"x": {"type": "array", "prefixItems": [TEXT, LABEL]}}}, "x", "x"),
        (WITHIN, "", "b"),
        ({"anyOf": [LABEL, A]}, "a", ""),
    ],
)  # fmt: skip
def test_fields_are_those_of_every_alternative_however_they_are_composed(schema, fields, derived):
    format = JsonSchema(schema)
    assert format.fields == tuple(fields.split())
    assert format.derived - {""} == set(derived.split())


def test_whole_answers_that_are_labels_are_derived():
    assert "" in JsonSchema({"anyOf": [LABEL, A]}).derived and "" not in JsonSchema({"anyOf": [TEXT, A]}).derived


def test_what_lies_in_arrays_may_be_derived_or_a_set():
    lines = {"type": "array", "items": {"anyOf": [{"properties": {"day": TEXT, "tags": {"type": "array"}}}, A]}}
    format = JsonSchema({"properties": {"lines": lines}}, derived=["lines.day"], sets=["lines.tags"])
    target = '{"lines":[{"day":"2026-01-02","tags":[1,2]}]}'
    assert format.check(target.replace("[1,2]", "[2,1]"), target=target).joint
    assert format.derived == {"lines.day"}
    with pytest.raises(UserError, match=r"no value \(derived\) at lines\.day"):
        JsonSchema({"properties": {"lines": lines}}, sets=["lines.day"])
    with pytest.raises(UserError, match=r"no value \(derived\) at lines\.night"):
        JsonSchema({"properties": {"lines": lines}}, derived=["lines.night"])


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        # The alternative that the document keeps; of two that it keeps, either.
        ({"anyOf": [call("x", b={}, a={}), call("y", a={}, b={})]},
         {'{"method":"x","parameters":{"b":1,"a":2}}': 1, '{"method":"y","parameters":{"a":1,"b":2}}': 1,
          '{"method":"y","parameters":{"b":1,"a":2}}': 0}),
        ({"anyOf": [{"properties": {"b": {}, "a": {}}}, {"properties": {"a": {}, "b": {}}}]},
         {'{"b":1,"a":1}': 1, '{"a":1,"b":1}': 1, '{"a":1, "b":1}': 0}),
        # One that names every key comes before one that leaves some open.
        ({"anyOf": [{"properties": {"a": {}}}, {"properties": {"c": {}, "a": {}}}]},
         {'{"c":1,"a":1}': 1, '{"a":1,"c":1}': 0, '{"a":1}': 1, '{"c":1,"a":1,"d":{"e":1,"f":1}}': 1}),
        ({"properties": {"k": {}}, "if": {"properties": {"k": {"const": 1}}},
          "then": {"properties": {"b": {}, "a": {}}}, "else": {"properties": {"a": {}, "b": {}}}},
         {'{"k":1,"b":1,"a":1}': 1, '{"k":1,"a":1,"b":1}': 0, '{"k":2,"a":1,"b":1}': 1, '{"k":2,"b":1,"a":1}': 0}),
        # Parts that hold together come as the schema writes them.
        ({"properties": {"z": {}}, "allOf": [{"properties": {"b": {}}}, {"properties": {"a": {}, "z": {}}}]},
         {'{"z":1,"b":1,"a":1}': 1, '{"b":1,"a":1,"z":1}': 0}),
    ],
)  # fmt: skip
def test_the_canonical_order_under_alternatives(schema, texts):
    format = JsonSchema(schema, canonical=True)
    for text, right in texts.items():
        verdict = format.check(text)
        assert (verdict.exact, verdict.kind) == ((True, "ok") if right else (False, "layout")), text
        assert format.check(format.write(json.loads(text))).exact


def test_alternatives_that_lead_back_to_themselves_are_ordered_in_time():
    again = {"$ref": "#"}
    schema = {"anyOf": [{"type": "integer"}, {"properties": {"a": again}}, {"properties": {"b": {}, "a": again}}]}
    text, started = '{"a":' * 40 + '{"b":1,"a":2}' + "}" * 40, time.process_time()
    assert JsonSchema(schema, canonical=True).check(text).exact and time.process_time() - started < 1
    started = time.process_time()
    schema = {"anyOf": [{"properties": {"a": again}, "required": [key]} for key in "yz"]}
    verdict = JsonSchema(schema, canonical=True).check('{"a":' * 30 + "1" + "}" * 30)
    assert "took more than" in verdict.detail and time.process_time() - started < 3


def test_a_tree_has_finitely_many_fields():
    node = {"properties": {"v": {}, "left": {"$ref": "#/$defs/n"}, "right": {"$ref": "#/$defs/n"}}}
    format = JsonSchema({"$ref": "#/$defs/n", "$defs": {"n": node}})
    assert format.fields == ("v", "left", "right")
    assert format.check('{"left":{"left":{"v":1}}}', target='{"left":{"left":{"v":1}}}').joint


@pytest.mark.parametrize("within", [lambda node: node, lambda node: {"type": "array", "items": node}])
def test_fields_that_multiply_without_end_are_cut_in_time(within):
    levels = {str(n): {"properties": {k: {"$ref": f"#/$defs/{n + 1}"} for k in "ab"}} for n in range(40)} | {"40": {}}
    started = time.process_time()
    format = JsonSchema(within({"$ref": "#/$defs/0"}) | {"$defs": levels})
    assert len(format.fields) in (0, 2000) and "only the first 2,000 fields" in format.notes[0]
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strng"}, "not a JSON Schema"),
        ({"$ref": "https://example.com/x.json"}, "points to nothing"),
        ({"properties": {"a": {"$ref": "other.json"}}}, "points to nothing"),
        ({"properties": {"a": {"$ref": "#/$defs/gone"}}}, "points to nothing"),
        ({"$ref": "#"}, r"an endless \$ref loop"),
        ({"pattern": "("}, "not a JSON Schema"),
        ({"items": {"requried": ["a"]}}, r"\$.items.requried: not a keyword.* did you mean 'required'"),
        (
            {"$schema": "http://json-schema.org/draft-03/schema#", "type": "object"},
            "draft 3 is not supported; write the schema as draft-07",
        ),
        ([], "must be a JSON object"),
    ],
)
def test_a_schema_that_cannot_judge_is_refused_before_training(schema, message):
    with pytest.raises(UserError, match=message):
        JsonSchema(schema)


def test_what_only_looks_like_a_mistake_in_a_schema_is_accepted():
    data = {"$ref": "https://example.com"}  # data and names of properties, no references
    format = JsonSchema({"$id": "x", "properties": {"$ref": {"const": data}, "requried": {}}, "x-note": 1})
    assert format.check(json.dumps({"$ref": data})).exact
    assert JsonSchema({"pattern": r"^\p{L}+$"}).check('"Zoë"').exact


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", "2024-02-29", "2023-02-29"),
        ("time", "23:59:59Z", "23:59:59"),
        ("date-time", "2024-01-02T03:04:05.678+02:00", "2024-01-02 03:04"),
        ("duration", "P1DT2H", "P"),
        ("email", "a@b.c", "a@"),
        ("ipv4", "1.2.3.4", "1.2.3.256"),
        ("ipv6", "::1", "fe80::1%eth0"),
        ("uri", "https://a.b/c?d#e", "a b"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567-e89b-12d3-a456-4266-1417-4000"),
    ],
)
def test_formats_are_checked(name, good, bad):
    format = JsonSchema({"format": name})
    assert format.check(json.dumps(good)).exact and format.check("1").exact
    assert format.check(json.dumps(bad)).kind == "bad_value_form"


@pytest.mark.parametrize("value", ["ab\n", "\u0661\u0662"])
def test_a_pattern_means_what_it_means_in_json_schema_and_not_in_python(value):
    verdict = JsonSchema({"pattern": r"^(?:[a-z]+|[\d]+|\d+)$"}).check(json.dumps(value))
    assert verdict.kind == "bad_value_form" and "does not match" in verdict.detail


def test_a_schema_file_that_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.json: No such file"):
        JsonSchema(str(tmp_path / "gone.json"))
    (tmp_path / "s.json").write_text('{"a": 1,}')
    with pytest.raises(UserError, match=r"s.json: not valid JSON"):
        JsonSchema(str(tmp_path / "s.json"))


EVIL = "a" * 60 + "!"
STAR = "^(a|a)+$"


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"items": {"pattern": STAR}}, [EVIL] * 50),
        ({"patternProperties": {STAR: {}}, "additionalProperties": False}, {EVIL: 1}),
        ({"$schema": "https://json-schema.org/draft/2020-12/schema", "items": {"$ref": "#"}, "pattern": STAR}, [EVIL]),
        (  # two alternatives that refer to themselves: 2^30 ways through 30 levels
            {"anyOf": [{"properties": {"a": {"$ref": "#"}}, "required": [key]} for key in "yz"]},
            json.loads('{"a":' * 30 + "1" + "}" * 30),
        ),
    ],
)  # fmt: skip
def test_a_check_without_end_is_stopped_and_counts_as_a_failure(schema, value):
    started = time.process_time()
    verdict = JsonSchema(schema).check(json.dumps(value))
    assert verdict.kind == "bad_value_form" and "took more than" in verdict.detail
    assert time.process_time() - started < 3


def test_after_a_check_without_end_no_other_document_in_the_text_is_checked():
    started = time.process_time()
    verdict = JsonSchema({"items": {"pattern": STAR}}).check(f"{json.dumps([EVIL])}\n" * 20)
    assert verdict.kind == "extra_text" and not verdict.loose and time.process_time() - started < 3


def test_a_match_without_end_is_stopped_once_and_not_tried_on_every_line():
    started = time.process_time()
    assert Regex("(a|a)+$").check(f"{EVIL}\n" * 50).detail == "matching took more than 0.5 s"
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 19_000, "{" * 70 + '"' + '\\"' * 45_000, '{"\\"' * 19_000, "{} " * 33_000, "```a\n" * 19_000,
        "```\n" + " " * 99_000, "<x>" * 33_000, "".join(f"<x{i}>" for i in range(12_000)), "<x></x> " * 12_000,
        "a " * 49_000, json.dumps([{"a": i} for i in range(9_000)]),
    ],
)  # fmt: skip
def test_time_grows_with_the_length_of_a_text_and_not_with_its_square(text):
    started = time.process_time()
    for format in (FORMAT, JsonSchema({"uniqueItems": True}), Regex("[a-z]"), Labels(["a"]), Tagged(["x"])):
        format.check(text)
    assert time.process_time() - started < 3


def test_numbers_beyond_a_float_break_no_arithmetic():
    format = JsonSchema({"multipleOf": 0.1})
    assert format.check("1" + "0" * 400).kind == "syntax" and format.check("1" + "0" * 299).kind in KINDS


@pytest.mark.parametrize(
    ("format", "text", "kind", "detail", "loose"),
    [
        (Regex(r"(?P<a>\d+)-(?P<b>\w+)"), "12-x", "ok", "", True),
        (Regex(r"(?P<a>\d+)-(?P<b>\w+)"), "12-x.", "extra_text", "", True),
        (Regex(r"\d+"), "none", "syntax", "'none' does not match the pattern", False),
        (Regex(r"\d+"), "It is 42.", "extra_text", "", True),
        (Regex(r"\d+"), "3 of 42", "syntax", "'3 of 42' does not match the pattern", False),
        (Regex(r"[a-z]+"), "I CANNOT Help you all", "syntax", "'I CANNOT Help you all' does not match", False),
        (Labels(["yes", "no"]), "yes", "ok", "", True),
        (Labels(["yes", "no"]), "maybe", "bad_value_form", "'maybe' is not one of the 2 labels", False),
        (Labels(["yes", "no"]), "yes\n", "extra_text", "", True),
        (Labels(["yes", "no"]), "The answer:\nno", "extra_text", "", True),
        (Labels(["yes", "no"]), "The answer is no.", "extra_text", "", True),
        (Labels(["yes", "no"]), "Well, yes and\nno", "syntax", "not one label", False),  # two labels are not an answer
        (Labels(["yes", ""]), "", "ok", "", True),
        (Labels(["yes", ""]), " ", "empty", "the answer is empty", False),
        (Labels(["yes", ""]), "no", "bad_value_form", "'no' is not one of the 2 labels", False),
        (Labels(["yes", ""]), "It is yes.", "extra_text", "", True),
        (Regex(r"(a\d)?"), "", "ok", "", True),
        (Regex(r"\s*"), " ", "empty", "the answer is empty", False),
        (Labels(["late", "very late"]), "It is very late.", "extra_text", "", True),
        (Tagged(["why", "answer"]), "<why>a</why>\n<answer>b</answer>", "ok", "", True),
        (Tagged(["why", "answer"]), "<why>a</why><answer>b", "syntax", "<answer> has no end", False),
        (Tagged(["why", "answer"]), "<answer>b</answer>", "missing_key", "no <why>", False),
        (Tagged(["why", "answer"]), "<why>a</why><x>c</x><answer>b</answer>", "extra_key", "<x> is", False),
        (Tagged(["why", "answer"]), "<answer>b</answer><why>a</why>", "layout", "the sections are in", False),
        (Tagged(["why", "answer"]), "So: <why>a</why><answer>b</answer>", "extra_text", "", True),
        (Tagged(["answer"]), "<think>a</think>\n<answer>b</answer>", "extra_text", "", True),
        (Tagged(["think", "answer"]), "<think>a</think>\n<answer>b</answer>", "ok", "", True),
    ],
)
def test_texts_that_are_not_json_are_checked_alike(format, text, kind, detail, loose):
    verdict = format.check(text)
    assert (verdict.kind, verdict.loose) == (kind, loose) and verdict.detail.startswith(detail), verdict.detail


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Labels([]), "labels"),
        (lambda: Labels(["a", "a"]), "labels"),
        (lambda: Regex("("), "pattern"),
        (lambda: Tagged(["a b"]), "sections"),
        (lambda: JsonSchema(SCHEMA, sets=["nope"]), "has no array \\(sets\\) or no value \\(derived\\) at nope"),
    ],
)
def test_a_format_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("format", [FORMAT, Regex(r"(?P<a>\d+)"), Labels(["a", "b"]), Tagged(["x"])])
def test_a_format_is_the_same_after_writing_and_reading_it(format):
    record = json.loads(json.dumps(format.to_dict()))
    again = type(format)(**record["init_args"])
    assert again.to_dict() == format.to_dict() and again.fields == format.fields


class Separated(Format):
    """As a user would write it: no care for what a model may answer."""

    fields = ("left",)

    def __init__(self, mark: str = "="):
        self.mark = mark

    def parse(self, text):
        left, right = text.split(self.mark)
        return {"left": left, "right": right}


def test_any_error_of_a_users_parser_is_a_syntax_problem():
    verdict = Separated().check("a=b=c", target="a=b")
    assert (verdict.kind, verdict.detail) == ("syntax", "ValueError: too many values to unpack (expected 2)")
    with pytest.raises(UserError, match="a target has an invalid format"):
        Separated().check("a=b", target="a")


class Forgetful(Separated):
    def __init__(self, separator: str):
        super().__init__(separator)


def test_a_format_that_does_not_store_an_argument_is_refused():
    assert Separated(mark=":").to_dict()["init_args"] == {"mark": ":"}
    with pytest.raises(UserError, match=r"Forgetful must store its argument separator as self\.separator"):
        Forgetful(":").to_dict()


def test_a_users_format_needs_only_parse():
    class Pair(Format):
        fields = ("left", "right")

        def parse(self, text):
            left, middle, right = text.partition("=")
            if not middle:
                raise SyntaxProblem("no =")
            return {"left": left, "right": right}

    verdict = Pair().check("a=c", target="a=b")
    assert verdict.kind == "content" and verdict.content.fields == (True, False)
    assert Pair().check("a").kind == "syntax" and Pair().check(" ").kind == "empty"


@settings(max_examples=300, deadline=2000)
@given(
    st.one_of(
        st.text(), st.text(alphabet='{}[]",:0123456789.eE+-truefalsn \\u'), st.text().map(lambda t: TARGET[:30] + t)
    )
)
def test_no_text_breaks_the_check(text):
    for format in (FORMAT, JsonSchema(SCHEMA, canonical=True), Labels(["a"]), Tagged(["x"])):
        verdict = format.check(text, target={FORMAT: TARGET}.get(format))
        assert verdict.kind in KINDS and (verdict.loose or not verdict.exact)


@settings(max_examples=200, deadline=2000)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_every_json_value_equals_itself_and_no_other(value):
    text = json.dumps(value)
    format = JsonSchema({"minLength": 0})
    assert format.check(text, target=text).joint
    assert not format.check(json.dumps([value]), target=text).joint


def test_formats_need_neither_torch_nor_lightning():
    code = "import sys, formtune.formats; sys.exit(any(m.split('.')[0] in ('torch', 'lightning') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_format_may_be_a_dataclass_which_has_no_hash():
    @dataclass
    class Upper(Format):
        ending: str = "."

        def parse(self, text):
            if not text.isupper():
                raise SyntaxProblem("lower case")
            return text.removesuffix(self.ending)

    assert Upper().of_row(None).check("YES.", target="YES.").exact


def test_a_slow_answer_says_nothing_of_its_target():
    assert Regex(r"(?:a|b|ab)*c|ok").check("ab" * 3000, target="ok").kind == "syntax"


@pytest.mark.parametrize("pattern", ["(?a)(?u)x", "(?V0)(?V1)a"])
def test_flags_that_exclude_one_another_are_refused(pattern):
    with pytest.raises(UserError, match="not a regular expression"):
        Regex(pattern)


def test_a_valid_document_of_nested_unions_is_checked_in_linear_time():
    types = {
        f"N{i}": {
            "type": "object",
            "properties": {
                "kind": {"const": f"k{i}"},
                "child": {"anyOf": [{"oneOf": [{"$ref": f"#/$defs/N{j}"} for j in range(12)]}, {"type": "null"}]},
            },
            "required": ["kind", "child"],
        }
        for i in range(12)
    }
    format = JsonSchema({"$defs": types, "$ref": "#/$defs/N0"})
    document = {"kind": "k0", "child": None}
    for i in range(20):
        document = {"kind": f"k{(19 - i) % 12}", "child": document}
    verdict = format.check(json.dumps(document))
    assert verdict.exact, verdict.detail  # each level had taken twelve times as long as the one below
    document["child"]["child"]["kind"] = "other"
    assert format.check(json.dumps(document)).kind == "bad_value_form"


@pytest.mark.parametrize(("divisor", "text", "valid"), [
    (0.01, "19.99", True), (0.1, "0.3", True), (0.01, "0.005", False), (5, "10", True), (5, "12", False),
    (0.01, "1e300", True),
])  # fmt: skip
def test_multiples_are_those_of_the_decimals(divisor, text, valid):
    assert JsonSchema({"type": "number", "multipleOf": divisor}).check(text).exact == valid


def test_objects_in_an_array_without_order_are_equal_whatever_the_order_of_their_keys():
    item = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    format = JsonSchema({"type": "object", "properties": {"x": {"type": "array", "items": item}}}, sets=["x"])
    verdict = format.check('{"x":[{"a":1,"b":2},{"a":3}]}', target='{"x":[{"a":3},{"b":2,"a":1}]}')
    assert verdict.kind == "ok" and verdict.content.matched == 3


def test_a_long_array_of_alternatives_is_checked_in_time():
    format = JsonSchema({"type": "array", "items": {"anyOf": [{"const": [i]} for i in range(40)]}})
    started = time.process_time()
    assert format.check(json.dumps([[39]] * 12_000)).kind in ("ok", "bad_value_form")
    assert time.process_time() - started < 3

"""Every text gets the one verdict it deserves, and no text breaks the judge."""

import json
import subprocess
import sys
import time

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
CONTRACT = JsonSchema(SCHEMA)
GOLD = '{"p":"low","c":{"name":"Ann","mail":null},"i":["a","b"],"n":1,"d":"2026-01-02"}'
SOURCE = "Ann wants a and b"


def swap(old, new):
    assert old in GOLD
    return GOLD.replace(old, new)


CASES = [
    (GOLD, "ok", "", True),
    ("", "empty", "", False),
    (" \n", "empty", "", False),
    (f"```json\n{GOLD}\n```", "extra_text", "code_fence", True),
    (f"Sure: {GOLD}", "extra_text", "prefix", True),
    (f"{GOLD} Done.", "extra_text", "suffix", True),
    (GOLD + "\n", "extra_text", "suffix", True),
    (" " + GOLD, "extra_text", "prefix", True),
    ("\ufeff" + GOLD, "extra_text", "prefix", True),
    (f"<think>{{}}</think>{GOLD}", "extra_text", "think_block", True),
    (f"{GOLD}\n{GOLD}", "extra_text", "second_document", True),
    ('{"a": 1}nosj', "extra_text", "suffix", False),
    (GOLD[:-1], "syntax", "unbalanced", False),
    (swap(":1,", ":1,,"), "syntax", "quotes", False),
    (swap('02"}', '02",}'), "syntax", "trailing_comma", False),
    (swap('"', "'"), "syntax", "quotes", False),
    (swap("null", "None"), "syntax", "literal", False),
    (swap(":1,", ":NaN,"), "syntax", "literal", False),
    (swap(":1,", ":-Infinity,"), "syntax", "literal", False),
    (swap(":1,", ":1e999,"), "syntax", "literal", False),
    (swap(":1,", ":1,\"n\":1,"), "syntax", "duplicate_key", False),
    (swap("Ann", "A\nn"), "syntax", "control_char", False),
    (swap("Ann", "\\ud800"), "syntax", "other", False),
    (swap(":1,", ":" + "9" * 5000 + ","), "syntax", "other", False),
    ("[" * 100_000, "syntax", "other", False),
    ("I cannot help.", "syntax", "other", False),
    ("x" * 1_000_001, "syntax", "other", False),
    ("[1]", "wrong_root", "object_as_array", False),
    ("null", "wrong_root", "null_not_allowed", False),
    (swap(',"n":1', ""), "missing_key", "required", False),
    (swap(":1,", ":1,\"z\":2,"), "extra_key", "additionalProperties", False),
    (swap(":1,", ':"1",'), "wrong_type", "number_as_string", False),
    (swap(":1,", ":true,"), "wrong_type", "number_as_boolean", False),
    (swap('"Ann"', "null"), "wrong_type", "null_not_allowed", False),
    (swap("low", "urgent"), "bad_value_form", "enum", False),
    (swap(":1,", ":-1,"), "bad_value_form", "minimum", False),
    (swap("01-02", "1-2"), "bad_value_form", "format", False),
    (swap("null", '"x@y"'), "content", "invented", True),
    (swap('["a","b"]', '["a"]'), "content", "omitted", True),
    (swap("Ann", "Bob"), "content", "mismatch", True),
    (swap(":1,", ":1.0,"), "content", "mismatch", True),
    (swap('["a","b"]', '["b","a"]'), "content", "mismatch", True),
    (swap("Ann", "\\u0041nn"), "ok", "", True),
    (json.dumps(json.loads(GOLD), indent=2, sort_keys=True), "ok", "", True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "subkind", "loose"), CASES)
def test_each_text_gets_its_kind(text, kind, subkind, loose):
    verdict = CONTRACT.check(text, gold=GOLD, source=SOURCE)
    assert (verdict.kind, verdict.subkind, verdict.loose) == (kind, subkind, loose), verdict.detail
    assert verdict.exact == (kind in ("ok", "content")) and verdict.joint == (kind == "ok")
    assert "\n" not in verdict.detail and (verdict.detail != "") == (kind != "ok")
    assert list(verdict.kinds) == sorted(verdict.kinds, key=KINDS.index)


@pytest.mark.parametrize(("text", "subkind"), [(GOLD, "runaway"), (GOLD[:20], "unclosed"), (GOLD + " and", "runaway")])
def test_an_answer_without_a_stop_token_is_truncated(text, subkind):
    verdict = CONTRACT.check(text, finished=False, gold=GOLD)
    assert (verdict.kind, verdict.subkind, verdict.terminated, verdict.loose) == ("truncated", subkind, False, False)


def test_all_problems_are_kept():
    verdict = CONTRACT.check("Well, " + swap("low", "urgent").replace(',"n":1', ""), gold=GOLD)
    assert verdict.kinds == ("extra_text", "missing_key", "bad_value_form", "content")


def test_a_part_of_a_broken_document_is_not_the_document():
    verdict = CONTRACT.check(swap(":1,", ":1,,"))
    assert verdict.kinds == ("syntax",) and verdict.value is None


def test_canonical_form_counts_only_where_the_contract_says_so():
    strict = JsonSchema(SCHEMA, canonical=True)
    for text in (json.dumps(json.loads(GOLD)), json.dumps(json.loads(GOLD), sort_keys=True, separators=(",", ":"))):
        assert CONTRACT.check(text, gold=GOLD).joint
        verdict = strict.check(text, gold=GOLD)
        assert (verdict.kind, verdict.canonical, verdict.schema) == ("layout", False, True)
    assert strict.check(GOLD, gold=GOLD).joint


def test_null_is_a_valid_document_where_the_schema_allows_it():
    assert JsonSchema({"type": ["object", "null"]}).check("null").exact


def test_arrays_declared_as_sets_are_compared_without_order_but_with_counts():
    contract = JsonSchema(SCHEMA, sets=["i"])
    assert contract.check(swap('["a","b"]', '["b","a"]'), gold=GOLD).joint
    for other in ('["a","a","b"]', '["a","a"]', "[]"):
        assert not contract.check(swap('["a","b"]', other), gold=GOLD).joint


def test_types_make_values_different():
    assert len({typed(v) for v in (1, 1.0, True, "1", None)}) == 5
    assert typed({"a": [1, {"b": 2}]}) == typed({"a": [1, {"b": 2}]}) != typed({"a": [1, {"b": 2.0}]})


@pytest.mark.parametrize(
    ("text", "ungrounded"),
    [
        (swap("Ann", "wants"), False),  # wrong, but read from the input
        (swap("Ann", "Zoë"), True),
        (swap("low", "high"), False),  # a label need not stand in the input
        (swap("null", '"ann@b"'), True),
    ],
)
def test_a_wrong_value_that_is_not_in_the_input_is_ungrounded(text, ungrounded):
    assert CONTRACT.check(text, gold=GOLD, source=SOURCE).content.ungrounded is ungrounded


def test_fields_are_compared_one_by_one_and_an_unparseable_answer_has_none_right():
    assert CONTRACT.fields == ("p", "c.name", "c.mail", "i", "n", "d")
    assert CONTRACT.check(swap("Ann", "Bob"), gold=GOLD).content.fields == (True, False, True, True, True, True)
    assert not any(CONTRACT.check("no", gold=GOLD).content.fields)


def test_value_spans_are_the_values_and_not_the_keys():
    assert [GOLD[a:b] for a, b in CONTRACT.value_spans(GOLD)] == ["low", "Ann", "null", "a", "b", "1", "2026-01-02"]


def test_references_within_the_schema_are_followed():
    schema = {"$defs": {"who": SCHEMA["properties"]["c"]}, "properties": {"c": {"$ref": "#/$defs/who"}}}
    contract = JsonSchema(schema)
    assert contract.fields == ("c.name", "c.mail") and contract.check('{"c":{"name":1}}').kind == "missing_key"


def test_the_closest_alternative_says_what_is_wrong():
    schema = {
        "anyOf": [{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}, {"type": "null"}]
    }
    verdict = JsonSchema(schema).check('{"a": "x"}')
    assert (verdict.kind, verdict.subkind) == ("wrong_type", "number_as_string")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strng"}, "not a JSON Schema"),
        ({"$ref": "https://example.com/x.json"}, "leads out of the file"),
        ({"$ref": "other.json"}, "leads out of the file"),
        ({"$ref": "#/$defs/gone"}, "leads nowhere"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"pattern": "("}, "not a JSON Schema"),
        (SCHEMA | {"$id": "x"}, None),
    ],
)
def test_a_schema_that_cannot_judge_is_refused_before_training(schema, message):
    if message is None:
        JsonSchema(schema)
    else:
        with pytest.raises(UserError, match=message):
            JsonSchema(schema)


def test_a_schema_file_that_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.json: No such file"):
        JsonSchema(str(tmp_path / "gone.json"))
    (tmp_path / "s.json").write_text('{"a": 1,}')
    with pytest.raises(UserError, match=r"s.json: not valid JSON"):
        JsonSchema(str(tmp_path / "s.json"))


def test_patterns_that_backtrack_without_end_are_stopped_and_count_as_no_match():
    evil = "a" * 60 + "!"
    begun = time.perf_counter()
    assert JsonSchema({"pattern": "^(a|a)+$"}).check(json.dumps(evil)).kind == "bad_value_form"
    assert Regex("(a|a)+$", seconds=0.2).check(evil).subkind == "timeout"
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    ("contract", "text", "kind", "subkind", "loose"),
    [
        (Regex(r"(?P<a>\d+)-(?P<b>\w+)"), "12-x", "ok", "", True),
        (Regex(r"(?P<a>\d+)-(?P<b>\w+)"), "12-x.", "extra_text", "suffix", True),
        (Regex(r"\d+"), "none", "syntax", "other", False),
        (Labels(["yes", "no"]), "yes", "ok", "", True),
        (Labels(["yes", "no"]), "maybe", "bad_value_form", "enum", False),
        (Labels(["yes", "no"]), "yes\n", "extra_text", "suffix", True),
        (Labels(["yes", "no"]), "The answer:\nno", "extra_text", "prefix", True),
        (Labels(["yes", "no"]), "Well, yes and\nno", "extra_text", "prefix", True),
        (Tagged(["why", "answer"]), "<why>a</why>\n<answer>b</answer>", "ok", "", True),
        (Tagged(["why", "answer"]), "<why>a</why><answer>b", "syntax", "unbalanced", False),
        (Tagged(["why", "answer"]), "<answer>b</answer>", "missing_key", "section", False),
        (Tagged(["why", "answer"]), "<why>a</why><x>c</x><answer>b</answer>", "extra_key", "section", False),
        (Tagged(["why", "answer"]), "<answer>b</answer><why>a</why>", "layout", "order", False),
        (Tagged(["why", "answer"]), "So: <why>a</why><answer>b</answer>", "extra_text", "prefix", True),
    ],
)
def test_texts_that_are_not_json_are_judged_alike(contract, text, kind, subkind, loose):
    verdict = contract.check(text)
    assert (verdict.kind, verdict.subkind, verdict.loose) == (kind, subkind, loose), verdict.detail


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Labels([]), "labels"),
        (lambda: Labels(["a", "a"]), "labels"),
        (lambda: Regex("("), "pattern"),
        (lambda: Tagged(["a b"]), "sections"),
        (lambda: JsonSchema(SCHEMA, sets=["nope"]), "declares no array at nope"),
    ],
)
def test_a_contract_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("contract", [CONTRACT, Regex(r"(?P<a>\d+)"), Labels(["a", "b"]), Tagged(["x"])])
def test_a_contract_survives_the_way_through_a_file(contract):
    kept = json.loads(json.dumps(contract.to_dict()))
    again = type(contract)(**kept["init_args"])
    assert again.to_dict() == contract.to_dict() and again.fields == contract.fields


def test_a_format_of_ones_own_needs_only_parse():
    class Pair(Format):
        fields = ("left", "right")

        def parse(self, text):
            left, middle, right = text.partition("=")
            if not middle:
                raise SyntaxProblem("other", "no =")
            return {"left": left, "right": right}

    verdict = Pair().check("a=c", gold="a=b")
    assert verdict.kind == "content" and verdict.content.fields == (True, False)
    assert Pair().check("a").kind == "syntax" and Pair().check(" ").kind == "empty"


@settings(max_examples=300, deadline=2000)
@given(
    st.one_of(
        st.text(), st.text(alphabet='{}[]",:0123456789.eE+-truefalsn \\u'), st.text().map(lambda t: GOLD[:30] + t)
    )
)
def test_no_text_breaks_the_judge(text):
    for contract in (CONTRACT, JsonSchema(SCHEMA, canonical=True), Labels(["a"]), Tagged(["x"])):
        verdict = contract.check(text, source=text)
        assert verdict.kind in KINDS and (verdict.loose or not verdict.exact)


@settings(max_examples=200, deadline=2000)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))  # fmt: skip
def test_every_json_value_equals_itself_and_no_other(value):
    text = json.dumps(value)
    contract = JsonSchema({})
    assert contract.check(text, gold=text).joint
    assert not contract.check(json.dumps([value]), gold=text).joint


def test_formats_need_neither_torch_nor_lightning():
    code = "import sys, formtune.formats; sys.exit(any(m.split('.')[0] in ('torch', 'lightning') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The inferred schema takes every document, and is the laxer one where a rule is doubtful."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formtune.formats import JsonSchema
from formtune.start import guesses as inferred
from formtune.start.guesses import common_pattern, is_categorical, string_constraint

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4)
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3)
)


def infer(documents, inputs=None):
    texts = inputs or [""] * len(documents)
    return inferred.infer([(document, text) for document, text in zip(documents, texts, strict=True)])


def accepts(schema, document):
    return JsonSchema(schema).check(json.dumps(document)).exact


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(JSON, min_size=1, max_size=12), st.sampled_from([1, 20]))
def test_the_schema_takes_all_documents(documents, times):
    format = JsonSchema(infer(documents * times))
    assert [it for it in documents if not format.check(json.dumps(it)).exact] == []


@pytest.mark.parametrize(
    "documents, schema",
    [
        ([{"n": 1}, {"n": 2}], {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}),
        ([{"n": 1}, {"n": 2.5}], {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"], "additionalProperties": False}),
        ([{"n": None}, {"n": "x"}, {}], {"type": "object", "properties": {"n": {"type": ["null", "string"]}}, "required": [], "additionalProperties": False}),
        ([["a"], ["b", "c"], []], {"type": "array", "items": {"type": "string"}}),
        ([[{"x": True}], []], {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False}}),
        ([True, False], {"type": "boolean"}),
        ([None], {"type": "null"}),
        (["yes", "no"] * 10, {"enum": ["no", "yes"]}),
        (["yes", "no", None] * 10, {"enum": ["no", "yes", None]}),
        ([1, 2, 3] * 20, {"type": "integer"}),
        (["yes", 1] * 20, {"type": ["integer", "string"]}),
        ([f"2026-03-{n}" for n in range(10, 20)], {"type": "string", "format": "date"}),
        ([f"{n:02}.03.2026" for n in range(1, 20)], {"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+$"}),
        ([f"AB-{n}" for n in range(20)], {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"}),
        ([f"a{n}@b.org" for n in range(20)], {"type": "string", "format": "email"}),
        ([f"name {'abc'[n % 3] * n}" for n in range(20)], {"type": "string"}),
    ],
)  # fmt: skip
def test_the_schema_is_as_expected(documents, schema):
    assert infer(documents) == schema
    assert all(accepts(schema, document) for document in documents)


def test_a_rare_key_is_allowed_and_a_key_that_one_row_lacks_is_not_required():
    schema = infer([{"a": n, "b": n} for n in range(198)] + [{"a": 1, "note": "x"}] * 2)
    assert [*schema["properties"]] == ["a", "b", "note"] and schema["required"] == ["a"]
    assert schema["additionalProperties"] is False


def test_objects_whose_keys_are_data_take_any_key():
    documents = [{"tool": "ab"[n % 2], "arguments": {"city": "x", f"key{n}": n}} for n in range(100)]
    schema = infer(documents)
    arguments = schema["properties"]["arguments"]
    assert arguments == {"type": "object", "properties": {"city": {"enum": ["x"]}}, "required": ["city"]}
    assert accepts(schema, {"tool": "a", "arguments": {"city": "x", "another": [1]}})


def test_one_value_of_another_type_or_form_makes_the_schema_laxer():
    dates = [f"2026-03-{n}" for n in range(10, 30)]
    assert infer([*dates, "next week"]) == {"type": "string"}
    assert infer([*dates, 5]) == {"type": ["integer", "string"]}
    assert infer(["x", *([["y"]] * 300)]) == {"type": ["array", "string"], "items": {"enum": ["y"]}}


def test_values_that_inputs_hold_are_no_enum():
    documents, inputs = [{"city": "Oslo"}, {"city": "Bern"}] * 30, ["to Oslo", "from Bern"] * 30
    assert infer(documents)["properties"]["city"] == {"enum": ["Bern", "Oslo"]}
    assert infer(documents, inputs)["properties"]["city"] == {"type": "string"}


def test_a_set_is_closed_if_its_values_repeat():
    assert is_categorical(Counter("aabb" * 10)) and not is_categorical(Counter("abcdefgh"))
    assert not is_categorical(Counter(dict.fromkeys("abcde", 1)) + Counter("x" * 100))


def test_forms_need_enough_texts():
    assert string_constraint(["2026-03-12"]) == {}
    assert common_pattern(["12.50", "3.10"]) == ""

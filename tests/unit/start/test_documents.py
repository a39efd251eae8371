"""The inferred schema takes every document but the evidently broken ones, and is as strict as the evidence."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formtune.formats import JsonSchema
from formtune.formats.content import Words
from formtune.start.documents import Observed, common_pattern, form, is_closed, without_mistakes

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
    observed = Observed()
    for document, text in zip(documents, inputs or [""] * len(documents), strict=True):
        observed.add(document, Words(text))
    return observed.schema()


def accepts(schema, document):
    return JsonSchema(schema).check(json.dumps(document)).exact


@settings(max_examples=300, deadline=None)
@given(st.lists(JSON, min_size=1, max_size=12))
def test_the_schema_of_few_documents_takes_all_of_them(documents):
    format = JsonSchema(infer(documents))
    assert [it for it in documents if not format.check(json.dumps(it)).exact] == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({"a": st.sampled_from(["x", "y", 1, None]), "b": st.lists(SCALARS, max_size=2)}),
        min_size=1,
        max_size=8,
    )
)
def test_what_a_tenth_of_many_documents_does_is_never_a_mistake(documents):
    repeated = documents * 20
    format = JsonSchema(infer(repeated))
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
        ([1, 2, 3] * 20, {"enum": [1, 2, 3]}),
        (["2026-03-12", "2025-01-02", "2024-02-29"] * 4, {"type": "string", "format": "date"}),
        ([f"{n:02}.03.2026" for n in range(1, 20)], {"type": "string", "pattern": r"^[0-9]{2}\.[0-9]{2}\.[0-9]{4}$"}),
        ([f"AB-{n}" for n in range(20)], {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"}),
        ([f"a{n}@b.org" for n in range(20)], {"type": "string", "format": "email"}),
        ([f"name {'abc'[n % 3] * n}" for n in range(20)], {"type": "string"}),
    ],
)  # fmt: skip
def test_the_schema_is_as_expected(documents, schema):
    assert infer(documents) == schema
    assert all(accepts(schema, document) for document in documents)


def test_a_key_that_one_row_in_a_hundred_has_is_not_allowed():
    documents = [{"a": n} for n in range(198)] + [{"a": 1, "note": "x"}] * 2
    assert list(infer(documents)["properties"]) == ["a"]
    assert list(infer(documents[150:])["properties"]) == ["a", "note"]  # of 50 rows, two are not few


def test_a_rare_key_is_allowed_where_others_come_and_go():
    documents = [{"a": n} | ({"b": n} if n % 2 else {"c": n}) for n in range(400)] + [{"a": 1, "d": 2}]
    assert infer(documents)["required"] == ["a"] and set(infer(documents)["properties"]) == {"a", "b", "c", "d"}


def test_a_key_that_nearly_all_have_is_required():
    assert infer([{"a": n, "b": n} for n in range(299)] + [{"a": 1}])["required"] == ["a", "b"]


def test_a_type_of_few_rows_is_a_mistake_but_several_of_the_usual_type_are_not():
    documents = [{"a": f"x{'y' * n}"} for n in range(300)] + [{"a": 5}, {"a": ["x", "y"]}]
    kinds = infer(documents)["properties"]["a"]
    assert kinds == {"type": ["array", "string"], "items": {"type": "string"}}


def test_values_that_inputs_hold_are_no_enum():
    documents, inputs = [{"city": "Oslo"}, {"city": "Bern"}] * 30, ["to Oslo", "from Bern"] * 30
    assert infer(documents)["properties"]["city"] == {"enum": ["Bern", "Oslo"]}
    assert infer(documents, inputs)["properties"]["city"] == {"type": "string"}


def test_counts_are_no_enum_as_the_next_may_be_larger():
    assert infer([1] * 80 + [2] * 30 + [3] * 4 + [4]) == {"type": "integer"}


def test_objects_whose_keys_are_data_take_any_key():
    documents = [{f"key{n}": n} for n in range(100)]
    assert infer(documents) == {"type": "object", "additionalProperties": {"type": ["integer"]}}


def test_a_mistyped_value_and_a_far_rarer_one_are_no_values_of_the_enum():
    assert without_mistakes(Counter(billing=400, delivery=200, biling=3, Billing=2)) == ["billing", "delivery"]
    assert without_mistakes(Counter(T1=300, T2=250, other=3)) == ["T1", "T2"]
    assert without_mistakes(Counter(a=300, b=40, c=5, d=1)) == ["a", "b", "c", "d"]  # a tail, not a mistake


def test_a_set_is_closed_if_its_values_repeat():
    assert is_closed(Counter("aabb" * 10)) and not is_closed(Counter("abcdefgh"))
    assert not is_closed(Counter(dict.fromkeys("abcde", 1)) + Counter("x" * 100))


def test_forms_need_enough_texts():
    assert form(Counter(["2026-03-12"])) == {}
    assert common_pattern(Counter(["12.50", "3.10"])) == ""


def test_what_answers_do_not_copy_is_derived():
    observed = Observed()
    for n in range(20):
        observed.add({"cents": 100 * n + 50, "who": f"P{n}x", "kind": "ab"[n % 2]}, Words(f"P{n}x owes {n} euros 50"))
    assert list(observed.derived(observed.schema())) == ["cents"]

"""Constrained decoding allows the orders of keys that training targets use, and no document that the format refuses."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_constrained import ANY, DIGIT, RENDERER, UNIONS, closed, document, keys, takes, walk

from conftest import shared
from formtune.base.renderer import Renderer
from formtune.constrained.decoder import Grammar
from formtune.constrained.grammar import MAX_KEYS
from formtune.formats import JsonSchema
from formtune.formats.content import learn_orders

pytest.importorskip("llguidance", reason="needs the extra `constrained`")

NAMES = ["a", "b", "c", "d", 'e"é']


def grammar_for(schema, *targets):
    """The grammar that targets with these documents teach; without any, that of unknown orders."""
    return Grammar(JsonSchema(schema=schema), RENDERER, learn_orders(targets) if targets else None)


def objects(inner):
    shapes = st.dictionaries(st.sampled_from(NAMES), inner, min_size=1, max_size=4)
    return st.tuples(shapes, st.sets(st.sampled_from(NAMES))).map(
        lambda pair: keys("", [key for key in pair[0] if key in pair[1]], **pair[0])
    )


def more(inner):
    arrays = inner.map(lambda item: {"type": "array", "items": item, "maxItems": 2})
    nullable = objects(inner).map(lambda node: node | {"type": ["object", "null"]})
    unions = st.lists(objects(inner), min_size=1, max_size=2).map(lambda parts: {"anyOf": [*parts, DIGIT]})
    return objects(inner) | arrays | nullable | unions


SCHEMAS = st.recursive(st.sampled_from([DIGIT, {"type": "string"}, {"$ref": "#/$defs/x"}]), more, max_leaves=5)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(objects(SCHEMAS), objects(st.just(DIGIT)), st.randoms(use_true_random=False))
def test_every_target_is_accepted_and_every_accepted_text_is_valid_without_a_repeated_key(schema, part, dice):
    schema |= {"$defs": {"x": part}}
    format = JsonSchema(schema=schema)
    targets = [value for _ in range(4) if format.check(json.dumps(value := document(dice, schema, schema))).exact]
    for grammar in (grammar_for(schema, *targets), grammar_for(schema)):
        for value in targets:
            for layout in ({}, {"separators": (",", ":")}, {"indent": 1}):
                text = json.dumps(value, ensure_ascii=False, **layout)
                assert takes(grammar, text), text
        for _ in range(2):
            text = walk(dice, grammar, 80)  # ends before its last token only if it is long: no state is a dead end
            assert text is None or format.check(text).exact, text


def test_where_targets_agree_their_order_is_the_only_one():
    schema = keys("abcd", "a", p=keys("xy", ""))
    grammar = grammar_for(schema, {"c": 1, "a": 1}, {"a": 1, "b": 1, "p": {"x": 1, "y": 1}}, {"a": 1, "p": {"y": 1}})
    assert takes(grammar, '{"c":1,"a":1,"b":1}') and takes(grammar, '{"a":1,"p":{"x":1,"y":2}}')
    assert not takes(grammar, '{"a":1,"c":1}') and not takes(grammar, '{"a":1,"p":{"y":1,"x":2}}')


def test_where_targets_differ_every_order_is_allowed_and_required_keys_still_are():
    schema = keys("abc", "ab", p={"type": "array", "items": keys("xyz", "z")})
    free = {"a": 1, "b": 2, "p": [{"x": 1, "z": 2}, {"z": 1, "x": 1}]}
    grammar = grammar_for(schema, free)
    for text in ('{"a":1,"b":2}', '{"a":1,"b":2,"p":[{"z":1,"y":2}, {"y": 1 , "z":2}]}', '{"a":1,"b":2,"p":[]}'):
        assert takes(grammar, text), text
    for text in ('{"b":1,"a":2}', '{"a":1}', '{"a":1,"b":2,"p":[{"x":1}]}', '{"a":1,"b":2,"p":[{"z":1,"z":1}]}'):
        assert not takes(grammar, text), text


@pytest.mark.parametrize("targets", [[{"a": 1, "b": 2}], [{"a": 1, "b": 2}, {"b": 2, "a": 1}]])
def test_white_space_is_bounded_everywhere(targets):
    grammar = grammar_for(keys("ab"), *targets)
    assert takes(grammar, '{\n  "a": 1,\n  "b": 2\n}')
    pieces = ["{", '"a":', "1,", '"b":', "2", "}"]
    for at in range(1, len(pieces)):
        assert not takes(grammar, "".join(pieces[:at]) + " " * 60 + "".join(pieces[at:]))


def test_a_schema_that_refers_to_itself_allows_every_order_at_every_depth():
    node = keys("v", "v", kids={"type": "array", "items": {"$ref": "#/$defs/node"}})
    schema = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    grammar = grammar_for(schema, {"v": 1, "kids": [{"kids": [], "v": 1}]})
    assert takes(grammar, '{"kids":[{"v":1,"kids":[{"kids":[],"v":2},{"v":3}]}],"v":1}')
    assert not takes(grammar, '{"kids":[{"kids":[]}],"v":1}')


@pytest.mark.parametrize("name", sorted(UNIONS))
def test_unions_too_accept_every_target(name):
    schema, dice = UNIONS[name], random.Random(name)
    format, plain = JsonSchema(schema=schema), Grammar(JsonSchema(schema=schema, canonical=True), RENDERER)
    values = (document(dice, schema, schema) for _ in range(40))
    targets = [value for value in values if format.check(json.dumps(value)).exact]
    composed = {"allOf", "keys and anyOf", "anyOf and keys", "two unions", "literals"}
    composed |= {"reference with keys before", "reference with keys behind", "tuple", "tuples"}
    composed |= {"nested", "open", "open below", "types", "several below", "same key"}  # some alternative of the whole
    for grammar in (grammar_for(schema, *targets), grammar_for(schema)):
        accepted = [takes(grammar, json.dumps(value)) for value in targets]
        assert targets and (all(accepted) or name in composed), name
        for _ in range(10):
            text = walk(dice, grammar)
            assert text is None or format.check(text).exact, text
    orders = learn_orders(targets)
    canonical = Grammar(JsonSchema(schema=schema, canonical=True), RENDERER, orders)  # whose order is the format's
    for value in targets:
        text = json.dumps(value, separators=(",", ":"))
        assert takes(canonical, text) == takes(plain, text)


def test_an_object_with_too_many_keys_keeps_the_most_frequent_order():
    names = [f"k{i}" for i in range(MAX_KEYS + 1)]
    schema = closed("", "", wide=closed(names, ""), n=DIGIT)
    targets = [{"wide": {"k1": 1, "k0": 1}, "n": 1}, {"wide": {"k1": 1, "k0": 1}}, {"n": 1, "wide": {"k0": 1, "k1": 1}}]
    grammar = grammar_for(schema, *targets)
    assert [takes(grammar, json.dumps(target)) for target in targets] == [True, True, False]
    del schema["properties"]["wide"]["properties"]["k2"]
    assert takes(grammar_for(schema, *targets), json.dumps({"n": 1, "wide": dict.fromkeys(reversed(names[:2]), 1)}))


@pytest.mark.slow
def test_snips_targets_of_every_order_are_accepted():
    rows = [json.loads(line) for line in shared("data/snips/train.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in shared("data/snips/validation.jsonl").read_text().splitlines()]
    targets = [json.loads(row["completion"]) for row in rows]
    text = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    slots = sorted({slot for target in targets for slot in target["slots"]})
    intents = sorted({target["intent"] for target in targets})
    schema = closed("", intent={"enum": intents}, slots=closed("", [], **dict.fromkeys(slots, text)))
    renderer = Renderer.load(str(shared("tokenizers/qwen3")))
    free = Grammar(JsonSchema(schema=schema), renderer, learn_orders(targets))
    forced = Grammar(JsonSchema(schema=schema), renderer, {})  # as if no target had two keys
    counts = []
    for grammar, texts in [(free, rows[::7]), (free, held_out), (forced, held_out)]:
        written = [renderer.tokenizer(row["completion"], add_special_tokens=False)["input_ids"] for row in texts]
        end = renderer.stop_ids[0]
        counts.append(sum(grammar.accepted(grammar.matcher(ANY), [*ids, end]) > len(ids) for ids in written))
    assert counts[0] == len(rows[::7]) and counts[1] == len(held_out) and counts[2] < 0.6 * len(held_out)

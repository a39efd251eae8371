"""Reasoning, and then an answer that its own format checks."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SCHEMA
from formtune.data.settings import system_prompt
from formtune.errors import UserError
from formtune.formats import JsonSchema, Labels, Reasoning, Regex, Tagged, ToolCalls
from formtune.formats.content import learn_orders

ANSWER = '{"n":1,"s":"x"}'
TARGET = f"<think>\nOne.\n</think>\n\n{ANSWER}"
JSON = Reasoning(JsonSchema(SCHEMA))


@pytest.mark.parametrize(
    ("format", "text", "kind", "detail", "loose"),
    [
        (JSON, TARGET, "ok", "", True),
        (JSON, f"<think></think>{ANSWER}", "ok", "", True),
        (JSON, f"<think>\n\n</think>\n\n{ANSWER}", "ok", "", True),
        (JSON, f"<think>{ANSWER} or <think> [1]</think> {ANSWER}", "ok", "", True),
        (JSON, '<think>a</think>{"n":2,"s":"x"}', "content", "n: 2 instead of 1", True),
        (JSON, ANSWER, "missing_key", "no <think>...</think> before the answer", False),
        (JSON, f"Hm.</think>{ANSWER}", "extra_text", "'Hm.</think>' is outside", False),
        (JSON, f"<think>a {ANSWER}", "syntax", "the reasoning has no </think>", False),
        (JSON, "", "empty", "the answer is empty", False),
        (JSON, "<think>a</think>\n", "empty", "the answer is empty", False),
        (JSON, f"So: <think>a</think>{ANSWER}", "extra_text", "'So: ' is before <think>", True),
        (JSON, f"\n<think>a</think>{ANSWER}", "extra_text", "'\\n' is before <think>", True),
        (JSON, f"<think>a</think>{ANSWER}\n", "extra_text", "'\\n' is outside the document", True),
        (JSON, f"<think>a</think>b</think>{ANSWER}", "extra_text", "'b</think>' is outside", True),
        (JSON, f"<think>a</think>```json\n{ANSWER}\n```", "extra_text", "'```json\\n' is outside", True),
        (JSON, '<think>a</think>{"n":1}', "missing_key", "$: 's' is a required property", False),
        (JSON, '<think>a</think>{"n":"1","s":"x"}', "wrong_type", "$.n: '1' is not of type", False),
        (JSON, "<think>a</think>[]", "wrong_root", "$: [] is not of type 'object'", False),
        (Reasoning(JsonSchema(SCHEMA, canonical=True)), TARGET, "ok", "", True),
        (Reasoning(JsonSchema(SCHEMA, canonical=True)), TARGET.replace(":1", ": 1"), "layout", "key order", False),
        (Reasoning(JsonSchema(SCHEMA), open=""), f"One.\n</think>\n{ANSWER}", "ok", "", True),
        (Reasoning(JsonSchema(SCHEMA), open=""), ANSWER, "syntax", "the reasoning has no </think>", False),
        (Reasoning(JsonSchema(SCHEMA), "[R]", "[/R]"), f"[R]a </think>[/R]{ANSWER}", "ok", "", True),
        (Reasoning(JsonSchema(SCHEMA), "[R]", "[/R]"), TARGET, "extra_text", "'<think>", False),
    ],
)
def test_the_answer_after_the_reasoning_is_checked_by_its_own_format(format, text, kind, detail, loose):
    target = f"{format.open}{format.close}{ANSWER}"
    verdict = format.check(text, target=target)
    assert (verdict.kind, verdict.loose) == (kind, loose) and verdict.detail.startswith(detail), verdict
    assert verdict.exact == (kind in ("ok", "content")) and verdict.joint == (kind == "ok")


def test_an_answer_that_is_cut_within_its_reasoning_is_truncated():
    verdict = JSON.check("<think>One and", finished=False, target=TARGET)
    assert (verdict.kind, verdict.value, verdict.content.matched) == ("truncated", None, 0)


@pytest.mark.parametrize(
    ("inner", "right", "wrong", "kind"),
    [
        (Labels(["yes", "no"]), "yes", "maybe", "bad_value_form"),
        (Regex(r"(?P<a>\d+)-(?P<b>\d+)"), "1-2", "1-x", "syntax"),
        (Tagged(["why", "label"]), "<why>a</why>\n<label>b</label>", "<label>b</label>", "missing_key"),
    ],
)
def test_any_format_can_follow_the_reasoning(inner, right, wrong, kind):
    format = Reasoning(inner)
    assert format.check(f"<think>yes 1-2 <label></think>\n{right}").value == inner.check(right).value
    assert format.check(f"<think>{right}</think>{wrong}").kind == kind == inner.check(wrong).kind
    assert (format.fields, format.sets, format.derived) == (inner.fields, inner.sets, inner.derived)


def test_calls_of_the_rows_tools_can_follow_the_reasoning():
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    format = Reasoning(ToolCalls())
    own = format.of_row(json.dumps([{"name": "weather", "parameters": city}]))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert format.per_row and own.check(f"<think>\nOslo\n</think>\n\n{call}").exact
    assert own.check(f"<think>\nOslo\n</think>\n\n{call.replace('weather', 'time')}").kind == "bad_value_form"


def test_each_row_can_have_its_own_schema():
    format = Reasoning(JsonSchema())
    own = format.of_row(json.dumps(SCHEMA))
    assert format.per_row and not own.per_row and own.fields == ("n", "s") and own.check(TARGET).exact


@given(st.text(alphabet="a<>/think \n{}", max_size=40), st.sampled_from([ANSWER, '{"n":1}', "", "x", f"{ANSWER} "]))
@settings(max_examples=200, deadline=None)
def test_reasoning_is_free_text_up_to_the_first_closing_tag(reasoning, answer):
    text = f"<think>{reasoning}</think>{answer}"
    first, _, rest = text.removeprefix("<think>").partition("</think>")
    verdict, alone = JSON.check(text, target=TARGET), JsonSchema(SCHEMA).check(rest.lstrip(" \n"), target=ANSWER)
    assert (verdict.kind, verdict.value, verdict.content) == (alone.kind, alone.value, alone.content)
    assert JSON.split(text)[0].strip() == f"<think>{first}</think>"


def test_spans_orders_and_the_schema_are_those_of_the_answer():
    value = JSON.check(TARGET).value
    assert value == {"n": 1, "s": "x"} and learn_orders([value]) == learn_orders([json.loads(ANSWER)])
    assert system_prompt("Keep {schema}.", JSON.to_dict()) == f"Keep {json.dumps(SCHEMA, separators=(',', ':'))}."
    assert system_prompt("Keep {schema}.", Reasoning(JsonSchema()).to_dict()) == "Keep {schema}."
    with pytest.raises(UserError, match=r"\{schema\} needs a JsonSchema"):
        system_prompt("Keep {schema}.", Reasoning(Labels(["a"])).to_dict())


def test_it_is_written_to_a_file_with_the_answers_format():
    record = json.loads(json.dumps(JSON.to_dict()))
    inner = record["init_args"].pop("format")
    assert inner == JsonSchema(SCHEMA).to_dict()
    assert record["init_args"] == {"open": "<think>", "close": "</think>"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Reasoning(JSON),
        lambda: Reasoning(Labels(["a"]), close=""),
        lambda: Reasoning(Labels(["a"]), open="</think>"),
        lambda: Reasoning(Labels(["a"]), open="<think>\n"),
    ],
)
def test_tags_and_formats_that_make_no_sense_are_refused(make):
    with pytest.raises(UserError, match="Reasoning needs another format, and two tags without surrounding spaces"):
        make()


@pytest.mark.parametrize(
    "text", ["<think>" * 14_000, "<think></think>" * 6_000, "</think>" * 12_000, "<think>" + "{" * 90_000]
)
def test_time_grows_with_the_length_of_a_text_and_not_with_its_square(text):
    assert not JSON.check(text).exact

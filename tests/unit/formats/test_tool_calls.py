"""Calls are checked by the row's own tools, in the syntax of the chat template."""

import json
import time

import pytest

from formtune.errors import UserError
from formtune.formats import ToolCalls

TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
            },
        },
        {"name": "now"},  # without OpenAI's wrapper and without parameters
    ]
)
PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
VALUE = [{"name": "get_weather", "arguments": {"city": "Paris"}}]


def tag(*calls):
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def call(name, **arguments):
    return tag(json.dumps({"name": name, "arguments": arguments}))


@pytest.mark.parametrize(
    ("syntax", "text", "value"),
    [
        ("hermes", tag(PARIS), VALUE),
        ("hermes", tag(PARIS, '{"name": "now", "arguments": {}}'), [*VALUE, {"name": "now", "arguments": {}}]),
        ("hermes", f"<tool_call>{PARIS}</tool_call>", VALUE),
        ("llama", PARIS.replace("arguments", "parameters"), VALUE),
        ("mistral", f"[TOOL_CALLS] [{PARIS}]", VALUE),
        ("mistral", f'[TOOL_CALLS][{PARIS[:-1]}, "id": "abcdefghi"}}]', VALUE),
    ],
)
def test_calls_are_read_in_the_syntax_of_each_template(syntax, text, value):
    verdict = ToolCalls(syntax).of_row(TOOLS).check(text, target=text)
    assert (verdict.kind, verdict.value, verdict.joint) == ("ok", value, True)


@pytest.mark.parametrize(
    ("text", "kind", "detail"),
    [
        (call("get_time"), "bad_value_form", "$[0].name: 'get_time'; the tools are 'get_weather', 'now'"),
        (call("get_weather"), "missing_key", "$[0].arguments: 'city' is a required property"),
        (call("get_weather", city=5), "wrong_type", "$[0].arguments.city: 5 is not of type 'string'"),
        (call("get_weather", city="a", unit="K"), "bad_value_form", "$[0].arguments.unit: 'K' is not one of 'C', 'F'"),
        (call("get_weather", city="a", x=1), "extra_key", "$[0].arguments: the key 'x' is not declared"),
        (tag('{"name": "now"}'), "missing_key", "$[0]: 'arguments' is a required property"),
        (tag('{"name": "now", "arguments": "{}"}'), "wrong_type", "$[0].arguments: '{}' is not of type 'object'"),
        (tag('{"name": "now", "arguments": {}, "id": 1}'), "extra_key", "$[0]: the key 'id' is not declared"),
        (tag("[]"), "wrong_type", "$[0]: [] is not of type 'object'"),
        (tag(PARIS[:-1]), "syntax", "Expecting ',' delimiter"),
        (tag(PARIS)[:-1], "syntax", "a tool call in the syntax of hermes, without its end"),
        (PARIS, "syntax", "in the syntax of llama; set data.format.init_args.syntax: llama"),
        (f"[TOOL_CALLS] [{PARIS}]", "syntax", "set data.format.init_args.syntax: mistral"),
        ("It rains.", "wrong_root", "text instead of a tool call; tool_choice: auto allows it"),
        (f"Sure:\n{tag(PARIS)}", "extra_text", "'Sure:\\n' is outside the document"),
        (tag(PARIS) + "\n", "extra_text", "is outside the document"),
        ("", "empty", "the answer is empty"),
    ],
)
def test_each_way_to_be_wrong_has_its_kind(text, kind, detail):
    verdict = ToolCalls().of_row(TOOLS).check(text)
    assert verdict.kind == kind and detail in verdict.detail and not verdict.exact, verdict


def test_text_is_right_where_the_row_has_no_tools_or_the_choice_is_free():
    assert ToolCalls().of_row(None).check("It rains.").value == "It rains."
    assert ToolCalls().of_row(None).check('{"name": "a"}').exact, "any text"
    assert ToolCalls(tool_choice="auto").of_row(TOOLS).check("It rains.").exact
    assert ToolCalls(tool_choice="auto").of_row(TOOLS).check(tag(PARIS)).exact
    verdict = ToolCalls().of_row(None).check(tag(PARIS))
    assert (verdict.kind, verdict.detail) == ("bad_value_form", "$[0].name: 'get_weather'; the tools are none")


def test_content_is_compared_value_by_value():
    format = ToolCalls().of_row(TOOLS)
    target, answer = call("get_weather", city="Paris", unit="C"), call("get_weather", city="Rome", unit="C")
    content = format.check(answer, target=target).content
    assert (content.matched, content.values) == (2, 6)
    assert content.difference == "[0].arguments.city: 'Rome' instead of 'Paris'"
    assert format.derived == {"name", "arguments.unit"}


def test_parameters_that_are_not_a_schema_are_refused_by_name():
    tools = json.dumps([{"name": "f", "parameters": {"type": "dict"}}])
    with pytest.raises(UserError, match=r"the parameters of f: \$.type: not a JSON Schema"):
        ToolCalls().of_row(tools)


def test_a_call_without_end_takes_little_time():
    started = time.process_time()
    for text in ("<tool_call>" + "\n" * 50_000, "<tool_call>" * 9000):
        assert not ToolCalls().of_row(TOOLS).check(text).exact
    assert time.process_time() - started < 2


def test_tools_in_other_layouts_are_checked_by_their_own_schema():
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": False}
    for key in ("input_schema", "inputSchema"):
        format = ToolCalls().of_row(json.dumps([{"name": "weather", key: parameters}]))
        assert format.check(call("weather", city="Oslo")).exact and not format.check(call("weather", town="Oslo")).exact


@pytest.mark.parametrize("parameters", ["json:JSONDecoder", "/etc/hostname", "per row", ["a"]])
def test_parameters_are_data_and_neither_a_file_nor_a_class(parameters):
    with pytest.raises(UserError, match="^the parameters of f: the schema must be a JSON object"):
        ToolCalls().of_row(json.dumps([{"name": "f", "parameters": parameters}]))


def test_an_empty_answer_is_no_text():
    assert ToolCalls().check("").kind == ToolCalls(tool_choice="auto").of_row(TOOLS).check("").kind == "empty"

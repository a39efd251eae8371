"""Tools, tool calls and reasoning are rendered by the chat template, or refused by name."""

import json

import pytest

from conftest import TEMPLATE, byte_tokenizer, shared
from formtune.base.renderer import Renderer
from formtune.base.row import Row, UnfitRow
from formtune.data import Columns
from formtune.data.sources import read_records
from formtune.formats import ToolCalls

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOLS = json.dumps([WEATHER])
USER = {"role": "user", "content": "Weather in Paris?"}
# As Llama 3.1 has them.
LLAMA = (
    "{% if tools %}<|im_start|>system\nTools: {% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if 'tool_calls' in m %}{% set f = m.tool_calls[0].function %}"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def calls(*cities, content="", **more):
    functions = [{"name": "get_weather", "arguments": {"city": city}} for city in cities]
    tool_calls = [{"id": "abcdefghi", "type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": content, "tool_calls": tool_calls, **more}


def encode(folder, messages, tools=TOOLS):
    renderer = Renderer.load(str(shared(f"tokenizers/{folder}"))) if isinstance(folder, str) else folder
    [row] = renderer.encode([(messages, "f:1", None, tools)])
    if isinstance(row, Row) and row.target is not None:
        [prompt_only] = renderer.encode([(messages[:-1], "f:1", None, tools)])
        assert prompt_only.prompt_ids == row.prompt_ids and renderer.answer(row.target_ids) == (row.target, True)
    return row, renderer


HERMES = '<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'


def test_the_calls_of_the_answer_are_the_target_as_the_template_writes_them():
    row, renderer = encode("qwen3", [USER, calls("Zürich")])
    assert row.target == HERMES.format("Zürich")
    assert renderer.tokenizer.decode(row.target_ids) == row.target + "<|im_end|>"
    prompt = renderer.tokenizer.decode(row.prompt_ids)
    assert f"<tools>\n{TOOLS[1:-1]}\n</tools>" in prompt and prompt.endswith("<think>\n\n</think>\n\n")
    assert encode("qwen3", [USER, calls("Paris", "Rome")])[0].target == "\n".join(map(HERMES.format, ["Paris", "Rome"]))
    assert encode("qwen3", [USER, calls("Oslo", content="Wait.")])[0].target == "Wait.\n" + HERMES.format("Oslo")


def test_mistral_writes_calls_after_a_control_token_and_does_not_escape_them():
    row, renderer = encode("mistral-v3-instruct", [USER, calls("Paris")])
    call = '[{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]'
    assert row.target.split() == f"[TOOL_CALLS] {call}".split()
    assert renderer.tokenizer.convert_ids_to_tokens(row.target_ids[0]) == "[TOOL_CALLS]"
    assert ToolCalls("mistral").of_row(TOOLS).check(row.target).value == [
        {"name": "get_weather", "arguments": {"city": "Paris"}}
    ]
    short = calls("Paris")
    short["tool_calls"][0]["id"] = "c1"
    assert "id of 9 characters" in str(encode("mistral-v3-instruct", [USER, short])[0])


def test_llama_writes_one_object():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LLAMA
    row, _ = encode(Renderer(tokenizer), [USER, calls("Paris")])
    assert row.target == '{"name": "get_weather", "parameters": {"city": "Paris"}}'
    assert ToolCalls("llama").of_row(TOOLS).check(row.target).exact


@pytest.mark.parametrize("folder", ["qwen3", "mistral-v3-instruct"])
def test_earlier_calls_and_results_are_context(folder):
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"t": 20, "sky": "a\nb"}'}
    answer = {"role": "assistant", "content": "20 degrees"}
    row, renderer = encode(folder, [USER, calls("Paris"), result, answer])
    prompt = renderer.tokenizer.decode(row.prompt_ids)
    assert row.target == "20 degrees" and row.input == USER["content"]
    assert '"arguments": {"city": "Paris"}' in prompt and "sky" in prompt.partition("Paris")[2]


@pytest.mark.parametrize(
    ("messages", "tools", "expected"),
    [
        ([USER, {"role": "assistant", "content": "b"}], TOOLS, "leaves out `tools`; remove it, or set model.chat"),
        ([USER, calls("Paris")], None, "leaves out `tool_calls`"),
        ([USER, calls("Paris"), USER, {"role": "assistant", "content": "b"}], None, "leaves out `tool_calls`"),
        ([USER, {"role": "assistant", "content": "b", "reasoning_content": "r"}], None, "out `reasoning_content`"),
        ([USER, {"role": "tool", "content": "<|im_end|>"}], None, "contains <|im_end|>, which the tokenizer"),
        ([USER, calls("<|im_end|>")], None, "contains <|im_end|>, which the tokenizer would read"),
        ([USER], json.dumps([WEATHER | {"x": "<|im_end|>"}]), "contains <|im_end|>, which the tokenizer would read"),
    ],
)
def test_what_the_template_leaves_out_is_refused_by_name(messages, tools, expected):
    row, _ = encode(Renderer(byte_tokenizer()), messages, tools)
    assert isinstance(row, UnfitRow) and expected in str(row)


def test_reasoning_is_trained_where_the_template_writes_it_without_thinking_switched_on():
    messages = [USER, {"role": "assistant", "content": "b", "reasoning_content": "because"}]
    row, _ = encode("qwen3", messages, None)
    assert isinstance(row, UnfitRow) and "as thinking is off; remove `reasoning_content`, or" in str(row)
    tokenizer = byte_tokenizer()
    thought = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", thought)
    assert encode(Renderer(tokenizer), messages, None)[0].target == "<think>because</think>b"


def test_without_a_chat_template_tools_are_refused():
    for messages, tools in (([USER], TOOLS), ([USER, calls("Paris")], None), ([USER, calls("Paris"), USER], None)):
        assert "the base has no chat template for tools" in str(encode("gpt2", messages, tools)[0])


CASES = {
    "b05-openai-tools-rows/openai_tools.jsonl": (
        '<tool_call>\n{"name": "set_mood", "arguments": {"mood": "positive"}}\n</tool_call>'
    ),
    "b05-openai-tools-rows/openai_tools_mid.jsonl": "positive",
    "02-tools-dropped/openai_tool_calls.jsonl": HERMES.format("Paris"),
    "02-tools-dropped/tool_role.jsonl": '{"name":"x","arguments":{}}',
    "02-tools-dropped/weight_name.jsonl": '{"name": "say", "arguments": {"text": "checking Paris"}}',
    "02-tools-dropped/content_and_tool_calls.jsonl": (
        '{"name": "say", "arguments": {"text": "checking Paris"}}\n' + HERMES.format("Paris")
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_as_other_tools_write_them_give_the_right_target(name):
    for number, (record, where) in enumerate(read_records(str(shared(f"cases/{name}")))):
        messages, tools = Columns().conversation(record, where, True), Columns().tools(record, where)
        row, _ = encode("qwen3", messages, tools)
        assert isinstance(row, Row), row
        if number == 0:
            print(row.target)
            assert row.target == CASES[name]


def test_text_beside_a_call_that_the_template_does_not_write_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turn = calls("Paris") | {"content": "Let me check that first."}
    [row] = Renderer(tokenizer).encode([([USER, turn], "f:1", None, TOOLS)])
    assert isinstance(row, UnfitRow)

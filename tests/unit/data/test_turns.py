"""Every part of a record and of its turns is read, refused by name, or named as ignored."""

import json
from datetime import date

import pytest

from formtune.data import Columns
from formtune.errors import UserError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PAIR = [("user", "a"), ("assistant", "b")]
CALL = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def read(record, with_target=True, **columns):
    """Turns of a record as pairs, and the names of its keys that are not read."""
    ignored = set()
    turns = Columns(**columns).conversation(record, "f:1", with_target, ignored)
    return [(turn["role"], turn["content"]) for turn in turns], ignored


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER, ANSWER], "functions": [{"name": "f"}]}, "f:1: `functions`"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": 1}}, "f:1: `chat_template_kwargs`"),
        ({"prompt": "a", "completion": "b", "reasoning_content": "r"}, "f:1: `reasoning_content`"),
        ({"messages": [USER, ANSWER | {"tools": CALL}]}, r"f:1: messages\[1\]: `tools` .* text of a turn"),
        ({"messages": [USER | {"tool_calls": CALL}, ANSWER]}, r"f:1: messages\[0\]: `tool_calls`"),
        ({"messages": [USER, ANSWER | {"tool_calls": ["f"]}]}, r"messages\[1\].tool_calls: write .*arguments"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "x"}]}]}, "tool_calls: write"),
        ({"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]}, r"messages\[1\]: `function_call`"),
        ({"messages": [USER, ANSWER | {"thinking": "r"}, USER, ANSWER]}, r"messages\[1\]: `thinking`"),
        ({"messages": [USER, {"role": "assistant", "content": None, "refusal": "no"}]}, r"messages\[1\]: `refusal`"),
        (
            {"messages": [USER, ANSWER | {"reasoning_content": [{"text": "r"}]}]},
            "`reasoning_content` is list; write it",
        ),
        (
            {"messages": [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": {"d": date(2026, 1, 1)}}]}]},
            "tool_calls: the arguments are not JSON .*; write them as JSON text",
        ),
        ({"messages": [USER, ANSWER | {"audio": {"id": "x"}}]}, r"messages\[1\]: `audio`"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, r"messages\[1\]: `weight` is 0; .* remove the row"),
        (
            {"messages": [USER, ANSWER | {"weight": 0.5}, USER, ANSWER]},
            r"messages\[1\]: `weight` is 0.5; write 1, or 0",
        ),
        ({"messages": [USER, ANSWER | {"weight": "1"}]}, r"messages\[1\]: `weight` is '1'; write 1, or 0"),
        ({"messages": [USER, ANSWER | {"train": False}]}, r"messages\[1\]: `train` is False"),
        ({"prompt": "a", "completion": "b", "system": 7}, "f:1: `system` is int, .* data.columns.system: null"),
        ({"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "system": "t"}, "both have a system prompt"),
    ],
)
def test_a_part_that_would_change_what_is_trained_is_refused_by_name(record, message):
    with pytest.raises(UserError, match=message):
        Columns().conversation(record, "f:1", True)


def test_empty_parts_change_nothing():
    row = {"tools": [], "functions": None, "parallel_tool_calls": None, "system": "", "id": None}
    turn = {
        "tool_calls": None,
        "function_call": {"name": None, "arguments": None},
        "reasoning_content": "",
        "name": None,
    }
    turns = [USER | turn, ANSWER | turn | {"weight": 1, "refusal": None, "thinking": False}]
    assert read({"messages": turns} | row) == (PAIR, {"messages[].thinking"})
    assert read({"prompt": "a", "completion": "b", "tools": "[]"} | row) == (PAIR, set())


def test_turns_before_the_last_answer_may_have_weight_zero():
    turns = [USER | {"weight": 0}, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1.0}]
    assert len(read({"messages": turns})[0]) == 4
    # Without a target, the last answer is left out, whatever its parts are.
    turns = [USER, ANSWER | {"weight": 0, "tool_calls": CALL}]
    assert read({"messages": turns}, with_target=False)[0] == PAIR[:1]


def test_calls_get_their_arguments_as_an_object_and_results_keep_their_id():
    result = {"role": "tool", "tool_call_id": "c", "name": "f", "content": "1", "extra": 1}
    function = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
    for content in (None, "", "x"):
        turns = [USER, {"role": "assistant", "content": content, "tool_calls": CALL}, result, ANSWER]
        ignored = set()
        messages = Columns().conversation({"messages": turns}, "f:1", True, ignored)
        assert messages[1] == {"role": "assistant", "content": content or "", "tool_calls": [function]}
        assert messages[2] == {key: value for key, value in result.items() if key != "extra"}
        assert ignored == {"messages[].extra"}
    assert Columns().conversation({"messages": turns[:3]}, "f:1", False)[-1]["role"] == "tool"


@pytest.mark.parametrize("written", [list, json.dumps])
def test_tools_are_read_as_a_list_or_as_json_text(written):
    tools = [{"type": "function", "function": {"name": "f"}}, {"name": "g"}]
    assert json.loads(Columns().tools({"tools": written(tools)}, "f:1")) == tools
    assert Columns().tools({"tools": []}, "f:1") is None and Columns().tools({}, "f:1") is None
    assert Columns(prompt="{a} {tools}").tools({"tools": "saw"}, "f:1") is None, "the prompt holds them"
    for bad in ("saw, hammer", [{"x": 1}], [*tools, tools[1]], {"name": "f"}):
        with pytest.raises(UserError, match="f:1: `tools` must be a list of tools .* rename the column"):
            Columns().tools({"tools": bad}, "f:1")


def test_parts_of_text_are_joined():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b", "image_url": None, "cache_control": {"type": "e"}},
    ]
    turns, ignored = read({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert turns[0] == ("user", "ab") and ignored == {"messages[].content[].cache_control"}


@pytest.mark.parametrize(
    ("record", "columns", "ignored"),
    [
        (
            {"prompt": "a", "completion": "b", "id": 0, "ok": False, "source": 7, "input": "more", "weight": 3},
            {},
            {"id", "ok", "source", "input", "weight"},
        ),
        (
            {"prompt": "a", "completion": "b", "id": 0, "source": 7, "input": "more"},
            {"source": "source", "prompt": "{prompt} {input}"},
            {"id"},
        ),
        (
            {
                "messages": [USER | {"name": "Ann"}, ANSWER],
                "prompt": "x",
                "completion": "y",
                "parallel_tool_calls": False,
            },
            {},
            {"prompt", "completion", "parallel_tool_calls", "messages[].name"},
        ),
        (
            {"instruction": "a", "input": "more", "output": "b"},
            {"prompt": "instruction", "completion": "output"},
            {"input"},
        ),
    ],
)
def test_every_key_that_is_not_read_is_named(record, columns, ignored):
    turns, names = read(record, **columns)
    assert names == ignored and turns[1] == PAIR[1]


@pytest.mark.parametrize(
    ("record", "columns", "turns", "ignored"),
    [
        ({"prompt": "a", "completion": "b", "system": "s"}, {}, [("system", "s"), *PAIR], set()),
        ({"messages": [USER, ANSWER], "system": "s"}, {}, [("system", "s"), *PAIR], set()),
        ({"prompt": "a", "completion": "b", "system": "s"}, {"system": None}, PAIR, {"system"}),
        (
            {"prompt": "a", "completion": "b", "system": "s"},
            {"prompt": "{prompt} on {system}"},
            [("user", "a on s"), PAIR[1]],
            set(),
        ),
    ],
)
def test_a_system_column_is_the_rows_own_system_prompt(record, columns, turns, ignored):
    assert read(record, **columns) == (turns, ignored)


@pytest.mark.parametrize(
    ("record", "origin"),
    [({"by": "m"}, "m"), ({"by": "Human "}, "human"), ({"by": None}, ""), ({}, ""), ({"source": 7}, "")],
)
def test_the_author_of_a_row_is_read_from_the_named_column(record, origin):
    assert Columns(source="by").origin(record, "f:1") == origin
    assert Columns().origin(record, "f:1") == ""


def test_an_author_that_is_not_text_is_refused():
    with pytest.raises(UserError, match="f:1: `by` is int, .* data.columns.source: null"):
        Columns(source="by").origin({"by": 7}, "f:1")


def test_a_template_over_columns_is_filled_as_plain_text():
    record = {"title": "{body} {body.__class__}", "body": "B", "completion": "b"}
    assert read(record, prompt="T {title}: {body}")[0][0] == ("user", "T {body} {body.__class__}: B")
    assert read(record | {"width (cm)": "3"}, prompt="{width (cm)} {body}")[0][0] == ("user", "3 B")
    with pytest.raises(UserError, match="f:1: no column `titel`"):
        read(record, prompt="T {titel}: {body}")


@pytest.mark.parametrize("arguments", [{"arguments": ""}, {"arguments": None}, {}, {"arguments": "{}"}])
def test_a_call_may_have_no_arguments(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "now", **arguments}}
    record = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert Columns().conversation(record, "f:1", True)[-1]["tool_calls"][0]["function"]["arguments"] == {}


def test_a_template_over_columns_names_at_least_one():
    with pytest.raises(UserError, match="names no column"):
        Columns(prompt="Q: {What is it?}")
    record = {"title": "t", "price": 2.5, "completion": "x"}
    assert Columns(prompt="{title}: {price}").conversation(record, "f:1", True)[0]["content"] == "t: 2.5"

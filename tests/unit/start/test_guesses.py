"""Columns, instruction, group and format are guessed from rows alone."""

import json

import pytest

from conftest import shared
from formtune.data import Columns
from formtune.data.sources import read_records
from formtune.errors import UserError
from formtune.formats import JsonSchema
from formtune.start.guesses import guess_columns, guess_format, guess_splits, guess_system, guess_tags, read_rows

HERMES = "<tool_call>"


def placed(*rows):
    return [(row, f"rows.jsonl:{n}") for n, row in enumerate(rows, 1)]


def pairs(*answers):
    return read_rows(placed(*({"prompt": f"p{n}", "completion": a} for n, a in enumerate(answers))), Columns())


@pytest.mark.parametrize(
    "rows, columns",
    [
        ([{"prompt": "p", "completion": "c"}], {}),
        ([{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}], {}),
        ([{"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]}], {}),
        ([{"instruction": "i", "input": "p", "output": "c"}], {}),
        ([{"text": "p", "label": "c"}], {"prompt": "text", "completion": "label"}),
        ([{"text": "p", "label": "0", "label_text": "c"}], {"prompt": "text", "completion": "label_text"}),
        ([{"question": "p", "answer": "c"}], {"prompt": "question", "completion": "answer"}),
        ([{"utterance": "p", "intent": "c", "id": "7"}], {"prompt": "utterance", "completion": "intent"}),
        ([{"Question": "p", "Category": "c"}], {"prompt": "Question", "completion": "Category"}),
        ([{"subject": "s", "body": "b", "label": "c"}], {"prompt": "{subject}\n\n{body}", "completion": "label"}),
        ([{"context": "c", "question": "p", "answer": "a"}], {"prompt": "{context}\n\n{question}", "completion": "answer"}),
        ([{"id": 7, "premise": "p", "hypothesis": "h", "label": 1}], {"prompt": "{premise}\n\n{hypothesis}", "completion": "label"}),
        ([{"text": "p", "toxic": False}], {"prompt": "text", "completion": "toxic"}),
        ([{"Anfrage": "p", "Felder": '{"a": 1}'}], {"prompt": "Anfrage", "completion": "Felder"}),
        ([{"Anfrage": "p", "Felder": {"a": 1}}], {"prompt": "Anfrage", "completion": "Felder"}),
    ],
)  # fmt: skip
def test_each_shape_of_columns(rows, columns):
    guessed = guess_columns(placed(*rows), None, None)
    assert guessed == columns
    *_, answer = Columns(**guessed).conversation(rows[0], "rows.jsonl:1", True)
    assert answer["role"] == "assistant"


def test_a_split_column_is_not_the_target():
    row = {"text": "x y", "verdict": "good", "split": "train"}
    assert guess_columns(placed(row), None, None) == {"prompt": "text", "completion": "verdict"}


def test_the_number_of_a_row_is_no_column_of_it():
    row = {"": 3, "id": "a7", "tweet": "I like it a lot", "score": "pos"}
    assert guess_columns(placed(row), None, None) == {"prompt": "tweet", "completion": "score"}


def test_columns_that_are_named_are_taken():
    rows = placed({"a": "x", "b": "y", "c": "z"})
    assert guess_columns(rows, "{a} {c}", "b") == {"prompt": "{a} {c}", "completion": "b"}


@pytest.mark.parametrize(
    "row", [{"a": "x", "b": "y", "c": "z"}, {"text": "x", "intent": "y", "sentiment": "z"}, {"text": "x"}]
)
def test_columns_that_may_be_several_are_asked_for(row):
    with pytest.raises(UserError, match=r"rows.jsonl:1: which of the columns .* --prompt COLUMN --completion COLUMN"):
        guess_columns(placed(row, row), None, None)


def test_a_mistake_within_turns_is_not_a_question_of_columns():
    row = {"messages": [{"role": "person", "content": "p"}]}
    with pytest.raises(UserError, match="has the role 'person'"):
        guess_columns(placed(row), None, None)


@pytest.mark.parametrize(
    "answers, kind, init_args",
    [
        (["yes", "no", "maybe"] * 10, "Labels", {"labels": ["maybe", "no", "yes"]}),
        ([0, 1] * 20, "Labels", {"labels": ["0", "1"]}),
        ([f"<why>because {n}</why>\n<label>ab</label>" for n in range(9)], "Tagged", {"sections": ["why", "label"]}),
        ([f"AB-{n}" for n in range(100, 130)], "Regex", {"pattern": "[A-Z]{2}-[0-9]+"}),
    ],
)  # fmt: skip
def test_each_format_but_json(answers, kind, init_args):
    assert guess_format(pairs(*answers), "")[:2] == (kind, init_args)


@pytest.mark.parametrize("write", [lambda it: it, json.dumps, lambda it: f"```json\n{json.dumps(it)}\n```"])
def test_json_as_an_object_as_text_and_in_a_fence(write):
    kind, init_args, why = guess_format(pairs(*(write({"a": n}) for n in range(30)), "sorry"), "")
    assert kind == "JsonSchema" and init_args["schema"]["properties"] == {"a": {"type": "integer"}}
    assert why == "30 of 31 answers match it (rows.jsonl:1)"


def test_booleans_are_a_schema():
    kind, init_args, _ = guess_format(pairs(*[True, False] * 20), "")
    assert (kind, init_args["schema"]["type"]) == ("JsonSchema", "boolean")


def test_numbers_are_a_schema():
    kind, init_args, _ = guess_format(pairs(*map(str, range(1000, 1030))), "")
    assert (kind, init_args["schema"]["type"]) == ("JsonSchema", "integer")


def test_a_schema_in_each_row_and_tools_in_each_row():
    rows = placed({"prompt": "p", "completion": "{}", "schema": {"type": "object"}})
    assert guess_format(read_rows(rows, Columns()), "")[:2] == ("JsonSchema", {})
    rows = placed(*({"prompt": f"p{n}", "completion": "a", "schema": "CREATE TABLE t (a text)"} for n in range(20)))
    assert guess_format(read_rows(rows, Columns()), "")[0] == "Labels"
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {
        "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "tool_calls": [call]}],
        "tools": [tool],
    }
    spoken = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "hi"}], "tools": [tool]}
    for rows, template, init_args in (
        ([called], HERMES, {"syntax": "hermes", "tool_choice": "required"}),
        ([called, spoken], "[TOOL_CALLS]", {"syntax": "mistral", "tool_choice": "auto"}),
    ):
        assert guess_format(read_rows(placed(*rows), Columns()), template)[:2] == ("ToolCalls", init_args)


def test_free_text_is_refused_with_what_can_be_trained():
    with pytest.raises(UserError, match=r"rows.jsonl:1: no format fits 90% of the answers, such as 'Tale 0 of"):
        guess_format(pairs(*(f"Tale {n} of {'old ' * n}times" for n in range(30))), "")


def test_an_instruction_ends_where_prompts_differ_at_a_line_or_sentence():
    def instruction(*prompts):
        return guess_system(read_rows(placed(*({"prompt": p, "completion": "c"} for p in prompts)), Columns()))

    texts = [f"Find the city in this text: I live in {name}" for name in ("Oslo", "Bern", "Rome", "Bonn") * 5]
    assert instruction(*texts) == "Find the city in this text: "
    assert instruction(*texts, *texts, "one without it") == ""  # of a few rows, one is too many
    assert instruction(*texts[:5]) == "" and instruction(*["What is it? yes", "What is it? no"] * 9) == ""


def test_a_group_is_a_column_that_says_so_and_repeats():
    rows = [{"prompt": str(n), "customer_id": n // 3, "id": n, "user": n} for n in range(90)]
    assert guess_splits(placed(*rows))[0][:2] == ("data.group", "customer_id")
    assert guess_splits(placed(*({"prompt": str(n), "user": n} for n in range(90)))) == []


def test_a_split_column_is_one_that_names_the_splits():
    rows = [{"prompt": "p", "fold": n % 5, "set": "train", "Split": ("train", "Dev", "test")[n % 3]} for n in range(90)]
    [guess] = guess_splits(placed(*rows))
    assert guess == ("data.split_column", "Split", "30 rows of train, 30 rows of Dev, 30 rows of test")


@pytest.mark.parametrize(
    "answer, tag, rest",
    [
        ("<think>\nn times 2\n</think>\n\n{}", "think", "{}"),
        ("<reason></reason>yes", "reason", "yes"),
        ("<why>it is</why><label>a</label>", "", "<why>it is</why><label>a</label>"),
        ("<p>free text</p>", "", "<p>free text</p>"),
    ],
)
def test_reasoning_is_a_tagged_text_before_an_answer_without_tags(answer, tag, rest):
    tags, rows = guess_tags(pairs(*[answer] * 19, "none"))
    assert tags == ({"open": f"<{tag}>", "close": f"</{tag}>"} if tag else {})
    assert rows[0].messages[-1]["content"] == rest


@pytest.mark.parametrize("name", ["snips", "wnut17"])
def test_the_schema_of_real_rows_takes_all_of_them_and_those_of_other_splits(name):
    records = [*read_records(str(shared(f"data/{name}/train.jsonl")))][:3000:3]
    kind, init_args, _ = guess_format(read_rows(records, Columns()), "")
    format = JsonSchema(**init_args)
    assert kind == "JsonSchema" and init_args["schema"]["additionalProperties"] is False
    assert all(format.check(record["completion"]).exact for record, _ in records)


def test_numbers_with_a_point_are_not_labels():
    assert guess_format(pairs(*[float(n % 4) for n in range(80)]), "")[0] == "JsonSchema"


def test_labels_that_the_instruction_lists_are_an_enum():
    labels, start = ("billing", "delivery", "other"), "Classify the message as billing, delivery or other. Message: "
    rows = [
        {"prompt": f"{start}number {i} is {i * 7919}", "completion": json.dumps({"category": labels[i % 3]})}
        for i in range(90)
    ]
    _, init_args, _ = guess_format(read_rows(placed(*rows), Columns()), "")
    assert init_args["schema"]["properties"]["category"] == {"enum": sorted(labels)}


def test_a_fence_may_have_windows_line_ends():
    rows = [{"prompt": f"{i}", "completion": f'```json\r\n{{"n": {i}}}\r\n```'} for i in range(20)]
    kind, init_args, _ = guess_format(read_rows(placed(*rows), Columns()), "")
    assert kind == "JsonSchema" and init_args["schema"]["required"] == ["n"]


def test_identifiers_with_a_colon_are_a_pattern_and_no_uri():
    rows = [{"prompt": f"{i}", "completion": json.dumps({"term": f"GO:{7919 * i:07}"})} for i in range(20)]
    _, init_args, _ = guess_format(read_rows(placed(*rows), Columns()), "")
    assert init_args["schema"]["properties"]["term"] == {"type": "string", "pattern": "^[A-Z]{2}:[0-9]+$"}


def test_a_column_that_is_null_in_the_first_row_is_guessed_too():
    rows = [{"subject": None, "body": "a", "label": "x"}, {"subject": "b", "body": "c", "label": "y"}]
    assert guess_columns(placed(*rows), None, None) == {"prompt": "{subject}\n\n{body}", "completion": "label"}

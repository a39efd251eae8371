"""Rows as other tools write them are recognized, or refused in a line; answers and files of many kinds are read."""

import json
from collections import Counter
from pathlib import Path

import pytest

from conftest import SCHEMA, pair
from formtune.data import Columns
from formtune.data.cleaning import check_example
from formtune.data.columns import serialize
from formtune.data.preparation import load_splits, read_examples
from formtune.data.settings import DataSettings
from formtune.data.sources import read_records
from formtune.errors import UserError
from formtune.formats import JsonSchema, Labels, Regex

USER, ANSWER = ("user", "a"), ("assistant", "b")
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def read(record, with_target=True, **columns):
    """Turns of a record as pairs."""
    turns = Columns(**columns).conversation(record, "f.jsonl:1", with_target)
    return [(turn["role"], turn["content"]) for turn in turns]


RECOGNIZED = [
    ({"conversations": SHAREGPT, "id": 1}, [USER, ANSWER]),
    ({"messages": SHAREGPT}, [USER, ANSWER]),
    ({"conversations": CHAT}, [USER, ANSWER]),
    (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        [("system", "s"), USER, ANSWER],
    ),
    ({"conversations": SHAREGPT, "system": "s"}, [("system", "s"), USER, ANSWER]),
    ({"instruction": "a", "input": "more", "output": "b"}, [("user", "a\n\nmore"), ANSWER]),
    ({"instruction": "a", "input": "", "output": "b"}, [USER, ANSWER]),
    ({"instruction": "a", "input": None, "output": "b"}, [USER, ANSWER]),
    ({"instruction": "a", "input": "[]", "output": "b"}, [("user", "a\n\n[]"), ANSWER]),
    ({"instruction": "a", "output": "b", "system": "s", "text": "rendered"}, [("system", "s"), USER, ANSWER]),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, [USER, ANSWER]),
    (
        {"prompt": [{"role": "system", "content": "s"}, *CHAT, CHAT[0]], "completion": CHAT[1:]},
        [("system", "s"), USER, ANSWER, USER, ANSWER],
    ),
    ({"prompt": CHAT[:1], "completion": "b"}, [USER, ANSWER]),
    ({"messages": CHAT}, [USER, ANSWER]),
    ({"messages": None, "prompt": "a", "completion": "b"}, [USER, ANSWER]),
    # A table with the columns of two kinds of rows.
    ({"conversations": None, "instruction": "a", "output": "b"}, [USER, ANSWER]),
    # What was read before is read as before, whatever else the row has.
    ({"prompt": "a", "completion": "b", "instruction": "q", "output": "r", "conversations": SHAREGPT}, [USER, ANSWER]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "turns"), RECOGNIZED)
def test_a_row_of_a_known_layout_is_read(record, turns):
    assert read(record) == turns
    assert read(record, with_target=False) == turns[:-1]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "a"}, "a"),
        ({"instruction": "a", "input": "more"}, "a\n\nmore"),
        ({"prompt": CHAT[:1]}, "a"),
        ({"conversations": SHAREGPT[:1]}, "a"),
    ],
)
def test_inputs_without_answers_are_recognized_too(record, prompt):
    assert read(record, with_target=False) == [("user", prompt)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]}, "`conversations` must end with an assistant turn"),
        ({"conversations": SHAREGPT[:1]}, "`conversations` must end with an assistant turn"),
        ({"prompt": CHAT[:1], "completion": CHAT[:1]}, r"`prompt\+completion` must end with an assistant turn"),
        ({"instruction": "a", "output": None}, "f.jsonl:1: `output` is null, not text"),
        ({"instruction": "a"}, "f.jsonl:1: no column `output` among instruction; fill it, or set data.columns"),
        ({"question": "a"}, "f.jsonl:1: no column `prompt` among question; fill it, or set data.columns"),
        ({"messages": None}, "f.jsonl:1: `messages` is null; it must be a list of turns"),
        ({"prompt": "a", "answer": "b"}, "f.jsonl:1: no column `completion` among prompt, answer"),
        ({"prompt": ["a"], "completion": "b"}, "f.jsonl:1: `prompt` is list, not text"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_refused(record, message):
    with pytest.raises(UserError, match=message):
        read(record)


def test_named_columns_come_before_a_known_layout():
    both = {"conversations": SHAREGPT, "instruction": "q", "output": "r"}
    assert read(both, messages="conversations") == [USER, ANSWER]
    assert read(both, prompt="{instruction}", completion="output") == [("user", "q"), ("assistant", "r")]
    assert read({"question": "q", "answer": "r"}, prompt="answer", completion="question") == [
        ("user", "r"),
        ("assistant", "q"),
    ]


def test_missing_values_in_columns_that_are_not_read_are_ignored(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b", "score": NaN, "rank": -Infinity, "note": null}\n{"prompt": NaN, "completion": "b"}'
    )
    (first, where), (second, _) = read_records(str(path))
    ignored = set()
    assert Columns().conversation(first, where, True, ignored)[1]["content"] == "b"
    assert ignored == {"rank"}
    with pytest.raises(UserError, match=r"f:2: `prompt` is null"):
        Columns().conversation(second, "f:2", True)


def test_null_in_a_template_is_empty_text_unless_all_is_null():
    template = {"prompt": "{title}\n{body}"}
    assert read({"title": None, "body": "B", "completion": "b"}, **template) == [("user", "\nB"), ANSWER]
    assert read({"title": "T", "body": None, "completion": "b"}, **template) == [("user", "T\n"), ANSWER]
    with pytest.raises(UserError, match="f.jsonl:1: `title` is null"):
        read({"title": None, "body": None, "completion": "b"}, **template)
    with pytest.raises(UserError, match="f.jsonl:1: no column `body`"):
        read({"title": "T", "completion": "b"}, **template)


OPEN = {
    "type": "object",
    "properties": {"b": {"type": "string"}, "a": {"type": ["integer", "null"]}, "c": {"type": "string"}},
    "required": ["b", "a"],
}


def answers(tmp_path, format, rows):
    """The texts of the answers of rows, and the notes."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(format, str(tmp_path / "rows.jsonl"))
    examples = read_examples(settings, settings.sources["train"], Counter())
    return [example.target for example in examples]


@pytest.mark.parametrize(
    ("format", "values", "texts"),
    [
        (JsonSchema(OPEN), [{"a": 1, "b": "é"}], ['{"b":"é","a":1}']),
        (JsonSchema({"type": "array", "items": {"type": "integer"}}), [[2, 1], []], ["[2,1]", "[]"]),
        (JsonSchema({"type": "number"}), [7, 7.5], ["7", "7.5"]),
        (JsonSchema({"type": "boolean"}), [True, False], ["true", "false"]),
        (Labels(["0", "1"]), [1, 0], ["1", "0"]),
        (Regex(r"\d+"), [42], ["42"]),
    ],
)
def test_answers_that_are_not_text_are_written_as_the_format_writes_them(tmp_path, format, values, texts):
    for rows in (
        [{"prompt": "a", "completion": value} for value in values],
        [{"instruction": "a", "output": value} for value in values],
    ):
        assert answers(tmp_path, format, rows) == texts
    if not isinstance(values[0], list):  # in a turn a list holds the parts of a text
        turns = [{"conversations": [SHAREGPT[0], {"from": "gpt", "value": value}]} for value in values]
        assert answers(tmp_path, format, turns) == texts
    assert all(format.check(text).exact for text in texts)


@pytest.mark.parametrize(
    ("format", "value", "message"),
    [
        (Labels(["no", "yes"]), 1, "rows.jsonl:2: the answer is int, not text; .* data.columns.completion"),
        (Labels(["True"]), True, "rows.jsonl:2: the answer is bool, not text"),
        (Regex(r".*"), {"a": 1}, "rows.jsonl:2: the answer is dict, not text"),
        (JsonSchema(OPEN), None, "rows.jsonl:2: `completion` is null, not text"),
    ],
)
def test_an_answer_that_the_format_cannot_write_is_refused_by_its_line(tmp_path, format, value, message):
    first = "no" if isinstance(format, Labels) else '{"b":"x","a":1}'
    with pytest.raises(UserError, match=message):
        answers(tmp_path, format, [{"prompt": "a", "completion": first}, {"prompt": "a", "completion": value}])


def test_an_answer_that_breaks_the_format_is_written_and_then_checked(tmp_path):
    [text] = answers(tmp_path, JsonSchema(OPEN), [{"prompt": "a", "completion": {"b": 1}}])
    assert text == '{"b":1}' and JsonSchema(OPEN).check(text).kind == "missing_key"


def test_absent_keys_that_a_table_writes_as_null_are_left_out(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt": "1", "completion": {"b": "x", "a": None, "c": "y", "d": [{"e": 1}]}},
        {"prompt": "2", "completion": {"b": "x", "a": 3}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for own, texts in (
        (OPEN, ['{"b":"x","a":null,"c":"y","d":[{"e":1}]}', '{"b":"x","a":3,"d":null}']),
        (OPEN | {"additionalProperties": {"type": "array"}}, ['{"b":"x","a":null,"c":"y","d":[{"e":1}]}', '{"b":"x","a":3}']),
    ):  # fmt: skip
        settings = DataSettings(JsonSchema(own), str(tmp_path / "a.parquet"))
        examples = read_examples(settings, settings.sources["train"], Counter())
        assert [example.target for example in examples] == texts


def test_an_empty_answer_is_kept_if_the_format_allows_it(tmp_path):
    rows = [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "x"}, {"prompt": " ", "completion": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for format, reasons in (
        (Labels(["", "x"]), ["", "", "empty"]),
        (Regex("x?"), ["", "", "empty"]),
        (Labels(["x"]), ["empty", "", "empty"]),
    ):
        settings = DataSettings(format, str(tmp_path / "rows.jsonl"))
        examples = read_examples(settings, settings.sources["train"], Counter())
        judged = [check_example(example, format, [], [], Counter()) for example in examples]
        assert [getattr(row, "reason", "") for row in judged] == reasons


def test_duplicates_are_detected_across_files_and_the_splits_are_the_same(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [pair(n) for n in range(60)]

    def write(name, rows):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("all.jsonl", rows)
    write("1.jsonl", rows[:30])
    write("2.jsonl", [*rows[30:], rows[0]])
    one = load_splits(DataSettings(JsonSchema(SCHEMA), "all.jsonl", tokenizer=base))
    two = load_splits(DataSettings(JsonSchema(SCHEMA), ["1.jsonl", "2.jsonl"], tokenizer=base))
    assert one.key == two.key and two.reasons == {"duplicate": 1}
    assert two.quarantine[0].where == "2.jsonl:31" and two.quarantine[0].other == "1.jsonl:1"
    # The rows of an array in one line have places of their own.
    Path("array.json").write_text(json.dumps(rows))
    assert load_splits(DataSettings(JsonSchema(SCHEMA), "array.json", tokenizer=base)).key == one.key


def test_other_shapes_and_objects_give_the_same_rows(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [pair(n) for n in range(60)]
    prompts = [(row["prompt"], json.loads(row["completion"])) for row in rows]
    kinds = {
        "plain": rows,
        "sharegpt": [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": json.dumps(a, separators=(",", ":"))}]} for p, a in prompts],
        "objects": [{"instruction": p, "output": dict(reversed(a.items()))} for p, a in prompts],
    }  # fmt: skip
    keys = set()
    for name, records in kinds.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        settings = DataSettings(JsonSchema(SCHEMA), f"{name}.jsonl", tokenizer=base)
        keys.add(load_splits(settings).key)
    assert len(keys) == 1


def test_any_number_of_null_keys_is_left_out():
    """A format names only its first problems."""
    schema = {
        "type": "object",
        "properties": {f"k{n}": {"type": "string"} for n in range(60)},
        "additionalProperties": False,
    }
    value = {f"k{n}": None for n in reversed(range(1, 60))} | {"k0": "x"}
    assert serialize(value, JsonSchema(schema), "f:1") == '{"k0":"x"}'

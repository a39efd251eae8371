"""Rows as other tools write them are recognized, or refused in a line; answers and files of many kinds are read."""

import bz2
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from conftest import SCHEMA, pair, shared
from formtune.data import Columns
from formtune.data.cleaning import judge
from formtune.data.preparation import load_splits, read_examples
from formtune.data.settings import DataSettings
from formtune.data.sources import read_records
from formtune.data.table import print_shapes
from formtune.errors import UserError
from formtune.formats import JsonSchema, Labels, Regex

USER, ANSWER = ("user", "a"), ("assistant", "b")
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def read(record, with_target=True, **columns):
    """Turns of a record as pairs, and what was said about its shape."""
    made = Columns(**columns)
    turns = made.conversation(record, "f.jsonl:1", with_target)
    return [(turn["role"], turn["content"]) for turn in turns], list(made.notes)


RECOGNIZED = [
    ({"conversations": SHAREGPT, "id": 1}, [USER, ANSWER], ["ShareGPT conversations (from, value)"]),
    ({"messages": SHAREGPT}, [USER, ANSWER], ["ShareGPT messages (from, value)"]),
    ({"conversations": CHAT}, [USER, ANSWER], ["conversations (role, content)"]),
    (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        [("system", "s"), USER, ANSWER],
        ["ShareGPT conversations (from, value)"],
    ),
    ({"conversations": SHAREGPT, "system": "s"}, [("system", "s"), USER, ANSWER], ["ShareGPT conversations (from, value)"]),
    (
        {"instruction": "a", "input": "more", "output": "b"},
        [("user", "a\n\nmore"), ANSWER],
        ["Alpaca rows (instruction, input, output)"],
    ),
    ({"instruction": "a", "input": "", "output": "b"}, [USER, ANSWER], ["Alpaca rows (instruction, input, output)"]),
    ({"instruction": "a", "input": None, "output": "b"}, [USER, ANSWER], ["Alpaca rows (instruction, input, output)"]),
    (
        {"instruction": "a", "output": "b", "system": "s", "text": "rendered"},
        [("system", "s"), USER, ANSWER],
        ["Alpaca rows (instruction, input, output)"],
    ),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, [USER, ANSWER], ["TRL conversations (prompt, completion)"]),
    (
        {"prompt": [{"role": "system", "content": "s"}, *CHAT, CHAT[0]], "completion": CHAT[1:]},
        [("system", "s"), USER, ANSWER, USER, ANSWER],
        ["TRL conversations (prompt, completion)"],
    ),
    ({"prompt": CHAT[:1], "completion": "b"}, [USER, ANSWER], ["TRL conversations (prompt, completion)"]),
    ({"messages": CHAT}, [USER, ANSWER], []),
    ({"messages": None, "prompt": "a", "completion": "b"}, [USER, ANSWER], []),
    ({"question": "a", "answer": "b"}, [USER, ANSWER], ["questions and answers (question, answer)"]),
    ({"question": "a", "answer": "b", "context": None}, [USER, ANSWER], ["questions and answers (question, answer)"]),
    ({"text": "a", "label": "b", "idx": 4}, [USER, ANSWER], ["texts and labels (text, label)"]),
    ({"text": "a", "label": 1, "label_text": "b"}, [USER, ANSWER], ["texts and labels (text, label)"]),
    # A table with the columns of two kinds of rows.
    ({"conversations": None, "question": "a", "answer": "b"}, [USER, ANSWER], ["questions and answers (question, answer)"]),
    # What was read before is read as before, whatever else the row has.
    ({"prompt": "a", "completion": "b", "question": "q", "answer": "r", "conversations": SHAREGPT}, [USER, ANSWER], []),
]  # fmt: skip


@pytest.mark.parametrize(("record", "turns", "said"), RECOGNIZED)
def test_a_row_of_a_known_shape_is_read_and_said(record, turns, said):
    assert read(record) == (turns, said)
    prompt = turns[:-1]
    assert read(record, with_target=False)[0] == prompt


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"question": "a"}, "a"),
        ({"text": "a"}, "a"),
        ({"instruction": "a", "input": "more"}, "a\n\nmore"),
        ({"prompt": CHAT[:1]}, "a"),
        ({"conversations": SHAREGPT[:1]}, "a"),
    ],
)
def test_inputs_without_answers_are_recognized_too(record, prompt):
    assert read(record, with_target=False)[0] == [("user", prompt)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": SHAREGPT, "question": "a", "answer": "b"},
         r"f.jsonl:1: the row may be conversations, data.columns: \{'messages': 'conversations'\}, or questions and "
         r"answers .*'prompt': '\{question\}', 'completion': 'answer'\}; set data.columns"),
        ({"context": "c", "question": "a", "answer": "b"}, r"questions and answers .* or questions on a text .*'\{context\}\\n\\n\{question\}'"),
        ({"instruction": "a", "output": "b", "text": "t", "label": "l"}, "Alpaca rows .* or texts and labels"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]}, "the last turn of `conversations` must be the assistant's"),
        ({"conversations": SHAREGPT[:1]}, "the last turn of `conversations` must be the assistant's"),
        ({"prompt": CHAT[:1], "completion": CHAT[:1]}, r"the last turn of `prompt\+completion` must be the assistant's"),
        ({"question": "a", "answer": None}, "f.jsonl:1: `answer` is null, not text"),
        ({"question": "a"}, "f.jsonl:1: no column `prompt` among question; set data.columns"),
        ({"prompt": "a", "answer": "b"}, "f.jsonl:1: no column `completion` among prompt, answer"),
        ({"prompt": ["a"], "completion": "b"}, "f.jsonl:1: `prompt` is list, not text"),
    ],
)  # fmt: skip
def test_a_row_that_may_be_two_or_is_none_is_refused_in_a_line(record, message):
    with pytest.raises(UserError, match=message):
        read(record)


def test_the_remedy_for_two_readings_works():
    both = {"conversations": SHAREGPT, "question": "q", "answer": "r"}
    assert read(both, messages="conversations")[0] == [USER, ANSWER]
    assert read(both, prompt="{question}", completion="answer")[0] == [("user", "q"), ("assistant", "r")]
    assert read({"question": "q", "answer": "r"}, prompt="answer", completion="question") == (
        [("user", "r"), ("assistant", "q")],
        [],
    )


def test_missing_values_in_columns_that_are_not_read_cost_no_row(tmp_path):
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
    assert read({"title": None, "body": "B", "completion": "b"}, **template)[0] == [("user", "\nB"), ANSWER]
    assert read({"title": "T", "body": float("nan"), "completion": "b"}, **template)[0] == [("user", "T\n"), ANSWER]
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
    """The texts of the answers of rows, and what was said."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(format, str(tmp_path / "rows.jsonl"))
    found = read_examples(settings, settings.sources["train"], Counter())
    return [example.target for example in found], list(settings.columns.notes)


@pytest.mark.parametrize(
    ("format", "values", "texts", "said"),
    [
        (JsonSchema(OPEN), [{"a": 1, "b": "é"}], ['{"b":"é","a":1}'], "objects"),
        (JsonSchema({"type": "array", "items": {"type": "integer"}}), [[2, 1], []], ["[2,1]", "[]"], "arrays"),
        (JsonSchema({"type": "number"}), [7, 7.5], ["7", "7.5"], "numbers"),
        (JsonSchema({"type": "boolean"}), [True, False], ["true", "false"], "booleans"),
        (Labels(["0", "1"]), [1, 0], ["1", "0"], "numbers"),
        (Regex(r"\d+"), [42], ["42"], "numbers"),
    ],
)
def test_answers_that_are_not_text_are_written_as_the_format_writes_them(tmp_path, format, values, texts, said):
    for rows in (
        [{"prompt": "a", "completion": value} for value in values],
        [{"question": "a", "answer": value} for value in values],
    ):
        found, notes = answers(tmp_path, format, rows)
        assert found == texts and f"answers were {said}, written in the format's form" in notes
    if said != "arrays":  # in a turn a list holds the parts of a text
        turns = [{"conversations": [SHAREGPT[0], {"from": "gpt", "value": value}]} for value in values]
        assert answers(tmp_path, format, turns)[0] == texts
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
def test_an_answer_without_a_form_is_refused_by_its_line(tmp_path, format, value, message):
    first = "no" if isinstance(format, Labels) else '{"b":"x","a":1}'
    with pytest.raises(UserError, match=message):
        answers(tmp_path, format, [{"prompt": "a", "completion": first}, {"prompt": "a", "completion": value}])


def test_an_answer_that_breaks_the_format_is_written_and_then_judged(tmp_path):
    [text], _ = answers(tmp_path, JsonSchema(OPEN), [{"prompt": "a", "completion": {"b": 1}}])
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
        found = read_examples(settings, settings.sources["train"], Counter())
        assert [example.target for example in found] == texts
        assert (
            "answers were objects, written in the format's form without the nulls that it refuses"
            in settings.columns.notes
        )


def test_class_labels_have_their_names(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "a.parquet"):
        records = [record for record, _ in read_records(str(tmp_path / name))]
        assert [record["label"] for record in records] == ["pos", "neg", None]
        assert read(records[0])[0] == [("user", "a"), ("assistant", "pos")]


def test_an_answer_that_is_rightly_empty_costs_no_row(tmp_path):
    rows = [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "x"}, {"prompt": " ", "completion": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for format, reasons in (
        (Labels(["", "x"]), ["", "", "empty"]),
        (Regex("x?"), ["", "", "empty"]),
        (Labels(["x"]), ["empty", "", "empty"]),
    ):
        settings = DataSettings(format, str(tmp_path / "rows.jsonl"))
        found = read_examples(settings, settings.sources["train"], Counter())
        judged = judge(found, format, [], [], Counter())
        assert [getattr(row, "reason", "") for row in judged] == reasons


# Files.

RECORDS = [{"prompt": "a; b", "completion": "2026-01-02"}, {"prompt": 'q, "r"\ns', "completion": "7"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
FILES = {
    "a.JSONL": (LINES, ["1", "2"]),
    "a.ndjson": (LINES, ["1", "2"]),
    "lines.json": (LINES, ["1", "2"]),
    "array.json": (json.dumps(RECORDS, indent=1), ["2", "6"]),
    "bom.json": ("\ufeff\n" + json.dumps(RECORDS), ["2", f"2:{len(json.dumps(RECORDS[0])) + 4}"]),
    "a.csv": ('prompt,completion\n"a; b",2026-01-02\n"q, ""r""\ns",7\n', ["2", "4"]),
    "semicolon.csv": ('prompt;completion\r\n"a; b";2026-01-02\r\n"q, ""r""\ns";7\r\n', ["2", "4"]),
    "quoted.csv": ('"prompt",completion\n"a; b",2026-01-02\n"q, ""r""\ns",7\n', ["2", "4"]),
    "a.tsv": ('prompt\tcompletion\na; b\t2026-01-02\n"q, ""r""\ns"\t7\n', ["2", "4"]),
}


def test_a_delimiter_within_quotes_divides_nothing(tmp_path):
    (tmp_path / "a.csv").write_text('"a;b"\nx;y\n')
    assert [record for record, _ in read_records(str(tmp_path / "a.csv"))] == [{"a;b": "x;y"}]


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, "zstd", asbytes=True)


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_by_its_ending_also_compressed(tmp_path, name, packed):
    text, lines = FILES[name]
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACKED[packed](text.encode()))
    found = list(read_records(str(path)))
    assert [record for record, _ in found] == RECORDS
    assert [where for _, where in found] == [f"{path}:{line}" for line in lines]


@pytest.mark.parametrize("packed", PACKED)
def test_a_parquet_file_may_be_compressed(tmp_path, packed):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    path = tmp_path / f"b.parquet{packed}"
    path.write_bytes(PACKED[packed]((tmp_path / "a.parquet").read_bytes()))
    assert list(read_records(str(path))) == [(record, f"{path}:{n}") for n, record in enumerate(RECORDS, 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": \n', mtime=0), "a.jsonl.gz:2: not valid JSON"),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n\xff\n'), "a.jsonl.xz:2: not UTF-8 at byte 0"),
        ("a.csv.bz2", bz2.compress(b"a,b\n1,2\n1\n"), "a.csv.bz2:3: the row does not have the header's 2 cells"),
        ("semicolon.csv", b"a;b\n1;2\n1,2\n", "semicolon.csv:3: the row does not have the header's 2 cells"),
        ("a.tsv", b"a\tb\n1\t2\n1\n", "a.tsv:3: the row does not have the header's 2 cells"),
        ("a.jsonl.gz", b'{"a": 1}\n', "a.jsonl.gz:1: not readable .Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "a.jsonl.gz:[123]: not readable"),
        ("a.json.xz", lzma.compress(LINES.encode())[:-12], "a.json.xz:[123]: not readable"),
        ("a.csv.bz2", b"nothing", "a.csv.bz2:1: not readable"),
        ("a.jsonl.zst", b"nothing", "a.jsonl.zst:1: not readable"),
        ("a.parquet.gz", b"nothing", "a.parquet.gz: not a readable Parquet file"),
        ("a.json", b'[\n{"a": 1},\n{"a": }\n]', "a.json:3: not valid JSON .Expecting value"),
        ("a.json", b'[\n{"a": 1}\n{"a": 2}\n]', "a.json:2: not valid JSON .Expecting ','"),
        ("a.json", b'[\n{"a": 1},\n7]', "a.json:3: expected .* object.*, found 7"),
        ("a.json", b'[\n{"a": 1},\n{"a": 1, "a": 2}]', "a.json:3: not valid JSON .duplicate key 'a'"),
        ("a.json", b'[\n{"a": 1},\n', "a.json:2: not valid JSON"),
        ("a.json", b'[{"a": 1}]\n[{"a": 1}]', "a.json:1: not valid JSON"),
        ("a.json", b'[{"a": "\xff"}]', "a.json:1: not UTF-8 at byte 8"),
        ("a.json", b"[" * 100_000, "a.json:1: not valid JSON"),
        ("a.json", b'{\n"a": 1}', "a.json:1: expected one JSON object per line"),
        ("a.txt", b"x", "a.txt: unknown kind of file; use .jsonl, .json, .csv, .tsv or .parquet, each also with .gz"),
        ("a.gz", b"x", "a.gz: unknown kind of file"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named_by_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_records(str(tmp_path / name)))


def test_several_files_are_read_in_their_order(tmp_path, monkeypatch):
    for name in ("c", "a", "b10", "b9", ".hidden"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}))
    (tmp_path / "README.md").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def names(source):
        return [record["name"] for record, _ in read_records(source)]

    assert names(["c.jsonl", "a.jsonl"]) == ["c", "a"]
    assert names("b*.jsonl") == ["b10", "b9"]
    assert names(["c.jsonl", "b*.jsonl"]) == ["c", "b10", "b9"]
    assert names(["*.jsonl", "a.jsonl"]) == ["a", "b10", "b9", "c"]  # once
    assert names(".") == names(str(tmp_path)) == names("~") == ["a", "b10", "b9", "c"]
    assert names("~/c.jsonl") == ["c"]
    (tmp_path / "[a].jsonl").write_text(json.dumps({"name": "brackets"}))
    assert names("[a].jsonl") == ["brackets"] and names("[b]9.jsonl") == ["b9"]
    for source, message in (
        ("x*.jsonl", r"x\*.jsonl: no file matches"),
        ("~/x.jsonl", f"{tmp_path}/x.jsonl: No such file"),
        ("*", "README.md: unknown kind of file"),
    ):
        with pytest.raises(UserError, match=message):
            names(source)


def test_duplicates_are_found_across_files_and_splits_stay_as_they_were(tmp_path, base, monkeypatch):
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


def test_other_shapes_and_objects_give_the_same_rows(tmp_path, base, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [pair(n) for n in range(60)]
    prompts = [(row["prompt"], json.loads(row["completion"])) for row in rows]
    kinds = {
        "plain": rows,
        "sharegpt": [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": json.dumps(a, separators=(",", ":"))}]} for p, a in prompts],
        "objects": [{"question": p, "answer": dict(reversed(a.items()))} for p, a in prompts],
    }  # fmt: skip
    keys = set()
    for name, records in kinds.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        splits = load_splits(DataSettings(JsonSchema(SCHEMA), f"{name}.jsonl", tokenizer=base))
        keys.add(splits.key)
        print_shapes(splits.notes)
    assert len(keys) == 1
    assert capsys.readouterr().out.splitlines() == [
        "sharegpt.jsonl: ShareGPT conversations (from, value)",
        "objects.jsonl: questions and answers (question, answer)",
        "objects.jsonl: answers were objects, written in the format's form",
    ]


def test_a_number_of_rows_is_no_share():
    with pytest.raises(UserError, match="data.validation: 200 is not a share of train's inputs; name one such as 0.1"):
        DataSettings(Labels(["a"]), "train.jsonl", validation="200")


def test_the_cases_that_people_have(monkeypatch):
    path = shared("cases/b22-files-everyone-has/plain.jsonl")
    records = [record for record, _ in read_records(str(path))]
    for name in ("array.json", "semi.csv"):
        assert [record for record, _ in read_records(str(path.with_name(name)))] == records

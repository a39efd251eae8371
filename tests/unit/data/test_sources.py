"""Files of every kind, also compressed, and data sets give the same records, each with its place."""

import bz2
import gzip
import json

import pytest

from conftest import shared
from formtune.data.sources import HuggingFace, Source, _numbered, read_records
from formtune.errors import UserError

RECORDS = [{"prompt": "a; b", "completion": "2026-01-02"}, {"prompt": 'q, "r"\ns', "completion": "7"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
FILES = {
    "a.JSONL": (LINES, ["1", "2"]),
    "a.ndjson": (LINES, ["1", "2"]),
    "bom.jsonl": ("\ufeff" + LINES.replace("\n", "\r\n\r\n"), ["1", "3"]),
    "lines.json": (LINES, ["1", "2"]),
    "array.json": (json.dumps(RECORDS, indent=1), ["row 1", "row 2"]),
    "bom.json": ("\ufeff\n" + json.dumps(RECORDS), ["row 1", "row 2"]),
    "a.csv": ('prompt,completion\n"a; b",2026-01-02\n"q, ""r""\ns",7\n', ["2", "4"]),
    "semicolon.csv": ('prompt;completion\r\n"a; b";2026-01-02\r\n"q, ""r""\ns";7\r\n', ["2", "4"]),
    "quoted.csv": ('"prompt",completion\n"a; b",2026-01-02\n"q, ""r""\ns",7\n', ["2", "4"]),
    "a.tsv": ('prompt\tcompletion\na; b\t2026-01-02\n"q, ""r""\ns"\t7\n', ["2", "4"]),
}


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, "zstd", asbytes=True)


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_by_its_ending_also_compressed(tmp_path, name, packed):
    text, lines = FILES[name]
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACKED[packed](text.encode()))
    assert list(read_records(str(path))) == [
        (record, f"{path}:{line}") for record, line in zip(RECORDS, lines, strict=True)
    ]


@pytest.mark.parametrize("packed", PACKED)
def test_a_parquet_file_may_be_compressed(tmp_path, packed):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    path = tmp_path / f"b.parquet{packed}"
    path.write_bytes(PACKED[packed]((tmp_path / "a.parquet").read_bytes()))
    assert list(read_records(str(path))) == [(record, f"{path}:row {n}") for n, record in enumerate(RECORDS, 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": \n', mtime=0), "a.jsonl.gz:2: not valid JSON"),
        ("a.jsonl.bz2", bz2.compress(b'{"a": 1}\n\xff\n'), "a.jsonl.bz2:2: not UTF-8 at byte 0"),
        ("a.csv.bz2", bz2.compress(b"a,b\n1,2\n1\n"), "a.csv.bz2:3: expected 2 cells, as in the header"),
        ("semicolon.csv", b"a;b\n1;2\n1,2\n", "semicolon.csv:3: expected 2 cells, as in the header"),
        ("a.tsv", b"a\tb\n1\t2\n1\n", "a.tsv:3: expected 2 cells, as in the header"),
        ("a.jsonl.gz", b'{"a": 1}\n', "a.jsonl.gz:1: not readable .zlib inflate failed"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "a.jsonl.gz:[123]: not readable"),
        ("a.json.zst", zstd(LINES.encode())[:-12], "a.json.zst:[123]: not readable"),
        ("a.csv.bz2", b"nothing", "a.csv.bz2:1: not readable"),
        ("a.jsonl.zst", b"nothing", "a.jsonl.zst:1: not readable"),
        ("a.parquet.gz", b"nothing", "a.parquet.gz: not a readable Parquet file"),
        ("a.json", b'[\n{"a": 1},\n{"a": }\n]', "a.json: not valid JSON .Expecting value at line 3"),
        ("a.json", b'[\n{"a": 1}\n{"a": 2}\n]', "a.json: not valid JSON .Expecting ',' delimiter at line 3"),
        ("a.json", b'[\n{"a": 1},\n7]', "a.json:row 2: expected an object, got 7"),
        ("a.json", b'[\n{"a": 1},\n{"a": 1, "a": 2}]', "a.json: not valid JSON .duplicate key 'a'"),
        ("a.json", b'[\n{"a": 1},\n', "a.json: not valid JSON .* line 2"),
        ("a.json", b'[{"a": 1}]\n[{"a": 1}]', "a.json: not valid JSON"),
        ("a.json", b'[{"a": "\xff"}]', "a.json:1: not UTF-8 at byte 8"),
        ("a.json", b"[" * 100_000, "a.json: not valid JSON"),
        ("a.json", b'{\n"a": 1}', "a.json:1: not valid JSON .*; a file has one JSON object per line, or is one array"),
        ("a.txt", b"x", "a.txt: unknown kind of file; use .jsonl, .json, .csv, .tsv or .parquet, each also with .gz"),
        ("a.gz", b"x", "a.gz: unknown kind of file"),
        ("a.parquet", b"x", "a.parquet: not a readable Parquet file"),
        ("a.csv", b"a,b\n1\n", "a.csv:2: expected 2 cells, as in the header"),
    ],
)  # fmt: skip
def test_an_error_in_a_file_names_the_line(tmp_path, name, content, message):
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
        ("~/x.jsonl", f"{tmp_path}/x.jsonl: no such file"),
        ("*", "README.md: unknown kind of file"),
    ):
        with pytest.raises(UserError, match=message):
            names(source)


@pytest.mark.parametrize("path", ["missing.jsonl", "no/such/place"])
def test_a_missing_file_is_refused_by_name(tmp_path, path):
    with pytest.raises(UserError, match=path):
        list(read_records(str(tmp_path / path)))


def test_a_delimiter_within_quotes_divides_nothing(tmp_path):
    (tmp_path / "a.csv").write_text('"a;b"\nx;y\n')
    assert [record for record, _ in read_records(str(tmp_path / "a.csv"))] == [{"a;b": "x;y"}]


def test_a_saved_data_set_is_read_with_the_names_of_its_class_labels(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    data_set = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data_set.save_to_disk(tmp_path / "saved")
    data_set.to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "a.parquet"):
        assert [record for record, _ in read_records(str(tmp_path / name))] == [
            {"text": "a", "label": "pos"},
            {"text": "b", "label": "neg"},
            {"text": "c", "label": None},
        ]


def test_a_split_that_a_saved_data_set_lacks_is_refused_with_those_that_it_has(tmp_path):
    import datasets

    part = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    datasets.DatasetDict({"train_sft": part, "test_sft": part}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"split train is not readable \(there are train_sft, test_sft\); set `split`"):
        list(read_records(str(tmp_path / "saved")))
    source = HuggingFace(str(tmp_path / "saved"), split="test_sft")
    assert [record for record, _ in read_records(source)] == [{"prompt": "a", "completion": "b"}]


def test_the_same_rows_in_other_files_are_the_same_records():
    path = shared("cases/b22-files-everyone-has/plain.jsonl")
    records = [record for record, _ in read_records(str(path))]
    for name in ("array.json", "semi.csv"):
        assert [record for record, _ in read_records(str(path.with_name(name)))] == records


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,completion\np,a,b\n")
    (tmp_path / "b.csv").write_text("prompt,completion,,\np,a,,\n")  # as Excel may save unused columns
    [(record, _)] = read_records(str(tmp_path / "b.csv"))
    assert (record["prompt"], record["completion"]) == ("p", "a")
    with pytest.raises(UserError, match=r"a\.csv:1: the header has two columns named `completion`"):
        list(read_records(str(tmp_path / "a.csv")))


def test_a_field_called_names_is_no_class_label():
    features = {"info": {"names": {"dtype": "string"}}}
    assert list(_numbered([{"info": {"names": "a"}}], features, "f")) == [({"info": {"names": "a"}}, "f:row 1")]


def test_several_labels_of_a_row_are_read_by_their_names(tmp_path):
    import datasets

    kind = datasets.ClassLabel(names=["joy", "anger", "fear"])
    features = datasets.Features({"text": datasets.Value("string"), "labels": datasets.Sequence(kind)})
    rows = {"text": ["a", "b"], "labels": [[0, 2], []]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "emotions")
    records = [record for record, _ in HuggingFace(str(tmp_path / "emotions")).records()]
    assert [record["labels"] for record in records] == [["joy", "fear"], []]


def test_a_map_in_a_parquet_file_is_an_object(tmp_path):
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([[("k", "v")], []], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    pyarrow.parquet.write_table(pyarrow.table({"slots": column}), tmp_path / "a.parquet")
    assert [record for record, _ in read_records(str(tmp_path / "a.parquet"))] == [{"slots": {"k": "v"}}, {"slots": {}}]


def test_the_delimiter_is_the_more_frequent_sign_of_the_header(tmp_path):
    (tmp_path / "a.csv").write_text("Nachricht, kurz;Label;Zeit\nx;y;z\n")
    [(record, _)] = read_records(str(tmp_path / "a.csv"))
    assert record == {"Nachricht, kurz": "x", "Label": "y", "Zeit": "z"}


def test_nulls_that_a_table_adds_to_tools_are_no_part_of_them(tmp_path):
    import pyarrow
    import pyarrow.parquet

    tools = [
        {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}},
        {"name": "g", "parameters": {"properties": {"b": {"type": "integer"}}}},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"tools": tools}]), tmp_path / "a.parquet")
    assert next(read_records(str(tmp_path / "a.parquet")))[0]["tools"] == tools
    (tmp_path / "a.jsonl").write_text(json.dumps({"tools": [{"name": "f", "default": None}]}))
    assert next(read_records(str(tmp_path / "a.jsonl")))[0]["tools"] == [{"name": "f", "default": None}]


def test_nulls_that_a_table_adds_to_calls_are_no_part_of_them(tmp_path):
    import pyarrow
    import pyarrow.parquet

    calls = [
        {"function": {"name": "f", "arguments": {"city": "Oslo"}}},
        {"function": {"name": "g", "arguments": {"n": 1}}},
    ]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    assert next(read_records(str(tmp_path / "a.parquet")))[0]["messages"][1]["tool_calls"] == calls


def test_a_source_gives_each_row_its_own_place():
    class Own(Source):
        def records(self):
            yield {"prompt": "a"}, "db"
            yield {"prompt": "b"}, "db"

    with pytest.raises(UserError, match="^db: two rows have this place; Own must give each row its own"):
        list(read_records(Own()))


def test_a_folder_without_a_readable_file_is_refused_with_the_kinds_that_are_read(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        UserError, match="no file of a known kind in this folder; use .jsonl, .* subfolders are not read"
    ):
        list(read_records(str(tmp_path)))

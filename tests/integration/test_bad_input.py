"""Bad input gets one line and exit code 2, or is counted and the command continues; nothing is left half-written.

Each row carries its number in the fault matrix and its title, for the table in docs/reliability.md.
"""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from command import formtune, no_input, no_output, no_port
from conftest import ATTEMPTS, SCHEMA, pair, tiny_model
from formtune.files import read_entry

GOOD = [json.dumps(pair(n)) for n in range(40)]
ANSWER = '{"n":1,"s":"a"}'


@pytest.fixture
def work(tmp_path, base):
    """A folder with a task that every command accepts; the function changes it and returns its folder."""
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))

    def change(rows=GOOD, model=None, data=None, trainer=None, **top):
        write(tmp_path / "train.jsonl", rows)
        format = {"class_path": "JsonSchema", "init_args": {"schema": "schema.json"}}
        config = {
            "model": {"base": base, "max_new_tokens": 24, "lora": {"r": 4}} | (model or {}),
            "data": {"train": "train.jsonl", "format": format, "validation": 0.2, "test": 0.2} | (data or {}),
            "trainer": {"max_steps": 2, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False}
            | (trainer or {}),
        }
        (tmp_path / "t.yaml").write_text(yaml.safe_dump(config | top))
        return tmp_path

    return change


def write(path: Path, rows) -> None:
    """Lines as they are, or bytes as they are."""
    path.write_bytes(rows if isinstance(rows, bytes) else "".join(f"{row}\n" for row in rows).encode())


def about(record_property, case, title):
    record_property("case", str(case))
    record_property("title", title)


def refused(done, *parts, leaves=()):
    """One line, exit code 2, nothing left but the cache and what is named."""
    assert done.code == 2, (done.code, done.out[-500:], done.err[-3000:])
    assert len(done.err.splitlines()) == 1 and done.err.startswith("formtune: error: "), done.err
    assert all(part in done.err for part in parts), done.err
    assert all(name.startswith(".cache/encoded/") or name.endswith(leaves or "-") for name in done.new), done.new


def accepted(done):
    assert done.code == 0, (done.code, done.out[-500:], done.err[-3000:])
    assert "Traceback" not in done.err


def row(prompt='"a"', completion=json.dumps(ANSWER)):
    return f'{{"prompt": {prompt}, "completion": {completion}}}'


def chat(*turns):
    return json.dumps({"messages": list(turns)})


USER, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}

# Case, title, the second line of the file (or all of it, in bytes), parts of the message.
ROWS = [
    (1, "line is not JSON", "number 7", ["train.jsonl:2: not valid JSON", "fix or remove the row"]),
    (2, "last line is cut off", row()[:-9], ["train.jsonl:2: not valid JSON"]),
    (6, "Latin-1 file", GOOD[0].encode() + b'\n{"prompt": "\xe9"}\n', ["train.jsonl:2: not UTF-8 at byte 12"]),
    (6, "UTF-16 file", GOOD[0].encode("utf-16"), ["train.jsonl:1: not UTF-8 at byte 0", "convert the file"]),
    (7, "NUL in a line", row('"a\0b"'), ["train.jsonl:2: not valid JSON"]),
    (8, "lone surrogate", row('"\\ud800"'), ["train.jsonl:2: not valid JSON", "surrogate"]),
    (9, "line of 5 MB", row(f'"{"x" * 5 * 2**20}"'), ["train.jsonl:2: the line is longer than 4 MiB"]),
    (10, "file is a JSON array", f"[{row()}]".encode(), ["train.jsonl:1: expected one JSON object per line"]),
    (10, "file is a JSON array over several lines", f"[\n  {row()}\n]".encode(), ["train.jsonl:1: not valid JSON", "one JSON object per line, or is one array"]),
    (10, "file is one JSON object over several lines", json.dumps(pair(1), indent=2).encode(), ["train.jsonl:1: ", "per line"]),
    (11, "row is a list", "[1, 2]", ["train.jsonl:2: expected one JSON object per line"]),
    (11, "row is a number", "7", ["train.jsonl:2: expected one JSON object per line"]),
    (11, "row is a text", '"a"', ["train.jsonl:2: expected one JSON object per line"]),
    (12, "column missing", '{"prompt": "a"}', ["train.jsonl:2: no column `completion` among prompt", "data.columns"]),
    (12, "row without columns", "{}", ["train.jsonl:2: no column `prompt`"]),
    (13, "completion is null", row(completion="null"), ["train.jsonl:2: `completion` is null, not text"]),
    (13, "prompt is null", row("null"), ["train.jsonl:2: `prompt` is null, not text"]),
    (15, "prompt is an object", row(ANSWER), ["train.jsonl:2: `prompt` is dict", "as a string"]),
    (16, "key twice in a row", '{"prompt": "a", "prompt": "b"}', ["train.jsonl:2: not valid JSON", "duplicate key 'prompt'"]),
    (17, "NaN in a row", row("NaN"), ["train.jsonl:2: `prompt` is null, not text"]),
    (17, "Infinity in a row", row("-Infinity"), ["train.jsonl:2: `prompt` is float, not text"]),
    (17, "1e999 in a row", row("1e999"), ["train.jsonl:2: not valid JSON", "too large"]),
    (18, "integer of 5000 digits", row("9" * 5000), ["train.jsonl:2: not valid JSON", "5000 digits"]),
    (19, "100,000 levels deep", row("[" * 100_000), ["train.jsonl:2: not valid JSON", "nested deeper"]),
    (25, "unknown role", chat({"role": "robot", "content": "a"}, ANSWERED), ["train.jsonl:2: messages[0] has the role 'robot'; a turn is", "system, developer, user, assistant, tool"]),
    (25, "function role", chat(USER, ANSWERED, {"role": "function", "content": "a"}, ANSWERED), ["train.jsonl:2: messages[2] has the role 'function'"]),
    (25, "tools of another shape", json.dumps({"messages": [USER, ANSWERED], "tools": "saw"}), ["train.jsonl:2: `tools` must be a list of tools"]),
    (25, "turns of another shape", json.dumps({"messages": [{"by": "human", "text": "a"}]}), ["messages[0] has the role None; a turn is an object with `content` and a `role`"]),
    (25, "turn is a text", chat("a", ANSWERED), ["train.jsonl:2: messages[0] is str; a turn is an object"]),
    (26, "turn without content", chat({"role": "user"}, ANSWERED), ["train.jsonl:2: messages[0]: `content` is null, not text"]),
    (26, "content is null", chat(USER, {"role": "assistant", "content": None}), ["messages[1]: `content` is null, not text"]),
    (27, "content is a list", chat({"role": "user", "content": [USER]}, ANSWERED), ["train.jsonl:2: messages[0].content[0]: only text"]),
    (27, "content has an image", chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, ANSWERED), ["messages[0].content[1]: only text is read"]),
    (27, "turns are null", '{"messages": null}', ["train.jsonl:2: `messages` is null; it must be a list of turns"]),
    (28, "last turn is not an assistant turn", chat(USER), ["train.jsonl:2: `messages` must end with an assistant turn"]),
    (28, "no user turn", chat(ANSWERED), ["train.jsonl:2: `messages` must end", "after a user turn"]),
    (28, "no turns", chat(), ["train.jsonl:2: `messages` must end"]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "title", "line", "parts"), ROWS, ids=[title for _, title, *_ in ROWS])
def test_a_row_that_cannot_be_read_is_named(work, record_property, case, title, line, parts):
    about(record_property, case, title)
    refused(formtune(work(line if isinstance(line, bytes) else [GOOD[0], line]), "audit", "-c", "t.yaml"), *parts)


def audited(folder):
    return json.loads((folder / "logs/t/audit/audit.json").read_text())


def encoded(folder):
    """Token ids of all rows as they would be trained on."""
    [path] = (folder / ".cache/encoded").glob("*.json")
    return [row[:2] for rows in read_entry(path)["rows"].values() for row in rows]


@pytest.mark.parametrize(
    ("case", "title", "change"),
    [
        (3, "UTF-8 byte order mark", lambda text: b"\xef\xbb\xbf" + text),
        (4, "CRLF line ends", lambda text: text.replace(b"\n", b"\r\n")),
        (5, "blank lines", lambda text: text.replace(b"\n", b"\n\n  \n")),
        (2, "no line feed at the end", lambda text: text.rstrip()),
    ],
)
def test_how_lines_end_changes_no_row(work, record_property, case, title, change):
    about(record_property, case, title)
    ids = []
    text = "\n".join([*GOOD, ""]).encode()
    for rows in (text, change(text)):
        folder = work(rows)
        accepted(formtune(folder, "audit", "-c", "t.yaml"))
        ids.append(encoded(folder))
        for path in (folder / ".cache/encoded").iterdir():
            path.unlink()
    assert ids[0] == ids[1] and ids[0]


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_a_row_of_half_a_megabyte_is_checked_like_any_other(work, record_property, name):
    about(record_property, 9, f"row of half a megabyte, {name}")
    rows = [pair(n) for n in range(40)] + [pair(41, "x" * 2**19)]
    lines = [json.dumps(one) for one in rows]
    if name.endswith("csv"):
        lines = [
            "prompt,completion",
            *(one["prompt"] + ',"' + one["completion"].replace('"', '""') + '"' for one in rows),
        ]
    folder = work(data={"train": name, "bad_rows": "drop"})
    write(folder / name, lines)
    accepted(formtune(folder, "audit", "-c", "t.yaml"))
    assert audited(folder)["quarantined"] == {"too_long": 1}


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_a_line_of_a_gigabyte_takes_no_gigabyte_of_memory(work, record_property, name):
    about(record_property, 9, f"line of 1 GB, {name}")
    folder = work(data={"train": name})
    with (folder / name).open("wb") as file:
        file.write(b"prompt,completion\n" if name.endswith("csv") else b"")
        file.truncate(2**30)
    for command in ("audit", "validate"):
        done = formtune(folder, command, "-c", "t.yaml")
        refused(done, f"{name}:{1 + name.endswith('csv')}: the line is longer than 4 MiB")
        assert done.peak < 150


def test_dates_stay_texts(work, record_property):
    about(record_property, 20, "ISO dates")
    schema = {"type": "object", "properties": {"d": {"type": "string", "format": "date"}}}
    answers = [f'{{"d":"2026-01-{n:02}"}}' for n in range(1, 31)]
    folder = work([row(f'"on {n}, 2026-02-01T00:00:00"', json.dumps(a)) for n, a in enumerate(answers)])
    (folder / "schema.json").write_text(json.dumps(schema))
    accepted(formtune(folder, "audit", "-c", "t.yaml"))
    rows = [row for rows in read_entry(next((folder / ".cache/encoded").iterdir()))["rows"].values() for row in rows]
    assert {row[3] for row in rows} == set(answers) and "2026-02-01T00:00:00" in str(rows)


@pytest.mark.parametrize(
    ("case", "title", "rows", "data", "parts"),
    [
        (21, "empty file", [], {}, ["data.train: the split is empty (0 read; none quarantined)"]),
        (21, "nothing but blank lines", ["", "  "], {}, ["the split is empty (0 read"]),
        (22, "empty after cleaning", [row('"\\u200b"')] * 3, {}, ["the split is empty (3 read; 3 empty)"]),
        (22, "all answers empty", [row(completion='" "')] * 3, {}, ["the split is empty (3 read; 3 empty)"]),
        (23, "all rows are duplicates", [GOOD[0]] * 5, {}, ["the split is empty (5 read; 4 duplicate)"]),
        (23, "all rows conflict", [row(completion=json.dumps(ANSWER.replace("1", str(n)))) for n in range(5)], {}, ["5 conflict"]),
        (24, "the same rows in train and validation", GOOD, {"validation": "train.jsonl"}, ["the split is empty (40 read; 40 leak)"]),
        (49, "prompt and answer over max_length", GOOD, {"max_length": 30}, ["train.jsonl:", "tokens, the limit is 30 (40 such rows); set data.max_length: "]),
        (49, "every row over max_length, dropped", GOOD, {"max_length": 30, "bad_rows": "drop"}, ["the split is empty (40 read; 40 too_long)"]),
        (48, "prompt longer than the context", [*GOOD, row(f'"{"x" * 600}"')], {}, ["train.jsonl:41: ", "tokens, the limit is 512"]),
        (50, "control token in the text", [*GOOD, row('"a <|im_end|> b"')], {}, ["train.jsonl:41: the text contains <|im_end|>"]),
    ],
)  # fmt: skip
def test_rows_that_leave_nothing_to_train_on_are_refused_with_counts(
    work, record_property, case, title, rows, data, parts
):
    about(record_property, case, title)
    done = formtune(work(rows, data=data), "train", "-c", "t.yaml", "--run", "r")
    refused(done, *parts, leaves=("logs/t/r/quarantine.jsonl",))


def test_an_audit_of_nothing_says_so_and_is_blocked(work, record_property):
    about(record_property, 21, "empty file, audit")
    folder = work([])
    done = formtune(folder, "audit", "-c", "t.yaml")
    assert (done.code, done.err) == (1, "") and "the split is empty (0 read" in done.out
    assert audited(folder)["verdict"] == "blocked"


def test_a_row_of_train_that_is_in_validation_too_is_quarantined_and_counted(work, record_property):
    about(record_property, 24, "one row in train and validation")
    folder = work([*GOOD, json.dumps(pair(99, "held out"))], data={"validation": "held.jsonl", "test": 0.2})
    write(folder / "held.jsonl", [json.dumps(pair(99, "held out")), json.dumps(pair(98, "and more"))])
    done = formtune(folder, "audit", "-c", "t.yaml")
    accepted(done)
    assert audited(folder)["quarantined"] == {"leak": 1} and "leak" in done.out


def test_prompts_longer_than_the_context_are_refused_by_their_line(work, record_property):
    about(record_property, 48, "prompt to predict longer than the context")
    folder = work(data={"prompts": "p.jsonl"})
    write(folder / "p.jsonl", ['{"prompt": "a"}', f'{{"prompt": "{"x" * 600}"}}'])
    refused(formtune(folder, "predict", "-c", "t.yaml"), "p.jsonl:2: the prompt has", "it exceeds 512")


SCHEMAS = [
    (29, "schema with an unknown type", {"type": "strng"}, ["schema.json: $.type: not a JSON Schema", "'strng' is not one of"]),
    (29, "schema with a mistyped keyword", {"requierd": ["a"]}, ["$.requierd: not a keyword", "did you mean 'required'?"]),
    (29, "schema that is a list", [], ["schema.json: the schema must be a JSON object"]),
    (29, "schema that accepts everything", {"$schema": "http://json-schema.org/draft-07/schema#"}, ["the schema checks nothing"]),
    (29, "schema whose $schema is a number", {"$schema": 7}, ["schema.json: "]),
    (30, "remote $ref", {"$ref": "https://example.com/x.json"}, ["points to nothing in the schema; copy what it names"]),
    (30, "$ref to a file", {"properties": {"a": {"$ref": "../x.json"}}}, ["points to nothing"]),
    (30, "remote $dynamicRef", {"$dynamicRef": "http://169.254.169.254/"}, ["$.$dynamicRef: not supported; use $ref"]),
    (30, "cyclic $ref", {"properties": {"n": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, ["an endless $ref loop"]),
    (30, "$ref to nowhere", {"$ref": "#/$defs/gone"}, ["'#/$defs/gone' points to nothing"]),
    (31, "schema of 200,000 properties", {"properties": {f"p{n}": {"type": "string"} for n in range(200_000)}}, ["schema.json: "]),
    (31, "schema with 20,000 references", {"$defs": {"a": {}}, "properties": {f"p{n}": {"$ref": "#/$defs/a"} for n in range(20_000)}}, None),
    (31, "schema with 2^60 fields", {"$ref": "#/$defs/a0", "$defs": {f"a{n}": {"properties": {key: {"$ref": f"#/$defs/a{n + 1}"} for key in "xy"}} for n in range(60)} | {"a60": {}}}, None),
    (31, "schema with 2^60 alternatives", {"$ref": "#/$defs/a0", "$defs": {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)} | {"a60": {}}}, ["schema.json: "]),
    (31, "schema nested 60 levels", json.loads('{"items":' * 60 + "{}" + "}" * 60), None),
    (31, "schema nested 5,000 levels", '{"items":' * 5_000 + "{}" + "}" * 5_000, ["schema.json: ", "nested deeper"]),
    (32, "pattern that takes gigabytes to compile", {"pattern": "(((a{1000}){1000}){1000}){1000}"}, ["schema.json: "]),
    (33, "schema pattern that does not compile", {"properties": {"a": {"pattern": "("}}}, ["$.properties.a.pattern: not a JSON Schema ('(' is not a 'regex'"]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "title", "schema", "parts"), SCHEMAS, ids=[title for _, title, *_ in SCHEMAS])
def test_an_invalid_schema_is_refused_in_time(work, record_property, case, title, schema, parts):
    about(record_property, case, title)
    folder = work()
    (folder / "schema.json").write_text(schema if isinstance(schema, str) else json.dumps(schema))
    done = formtune(folder, "audit", "-c", "t.yaml", seconds=20)
    if parts is None:
        accepted(done)
    else:
        refused(done, *parts)
        assert done.peak < 300


@pytest.mark.parametrize(
    ("case", "title", "format", "parts"),
    [
        (33, "pattern that does not compile", {"class_path": "Regex", "init_args": {"pattern": "("}}, ["data.format.pattern: not a regular expression"]),
        (33, "pattern nested 1,000 levels", {"class_path": "Regex", "init_args": {"pattern": "(" * 1000 + ")" * 1000}}, ["data.format.pattern: ", "nested too deeply"]),
        (32, "pattern that takes gigabytes to compile", {"class_path": "Regex", "init_args": {"pattern": "(?:a{1000}){1000}"}}, ["data.format.pattern: ", "repetitions"]),
        (29, "schema file that is missing", {"class_path": "JsonSchema", "init_args": {"schema": "gone.json"}}, ["gone.json: No such file"]),
        (29, "schema file that is a folder", {"class_path": "JsonSchema", "init_args": {"schema": "."}}, ["data.format.schema: .: Is a directory"]),
        (29, "labels twice", {"class_path": "Labels", "init_args": {"labels": ["a", "a"]}}, ["data.format.labels: "]),
        (29, "format that does not exist", {"class_path": "Nope"}, ["data.format", "Nope"]),
        (29, "format that names another class", {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "payload"]}}, ["data.format"]),
        (31, "schema file of a gigabyte", {"class_path": "JsonSchema", "init_args": {"schema": "big.json"}}, ["big.json: longer than"]),
    ],
)  # fmt: skip
def test_an_invalid_format_is_refused(work, record_property, case, title, format, parts):
    about(record_property, case, title)
    folder = work(data={"format": format})
    with (folder / "big.json").open("wb") as file:
        file.truncate(2**30)
    for command in ("audit", "validate"):
        done = formtune(folder, command, "-c", "t.yaml", seconds=20)
        refused(done, *parts)
        assert done.peak < 200


EVIL = "a" * 40 + "!"


@pytest.mark.parametrize(
    ("title", "format", "good", "evil"),
    [
        ("catastrophic pattern in Regex", {"class_path": "Regex", "init_args": {"pattern": "(a|a)+b?"}}, "aaa", EVIL),
        ("catastrophic pattern in a schema", {"class_path": "JsonSchema", "init_args": {"schema": {"type": "string", "pattern": "^(a|a)+$"}}}, '"aaa"', f'"{EVIL}"'),
    ],
)  # fmt: skip
def test_a_match_without_end_counts_as_a_failure_and_the_audit_continues(
    work, record_property, title, format, good, evil
):
    about(record_property, 32, title)
    rows = [json.dumps({"prompt": f"number {n}", "completion": good}) for n in range(30)]
    rows += [json.dumps({"prompt": f"evil {n}", "completion": evil}) for n in range(3)]
    folder = work(rows, data={"format": format, "bad_rows": "drop", "near_duplicates": 1.0})
    done = formtune(folder, "audit", "-c", "t.yaml", seconds=180)  # the limits are of processor time
    accepted(done)
    audit = audited(folder)
    assert audit["quarantined"] == {"format": 3} and sum(split["used"] for split in audit["rows"].values()) == 30
    details = [
        json.loads(line)["detail"] for line in (folder / "logs/t/audit/quarantine.jsonl").read_text().splitlines()
    ]
    assert all("took" in detail for detail in details)


class Payload:
    """Writes a file if anything unpickles it."""

    def __reduce__(self):
        return (open, ("payload", "w"))


def change_json(name, **entries):
    """Sets entries of one of the base's JSON files; None removes one."""

    def change(folder):
        path = folder / name
        content = json.loads(path.read_text()) | entries
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def change_weights(change):
    def changed(folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})

    return changed


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def not_a_number(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def pickled(*names):
    """Pickles in place of the weights, or beside them."""

    def change(folder):
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(pickle.dumps({"model.norm.weight": Payload()}))

    return change


def index(name):
    """An index in place of the weights that names this file for all of them."""

    def change(folder):
        weights = dict.fromkeys(load_file(folder / "model.safetensors"), name)
        (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))

    return change


def own_code(name, **entries):
    """Files that ask for code of their own, which writes a file when it is imported."""

    def change(folder):
        change_json(name, **entries)(folder)
        (folder / "custom.py").write_text("open('payload', 'w')\nclass Custom: pass\n")

    return change


CODE = {
    "AutoConfig": "custom.Custom",
    "AutoModelForCausalLM": "custom.Custom",
    "AutoTokenizer": ["custom.Custom", "custom.Custom"],
}
ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def adapter(base, weights="adapter_model.safetensors"):
    """An adapter's configuration that names another base, instead of a model."""

    def change(folder):
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | {"base_model_name_or_path": base}))
        (folder / weights).write_bytes(pickle.dumps(Payload()))

    return change


MODELS = [
    (35, "no weights", lambda folder: (folder / "model.safetensors").unlink(), ["cannot be loaded"]),
    (35, "no config.json", lambda folder: (folder / "config.json").unlink(), ["cannot be loaded"]),
    (35, "config.json is not JSON", lambda folder: (folder / "config.json").write_text("{"), ["model.base: "]),
    (35, "config.json is a list", lambda folder: (folder / "config.json").write_text("[]"), ["model.base: "]),
    (35, "config.json with a wrong type", change_json("config.json", hidden_size="many"), ["model.base: "]),
    (35, "context length that is not a number", change_json("config.json", max_position_embeddings="many"), ["model.base: "]),
    (36, "weights cut off", cut, ["cannot be loaded"]),
    (36, "weights empty", lambda folder: (folder / "model.safetensors").write_bytes(b""), ["cannot be loaded"]),
    (36, "weights whose header says 2^63 bytes", lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"), ["cannot be loaded"]),
    (37, "tensor missing", change_weights(lambda w: w.pop("model.norm.weight")), ["is incomplete", "model.norm.weight"]),
    (38, "tensor of another shape", change_weights(lambda w: w.update({"model.norm.weight": torch.ones(7)})), ["model.base: "]),
    (39, "NaN in the weights", change_weights(not_a_number), ["non-finite weights"]),
    (40, "unknown model_type", change_json("config.json", model_type="nonsense"), ["model.base: "]),
    (41, "remote code: configuration", own_code("config.json", auto_map=CODE, model_type="custom"), ["model.base: "]),
    (41, "hub kernel in config.json", change_json("config.json", attn_implementation="kernels-community/flash-attn"), ["model.base: ", "kernel"]),
    (42, "pytorch_model.bin", pickled("pytorch_model.bin"), ["cannot be loaded"]),
    (42, "pytorch_model.bin beside an index", both(index("pytorch_model.bin"), lambda folder: (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Payload()}))), ["names 'pytorch_model.bin'"]),
    (103, "index that points out of the folder", index("../model.safetensors"), ["names '../model.safetensors'"]),
    (103, "index that points to an absolute path", index("/etc/x.safetensors"), ["names '/etc/x.safetensors'"]),
    (42, "model.safetensors that is a pickle", pickled("model.safetensors"), ["cannot be loaded"]),
    (42, "adapter as base, .bin", adapter("elsewhere", "adapter_model.bin"), ["is an adapter"]),
    (103, "adapter whose base points out of its folder", adapter("../../x"), ["is an adapter"]),
    (103, "adapter whose base is an absolute path", adapter("/etc"), ["is an adapter"]),
    (103, "adapter whose base is a Hub id", adapter("owner/name"), ["is an adapter"]),
]  # fmt: skip


@pytest.fixture
def copy(base, tmp_path_factory):
    def make(change):
        folder = tmp_path_factory.mktemp("m") / "model"
        shutil.copytree(base, folder)
        change(folder)
        return str(folder)

    return make


@pytest.mark.parametrize(("case", "title", "change", "parts"), MODELS, ids=[title for _, title, *_ in MODELS])
def test_a_model_folder_that_is_incomplete_or_odd_is_refused(work, copy, record_property, case, title, change, parts):
    about(record_property, case, title)
    folder = work(model={"base": copy(change)})
    refused(formtune(folder, "validate", "-c", "t.yaml"), *parts)
    assert not list(folder.rglob("payload"))


def template(change):
    def changed(folder):
        path = folder / "chat_template.jinja"
        path.write_text(change(path.read_text()))

    return changed


def no_template(folder):
    (folder / "chat_template.jinja").unlink()


no_eos = change_json("tokenizer_config.json", eos_token=None)
TOKENIZERS = [
    (43, "tokenizer.json missing", lambda folder: (folder / "tokenizer.json").unlink(), ["model.base: no usable tokenizer"]),
    (43, "tokenizer.json cut off", lambda folder: (folder / "tokenizer.json").write_text("{"), ["model.base: no usable tokenizer"]),
    (43, "tokenizer.json of another kind", lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'), ["model.base: no usable tokenizer"]),
    (43, "tokenizer_config.json is a list", lambda folder: (folder / "tokenizer_config.json").write_text("[]"), ["model.base: no usable tokenizer"]),
    (41, "remote code: tokenizer", own_code("tokenizer_config.json", auto_map=CODE, tokenizer_class="Custom"), ["model.base: no usable tokenizer", "custom code"]),
    (45, "neither EOS nor a chat template", both(no_eos, no_template), ["neither a chat template nor an EOS token"]),
    (46, "chat template with a syntax error", template(lambda t: "{% for %}"), ["model.base: "]),
    (46, "chat template that tries to run code", template(lambda t: "{{ ''.__class__.__mro__[1].__subclasses__() }}"), ["model.base: "]),
    (46, "chat template without an end of turn", template(lambda t: "{% for m in messages %}{{ m.content }} {% endfor %}"), ["no end-of-turn token"]),
    (46, "chat template with a very long loop", template(lambda t: "{% for a in range(100000000) %}x{% endfor %}"), ["model.base: "]),
    (50, "chat template that leaves out the answer", template(lambda t: t.replace("m.content", "'?'")), ["the chat template alters the answer"]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "title", "change", "parts"), TOKENIZERS, ids=[title for _, title, *_ in TOKENIZERS])
def test_a_tokenizer_that_cannot_prove_its_mask_is_refused(work, copy, record_property, case, title, change, parts):
    about(record_property, case, title)
    folder = work(model={"base": copy(change)})
    done = formtune(folder, "audit", "-c", "t.yaml", seconds=20)
    accepted(done) if parts is None else refused(done, *parts)
    assert not list(folder.rglob("payload"))


@pytest.mark.parametrize(
    ("case", "title", "change"),
    [
        (44, "tokenizer without a padding token", change_json("tokenizer_config.json", pad_token=None)),
        (45, "tokenizer with a template and no EOS", no_eos),
        (46, "tokenizer with EOS and no template", no_template),
        (47, "more embeddings than tokens", change_json("tokenizer_config.json")),
    ],
)
def test_a_tokenizer_without_an_optional_part_is_accepted(work, copy, record_property, case, title, change):
    about(record_property, case, title)
    accepted(formtune(work(model={"base": copy(change)}), "validate", "-c", "t.yaml"))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(work, tmp_path_factory, base, record_property):
    about(record_property, 47, "vocabulary larger than the embedding")
    folder = tmp_path_factory.mktemp("m") / "model"
    shutil.copytree(base, folder)
    tiny_model(vocab_size=200).save_pretrained(folder)
    refused(formtune(work(model={"base": str(folder)}), "validate", "-c", "t.yaml"), "more tokens than the model has")


@pytest.mark.parametrize(
    ("title", "name", "parts"),
    [
        ("folder that does not exist", "no/model/here", ["model.base: no folder no/model/here"]),
        ("file instead of a folder", "t.yaml", ["model.base: no folder t.yaml"]),
        ("empty folder", ".", ["model.base: "]),
        ("empty name", "", ["model.base: "]),
        ("URL", "https://example.com/x", ["model.base: no folder https://example.com/x"]),
    ],
)
def test_a_missing_model_is_named_without_using_the_network(work, record_property, title, name, parts):
    about(record_property, 34, title)
    for command in ("audit", "validate"):
        refused(formtune(work(model={"base": name}), command, "-c", "t.yaml"), *parts)


@pytest.mark.parametrize(
    ("case", "title", "keys", "parts"),
    [
        (51, "target that matches no layer", ["--model.lora.targets", "[nope]"], ["model.lora.targets: no layer is called 'nope'"]),
        (51, "no targets", ["--model.lora.targets", "[]"], ["model.lora.targets: the list is empty"]),
        (52, "rank 0", ["--model.lora.r", "0"], ["model.lora.r"]),
        (52, "rank -1", ["--model.lora.r=-1"], ["model.lora.r"]),
        (52, "dropout above 1", ["--model.lora.dropout", "2"], ["model.lora.dropout"]),
        (52, "alpha 0", ["--model.lora.alpha", "0"], ["model.lora.alpha"]),
        (53, "learning rate below 0", ["--model.optimizer.lr=-1"], ["model.optimizer: Invalid learning rate"]),
        (53, "learning rate NaN", ["--model.optimizer.lr=.nan"], ["model.optimizer: "]),
        (53, "learning rate infinite", ["--model.optimizer.lr=.inf"], ["model.optimizer: "]),
        (53, "weight decay below 0", ["--model.optimizer.weight_decay=-1"], ["model.optimizer: "]),
        (53, "betas of one number", ["--model.optimizer.betas", "[1]"], ["betas", "[1]"]),
        (53, "warmup above 1", ["--model.scheduler.warmup", "1.5"], ["warmup"]),
        (53, "gradient norm below 0", ["--model.max_grad_norm=-1"], ["model.max_grad_norm"]),
        (53, "no tokens per micro-batch", ["--model.tokens_per_micro_batch", "0"], ["model.tokens_per_micro_batch"]),
        (53, "validation after every 0 steps", ["--trainer.val_check_interval", "0"], ["trainer.val_check_interval: 0"]),
        (53, "no rows per step", ["--data.rows_per_step", "0"], ["data.rows_per_step"]),
        (53, "shares that leave no training rows", ["--data.validation", "0.6", "--data.test", "0.6"], ["data.validation, data.test: the two fractions"]),
        (55, "bf16-true", ["--trainer.precision", "bf16-true"], ["trainer.precision: bf16-true would store"]),
        (56, "16-true on CPU", ["--trainer.precision", "16-true"], ["trainer.precision: 16-true would store"]),
        (57, "unknown key on the command line", ["--model.lora.rnak", "3"], ["did you mean model.lora.r"]),
        (58, "wrong type on the command line", ["--model.lora.r", "many"], ["model.lora.r"]),
        (58, "option without a value", ["--model.lora.r"], ["model.lora.r"]),
        (64, "monitor that no metric produces", ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/los"], ["trainer.callbacks", "val/los", "did you mean val/loss"]),
        (64, "monitor of a checkpoint", ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.monitor", "nope"], ["trainer.callbacks", "nope"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_an_invalid_value_is_refused_before_a_run_begins(work, record_property, case, title, keys, parts):
    about(record_property, case, title)
    refused(formtune(work(), "train", "-c", "t.yaml", *keys), *parts)


UNKNOWN = [
    (57, "unknown key", {"model": {"lora": {"rnak": 3}}}, ["t.yaml:", "lora.rnak", "did you mean model.lora.r"]),
    (57, "unknown key at the top", {"modle": {"base": "x"}}, ["t.yaml:", "modle", "did you mean model"]),
    (57, "unknown key of the trainer", {"trainer": {"max_step": 3}}, ["t.yaml:", "did you mean trainer.max_steps"]),
    (57, "unknown key of the optimizer", {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lrr": 1}}}}, ["t.yaml:", "lrr"]),
    (57, "key that is a number", {7: 8}, ["7"]),
    (58, "wrong type", {"model": {"lora": {"r": "many"}}}, ["t.yaml:", "model.lora.r: must be a positive integer"]),
    (58, "list instead of keys", {"model": {"lora": [1]}}, ["t.yaml:", "model.lora must contain keys"]),
    (58, "list instead of the trainer's keys", {"trainer": [1]}, ["t.yaml:", "trainer must contain keys"]),
    (58, "number instead of the data's keys", {"data": 7}, ["t.yaml:", "data must contain keys"]),
    (58, "number instead of a folder", {"model": {"base": 7}}, ["t.yaml:", "model.base"]),
    (58, "`no` instead of a folder", {"model": {"base": False}}, ["t.yaml:", "model.base"]),
    (58, "unknown choice", {"data": {"bad_rows": "maybe"}}, ["t.yaml:", "data.bad_rows", "refuse"]),
    (58, "callback that names another class", {"trainer": {"callbacks": [{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "payload"]}}]}}, ["t.yaml:", "trainer.callbacks"]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "title", "change", "parts"), UNKNOWN, ids=[title for _, title, *_ in UNKNOWN])
def test_an_invalid_key_or_value_of_a_yaml_is_named_with_its_line(work, record_property, case, title, change, parts):
    about(record_property, case, title)
    folder = work()
    config = yaml.safe_load((folder / "t.yaml").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) and key in config else value
    (folder / "t.yaml").write_text(yaml.safe_dump(config))
    refused(formtune(folder, "train", "-c", "t.yaml"), *parts)
    assert not (folder / "payload").exists()


CONFIGS = [
    (59, "key twice", "model:\n  base: a\n  base: b\n", ["t.yaml:3: ", "duplicate key 'base'"]),
    (59, "key twice at the top", "model: {base: a}\ndata: {}\nmodel: {base: b}\n", ["t.yaml:3: ", "duplicate key 'model'"]),
    (60, "empty file", "", ["t.yaml: expected keys"]),
    (60, "nothing but comments", "# model\n", ["t.yaml: expected keys"]),
    (62, "syntax error", "model: [", ["t.yaml:1: not valid YAML"]),
    (62, "tab", "model:\n\tbase: x\n", ["t.yaml:2: not valid YAML"]),
    (62, "a list", "- a\n", ["t.yaml: expected keys"]),
    (62, "a text", "hello\n", ["t.yaml: expected keys"]),
    (62, "two documents", "model: {base: x}\n---\nmodel: {base: y}\n", ["t.yaml:2: "]),
    (62, "not UTF-8", b"model: {base: \xff}\n", ["t.yaml: not UTF-8 at byte 14"]),
    (62, "UTF-16", "model: {base: x}".encode("utf-16"), ["t.yaml: not UTF-8 at byte 0"]),
    (62, "NUL", b"model: {base: a\0b}\n", ["t.yaml: not valid YAML"]),
    (62, "YAML tag that constructs an object", "model: !!python/object/apply:os.system ['touch payload']\n", ["t.yaml:1: not valid YAML"]),
    (62, "key that is a list", "model: {? [a] : b}\n", ["t.yaml"]),
    (62, "10,000 levels deep", "model: " + "[" * 10_000, ["t.yaml: not valid YAML", "recursion"]),
    (62, "alias that contains itself", "model: &a {base: x, lora: *a}\n", ["t.yaml: "]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "title", "text", "parts"), CONFIGS, ids=[title for _, title, *_ in CONFIGS])
def test_a_broken_yaml_is_named_with_its_line(work, record_property, case, title, text, parts):
    about(record_property, case, title)
    folder = work()
    write(folder / "t.yaml", text if isinstance(text, bytes) else text.encode())
    for command in ("audit", "train"):
        refused(formtune(folder, command, "-c", "t.yaml", seconds=20), *parts)


@pytest.mark.parametrize(
    ("case", "title", "name", "parts"),
    [
        (61, "YAML that is missing", "gone.yaml", ["gone.yaml: No such file"]),
        (63, "folder instead of a YAML", ".", [".: Is a directory"]),
        (61, "no YAML named", "", ["-c: name the YAML of a task"]),
        (61, "URL instead of a YAML", "https://example.com/t.yaml", ["https://example.com/t.yaml: No such file"]),
    ],
)
def test_a_missing_yaml_is_named(work, record_property, case, title, name, parts):
    about(record_property, case, title)
    for command in ("audit", "train", "sweep"):
        refused(formtune(work(), command, "-c", name), *parts)


@pytest.mark.parametrize(
    ("title", "content"),
    [
        ("pickle", pickle.dumps({"state_dict": Payload()})),
        ("torch archive with a pickle", None),
        ("text", b"not a checkpoint"),
        ("empty file", b""),
    ],
)
def test_a_checkpoint_is_never_unpickled(work, record_property, title, content):
    about(record_property, 42, f"malicious .ckpt: {title}")
    folder = work()
    (folder / "evil.ckpt").write_bytes(content or b"")
    if content is None:
        torch.save({"state_dict": Payload()}, folder / "evil.ckpt")
    for command in ("validate", "test"):
        refused(formtune(folder, command, "-c", "t.yaml", "--ckpt_path", "evil.ckpt"), "evil.ckpt")
    assert not (folder / "payload").exists()


def python(folder, *args, **options):
    """A process of its own, for what the process itself decides."""
    command = [sys.executable, "-m", "formtune", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, **options)


@pytest.mark.parametrize("command", ["audit", "validate"])
def test_a_hub_id_is_refused_at_once_when_the_hub_is_off(work, record_property, command):
    about(record_property, 105, f"Hub id and HF_HUB_OFFLINE, {command}")
    refused(formtune(work(model={"base": "owner/name"}), command, "-c", "t.yaml"), "model.base: ", "owner/name")


def test_a_hub_id_is_refused_without_retries_where_there_is_no_network(
    work, record_property, monkeypatch, tmp_path_factory
):
    about(record_property, 105, "Hub id without a network")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folder = work(model={"base": "owner/name"})
    done = python(folder, "audit", "-c", "t.yaml")
    attempts = ATTEMPTS.read_text().splitlines()
    ATTEMPTS.write_text("")
    assert attempts == ["socket.getaddrinfo huggingface.co"]  # each retry would wait longer than the one before
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "model.base: no usable tokenizer in owner/name" in done.stderr


@pytest.mark.parametrize(
    ("title", "given"),
    [
        ("standard input closed", no_input),
        ("standard output closed", no_output),
    ],
)
def test_a_run_asks_nothing_and_needs_no_output(work, record_property, title, given):
    about(record_property, 106, title)
    folder = work(trainer={"max_steps": 1})
    for command in (["audit"], ["train", "--run", "r"]):
        done = formtune(folder, *command, "-c", "t.yaml", given=given)
        assert (done.code, done.err) == (0, "")
    assert {"logs/t/r/metrics.json", "logs/t/r/adapter/adapter_model.safetensors"} <= done.new


def test_help_whose_reader_is_gone_ends_without_an_error(work, record_property):
    about(record_property, 106, "help, output pipe closed by its reader")
    line = f"{sys.executable} -m formtune --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=work(), capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_training_starts_no_server(work, record_property):
    about(record_property, 104, "TensorBoard's port in use: training opens no port")
    done = formtune(work(), "train", "-c", "t.yaml", given=no_port)
    accepted(done)

"""A teacher's rows are judged before they are written, against a real server on this machine."""

import itertools
import json
from types import SimpleNamespace

import pytest
import yaml

from chat_server import ChatServer
from conftest import SCHEMA, pair
from formtune.cli import main
from formtune.commands.synthesize import near, read_reply


@pytest.fixture
def serve():
    """Starts a server whose reply to request n is `reply(n)`."""
    servers = []

    def make(reply):
        numbers = itertools.count(1)
        servers.append(ChatServer(lambda _: reply(next(numbers))))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def task(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(pair(n)) + "\n" for n in range(30)))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    data = {
        "train": "train.jsonl",
        "system": "Number it.",
        "format": {"class_path": "JsonSchema", "init_args": {"schema": "schema.json"}},
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"model": {"base": base}, "data": data}))

    def run(server, *more, rows=6):
        words = ["synthesize", "-c", "t.yaml", "--endpoint", server.url, "--teacher", "wise-1", "--out", "s.jsonl"]
        return main([*words, "--rows", str(rows), "--at_once", "1", *more])

    return tmp_path, run


def line(text, answer):
    return json.dumps({"prompt": text, "completion": answer})


def good(number):
    texts = (
        f"{'ABCDEFGHIJ'[number % 10] * 9} wants {number}",
        f"could {number * 7919} be sent to {'klmnopqrst'[number % 10] * 9}?",
    )
    return "\n".join(line(text, json.dumps({"n": number, "s": "a"}, separators=(",", ":"))) for text in texts)


def test_only_rows_in_a_valid_format_that_are_new_are_written_with_their_source(serve, task, capsys):
    folder, run = task

    def reply(number):
        bad = [
            line("an answer in prose", "the number is 5"),
            line("a key too many", '{"n":1,"s":"a","x":1}'),
            line(pair(3)["prompt"].upper(), '{"n":1,"s":"a"}'),  # is in train
            '{"prompt": "cut off", "comp',
            json.dumps({"prompt": 5}),
        ]
        return "Sure! Here are the rows:\n```json\n" + "\n".join([*bad, good(number)]) + "\n```"

    server = serve(reply)
    server.failures = 2
    assert run(server) == 0
    rows = [json.loads(text) for text in (folder / "s.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {row["source"] for row in rows} == {"wise-1"}
    assert all(set(json.loads(row["completion"])) == {"n", "s"} for row in rows)
    output = capsys.readouterr().out
    assert "6 rows; refused" in output and "data.columns.source: source" in output
    assert "invalid format: syntax" in output and "invalid format: extra_key" in output
    assert "near-duplicate" in output and "not a row" in output
    request = server.requests[0]["messages"][0]["content"]
    assert "Number it." in request and '"additionalProperties": false' in request and pair(0)["prompt"][:4] in request


def test_the_teachers_name_goes_into_the_column_that_the_task_names(serve, task, capsys):
    folder, run = task
    assert run(serve(good), "--data.columns.source", "by", rows=2) == 0
    assert json.loads((folder / "s.jsonl").read_text().splitlines()[0])["by"] == "wise-1"
    assert "data.columns.source" not in capsys.readouterr().out


def test_an_answer_that_comes_as_an_object_is_written_as_its_text(serve, task):
    folder, run = task
    assert (
        run(serve(lambda n: json.dumps({"prompt": f"subject {n * n * 17}", "completion": {"s": "a", "n": n}})), rows=2)
        == 0
    )
    assert json.loads((folder / "s.jsonl").read_text().splitlines()[0])["completion"] == '{"n":1,"s":"a"}'


def test_an_interrupted_run_continues_where_it_stopped(serve, task):
    folder, run = task
    server = serve(good)
    assert run(server, rows=4) == 0
    whole = (folder / "s.jsonl").read_bytes()
    requests = len(server.requests)
    assert run(server, rows=4) == 0 and len(server.requests) == requests  # nothing left to do
    assert (folder / "s.jsonl").read_bytes() == whole
    assert run(server, rows=8) == 0
    rows = [json.loads(text)["prompt"] for text in (folder / "s.jsonl").read_text().splitlines()]
    assert len(set(rows)) == 8 and (folder / "s.jsonl").read_bytes().startswith(whole)


def test_a_teacher_without_new_rows_ends_the_run(serve, task, capsys):
    _, run = task
    assert run(serve(lambda n: good(1))) == 1
    assert "brought nothing new" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "nonsense"])
def test_an_endpoint_that_does_not_answer_is_named_in_one_line(task, capsys, monkeypatch, url):
    monkeypatch.setattr("formtune.commands.synthesize.RETRIES", 0)

    _, run = task
    assert run(SimpleNamespace(url=url)) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"formtune: error: endpoint: {url} gave no rows") and len(output.splitlines()) == 1


def test_a_file_of_something_else_is_not_touched(task, capsys):
    folder, run = task
    (folder / "s.jsonl").write_text('{"notes": "other"}\n')

    assert run(SimpleNamespace(url="http://127.0.0.1:9/v1")) == 2
    assert "s.jsonl does not hold rows of formtune synthesize" in capsys.readouterr().err
    assert (folder / "s.jsonl").read_text() == '{"notes": "other"}\n'


def test_a_near_duplicate_is_not_new():
    text = "i would like to book a table for five people in the old harbour tonight"
    inputs = ["a", text, "b"]
    assert near(text, inputs, 1.0) and near(text + " thanks", inputs, 0.8)
    assert not near(text + " thanks", inputs, 1.0) and not near("something else", inputs, 0.8)


def test_replies_are_read_line_by_line():
    assert list(read_reply('Sure:\n{"a": 1},\n{"a": \n[1]\n{"b": 2}')) == [{"a": 1}, {"b": 2}]

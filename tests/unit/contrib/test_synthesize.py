"""A teacher's answers are checked before they are written, against a real server on this machine."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from chat_server import ChatServer
from conftest import SCHEMA, pair
from formtune.cli import main

pytest.importorskip("formtune.quality.duplicates")

PROMPTS = [f"{letter * 9} wants {n}" for n, letter in enumerate("ABCDEF")]


@pytest.fixture
def serve():
    """Starts a server that answers a prompt with `say(prompt)`."""
    servers = []

    def make(say):
        servers.append(ChatServer(say))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def task(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(pair(n)) + "\n" for n in range(30)))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    data = {
        "train": "train.jsonl",
        "system": "Number it.",
        "prompts": "prompts.jsonl",
        "format": {"class_path": "JsonSchema", "init_args": {"schema": "schema.json"}},
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"model": {"base": base}, "data": data}))

    def run(server, *more):
        words = ["synthesize", "-c", "t.yaml", "--endpoint", server.url, "--teacher", "wise-1", "--out", "s.jsonl"]
        return main([*words, *more])

    def rows():
        return [json.loads(text) for text in (tmp_path / "s.jsonl").read_text().splitlines()]

    return run, rows, tmp_path


def right(prompt):
    return json.dumps({"n": int(prompt.split()[-1]), "s": "a"}, separators=(",", ":"))


def test_only_new_prompts_are_asked_and_only_answers_in_a_valid_format_are_written_with_their_source(
    serve, task, capsys
):
    run, rows, folder = task
    with (folder / "prompts.jsonl").open("a") as file:
        for text in (pair(3)["prompt"].upper(), PROMPTS[0] + "!"):  # one is in train, one is given twice
            file.write(json.dumps({"prompt": text}) + "\n")
    said = {PROMPTS[1]: "the number is 5", PROMPTS[2]: '{"n":1,"s":"a","x":1}'}
    said |= {PROMPTS[3]: '```json\n{"s": "a",\n "n": 3}\n```\n'}
    server = serve(lambda text: said.get(text) or right(text))
    server.failures = 2
    assert run(server) == 0
    assert len(server.requests) == len(PROMPTS)
    assert rows() == [
        {"messages": [{"role": "user", "content": PROMPTS[n]}, {"role": "assistant", "content": right(PROMPTS[n])}],
         "source": "wise-1"}
        for n in (0, 3, 4, 5)
    ]  # fmt: skip
    output = capsys.readouterr().out
    assert "s.jsonl: 4 rows; not asked: 2 near-duplicates" in output and "data.columns.source: source" in output
    assert "1 left out: invalid format, syntax" in output and "1 left out: invalid format, extra_key" in output
    system, *turns = server.requests[0]["messages"]
    assert system["content"].startswith("Number it.\n\n") and '"additionalProperties": false' in system["content"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4 + ["user"]
    assert [turn["content"] for turn in turns[:2]] == [pair(0)["prompt"], pair(0)["completion"]]


def test_what_is_written_is_trained_on_and_the_teachers_name_goes_into_the_column_that_the_task_names(
    serve, task, capsys
):
    pytest.importorskip("formtune.audit.findings")
    run, rows, _ = task
    assert run(serve(right), "--data.columns.source", "by") == 0
    assert rows()[0]["by"] == "wise-1" and "set data.columns.source" not in capsys.readouterr().out
    words = ["--data.train", '["train.jsonl", "s.jsonl"]', "--data.columns.source", "by", "--data.near_duplicates", "1"]
    main(["audit", "-c", "t.yaml", *words])
    findings = json.loads(next(iter(Path("logs/t/audit").glob("*.json"))).read_text())
    assert "wise-1" in json.dumps(findings)


def test_the_same_command_again_asks_what_has_no_answer_yet(serve, task):
    run, rows, _ = task
    server = serve(lambda text: right(text) if text in PROMPTS[:4] else "no")
    assert run(server) == 0 and len(rows()) == 4
    written = rows()
    del server.requests[:]
    server.say = right
    assert run(server) == 0 and {it["messages"][-1]["content"] for it in server.requests} == {*PROMPTS[4:]}
    assert rows()[:4] == written and len(rows()) == 6


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "nonsense"])
def test_an_endpoint_that_does_not_answer_is_named_in_one_line(task, capsys, monkeypatch, url):
    monkeypatch.setattr("formtune_contrib.endpoint.RETRIES", 0)
    run, *_ = task
    assert run(SimpleNamespace(url=url)) == 2
    output = capsys.readouterr().err
    assert output.startswith(f"formtune: error: {url}: Connection error.") and len(output.splitlines()) == 1


def test_a_file_of_something_else_is_not_touched_and_prompts_are_needed(task, capsys):
    run, _, folder = task
    (folder / "s.jsonl").write_text('{"notes": "other"}\n')
    assert run(SimpleNamespace(url="http://127.0.0.1:9/v1")) == 2
    assert "s.jsonl:1: no column `prompt`" in capsys.readouterr().err
    assert (folder / "s.jsonl").read_text() == '{"notes": "other"}\n'
    assert run(SimpleNamespace(url="http://127.0.0.1:9/v1"), "--data.prompts", "null") == 2
    assert "data.prompts: name a file of inputs" in capsys.readouterr().err

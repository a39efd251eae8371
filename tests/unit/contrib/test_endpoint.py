"""What is served is checked as the run was, and must show that it renders the same prompts; against a real server here."""

import json
import shutil
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chat_server import ChatServer
from conftest import TEMPLATE, pair, write_splits
from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.cli import main
from formtune.evaluation.outcomes import read_outcomes
from formtune.export.llama_cpp import chat_prompt

ROWS = 12


@pytest.fixture
def check(tmp_path, monkeypatch, base):
    """A task, a server that answers it rightly, and a function that checks that server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("formtune_contrib.endpoint.RETRIES", 0)
    write_splits(base, 48, test_rows=ROWS)
    server = ChatServer(lambda text: pair(int(text.split()[1]))["completion"], AutoTokenizer.from_pretrained(base))

    def run(*more, url=None):
        return main(["check-endpoint", url or server.url, "-c", "small.yaml", *more])

    yield run, server
    server.close()


def test_served_answers_are_checked_as_a_runs_and_can_be_compared_with_it(check, capsys):
    run, server = check
    right = server.say
    server.say = lambda text: "It is " + right(text) if text == "number 203" else right(text)
    assert run("--concurrency", "3") == 0
    outcomes = read_outcomes(Path("logs/small/endpoint/outcomes/after.jsonl"))
    assert [it.input for it in outcomes] == [f"number {n}" for n in range(200, 200 + ROWS)]
    assert [it.kind for it in outcomes if not it.exact] == ["extra_text"] and outcomes[3].loose
    result = json.loads(Path("logs/small/endpoint/endpoint.json").read_text())
    exact = result["metrics"]["format/exact"]
    assert exact["value"] == 11 / 12 and exact["interval"][0] < 11 / 12 < exact["interval"][1]
    assert result["kinds"] == {"ok": 11, "extra_text": 1} and result["rows"] == ROWS
    assert 0.01 <= result["latency_s"]["P50"] <= result["latency_s"]["P95"] and result["requests_per_s"] > 0
    requests = server.requests
    assert len(requests) == ROWS + 1, "one is sent before the clock starts"
    assert {body["temperature"] for body in requests} == {0} and {body["max_tokens"] for body in requests} == {48}
    assert {body["model"] for body in requests} == {"small"}, "the task's name, as formtune serve calls it"
    assert requests[0]["messages"] == [
        {"role": "system", "content": "Number it."}, {"role": "user", "content": "number 200"},
    ]  # fmt: skip
    assert 2 <= server.most <= 3
    output = capsys.readouterr().out
    assert "prompts: same number of tokens as formtune's in every row" in output
    assert (
        "kinds: ok 11, extra_text 1" in output and "test.jsonl:4: extra_text" in output and "answer 'It is {" in output
    )
    assert main(["compare", "logs/small/endpoint", "logs/small/endpoint"]) == 0


def test_a_training_run_called_endpoint_is_not_overwritten(check, capsys):
    run, server = check
    Path("logs/small/endpoint/checkpoints").mkdir(parents=True)
    assert run() == 2 and not server.requests
    assert "logs/small/endpoint: a training run" in capsys.readouterr().err


def test_confidence_comes_from_log_probabilities_where_the_server_gives_them(check, capsys):
    run, server = check
    outcomes = Path("logs/small/endpoint/outcomes/after.jsonl")
    assert run() == 0 and all(body["logprobs"] for body in server.requests)
    assert {it.confidence for it in read_outcomes(outcomes)} == {None}
    assert "confidence: the server gives no log-probabilities" in capsys.readouterr().out
    assert json.loads(Path("logs/small/endpoint/endpoint.json").read_text())["confidence"] is None

    server.logprob, right = -0.1, server.say
    server.say = lambda text: "It is " + right(text) if text == "number 203" else right(text)
    assert run() == 0
    sure = {it.kind: (it.confidence, it.field_confidences) for it in read_outcomes(outcomes)}
    assert sure == {"ok": (0.740818, {"n": 0.818731, "s": 0.904837}), "extra_text": (0.0, None)}, (
        "exp(-0.3), -0.2, -0.1"
    )
    figures = json.loads(Path("logs/small/endpoint/endpoint.json").read_text())["confidence"]
    assert figures == {"aurc": pytest.approx(1 / 12 / 12), "calibration_error": pytest.approx(11 / 12 * (1 - 0.740818))}
    assert "confidence: AURC 0.0069, expected calibration error 23.8%" in capsys.readouterr().out

    server.refuses_logprobs = True
    del server.requests[:]
    assert run() == 0 and {it.confidence for it in read_outcomes(outcomes)} == {None}
    assert ["logprobs" in body for body in server.requests] == [True] + [False] * (ROWS + 1), "it is asked once"


def test_too_few_answers_in_format_give_exit_code_1(check, capsys):
    run, server = check
    server.finish = "length"
    assert run("--min_exact", "0.5") == 1
    assert "format/exact 0.0% is below --min_exact 50.0%" in capsys.readouterr().out
    assert {it.kind for it in read_outcomes(Path("logs/small/endpoint/outcomes/after.jsonl"))} == {"truncated"}


def test_as_many_but_other_tokens_are_found_where_the_server_shows_them(check, capsys):
    run, server = check
    server.system = "Number IT."
    assert run() == 0, "by their number alone they cannot be told apart, and the output claims no more"
    assert "same number of tokens" in capsys.readouterr().out
    server.tokenize = True
    assert run() == 2
    assert (
        "tokens and formtune's 49: the system turn is missing or altered; from token 15 on they are ['I', 'T', '.'"
        in capsys.readouterr().err
    )
    server.system = None
    assert run() == 0 and "prompts: same tokens as formtune's in every row" in capsys.readouterr().out


def test_a_server_that_writes_its_own_day_is_told_from_one_with_another_template(check, capsys, base, tmp_path):
    run, server = check
    dated = "{{ strftime_now('%d %b %Y') }}" + server.tokenizer.chat_template
    server.tokenizer.chat_template, server.tokenize = dated, True
    own = shutil.copytree(base, tmp_path / "base")
    (own / "chat_template.jinja").write_text(dated)
    assert run("--model.base", str(own)) == 0, "both write today's"
    assert run("--model.base", str(own), "--data.date", "2020-01-01") == 2
    assert "if the template writes the date, check with today's" in capsys.readouterr().err


def test_a_server_that_does_not_count_proves_nothing(check, capsys):
    run, server = check
    server.usage = False
    assert run() == 2 and "does not say how many tokens" in capsys.readouterr().err
    server.tokenize = True
    assert run() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 401}, "so it is; start the server and wait for its model to load; check the URL, which usually"),
        ({"html": True}, "the reply is not a chat completion"),
        ({"say": lambda _: {"role": "assistant", "content": None, "reasoning_content": "{}"}}, "parsed the answer as"),
        ({"extra": 1}, "test.jsonl:1: the server's prompt has 50 tokens and formtune's 49; serve the tokenizer"),
    ],
)
def test_what_a_server_refuses_or_leaves_out_is_one_line(check, capsys, change, message):
    run, server = check
    for name, value in change.items():
        setattr(server, name, value)
    assert run() == 2
    line = capsys.readouterr().err
    assert message in line and len(line.splitlines()) == 1 and not Path("logs/small/endpoint").exists()


def test_a_server_that_is_slow_or_not_there_is_one_line(check, capsys, monkeypatch):
    run, server = check
    assert run(url="http://127.0.0.1:9/v1") == 2
    assert (
        "http://127.0.0.1:9/v1: Connection error. [Errno 111] Connection refused; start the server"
        in capsys.readouterr().err
    )
    assert run(url="nonsense") == 2 and "nonsense: Connection error." in capsys.readouterr().err
    monkeypatch.setattr("formtune_contrib.endpoint.TIMEOUT", 0.2)
    server.say = lambda _: time.sleep(0.5)
    assert (
        run() == 2
        and "Request timed out. timed out; start the server and wait for its model" in capsys.readouterr().err
    )


def test_a_request_holds_what_the_renderer_renders(check, base, capsys):
    run, server = check
    shutil.copytree(base, "other")
    Path("other/chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    )
    server.tokenizer = AutoTokenizer.from_pretrained("other")
    right = server.say
    server.say = lambda text: right(text.split("\n\n")[1])
    assert run("--model.base", "other") == 0
    assert server.requests[0]["messages"] == [{"role": "user", "content": "Number it.\n\nnumber 200"}]
    Path("other/chat_template.jinja").unlink()
    Renderer.load.cache_clear()
    assert run("--model.base", "other") == 2
    assert "asks for chat completions, and the base has no chat template" in capsys.readouterr().err


def test_a_template_that_a_server_of_the_base_lacks_is_announced_and_its_prompts_are_proven(check, base, capsys):
    run, server = check
    Path("own.jinja").write_text(TEMPLATE.replace("<|im_start|>{{ m.role }}", "<|im_start|>turn of {{ m.role }}")
                                 .replace("<|im_start|>assistant", "<|im_start|>turn of assistant"))  # fmt: skip
    assert run("--model.chat_template", "own.jinja") == 2
    out, error = capsys.readouterr()
    assert "warning: model.chat_template is set: servers need the exported" in out
    assert "tokens and formtune's" in error and "serve the tokenizer and the chat template" in error
    server.tokenizer = AutoTokenizer.from_pretrained(base)
    server.tokenizer.chat_template = Path("own.jinja").read_text()
    assert run("--model.chat_template", "own.jinja") == 0


def test_tools_and_calls_are_sent_as_openai_has_them():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "c", "content": "1"}, {"role": "assistant", "content": "b"}]
    row = Row([], [], "q", "b", "f:1", messages=turns, tools='[{"name": "f"}]')
    text = call | {"function": {"name": "f", "arguments": '{"a": "é"}'}}
    assert chat_prompt(row) == {
        "messages": [turns[0], turns[1] | {"tool_calls": [text]}, turns[2]],
        "tools": [{"name": "f"}],
        "tool_choice": "none",
    }
    assert call["function"]["arguments"] == {"a": "é"}, "the row is as it was"

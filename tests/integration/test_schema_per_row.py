"""A task whose rows have three schemas goes through every command, and each row is checked by its own schema."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from chat_server import ChatServer
from formtune.cli import main
from formtune.evaluation.outcomes import read_outcomes
from formtune.formats import JsonSchema


def keys(**properties):
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


SCHEMAS = [
    keys(n={"type": "integer", "minimum": 0, "maximum": 9}),
    keys(color={"enum": ["red", "blue"]}),
    {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
]
TEXTS = [json.dumps(schema, separators=(",", ":")) for schema in SCHEMAS]


def record(n):
    answer = [{"n": n % 10}, {"color": ["red", "blue"][n % 2]}, ["x", "y"][: n % 2 + 1]][n % 3]
    schema = SCHEMAS[n % 3] if n % 2 else TEXTS[n % 3]  # objects and JSON text
    return {
        "prompt": f"row {n * 7919} of {n}",
        "completion": json.dumps(answer, separators=(",", ":")),
        "schema": schema,
    }


def write(name, records):
    Path(name).write_text("".join(json.dumps(one) + "\n" for one in records))


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """The folder of a finished run, in the working directory of the task."""
    pytest.importorskip("llguidance", reason="needs the extra `constrained`")
    folder = tmp_path_factory.mktemp("task")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("FORMTUNE_RUN", raising=False)
        write("train.jsonl", [record(n) for n in range(60)])
        config = {
            "model": {"base": base, "max_new_tokens": 32, "lora": {"r": 2}},
            "data": {"train": "train.jsonl", "system": "Keep {schema}.", "near_duplicates": 1,
                     "format": {"class_path": "JsonSchema", "init_args": {"canonical": True}}},
            "trainer": {"max_steps": 2, "val_check_interval": 1, "accelerator": "cpu", "precision": "32-true",
                        "enable_progress_bar": False},
        }  # fmt: skip
        Path("small.yaml").write_text(yaml.safe_dump(config))
        assert main(["train", "-c", "small.yaml", "--run", "one"]) == 0
        yield Path("logs/small/one")


def test_every_evaluation_checks_and_constrains_by_the_rows_schema(run):
    figures = json.loads((run / "metrics.json").read_text())
    for view in ("before", "few_shot", "before_constrained", "after", "after_constrained"):
        outcomes = read_outcomes(run / "outcomes" / f"{view}.jsonl")
        assert {outcome.schema for outcome in outcomes} == set(TEXTS)
        for outcome in outcomes:
            n = int(outcome.where.rpartition(":")[2]) - 1
            assert outcome.schema == TEXTS[n % 3] and outcome.target == record(n)["completion"]
            verdict = JsonSchema(SCHEMAS[n % 3], canonical=True).check(outcome.answer, target=outcome.target)
            assert outcome.exact == (verdict.exact and outcome.kind != "truncated")
        exact, rows = figures["counts"][view]["format/exact"]
        assert (exact, rows) == (sum(outcome.exact for outcome in outcomes), len(outcomes))
        if "constrained" in view:
            assert exact == rows, "the three schemas have no document in common, so each grammar was its row's"
        right, fields = figures["counts"][view]["content/field_acc"]
        assert fields == sum(len(outcome.fields) for outcome in outcomes) and 0 <= right <= fields
        assert [name for name in figures[view] if "field_acc" in name] == ["content/field_acc"]
    assert figures["training"]["steps"] == 2 and len(figures["training"]["history"]) == 3


def test_the_adapter_says_that_each_row_has_its_schema(run):
    written = json.loads((run / "adapter/format.json").read_text())
    assert written["init_args"]["schema"] == "per row"
    assert JsonSchema(**written["init_args"]).to_dict() == written
    assert "format.json" in json.loads((run / "adapter/manifest.json").read_text())["files"]


def test_the_best_checkpoint_is_tested_again_with_and_without_constrained_decoding(run, capfd):
    counts = json.loads((run / "metrics.json").read_text())["counts"]
    for constrained, view in (("false", "after"), ("true", "after_constrained")):
        assert main(["test", str(run), "--model.constrained", constrained]) == 0
        [line] = [line for line in capfd.readouterr().out.splitlines() if "format/exact" in line]
        exact, rows = counts[view]["format/exact"]
        assert f"{exact / rows:.1%}" in line


def test_predict_answers_each_prompt_by_its_schema(run, capfd):
    prompts = [{"prompt": f"p {n}", "schema": schema} for n, schema in enumerate([*SCHEMAS, *TEXTS])]
    write("prompts.jsonl", prompts)
    assert main(["predict", str(run), "prompts.jsonl", "--model.constrained", "true", "--answers", "a.jsonl"]) == 0
    answers = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert [answer["valid"] for answer in answers] == [True] * 6
    for n, answer in enumerate(answers):
        assert JsonSchema(SCHEMAS[n % 3], canonical=True).check(answer["answer"]).exact
    for n, (one, other) in enumerate(zip(answers[:3], answers[3:], strict=True)):
        assert one["confidence"] == pytest.approx(other["confidence"], rel=1e-3)
        for name in ("where", "prompt", "confidence", "field_confidences"):
            one.pop(name), other.pop(name)
        assert one == other, n
    write("prompts.jsonl", [*prompts, {"prompt": "p"}])
    assert main(["predict", str(run), "prompts.jsonl"]) == 2
    assert "prompts.jsonl:7: the row has no schema" in capfd.readouterr().err


def test_an_export_and_a_comparison_use_the_rows_schemas(run, capfd):
    assert main(["export", str(run), "--as", "merged"]) == 0
    for one, merged in zip(
        read_outcomes(run / "outcomes/after.jsonl"), read_outcomes(run / "outcomes/merged.jsonl"), strict=True
    ):
        assert (one.schema, one.kind) == (merged.schema, merged.kind)
    assert main(["compare", str(run), f"{run}:after_constrained"]) == 0
    output = capfd.readouterr().out
    assert "field n " in output and "field color " in output


@pytest.mark.contrib
def test_a_server_is_sent_each_rows_schema_and_checked_by_it(run, base):
    pytest.importorskip("openai", reason="needs the extra `synthesize`")
    rows = {record(n)["prompt"]: record(n)["completion"] for n in range(60)}
    server = ChatServer(rows.__getitem__, AutoTokenizer.from_pretrained(base))
    try:
        assert main(["check-endpoint", server.url, "-c", "small.yaml", "--min_exact", "1"]) == 0
    finally:
        server.close()
    outcomes = read_outcomes(Path("logs/small/endpoint/outcomes/after.jsonl"))
    assert {outcome.kind for outcome in outcomes} == {"ok"} and {outcome.schema for outcome in outcomes} == set(TEXTS)
    assert {body["messages"][0]["content"] for body in server.requests} == {f"Keep {text}." for text in TEXTS}


@pytest.mark.contrib
def test_try_takes_the_schema_from_a_file(run, monkeypatch, capfd):
    prompts = iter(["row 1 of 1"])

    def ask(_):
        try:
            return next(prompts)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    Path("one.json").write_text(json.dumps(SCHEMAS[1]))
    assert main(["try", str(run), "--schema", "one.json"]) in (0, None)
    assert "tuned" in capfd.readouterr().out
    assert main(["try", str(run)]) == 2
    assert "--schema: needed if each row of" in capfd.readouterr().err

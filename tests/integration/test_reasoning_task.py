"""A task that reasons before it answers goes through every command; the chat template writes the reasoning."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from chat_server import ChatServer
from conftest import SCHEMA, byte_tokenizer, pair, tiny_model
from formtune.cli import main
from formtune.evaluation.outcomes import read_outcomes
from formtune.export.exported import Exported
from formtune.formats import JsonSchema, Reasoning

pytestmark = pytest.mark.slow

# As Qwen3's: only the last answer keeps its reasoning, and thinking is switched off by an empty block in the prompt.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set text = m.content %}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or text.split('</think>')[0].split('<think>')[-1] if '</think>' in text "
    "else m.reasoning_content or '' %}{% set text = text.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ text }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
FORMAT = Reasoning(JsonSchema(SCHEMA))


def row(n):
    """Reasoning in its own key, in the text, or none; answers are text or objects."""
    answer, user = pair(n)["completion"], {"role": "user", "content": f"number {n}"}
    last = [
        {"content": answer, "reasoning_content": f"It says {n}."},
        {"content": f"<think>It says {n}.</think>{answer}"},
        {"content": json.loads(answer)},
    ][n % 3]
    return {"messages": [user, {"role": "assistant", **last}]}


def target(n):
    thought = f"It says {n}." if n % 3 < 2 else ""
    return f"<think>\n{thought}\n</think>\n\n{pair(n)['completion']}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, in the working directory of the task."""
    pytest.importorskip("llguidance", reason="needs the extra `constrained`")
    folder = tmp_path_factory.mktemp("task")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    tiny_model().save_pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("FORMTUNE_RUN", raising=False)
        Path("train.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(60)))
        format = {"class_path": "JsonSchema", "init_args": {"schema": SCHEMA}}
        config = {
            "model": {"base": "base", "max_new_tokens": 96, "lora": {"r": 8, "targets": "all-linear"}},
            "data": {"train": "train.jsonl", "system": "Keep {schema}.", "near_duplicates": 1, "rows_per_step": 4,
                     "format": {"class_path": "Reasoning", "init_args": {"format": format}}},
            "trainer": {"max_epochs": 12, "val_check_interval": 78, "accelerator": "cpu", "precision": "32-true",
                        "enable_progress_bar": False},
        }  # fmt: skip
        Path("small.yaml").write_text(yaml.safe_dump(config))
        assert main(["train", "-c", "small.yaml", "--run", "one", "--model.optimizer.lr", "0.01"]) == 0
        yield Path("logs/small/one")


def test_every_evaluation_checks_the_answer_and_measures_its_fields(run):
    figures = json.loads((run / "metrics.json").read_text())
    for view in ("before", "few_shot", "before_constrained", "after", "after_constrained"):
        for outcome in read_outcomes(run / "outcomes" / f"{view}.jsonl"):
            n = int(outcome.where.rpartition(":")[2]) - 1
            verdict = FORMAT.check(outcome.answer, target=outcome.target)
            assert outcome.target == target(n) and set(outcome.fields) == {"n", "s"}
            assert outcome.exact == (verdict.exact and outcome.kind != "truncated")
        assert "content/field_acc/n" in figures["counts"][view]


def test_the_exported_format_and_card_say_how_to_ask(run):
    assert json.loads((run / "adapter/format.json").read_text()) == FORMAT.to_dict()
    card = (run / "adapter/README.md").read_text()
    assert "Reasoning, then JsonSchema" in card and "`enable_thinking=True`" in card
    renderer = Exported(run / "adapter").renderer
    assert renderer.thinking and renderer.tags == ("<think>", "</think>")


def test_the_prompts_are_asked_with_thinking_on_and_the_system_prompt_has_the_schema(run, capfd):
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(70, 78)))
    words = ["--model.constrained", "true", "--answers", "answers.jsonl"]
    assert main(["predict", str(run), "prompts.jsonl", *words]) == 0
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    finished = [answer for answer in answers if answer["kind"] != "truncated"]
    assert finished and all(answer["valid"] and FORMAT.check(answer["answer"]).exact for answer in finished)
    assert all(answer["answer"].startswith("<think>") for answer in answers), "the grammar begins with the tag"


def test_the_audit_compares_the_answers_after_the_reasoning(run, capfd):
    rows = [row(n) for n in range(60)]
    rows[3]["messages"][1]["content"] = rows[3]["messages"][1]["content"].replace(",", ", ").replace(":", ": ")
    rows[4]["messages"][1]["content"] = "<think>lost</think> and </think>" + pair(4)["completion"]
    Path("mixed.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert main(["audit", "-c", "small.yaml", "--data.train", "mixed.jsonl"]) == 1
    [path] = Path("logs/small").rglob("audit/**/quarantine.jsonl")
    quarantine = map(json.loads, path.read_text().splitlines())
    assert {(one["reason"], one["where"].rpartition(":")[2]) for one in quarantine} == {("style", "4"), ("unfit", "5")}


def test_a_merged_model_and_what_is_served_are_checked_alike(run):
    assert main(["export", str(run), "--as", "merged"]) == 0
    after, merged = (read_outcomes(run / f"outcomes/{name}.jsonl") for name in ("after", "merged"))
    assert [one.kind for one in after] == [one.kind for one in merged]


@pytest.mark.contrib
@pytest.mark.parametrize("apart", [False, True])
def test_a_server_may_give_the_reasoning_apart(run, apart, capfd):
    pytest.importorskip("openai", reason="needs the extra `synthesize`")

    def say(text):
        n = int(text.split()[1])
        if not apart:
            return target(n)
        message = {"role": "assistant", "content": pair(n)["completion"], "reasoning_content": "\nIt does.\n"}
        return message

    server = ChatServer(say, AutoTokenizer.from_pretrained("base"))
    try:
        assert main(["check-endpoint", server.url, "-c", "small.yaml", "--min_exact", "1"]) == 0
    finally:
        server.close()
    outcomes = read_outcomes(Path("logs/small/endpoint/outcomes/after.jsonl"))
    assert {outcome.kind for outcome in outcomes} == {"ok"}
    assert json.loads(server.requests[0]["messages"][0]["content"][5:-1]) == SCHEMA


@pytest.mark.contrib
def test_a_served_model_thinks(run):
    from formtune_contrib.server import command

    models = {"small": Exported(run / "adapter")}
    assert command(models, "vllm", 8000)[-1] == '{"enable_thinking": true}'
    assert command(models, "transformers", 8000)[-2:] == ["on", "small"]

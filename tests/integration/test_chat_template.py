"""A chat template of one's own, on a base that has another or none, from training to what is exported."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import TEMPLATE
from formtune.base.renderer import Renderer
from formtune.cli import main

OWN = (  # <pad> ends a turn
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<pad>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}\n"
)
CHANGED = OWN.replace("[", "(").replace("]", ")")
WORDS = ["-c", "small.yaml", "--model.base", "plain", "--model.chat_template", "own.jinja"]


@pytest.fixture
def project(write_project, base):
    """A task on a base without a chat template, and a file with one; the working directory of the test."""
    write_project({"max_steps": 4, "val_check_interval": 2})
    shutil.copytree(base, "plain")
    Path("plain/chat_template.jinja").unlink()
    Path("own.jinja").write_text(OWN)
    Renderer.load.cache_clear()


def train():
    assert main(["train", *WORDS, "--run", "one", "--baselines", "[]"]) == 0
    return Path("logs/small/one")


@pytest.fixture
def run(project):
    return train()


def test_the_adapter_carries_the_template_and_the_run_warns(project, capfd):
    run = train()
    out = capfd.readouterr().out
    note = "model.chat_template is set: servers need the exported chat_template.jinja"
    assert note in out and note in (run / "adapter/README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    assert tokenizer.chat_template == OWN
    turns = [{"role": "user", "content": "number 3"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "[user] number 3<pad>[assistant] "
    )
    manifest = json.loads((run / "adapter/manifest.json").read_text())
    assert manifest["template"] == manifest["files"]["chat_template.jinja"]


def test_a_run_is_measured_and_predicts_with_its_own_template(run, task, capfd):
    after = json.loads((run / "metrics.json").read_text())["after"]["val/loss"]
    assert main(["test", str(run)]) == 0
    assert f"{after:.4f}" in capfd.readouterr().out
    task[1]("prompts.jsonl", [{"prompt": "number 7"}])
    assert main(["predict", str(run), "prompts.jsonl"]) == 0


def test_a_changed_template_is_refused_and_encodes_the_rows_anew(run, capfd):
    Path("own.jinja").write_text(CHANGED)
    assert main(["test", str(run)]) == 2
    out, error = capfd.readouterr()
    assert "encoded rows read from" not in out
    assert "model.chat_template: the checkpoint was trained with another chat template; name its file" in error
    assert main(["export", str(run)]) == 2
    assert "model.chat_template: own.jinja has changed since training, see logs" in capfd.readouterr().err
    assert main(["test", str(run), "--model.chat_template", f"{run}/adapter/chat_template.jinja"]) == 0
    assert "encoded rows read from" in capfd.readouterr().out


@pytest.mark.parametrize("change", ["another file", "other ids", "the same ids"])
def test_a_run_is_not_resumed_with_another_template(change, project, capfd):
    assert main(["fit", *WORDS, "--run", "one"]) == 0
    words, message = WORDS, "model.chat_template: the checkpoint was trained with another chat template"
    if change == "another file":
        Path("other.jinja").write_text(OWN)
        words, message = [*WORDS[:-1], "other.jinja"], "was started with model.chat_template own.jinja, now other.jinja"
    else:
        Path("own.jinja").write_text(CHANGED if change == "other ids" else "{# #}" + OWN)
    assert main(["fit", *words, "--run", "one", "--resume"]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.slow
def test_a_merged_export_carries_the_template_and_answers_as_the_adapter(run):
    assert main(["export", str(run), "--as", "merged"]) == 0
    assert AutoTokenizer.from_pretrained(run / "merged").chat_template == OWN
    figures = json.loads((run / "outcomes/merged.json").read_text())
    assert figures["same_answers"] == figures["format/exact"]["rows"] and figures["refused"] is None
    assert json.loads((run / "merged/generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_a_template_in_place_of_the_bases_own_is_what_is_trained(project, base, capfd):
    words = ["-c", "small.yaml", "--model.chat_template", "own.jinja"]
    assert main(["audit", *words]) == 0
    assert "model.chat_template is set" in capfd.readouterr().out
    Path("own.jinja").write_text(TEMPLATE)  # the base's
    assert main(["audit", *words]) == 0
    assert "model.chat_template renders" not in capfd.readouterr().out

"""The printed command serves what was promoted, on the base that it was trained on."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from conftest import byte_tokenizer, tiny_model, write_run
from formtune.cli import main
from formtune.training.manifest import write_manifest


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose base lies beside it, so that a test may change it."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    byte_tokenizer().save_pretrained("base")
    return write_run(Path("logs/small/r40"), str(tmp_path / "base"), [("it's number 5", True)], rank=40)


def test_vllms_command_for_a_deployed_adapter_names_base_template_and_an_allowed_rank(run, capsys):
    assert main(["promote", str(run), "--to", "production"]) == 0
    shutil.rmtree("logs")
    capsys.readouterr()
    assert main(["serve", "small/production"]) == 0
    command, note = capsys.readouterr().out.splitlines()
    words = shlex.split(command)
    folder = Path("deployments/small/versions/r40-adapter").resolve()
    assert words[:3] == ["vllm", "serve", str(Path("base").resolve())]
    assert words[words.index("--max-lora-rank") + 1] == "64"
    assert words[words.index("--lora-modules") + 1] == f"small={folder}"
    assert words[words.index("--chat-template") + 1] == str(folder / "chat_template.jinja")
    assert "check-endpoint" in note and note.startswith("# ")


def test_a_merged_model_is_served_by_itself(run, tmp_path, capsys):
    shutil.copytree(run / "adapter", run / "merged", ignore=shutil.ignore_patterns("adapter_*", "manifest.json"))
    write_manifest(run / "merged", "merged", str(tmp_path / "base"), None)
    shutil.rmtree("base")
    folder = str((run / "merged").resolve())
    assert main(["serve", str(run), "--as", "merged"]) == 0
    assert capsys.readouterr().out.startswith(f"vllm serve {folder} --served-model-name small ")


def test_what_cannot_be_served_as_it_was_judged_is_refused(run, capsys):
    path = run / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    assert main(["serve", str(run)]) == 2 and "changed since it was exported" in capsys.readouterr().err
    write_manifest(run / "adapter", "adapter", str(Path("base").resolve()), None)
    assert main(["serve", str(run)]) == 2 and "is not supported by vLLM" in capsys.readouterr().err
    base = Path("base/config.json")
    base.write_text(base.read_text() + "\n")
    assert main(["serve", str(run)]) == 2
    assert "not the base that logs/small/r40/adapter was trained on" in capsys.readouterr().err

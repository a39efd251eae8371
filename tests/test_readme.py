"""The README's commands and code are what the project really takes."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from formtune.cli import main
from formtune.evaluation.metrics import OwnMetrics

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "formtune " in c and not c.startswith(("git", "make"))])
def test_commands_are_parsed(command, monkeypatch, tmp_path, capfd):
    for text in PYTHON:
        if text.startswith("# ") and (name := text.split()[1]).endswith(".py"):
            (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("logs/demo/RUN/config.yaml", "configs/demo.yaml"))
    words = words[words.index("formtune") + 1 :]
    with pytest.raises(SystemExit) as done:
        main([*words, "--print_config"])
    assert not done.value.code and "model:" in capfd.readouterr().out


def test_the_format_of_ones_own_works_as_shown(monkeypatch):
    namespace: dict = {}
    exec(next(text for text in PYTHON if "KeyValue" in text), namespace)
    contract = namespace["KeyValue"]()
    assert contract.check("number=7\ntotal=12", gold="number=7\ntotal=12").joint
    assert contract.check("total=12").kind == "syntax"


def test_the_metric_of_ones_own_works_as_shown_in_tests_and_then_in_validations():
    namespace: dict = {}
    exec(next(text for text in PYTHON if "LengthRatio" in text), namespace)
    metrics = OwnMetrics([namespace["LengthRatio"]()])
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            metrics.reset()
            metrics.update(["abc", "d"], ["ab", ""])
            metrics.update(["", "x"], ["", "yz"])
            assert metrics.compute() == {"own/LengthRatio": 1.25}

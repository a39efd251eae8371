"""The README's commands and code are what the project really takes."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from formtune.cli import main
from formtune.commands import COMMANDS as COMMANDS_OF_FORMTUNE
from formtune.evaluation.metrics import OwnMetrics

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
TEXT = "\n".join(page.read_text() for page in PAGES)
LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
COMMANDS = sorted({shlex.join(shlex.split(line, comments=True)) for line in LINES if line.split("#")[0].strip()})
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
PARSED = ("audit", "train", "fit", "validate", "test", "predict")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def words(command):
    given = shlex.split(command)
    return given[given.index("formtune") + 1 :]


def calls(command):
    return re.match(r"(python -m )?formtune |torchrun .* formtune ", command) is not None


@pytest.mark.parametrize("command", [c for c in COMMANDS if calls(c) and words(c)[0] in PARSED])
def test_commands_are_parsed(command, monkeypatch, tmp_path, capfd):
    for text in PYTHON:
        if text.startswith("# ") and (name := text.split()[1]).endswith(".py"):
            (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    name, *rest = words(command)
    if rest[0].startswith("logs/"):  # a run's configuration
        rest = ["-c", "configs/demo.yaml", *(word for word in rest[1:] if not word.endswith(".jsonl"))]
    rest = ["configs/demo.yaml" if word in ("configs/mytask.yaml", "TASK.yaml", "task.yaml") else word for word in rest]
    with pytest.raises(SystemExit) as done:
        main([name, *rest, "--print_config"])
    assert not done.value.code and "model:" in capfd.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if calls(c) and words(c)[0] not in PARSED])
def test_other_commands_exist(command):
    assert words(command)[0] in COMMANDS_OF_FORMTUNE


def test_the_format_of_ones_own_works_as_shown(monkeypatch):
    namespace: dict = {}
    exec(next(text for text in PYTHON if "KeyValue" in text), namespace)
    format = namespace["KeyValue"]()
    assert format.check("number=7\ntotal=12", target="number=7\ntotal=12").joint
    assert format.check("total=12").kind == "syntax"


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


def test_no_page_is_long():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    long = {page.name: count for page in PAGES if (count := len(page.read_text().splitlines())) > 150}
    assert not long

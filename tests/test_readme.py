"""The README's commands and code are what the project really takes."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from formtune.cli import main

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
    (tmp_path / "invoice_format.py").write_text(PYTHON[-1])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("logs/demo/RUN/config.yaml", "configs/demo.yaml"))
    words = words[words.index("formtune") + 1 :]
    with pytest.raises(SystemExit) as done:
        main([*words, "--print_config"])
    assert not done.value.code and "model:" in capfd.readouterr().out


def test_the_format_of_ones_own_works_as_shown(monkeypatch):
    namespace: dict = {}
    exec(PYTHON[-1], namespace)
    contract = namespace["KeyValue"]()
    assert contract.check("number=7\ntotal=12", gold="number=7\ntotal=12").joint
    assert contract.check("total=12").kind == "syntax"

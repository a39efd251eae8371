"""In the terminal no word is broken in the middle; in a pipe the output is plain; --quiet prints errors only."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from formtune.cli import main
from formtune.commands import COMMANDS
from formtune.evaluation.console import HEADLINES, print_result
from formtune.evaluation.outcomes import EVALUATIONS, Outcome, write_outcomes

SOURCE = Path(__file__).resolve().parents[2] / "src"
ROWS = [Outcome(f"t:{i}", "", 9, f"{i}", "{}", "{}", "ok", "", True, 1, 2, {"customer.name": i > 9}) for i in range(30)]
SENTENCE = "its valid format, 199, is the most; as many right as step 400, with a lower loss; lowest loss: the same"


def result(views):
    figures = dict.fromkeys([*HEADLINES, "content/field_acc/customer.name", "fail/missing_key"], 0.5)
    counts = {name: (165, 330) for name in figures if name != "val/loss"}
    training = {"steps": 9, "seconds": 9, "best_reason": SENTENCE, "best_step": 9, "diagnosis": SENTENCE, "next": "x"}
    return dict.fromkeys(views, figures) | {"rows": 330, "counts": dict.fromkeys(views, counts), "training": training}


def audited():
    settings = SimpleNamespace(ignored={}, format=SimpleNamespace(notes=[SENTENCE]), columns=SimpleNamespace(notes={}))
    findings = pytest.importorskip("formtune.audit.findings")
    findings.print_audit(
        {"blockers": [SENTENCE], "warnings": [SENTENCE], "verdict": "blocked"}, settings, None, Path("logs")
    )


def compared():
    comparison = pytest.importorskip("formtune.report.comparison")
    runs = [(f"logs/demo/2026112{n}-041835", ROWS) for n in range(3)]
    comparison.print_comparison(comparison.compare(runs))


SHOWN = {
    "train": lambda: print_result(result([*EVALUATIONS][:5]), Path("logs/demo/run")),
    "test": lambda: print_result(result([*EVALUATIONS][:3]), Path("logs/demo/run")),
    "compare": compared,
    "audit": audited,
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", SHOWN)
def test_no_word_is_broken_in_the_middle(name, width, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = []
    for columns in (width, 1000):
        monkeypatch.setenv("COLUMNS", str(columns))
        SHOWN[name]()
        lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
        assert all(len(line) <= columns for line in lines if not line.startswith(("next:", "metrics:")))
        words.append(
            {
                word
                for line in lines
                for word in re.split(r"[\s│┃]+", line)
                if word and not re.search("[\u2500-\u257f]", word)
            }
        )
    assert words[0] <= words[1]


@pytest.fixture
def words(tmp_path):
    """A command line that compares two runs."""
    runs = [str(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        write_outcomes(Path(run, "outcomes/after.jsonl"), ROWS)
    return ["compare", *runs]


def in_terminal(words, width, **environment):
    """What a command prints into a terminal."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "TERM": "xterm-256color"} | environment
    process = subprocess.Popen([sys.executable, "-m", "formtune", *words], stdout=its, stderr=its, env=environment)
    os.close(its)
    text = b""
    while True:
        try:
            text += os.read(ours, 4096)
        except OSError:  # the process has ended
            break
    assert process.wait() == 0
    os.close(ours)
    return text.decode()


def test_a_terminal_gets_style_and_its_width_no_color_no_colors_and_a_pipe_plain_text(words, capsys):
    shown = in_terminal(words, 120)
    assert "\x1b[" in shown and "┏" in shown
    assert not re.search(r"\x1b\[[\d;]*3\d", in_terminal(words, 80, NO_COLOR="1"))
    assert main(words) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_quiet_prints_errors_only(words, capsys):
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["--quiet", "compare", "gone"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("formtune: error: ")


def test_every_command_says_what_to_do_next():
    for name, command in COMMANDS.items():
        module = "formtune.commands.formtune_cli" if command.module.endswith(".lightning") else command.module
        text = Path(find_spec(module).origin).read_text()
        assert re.search(r"\"\\?n?n?next: |CHECK\.format|formtune compare RUN", text), name

"""The README's commands and code are what the project really takes."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from formtune import formats
from formtune.base.row import Row
from formtune.cli import main
from formtune.commands import COMMANDS as COMMANDS_OF_FORMTUNE
from formtune.evaluation.metrics import Scores
from formtune.evaluation.outcomes import outcome
from formtune.formats import Regex

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
TEXT = "\n".join(page.read_text() for page in PAGES)
LINES = [
    line for block in re.findall(r"```bash\n(.*?)```", TEXT.replace("\\\n", " "), re.S) for line in block.splitlines()
]
NOTEBOOK = [
    "".join(cell["source"])
    for cell in json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]
LINES += [line[1:] for cell in NOTEBOOK for line in cell.splitlines() if line.startswith("!formtune")]
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
    rest = [
        "configs/demo.yaml" if word in ("configs/mytask.yaml", "configs/snips.yaml", "TASK.yaml", "task.yaml") else word
        for word in rest
    ]
    with pytest.raises(SystemExit) as done:
        main([name, *rest, "--print_config"])
    assert not done.value.code and "model:" in capfd.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if calls(c) and words(c)[0] not in PARSED])
def test_other_commands_exist(command):
    assert words(command)[0] in COMMANDS_OF_FORMTUNE


EXAMPLES = re.findall(
    r"```yaml\n(data:\n(?:(?!```)[\s\S])*?format:(?:(?!```)[\s\S])*)```\n\n```json\n(.*?)```",
    (ROOT / "docs/formats.md").read_text(),
    re.S,
)


def made(settings):
    """The format that a YAML names."""
    arguments = {name: made(it) if name == "format" else it for name, it in settings["init_args"].items()}
    return getattr(formats, settings["class_path"])(**arguments)


@pytest.mark.parametrize(("task", "rows"), EXAMPLES)
def test_the_target_of_each_example_has_the_format_that_its_yaml_names(task, rows, monkeypatch, tmp_path):
    (tmp_path / "orders.py").write_text(next(text for text in PYTHON if "class Order" in text))
    monkeypatch.syspath_prepend(str(tmp_path))
    format = made(yaml.safe_load(task)["data"]["format"])
    for row in map(json.loads, rows.splitlines()):
        target = row["completion"] if isinstance(row["completion"], str) else format.write(row["completion"])
        assert format.check(target).exact, target
        assert not format.check(target + ".").exact


def test_there_is_an_example_of_each_format():
    assert len(EXAMPLES) >= 6


def test_the_format_of_ones_own_works_as_shown(monkeypatch):
    namespace: dict = {}
    exec(next(text for text in PYTHON if "KeyValue" in text), namespace)
    format = namespace["KeyValue"]()
    assert format.check("number=7\ntotal=12", target="number=7\ntotal=12").joint
    assert format.check("total=12").kind == "syntax"


def test_the_metric_of_ones_own_works_as_shown_in_tests_and_then_in_validations():
    namespace: dict = {}
    exec(next(text for text in PYTHON if "LengthRatio" in text), namespace)
    format = Regex(".*")
    scores = Scores(format, [namespace["LengthRatio"]()])
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            pairs = [("abc", "ab"), ("d", ""), ("", ""), ("x", "yz")]
            rows = [(Row([], [], "", target, ""), answer) for answer, target in pairs]
            outcomes = [outcome(row, answer, format.check(answer), format) for row, answer in rows]
            assert scores.compute(outcomes, outcomes)[0]["custom/LengthRatio"] == 1.25


def test_the_notebooks_cells_make_a_task_whose_targets_have_its_format(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    requests = [
        {"data": [{"text": "play "}, {"text": "Yesterday", "entity": "track"}, {"text": " please "}]},
        {"data": [{"text": "jazz", "entity": "genre"}, {"text": " and "}, {"text": "blues ", "entity": "genre"}]},
    ]
    namespace: dict = {"json": json, "Path": Path}
    cells = {name: cell for cell in NOTEBOOK for name in ("def to_row", "schema.json") if name in cell}
    exec(cells["def to_row"], namespace)
    rows = [namespace["to_row"]("PlayMusic", request) for request in requests]
    assert rows[0] == {
        "prompt": "play Yesterday please",
        "completion": '{"intent": "PlayMusic", "slots": {"track": "Yesterday"}}',
    }
    assert json.loads(rows[1]["completion"])["slots"] == {"genre": ["jazz", "blues"]}
    namespace["write"]("train", rows)
    exec(cells["schema.json"], namespace)
    settings = yaml.safe_load(Path("configs/snips.yaml").read_text())["data"]["format"]
    format = getattr(formats, settings["class_path"])(**settings["init_args"])
    assert all(format.check(row["completion"]).exact for row in rows)


def test_every_link_between_the_pages_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_no_page_is_long():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    long = {page.name: count for page in PAGES if (count := len(page.read_text().splitlines())) > 150}
    assert not long

"""Production moves only on evidence, wholly or not at all, and back again."""

import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import write_run
from formtune.cli import main
from formtune.export.exported import verify
from formtune.export.manifest import file_hash
from formtune_contrib import promote as command
from formtune_contrib import registry
from formtune_contrib.registry import Deployment

ROWS = 40
POINTER = Path("deployments/small/production.json")


def rows(wrong=0, of=ROWS):
    return [(f"input {i}", i >= wrong) for i in range(of)]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for rank, (name, wrong) in enumerate((("good", 1), ("equal", 3), ("bad", 20), ("good2", 1)), 1):
        write_run(folder / name, base, rows(wrong), rank)
    write_run(folder / "other", base, [("something else", True)])
    return folder


@pytest.fixture
def logs(runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path / "logs/small")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "logs/small"


def promote(run, *more):
    return main(["promote", f"logs/small/{run}", "--to", "production", *more])


def rollback(*more):
    return main(["rollback", "production", "--reason", "it broke", *more])


def current():
    return Deployment("small/production").current


def test_a_run_that_is_not_worse_is_promoted_and_nothing_depends_on_logs_then(logs, capsys):
    assert promote("good", "--reason", "first") == 0
    assert promote("equal") == 0
    output = capsys.readouterr().out
    assert "small/production: equal-adapter (before: good-adapter)" in output
    assert "good-adapter.jsonl: format/exact cannot tell with 40 rows" in output
    shutil.rmtree(logs)
    deployment = Deployment("small/production")
    assert verify(deployment.version_folder("equal-adapter"))["kind"] == "adapter"
    first, second = deployment.history
    assert (first["reason"], second["reason"], first["by"] != "", second["overruled"]) == ("first", None, True, [])
    assert json.loads(POINTER.read_text())["current"] == "equal-adapter"
    assert rollback() == 0 and current() == "good-adapter"


def test_a_worse_run_is_refused_unless_forced_with_a_reason_which_is_recorded(logs, capsys):
    assert promote("good") == 0
    assert promote("bad") == 2
    assert "format/exact is worse than good-adapter's (p = 3.8e-06)" in capsys.readouterr().err
    assert promote("bad", "--force") == 2 and "--reason" in capsys.readouterr().err
    assert [move["version"] for move in Deployment("small/production").history] == ["good-adapter"]
    assert promote("bad", "--force", "--reason", "the old one leaks") == 0
    last = Deployment("small/production").history[-1]
    assert last["reason"] == "the old one leaks" and "joint/exact is worse" in last["overruled"][1]
    assert main(["deployments"]) == 0
    output = capsys.readouterr().out
    assert (
        "bad-adapter" in output and "good-adapter" in output and "the old one leaks; overruled: format/exact" in output
    )


def test_a_run_without_a_valid_answer_is_not_promoted_even_if_nothing_is_deployed(logs, capsys):
    path = logs / "good/outcomes/after.jsonl"
    outcomes = [json.loads(line) | {"kind": "syntax"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(one) + "\n" for one in outcomes))
    assert promote("good") == 2 and current() is None
    assert "none of its answers to the test rows has a valid format" in capsys.readouterr().err


def test_an_adapter_whose_export_was_refused_is_not_promoted_silently(logs, capsys):
    (logs / "good/outcomes/adapter.json").write_text(json.dumps({"refused": "another model"}))
    assert promote("good") == 2
    assert "its export was refused: another model" in capsys.readouterr().err


def test_other_test_rows_a_missing_evaluation_and_another_format_are_no_evidence(logs, base, capsys):
    assert promote("good") == 0
    assert promote("other") == 2
    assert "0 of its 1 test rows are among the 40" in capsys.readouterr().err
    (logs / "equal/outcomes/after.jsonl").unlink()
    assert promote("equal") == 2 and "outcomes/after.jsonl: No such file" in capsys.readouterr().err
    manifest = json.loads((logs / "good2/adapter/manifest.json").read_text())
    format = logs / "good2/adapter/format.json"
    format.write_text(format.read_text() + "\n")
    manifest["format"] = manifest["files"]["format.json"] = file_hash(format)
    (logs / "good2/adapter/manifest.json").write_text(json.dumps(manifest))
    assert promote("good2") == 2 and "the format differs from that of good-adapter" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["changed", "missing"])
def test_what_is_not_as_it_was_exported_is_never_pointed_to(logs, capsys, what):
    path = logs / "good/adapter/adapter_model.safetensors"
    path.write_bytes(b"other") if what == "changed" else path.unlink()
    assert promote("good") == 2 and what in capsys.readouterr().err
    assert not POINTER.exists() and not Path("deployments/small/versions/good-adapter").exists()


def test_a_rollback_goes_back_one_by_one_or_to_a_version_and_verifies_it(logs, capsys):
    for run in ("good", "equal", "good2"):
        assert promote(run) == 0
    assert rollback() == 0 and current() == "equal-adapter"
    assert rollback() == 0 and current() == "good-adapter"
    assert (
        rollback() == 2 and "none is not an earlier version; choose --to from equal-adapter" in capsys.readouterr().err
    )
    assert (
        rollback("--to", "never-adapter") == 2
        and "never-adapter is not an earlier version; choose --to from" in capsys.readouterr().err
    )
    assert rollback("--to", "good2-adapter") == 0
    assert rollback() == 0 and current() == "equal-adapter", "which good2 replaced when it was promoted"
    Path("deployments/small/versions/good2-adapter/format.json").write_text("{}")
    assert rollback("--to", "good2-adapter") == 2 and "changed since it was exported" in capsys.readouterr().err
    assert current() == "equal-adapter"


def test_a_run_of_the_same_name_with_other_content_does_not_replace_a_version(logs, capsys):
    assert promote("good") == 0 and promote("equal") == 0
    shutil.rmtree(logs / "good")
    (logs / "good2").rename(logs / "good")
    assert promote("good") == 2 and "already has another export of this name" in capsys.readouterr().err


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_rename_that_fails_leaves_the_old_pointer(logs, monkeypatch, capsys, failing):
    """The renames: the version's folder, its outcomes, the pointer; a fourth one there is not."""
    assert promote("good") == 0
    before, real, calls = POINTER.read_bytes(), Path.replace, []

    def replace(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        if failing == 4:
            assert promote("equal") == 0 and len(calls) == 3
            return
        assert promote("equal") == 2 and "is unchanged" in capsys.readouterr().err
        assert POINTER.read_bytes() == before
    assert promote("equal") == 0 and not list(Path("deployments").rglob("*.part"))


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_the_old_or_the_new_pointer(logs, monkeypatch):
    monkeypatch.setattr(command, "objections_to", lambda *_: [])  # the statistics would be most of the time
    assert promote("good") == 0
    dice = random.Random(0)
    for _ in range(30):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            for number in range(10**6):
                shutil.rmtree("deployments/small/versions/equal-adapter", ignore_errors=True)
                promote("equal") if number % 2 == 0 else rollback()
            os._exit(0)
        time.sleep(dice.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        deployment = Deployment("small/production")
        assert deployment.current in ("good-adapter", "equal-adapter")
        verify(deployment.version_folder("good-adapter"))
    promoted = len(Deployment("small/production").history)
    assert promoted > 10, "the processes did something before they were killed"
    rollback()
    assert promote("good2") == 0  # no lock is left behind


def test_promotions_at_the_same_time_come_one_after_the_other(logs, monkeypatch):
    stored = registry.store
    monkeypatch.setattr(registry, "store", lambda *args: (time.sleep(0.05), stored(*args)))
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(promote, ("good", "equal", "good2"))) == [0, 0, 0]
    assert {move["version"] for move in Deployment("small/production").history} == {
        "good-adapter", "equal-adapter", "good2-adapter",
    }  # fmt: skip


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"current": "x", "history": []}'])
def test_a_damaged_pointer_is_named(logs, capsys, content):
    assert promote("good") == 0
    POINTER.write_text(content)
    for words in (["deployments"], ["rollback", "small/production", "--reason", "x"], ["serve", "small/production"]):
        assert main(words) == 2
        assert f"{POINTER}: not a deployment" in capsys.readouterr().err


def test_names_and_folders_that_cannot_be_are_refused_in_one_line(logs, capsys):
    for words, message in (
        (["promote", "logs/small/none", "--to", "production"], "none/adapter/manifest.json: No such file"),
        (
            ["promote", "logs/small/good", "--to", "../production"],
            "'small/../production': a task and --to have letters",
        ),
        (
            ["promote", "logs/small/good", "--to", "production", "--as", "merged"],
            "good/merged/manifest.json: No such file",
        ),
        (["rollback", "production", "--reason", "x"], "matches no single deployment; choose from none so far"),
        (["serve", "logs/small"], "neither an exported folder nor a run with adapter/"),
    ):
        assert main(words) == 2
        line = capsys.readouterr().err
        assert message in line and len(line.splitlines()) == 1
    assert main(["deployments"]) == 0 and "nothing is deployed yet" in capsys.readouterr().out


def test_a_name_that_several_tasks_have_needs_the_task(logs, capsys):
    assert promote("good") == 0
    shutil.copytree("deployments/small", "deployments/big")
    assert rollback() == 2 and "choose from big/production, small/production" in capsys.readouterr().err

"""Killed at any moment, a run goes on as if nothing had happened; what cannot go on says so in one line.

Each test carries its number in the fault matrix and its title, for the table in docs/reliability.md.
"""

import errno
import fcntl
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml

from conftest import SCHEMA, pair, tiny_model
from formtune.base import renderer as rendering
from formtune.cli import main
from formtune.errors import UserError
from formtune.model import FormatModule
from formtune.training import checkpoint
from formtune.training.validations import Validations, best
from interrupting import signalled, start, until_finished

ROWS = [pair(n) for n in range(60)]
FIT = ("train", "-c", "small.yaml", "--run", "one")
STEPS = 18  # of the task below: 48 rows, 8 a step, 3 epochs; validated after steps 4, 8, 12, 16 and 18


@pytest.fixture(autouse=True)
def _record(request, record_property):
    for mark in request.node.iter_markers("case"):
        record_property("case", mark.args[0])
        record_property("title", mark.args[1])


@pytest.fixture
def work(tmp_path, base, monkeypatch):
    """The working directory of a small task with dropout."""
    monkeypatch.chdir(tmp_path)
    _task(tmp_path, base)
    return tmp_path


def _task(folder: Path, base: str) -> None:
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    for name, rows in (("train", ROWS[:48]), ("validation", ROWS[48:55]), ("test", ROWS[55:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {
            "base": base,
            "max_new_tokens": 24,
            "lora": {"r": 4, "dropout": 0.1},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {
            "train": "train.jsonl",
            "validation": "validation.jsonl",
            "test": "test.jsonl",
            "near_duplicates": 1.0,
            "rows_per_step": 8,
            "format": {"class_path": "JsonSchema", "init_args": {"schema": "schema.json"}},
        },
        "trainer": {
            "val_check_interval": 4,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "precision": "32-true",
            "enable_progress_bar": False,
        },
        "baselines": [],
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """The folder of a run that nothing interrupted, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    _task(folder, base)
    began = time.monotonic()
    assert signalled(start(folder, *FIT)) == 0, (folder / "output.log").read_text()
    return folder, time.monotonic() - began


def adapter(folder: Path, run: str = "one") -> bytes:
    return (folder / f"logs/small/{run}/adapter/adapter_model.safetensors").read_bytes()


def result(folder: Path, run: str = "one") -> dict:
    """All figures of a run but its time."""
    found = json.loads((folder / f"logs/small/{run}/metrics.json").read_text())
    found["training"].pop("seconds")
    return found


def same(folder: Path, whole: Path) -> None:
    """The run in `folder` ended as the uninterrupted one did, to the last bit."""
    assert adapter(folder) == adapter(whole)
    assert result(folder) == result(whole)  # its history too: every validation happened once


def steps(folder: Path) -> list[int]:
    return list(checkpoint.steps(folder / "logs/small/one/checkpoints"))


def at(monkeypatch, hook: str, step: int, do) -> None:
    """Do something in a run of this process, at a hook of a callback, after so many steps, once."""
    before, done = getattr(checkpoint.BestCheckpoint, hook), []

    def called(self, trainer, *args):
        if trainer.global_step == step and not done:
            done.append(True)
            do(self, trainer)
        return before(self, trainer, *args)

    monkeypatch.setattr(checkpoint.BestCheckpoint, hook, called)


def one_line(capfd, *parts) -> str:
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith("formtune:")]
    assert len(err) == 1 and all(part in err[0] for part in parts), err
    return err[0]


# Interruptions


@pytest.mark.case("73", "SIGKILL at random moments, dropout, shuffling, validations: the same bits")
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(work, whole, seed):
    folder, seconds = whole
    codes = until_finished(work, FIT, signal.SIGKILL, 0.7 * seconds, random.Random(seed))
    same(work, folder)
    assert codes[-1] == 0


@pytest.mark.case("71", "SIGTERM in training")
@pytest.mark.case("100", "a stop where a validation is due: it happens once over both runs")
@pytest.mark.parametrize("step", [1, 4, 6, 7, 12, 17])  # 4 and 12: before a validation, 6 and 12: an epoch's last
def test_a_signal_between_steps_is_obeyed_at_the_next_and_the_run_goes_on(work, whole, monkeypatch, capfd, step):
    at(monkeypatch, "on_train_batch_end", step, lambda callback, _: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*FIT]) == 143
    line = one_line(capfd, "SIGTERM", "continue with: formtune train -c small.yaml --run one --resume")
    if step not in (4, 12):
        assert f"saved at step {step + (step == 6)}" in line
    assert not (work / "logs/small/one/metrics.json").exists()
    assert main([*FIT, "--resume"]) == 0
    same(work, whole[0])


@pytest.mark.case("72", "SIGTERM in a validation, and while a checkpoint is written")
@pytest.mark.parametrize("hook, step", [("on_validation_batch_end", 8), ("_save", 8), ("on_validation_end", 18)])
def test_a_signal_in_a_validation_or_a_save_loses_nothing_but_time(work, whole, monkeypatch, hook, step):
    at(monkeypatch, hook, step, lambda callback, _: os.kill(os.getpid(), signal.SIGTERM))
    code = main([*FIT])
    assert code == 143 or (step == STEPS and code in (0, 143))
    assert main([*FIT, "--resume"]) == 0
    same(work, whole[0])


@pytest.mark.case("72", "SIGTERM in the midst of a batch of an evaluation")
@pytest.mark.parametrize("evaluation", [1, 2, 4])  # of the base, before the first step, after some
def test_a_signal_in_an_evaluation_does_not_wait_for_the_end_of_a_batch(work, whole, monkeypatch, capfd, evaluation):
    begun = []
    original = FormatModule.validation_step

    def step(module, batch, batch_idx):
        begun.append(batch_idx == 0)
        if sum(begun) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            begun.append("the batch goes on")
        return original(module, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(FormatModule, "validation_step", step)
        assert main([*FIT]) == 143
    assert "the batch goes on" not in begun
    one_line(capfd, "SIGTERM", "continue with")
    assert main([*FIT, "--resume"]) == 0
    same(work, whole[0])


@pytest.mark.case("74", "Ctrl-C once: saved; twice: at once, the old checkpoint intact")
def test_a_second_interrupt_stops_at_once(work, whole):
    process = start(work, *FIT, "--trainer.callbacks+=interrupting.Sleepy")
    while not (work / "sleeping").exists():
        time.sleep(0.05)
        assert process.is_alive(), (work / "output.log").read_text()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.is_alive()  # the step is not done
    began = time.monotonic()
    assert signalled(process, signal.SIGINT, 0.01) == 130 and time.monotonic() - began < 5


@pytest.mark.case("99", "killed after the new best is written and before the old one is removed")
def test_a_kill_between_writing_and_removing_is_made_good(work, whole, monkeypatch):
    def fail(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(checkpoint, "contenders", fail)
        main([*FIT])
    assert steps(work) == [4]
    assert main([*FIT, "--resume"]) == 0
    same(work, whole[0])


@pytest.mark.case("95", "going on with a finished run")
def test_a_finished_run_has_nothing_to_do(whole, monkeypatch, capfd):
    monkeypatch.chdir(whole[0])
    before = (whole[0] / "logs/small/one/metrics.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as ended:
        main([*FIT, "--resume"])
    assert not ended.value.code and "nothing to do" in capfd.readouterr().out
    assert (whole[0] / "logs/small/one/metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "arguments, says",
    [(["--trainer.max_steps", "40"], "max_steps -1, now 40"), (["--model.lora.r", "2"], "r 4, now 2")],
)
def test_a_finished_run_asked_for_something_else_is_refused_with_the_difference(
    whole, monkeypatch, capfd, arguments, says
):
    monkeypatch.chdir(whole[0])
    assert main([*FIT, *arguments, "--resume"]) == 2
    one_line(capfd, says, "another --run")


def interrupt(monkeypatch, step: int = 9) -> None:
    with monkeypatch.context() as patched:
        at(patched, "on_train_batch_end", step, lambda callback, _: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*FIT]) == 143


@pytest.mark.case("96", "the run's folder was moved")
def test_a_moved_run_knows_its_best_and_goes_on(work, whole, monkeypatch):
    interrupt(monkeypatch)
    Path("logs/small/one").rename("logs/small/other")
    assert main(["train", "-c", "small.yaml", "--run", "other", "--resume"]) == 0
    assert adapter(work, "other") == adapter(whole[0]) and result(work, "other") == result(whole[0])


def test_without_a_name_the_last_run_goes_on_if_it_is_the_same_task_and_else_a_new_one_begins(work, monkeypatch, capfd):
    interrupt(monkeypatch)
    assert main(["train", "-c", "small.yaml", "--model.lora.r", "2", "--resume"]) == 0
    assert "began with model.lora.r 4, now 2: a new run begins" in capfd.readouterr().out
    assert len(list(Path("logs/small").iterdir())) == 2 and not Path("logs/small/one/metrics.json").exists()
    shutil.rmtree(next(path for path in Path("logs/small").iterdir() if path.name != "one"))
    assert main(["train", "-c", "small.yaml", "--resume"]) == 0
    assert [path.name for path in Path("logs/small").iterdir()] == ["one"]


def test_a_run_whose_template_writes_the_date_keeps_that_of_its_first_day(work, base, monkeypatch, capfd):
    own = shutil.copytree(base, work / "base")
    template = own / "chat_template.jinja"
    template.write_text("Today is {{ strftime_now('%d %b %Y') }}\n" + template.read_text())
    Path("small.yaml").write_text(Path("small.yaml").read_text().replace(base, str(own)))

    def today_is(day):
        fake = type("day", (datetime,), {"now": classmethod(lambda cls: cls.fromisoformat(day))})
        monkeypatch.setattr(rendering, "datetime", fake)

    today_is("2026-11-25")
    assert main(["train", "-c", "small.yaml", "--run", "whole"]) == 0
    said = "the chat template writes the date; frozen at 2026-11-25 for this run; a server writes its own day"
    assert capfd.readouterr().out.count(said) == 1
    card = " ".join(Path("logs/small/whole/adapter/README.md").read_text().split())
    assert "The template writes the date: 2026-11-25 in every row of this run." in card
    interrupt(monkeypatch)
    today_is("2026-12-01")
    capfd.readouterr()
    assert main([*FIT, "--data.date", "2026-12-01", "--resume"]) == 2
    one_line(capfd, "data.date 2026-11-25, now 2026-12-01")
    assert main([*FIT, "--resume"]) == 0
    assert adapter(work) == adapter(work, "whole")
    config, found = "logs/small/one/config.yaml", result(work)
    assert yaml.safe_load(Path(config).read_text())["data"]["date"] == "2026-11-25"
    loss = f"{found['after']['val/loss']:.4f}"
    capfd.readouterr()
    for named in (config, "small.yaml"):  # the second asks for the checkpoint of a run
        best = f"logs/small/one/checkpoints/step-{found['training']['best_step']}.ckpt"
        assert main(["test", "-c", named, "--ckpt_path", best]) == 0
        assert loss in capfd.readouterr().out
    assert main(["test", "-c", config, "--data.date", "2020-01-01"]) == 0
    assert loss not in capfd.readouterr().out  # so the date matters
    assert main(["train", "-c", "small.yaml", "--run", "new", "--trainer.max_steps", "1"]) == 0
    assert yaml.safe_load(Path("logs/small/new/config.yaml").read_text())["data"]["date"] == "2026-12-01"
    # What judges the adapter again, whenever it does, sees the rows of the run.
    from formtune.export.exporter import read_run

    assert len(read_run(Path("logs/small/one")).test) == 5


def test_a_run_without_a_date_in_its_template_records_none(whole):
    assert yaml.safe_load((whole[0] / "logs/small/one/config.yaml").read_text())["data"]["date"] is None


# Which weights are measured


def test_a_runs_configuration_measures_its_best_checkpoint(whole, monkeypatch, capfd):
    monkeypatch.chdir(whole[0])
    config, found = "logs/small/one/config.yaml", result(whole[0])
    best = f"step-{found['training']['best_step']}.ckpt"
    for arguments in ([], ["--ckpt_path", "best"]):
        assert main(["test", "-c", config, *arguments]) == 0
        out = capfd.readouterr().out
        assert f"measuring: logs/small/one/checkpoints/{best}, the run's best checkpoint" in out
        assert f"{best} on 5 test rows" in out and f"{found['after']['val/loss']:.4f}" in out
    assert main(["validate", "-c", "small.yaml", "--run", "one"]) == 0
    assert f"{best} on 7 validation rows" in capfd.readouterr().out
    assert main(["test", "-c", config, "--ckpt_path", "last"]) == 0
    assert f"step-{STEPS}.ckpt on 5 test rows" in capfd.readouterr().out


def test_the_untuned_base_is_called_so(whole, monkeypatch, capfd):
    monkeypatch.chdir(whole[0])
    before = f"{result(whole[0])['before']['val/loss']:.4f}"
    for arguments in (["logs/small/one/config.yaml", "--ckpt_path", "base"], ["small.yaml"]):
        assert main(["test", "-c", *arguments]) == 0
        out = capfd.readouterr().out
        assert "measuring: untuned base\n" in out and "untuned base on 5 test rows" in out and before in out
        assert main(["predict", "-c", *arguments, "--data.prompts", "test.jsonl", "--answers", "said.jsonl"]) == 0
        assert "answers of untuned base: said.jsonl" in capfd.readouterr().out
        assert {json.loads(line)["model"] for line in Path("said.jsonl").read_text().splitlines()} == {"untuned base"}
    assert main(["predict", "-c", "logs/small/one/config.yaml", "--data.prompts", "test.jsonl", "--answers", "s"]) == 0
    assert not any("model" in json.loads(line) for line in Path("s").read_text().splitlines())


def test_an_interrupted_run_is_measured_by_its_best_so_far(work, monkeypatch, capfd):
    interrupt(monkeypatch)
    config, folder = "logs/small/one/config.yaml", Path("logs/small/one/checkpoints")
    state = checkpoint.read(checkpoint.newest(folder))["callbacks"]["Validations"]
    known = Validations()
    known.load_state_dict(state)
    chosen = best(known.history)
    capfd.readouterr()
    assert main(["test", "-c", config]) == 0
    assert f"step-{chosen.step}.ckpt, the run's best checkpoint" in capfd.readouterr().out
    (folder / f"step-{chosen.step}.ckpt").unlink()
    assert main(["test", "-c", config]) == 2
    one_line(capfd, "has no best checkpoint", "step-9.ckpt", "--ckpt_path base")


@pytest.mark.parametrize("name", ["best", "last"])
def test_the_best_of_no_run_is_refused(work, capfd, name):
    assert main(["test", "-c", "small.yaml", "--ckpt_path", name]) == 2
    one_line(capfd, f"ckpt_path: {name} of which run?", "-c logs/TASK/RUN/config.yaml")


# What a run that goes on is held to

OTHERS = [
    ("90", "another rank", ["--model.lora.r", "2"], "model.lora.r 4, now 2"),
    ("91", "other targets", ["--model.lora.targets", "all-linear"], "model.lora.targets attention, now all-linear"),
    ("93", "another batch", ["--data.rows_per_step", "4"], "data.rows_per_step 8, now 4"),
    ("94", "another learning rate", ["--model.optimizer.init_args.lr", "0.1"], "lr 0.01, now 0.1"),
]


@pytest.mark.parametrize(
    "arguments, says", [pytest.param(*c[2:], marks=pytest.mark.case(*c[:2]), id=c[1].replace(" ", "-")) for c in OTHERS]
)
def test_a_changed_configuration_is_refused_with_the_difference(work, monkeypatch, capfd, arguments, says):
    interrupt(monkeypatch)
    capfd.readouterr()
    assert main([*FIT, *arguments, "--resume"]) == 2
    one_line(capfd, says, "another --run")


@pytest.mark.parametrize(
    "change, says",
    [
        pytest.param("base", "another base", marks=pytest.mark.case("89", "another base of the same shapes")),
        pytest.param("rows", "training or validation rows", marks=pytest.mark.case("92", "changed data")),
        pytest.param(
            "format", "the format has changed since this run began", marks=pytest.mark.case("92", "a changed format")
        ),
        pytest.param("processes", "began on 2 processes", marks=pytest.mark.case("93", "another number of processes")),
    ],
)
def test_files_that_changed_under_a_run_are_refused(work, base, monkeypatch, capfd, change, says):
    own = shutil.copytree(base, work / "base")
    Path("small.yaml").write_text(Path("small.yaml").read_text().replace(base, str(own)))
    interrupt(monkeypatch)
    capfd.readouterr()
    if change == "base":
        tiny_model(seed=1).save_pretrained(own)
    elif change == "rows":
        Path("train.jsonl").write_text(Path("train.jsonl").read_text().replace("number 7", "number 70"))
    elif change == "format":
        Path("schema.json").write_text(json.dumps(SCHEMA | {"title": "another"}))
    else:
        path = checkpoint.newest(Path("logs/small/one/checkpoints"))
        state = torch.load(path, weights_only=True)
        state["formtune"]["processes"] = 2
        torch.save(state, path)
    assert main([*FIT, "--resume"]) == 2
    one_line(capfd, says)
    if change == "base":  # nor does it score with an adapter of another base
        path = str(checkpoint.newest(Path("logs/small/one/checkpoints")))
        assert main(["test", "-c", "small.yaml", "--ckpt_path", path]) == 2
        one_line(capfd, says)


@pytest.mark.case("97", "a folder that holds a run, without --resume")
def test_a_run_is_not_written_over(work, monkeypatch, capfd):
    interrupt(monkeypatch)
    capfd.readouterr()
    assert main([*FIT]) == 2
    one_line(capfd, "already holds a run", "--resume", "another --run")


@pytest.mark.case("98", "two processes in one run's folder")
def test_a_run_that_is_going_on_is_left_alone(work, monkeypatch, capfd):
    interrupt(monkeypatch)
    capfd.readouterr()
    with Path("logs/small/one/.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main([*FIT, "--resume"]) == 2
    one_line(capfd, "another process is running", "--run")


# Files


def flipped(data: bytes) -> bytes:
    """With one bit of the largest record changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        record = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
    place = data.index(record) + len(record) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "truncated": ("84", lambda data: data[: len(data) // 2]),
    "empty": ("85", lambda data: b""),
    "text": ("86", lambda data: b"not a checkpoint\n"),
    "bit flip": ("87", flipped),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.case(v[0], k)) for k, v in DAMAGES.items()])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(work, whole, monkeypatch, capfd, kind):
    interrupt(monkeypatch)
    assert steps(work) == [8, 9]
    path = Path("logs/small/one/checkpoints/step-9.ckpt")
    path.write_bytes(DAMAGES[kind][1](path.read_bytes()))
    capfd.readouterr()
    assert main(["test", "-c", "small.yaml", "--ckpt_path", str(path)]) == 2
    one_line(capfd, "step-9.ckpt", "damaged", "another checkpoint")
    assert main([*FIT, "--resume"]) == 0
    same(work, whole[0])


@pytest.mark.case("88", "a checkpoint that is not there")
def test_a_missing_checkpoint_is_named(work, capfd):
    assert main(["test", "-c", "small.yaml", "--ckpt_path", "gone.ckpt"]) == 2
    one_line(capfd, "gone.ckpt", "no such file")


def test_no_flipped_bit_of_a_checkpoint_is_read_as_another_number(whole, tmp_path):
    path = checkpoint.newest(whole[0] / "logs/small/one/checkpoints")
    good, data, rng = checkpoint.read(path), path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        place = rng.randrange(len(data))
        (tmp_path / "x.ckpt").write_bytes(
            data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        )
        try:
            found = checkpoint.read(tmp_path / "x.ckpt")
        except UserError:
            refused += 1
        else:  # the bit is padding between two records
            assert found["loops"] == good["loops"] and all(
                torch.equal(value, good["state_dict"][name]) for name, value in found["state_dict"].items()
            )
    assert refused > 200


@pytest.mark.case("78", "disk full while a checkpoint is written")
def test_a_full_disk_costs_no_checkpoint(work, whole, monkeypatch, capfd):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        if "step-8.ckpt." in calls[-1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert main([*FIT]) == 1
    one_line(capfd, "step-8.ckpt", "No space left on device", "step-4.ckpt is kept", "--resume")
    assert steps(work) == [4] and not list(work.rglob("*.part"))
    assert main([*FIT, "--resume"]) == 0
    same(work, whole[0])


@pytest.mark.case("80", "TMPDIR elsewhere, or not there at all")
def test_nothing_of_a_checkpoint_passes_through_the_temporary_folder(work, whole, monkeypatch):
    import tempfile

    def make(*args, original=tempfile.mkstemp, **rest):
        assert rest["dir"], "a temporary file elsewhere"
        return original(*args, **rest)

    monkeypatch.setattr(tempfile, "mkstemp", make)
    interrupt(monkeypatch)
    assert steps(work) == [8, 9]


@pytest.mark.case("81", "a folder that cannot be written")
@pytest.mark.case("82", "a file where the run's folder should be")
def test_a_file_in_the_place_of_the_folder_is_refused_before_the_model_loads(work, monkeypatch, capfd):
    Path("logs/small").mkdir(parents=True)
    Path("logs/small/one").write_text("")
    monkeypatch.setattr(FormatModule, "configure_model", lambda self: pytest.fail("the model was loaded"))
    assert main([*FIT]) == 2
    one_line(capfd, "logs/small/one", "File exists")


@pytest.mark.case("83", "the run's folder is removed while it runs")
def test_a_removed_folder_ends_the_run_in_one_line(work, monkeypatch, capfd):
    at(monkeypatch, "on_train_batch_end", 6, lambda *_: shutil.rmtree("logs"))
    assert main([*FIT]) == 1
    one_line(capfd, "error: logs/small/one", "No such file or directory")


# Numbers and memory


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the gradient of some steps no number."""

    def poison(*bad):
        backward = FormatModule.manual_backward

        def spoiled(self, loss, *args, **kwargs):
            backward(self, loss, *args, **kwargs)
            if self.trainer.global_step in bad:
                next(p for p in self.parameters() if p.grad is not None).grad.fill_(float("nan"))

        monkeypatch.setattr(FormatModule, "manual_backward", spoiled)

    return poison


@pytest.mark.case("65", "a loss that is no number, once")
def test_a_step_without_a_finite_gradient_is_left_out_and_counted(work, poisoned):
    poisoned(5)
    assert main([*FIT]) == 0
    assert result(work)["training"]["skipped_steps"] == 1 and result(work)["training"]["steps"] == STEPS
    state = checkpoint.read(work / f"logs/small/one/checkpoints/step-{STEPS}.ckpt")
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    assert all(s["step"] == STEPS - 1 for s in state["optimizer_states"][0]["state"].values())


@pytest.mark.case("66", "a loss that is no number, for ever")
def test_a_run_without_finite_gradients_stops_and_keeps_its_last_good_adapter(work, poisoned, monkeypatch, capfd):
    monkeypatch.setattr("formtune.model.module.SKIPPED", 5)
    poisoned(*range(9, 99))
    assert main([*FIT]) == 1
    one_line(capfd, "5 steps in a row", "non-finite gradient", "learning rate")
    state = checkpoint.read(work / "logs/small/one/checkpoints/step-8.ckpt")
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


@pytest.mark.case("67", "a metric that is never a number")
def test_a_loss_that_is_never_a_number_names_no_best(work, monkeypatch, capfd):
    from formtune.evaluation.metrics import LossMetrics

    compute = LossMetrics.compute
    monkeypatch.setattr(LossMetrics, "compute", lambda self: compute(self) | {"loss": torch.tensor(float("nan"))})
    assert main([*FIT]) == 2
    one_line(capfd, "no best checkpoint", "model.optimizer.lr")
    assert not (work / "logs/small/one/adapter").exists()


@pytest.mark.case("69", "out of memory")
def test_lack_of_memory_names_the_longest_row_and_what_to_lower(work, monkeypatch, capfd):
    from formtune.model.shared_prefixes import SharedPrefixes

    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    at(monkeypatch, "on_train_start", 0, lambda *_: monkeypatch.setattr(SharedPrefixes, "predictions", full))
    assert main([*FIT]) == 1
    line = one_line(capfd, "out of memory in a step of 8 rows", "model.tokens_per_micro_batch (now 4096)")
    assert re.search(r"train\.jsonl:\d+ with \d+ tokens", line)


@pytest.mark.case("54", "max_steps: 0")
@pytest.mark.parametrize("key", ["max_steps", "max_epochs"])
def test_a_run_of_no_steps_is_refused(work, capfd, key):
    assert main([*FIT, f"--trainer.{key}", "0"]) == 2
    one_line(capfd, f"trainer.{key}", "nothing to train")


@pytest.mark.case("107", "stale variables of SLURM in a shell")
def test_variables_of_a_batch_system_change_nothing(work, whole, monkeypatch):
    for name, value in {
        "JOB_ID": "7",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
        "JOB_NAME": "x",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    at(monkeypatch, "on_train_batch_end", 9, lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
    assert main([*FIT]) == 128 + signal.SIGUSR1
    assert not list(work.rglob("hpc_ckpt*"))
    assert main([*FIT, "--resume"]) == 0
    same(work, whole[0])


# Two processes


class Two:
    """A run on two processes, started as a user does."""

    def __init__(self, folder: Path, *args: str, strategy: str = "ddp") -> None:
        self.folder = folder
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        self.log = (folder / "two.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "formtune", *FIT, "--trainer.devices", "2", "--trainer.strategy", strategy,
             "--trainer.callbacks+=interrupting.Progress", *args],
            cwd=folder, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def children(self) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(self.process.pid), "-f", "formtune"], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]

    def at_step(self, step: int) -> None:
        """Wait until both have done so many steps."""
        while not all(_read(self.folder / f"step.{rank}") >= step for rank in (0, 1)):
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)

    def ended(self, seconds: float) -> int:
        code = self.process.wait(seconds)
        until = time.monotonic() + seconds
        while self._group_lives():
            assert time.monotonic() < until, "a process of the run lives on"
            time.sleep(0.05)
        return code

    def _group_lives(self) -> bool:
        found = subprocess.run(["pgrep", "-g", str(self.process.pid)], capture_output=True, text=True)
        return bool(found.stdout.split())

    def text(self) -> str:
        return (self.folder / "two.log").read_text()


def _read(path: Path) -> int:
    try:
        return int(path.read_text() or 0)
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def whole_on_two(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("two")
    _task(folder, base)
    run = Two(folder)
    assert run.ended(180) == 0, run.text()
    return folder


@pytest.mark.case("75", "SIGTERM to the first, the second or both of two processes")
@pytest.mark.case("101", "validations of uneven shares")
@pytest.mark.parametrize(
    ("whom", "strategy"), [("first", "ddp"), ("second", "ddp"), ("both", "ddp"), ("second", "fsdp")]
)
def test_two_processes_stop_together_and_go_on_to_the_same_bits(work, whole_on_two, whom, strategy):
    run = Two(work, strategy=strategy)
    run.at_step(6)
    who = {"first": [run.process.pid], "second": run.children()[:1], "both": [run.process.pid, *run.children()[:1]]}[
        whom
    ]
    for pid in who:
        os.kill(pid, signal.SIGTERM)
    assert run.ended(60) == 143, run.text()  # a second on an idle machine
    assert run.text().count("formtune: SIGTERM: ") == 1 and "Traceback" not in run.text()
    again = Two(work, "--resume", strategy=strategy)
    assert again.ended(180) == 0, again.text()
    same(work, whole_on_two)


@pytest.mark.case("76", "SIGKILL of one of two processes")
@pytest.mark.parametrize("whom", ["first", "second"])
def test_a_killed_process_ends_the_other_within_seconds(work, whole_on_two, whom):
    run = Two(work)
    run.at_step(6)
    os.kill(run.process.pid if whom == "first" else run.children()[0], signal.SIGKILL)
    assert run.ended(30) != 0
    again = Two(work, "--resume")
    assert again.ended(180) == 0, again.text()
    same(work, whole_on_two)


@pytest.mark.case("77", "an error in one of two processes: the cause is said first")
def test_an_error_in_one_process_ends_both_and_is_said_first(work):
    run = Two(work, "--trainer.callbacks+=interrupting.Breaking")
    assert run.ended(60) != 0
    text = run.text()
    assert "the second process has a mistake of its own" in text
    assert (
        text.index("a mistake of its own") < text.find("another process of this run") or "another process" not in text
    )


@pytest.mark.case("102", "fewer rows than processes")
def test_one_row_to_validate_and_test_is_enough_for_two_processes(work):
    for name in ("validation", "test"):
        Path(f"{name}.jsonl").write_text(json.dumps(ROWS[55 if name == "test" else 50]) + "\n")
    run = Two(work, "--trainer.max_steps", "4")
    assert run.ended(180) == 0, run.text()
    assert result(work)["rows"] == 1

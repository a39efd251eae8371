"""Killed at any moment, a run resumes as if nothing had happened; what cannot be resumed is refused in one line.

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
import time
import zipfile
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml

from conftest import tiny_model
from formtune.base import renderer as rendering
from formtune.cli import main
from formtune.errors import UserError
from formtune.model import FormatModule
from formtune.training import checkpoint
from formtune.training.callbacks import OverfittingWatch
from formtune.training.validations import best
from interrupting import (
    FIT,
    SCHEMA,
    STEPS,
    adapter,
    assert_same,
    result,
    signalled,
    start,
    steps,
    until_finished,
    write_task,
)


@pytest.fixture
def work(tmp_path, base, monkeypatch):
    """The working directory of a small task with dropout."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, base)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """The folder of a run that nothing interrupted, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    write_task(folder, base)
    began = time.monotonic()
    assert signalled(start(folder, *FIT)) == 0, (folder / "output.log").read_text()
    return folder, time.monotonic() - began


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
    assert_same(work, folder)
    assert codes[-1] == 0


@pytest.mark.case("71", "SIGTERM in training")
@pytest.mark.case("100", "a stop where a validation is due: it happens once over both runs")
@pytest.mark.parametrize("step", [1, 4, 6, 7, 12, 17])  # 4 and 12: before a validation, 6 and 12: an epoch's last
def test_a_signal_between_steps_stops_the_run_at_the_next_and_it_resumes(work, whole, monkeypatch, capfd, step):
    at(monkeypatch, "on_train_batch_end", step, lambda callback, _: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*FIT]) == 143
    line = one_line(capfd, "SIGTERM", "continue with: formtune train -c small.yaml --run one --resume")
    if step not in (4, 12):
        assert f"saved at step {step + (step == 6)}" in line
    assert not (work / "logs/small/one/metrics.json").exists()
    assert main([*FIT, "--resume"]) == 0
    assert_same(work, whole[0])


@pytest.mark.case("72", "SIGTERM in a validation, and while a checkpoint is written")
@pytest.mark.parametrize("hook, step", [("on_validation_batch_end", 8), ("_save", 8), ("on_validation_end", 18)])
def test_a_signal_in_a_validation_or_a_save_loses_nothing_but_time(work, whole, monkeypatch, hook, step):
    at(monkeypatch, hook, step, lambda callback, _: os.kill(os.getpid(), signal.SIGTERM))
    code = main([*FIT])
    assert code == 143 or (step == STEPS and code in (0, 143))
    assert main([*FIT, "--resume"]) == 0
    assert_same(work, whole[0])


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
            begun.append("the batch continues")
        return original(module, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(FormatModule, "validation_step", step)
        assert main([*FIT]) == 143
    assert "the batch continues" not in begun
    one_line(capfd, "SIGTERM", "continue with")
    assert main([*FIT, "--resume"]) == 0
    assert_same(work, whole[0])


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
def test_a_kill_between_writing_and_removing_a_checkpoint_loses_nothing(work, whole, monkeypatch):
    def fail(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(checkpoint, "can_still_win", fail)
        main([*FIT])
    assert steps(work) == [4]
    assert main([*FIT, "--resume"]) == 0
    assert_same(work, whole[0])


@pytest.mark.case("95", "resuming a finished run")
def test_a_finished_run_has_nothing_to_do(whole, monkeypatch, capfd):
    monkeypatch.chdir(whole[0])
    before = (whole[0] / "logs/small/one/metrics.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as ended:
        main([*FIT, "--resume"])
    assert not ended.value.code and "nothing to do" in capfd.readouterr().out
    assert (whole[0] / "logs/small/one/metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "arguments, message",
    [(["--trainer.max_steps", "40"], "max_steps -1, now 40"), (["--model.lora.r", "2"], "r 4, now 2")],
)
def test_a_finished_run_asked_for_something_else_is_refused_with_the_difference(
    whole, monkeypatch, capfd, arguments, message
):
    monkeypatch.chdir(whole[0])
    assert main([*FIT, *arguments, "--resume"]) == 2
    one_line(capfd, message, "another --run")


def interrupt(step: int = 9) -> None:
    with pytest.MonkeyPatch.context() as patched:
        at(patched, "on_train_batch_end", step, lambda callback, _: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*FIT]) == 143


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, base):
    """The folder of a run that was stopped after step 9."""
    folder = tmp_path_factory.mktemp("stopped")
    write_task(folder, base)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        interrupt()
    return folder


@pytest.fixture
def interrupted(work, stopped):
    """The working directory of the task with a run that was stopped after step 9."""
    for name in ("logs", ".cache"):
        shutil.copytree(stopped / name, work / name)
    return work


@pytest.mark.case("96", "the run's folder was moved")
def test_a_moved_run_keeps_its_best_and_resumes(interrupted, whole):
    Path("logs/small/one").rename("logs/small/other")
    assert main(["train", "-c", "small.yaml", "--run", "other", "--resume"]) == 0
    assert adapter(interrupted, "other") == adapter(whole[0]) and result(interrupted, "other") == result(whole[0])


def test_without_a_name_the_last_run_resumes_if_its_configuration_is_the_same(interrupted, capfd):
    assert main(["train", "-c", "small.yaml", "--model.lora.r", "2", "--resume"]) == 0
    assert "was started with model.lora.r 4, now 2: starting a new run" in capfd.readouterr().out
    assert len(list(Path("logs/small").iterdir())) == 2 and not Path("logs/small/one/metrics.json").exists()
    shutil.rmtree(next(path for path in Path("logs/small").iterdir() if path.name != "one"))
    assert main(["train", "-c", "small.yaml", "--resume"]) == 0
    assert [path.name for path in Path("logs/small").iterdir()] == ["one"]


def test_a_run_whose_template_writes_the_date_keeps_that_of_its_first_day(work, base, monkeypatch, capfd):
    own = shutil.copytree(base, work / "base")
    template = own / "chat_template.jinja"
    template.write_text("Today is {{ strftime_now('%d %b %Y') * 4 }}\n" + template.read_text())
    Path("small.yaml").write_text(Path("small.yaml").read_text().replace(base, str(own)))

    def today_is(day):
        fake = type("day", (datetime,), {"now": classmethod(lambda cls: cls.fromisoformat(day))})
        monkeypatch.setattr(rendering, "datetime", fake)

    today_is("2026-11-25")
    assert main(["train", "-c", "small.yaml", "--run", "whole"]) == 0
    note = "the chat template writes the date: 2026-11-25 in this run; a server writes the current date"
    assert capfd.readouterr().out.count(note) == 1
    card = " ".join(Path("logs/small/whole/adapter/README.md").read_text().split())
    assert "The template writes the date: 2026-11-25 in every row of this run." in card
    interrupt()
    today_is("2026-12-01")
    capfd.readouterr()
    assert main([*FIT, "--data.date", "2026-12-01", "--resume"]) == 2
    one_line(capfd, "data.date 2026-11-25, now 2026-12-01")
    assert main([*FIT, "--resume"]) == 0
    assert adapter(work) == adapter(work, "whole")
    config, figures = "logs/small/one/config.yaml", result(work)
    assert yaml.safe_load(Path(config).read_text())["data"]["date"] == "2026-11-25"
    loss = f"{figures['after']['val/loss']:.4f}"
    capfd.readouterr()
    for named in (config, "small.yaml"):  # the second asks for the checkpoint of a run
        best = f"logs/small/one/checkpoints/step-{figures['training']['best_step']}.ckpt"
        assert main(["test", "-c", named, "--ckpt_path", best]) == 0
        assert loss in capfd.readouterr().out
    assert main(["test", "-c", config, "--data.date", "1999-06-30"]) == 0
    assert loss not in capfd.readouterr().out  # so the date matters
    assert main(["train", "-c", "small.yaml", "--run", "new", "--trainer.max_steps", "1"]) == 0
    assert yaml.safe_load(Path("logs/small/new/config.yaml").read_text())["data"]["date"] == "2026-12-01"
    # What judges the adapter again, whenever it does, sees the rows of the run.
    from formtune.export.exporter import FinishedRun

    assert len(FinishedRun(Path("logs/small/one")).tuned.rows) == 5


def test_a_run_without_a_date_in_its_template_records_none(whole):
    assert yaml.safe_load((whole[0] / "logs/small/one/config.yaml").read_text())["data"]["date"] is None


# Which weights are measured


def test_a_runs_configuration_measures_its_best_checkpoint(whole, monkeypatch, capfd):
    monkeypatch.chdir(whole[0])
    config, figures = "logs/small/one/config.yaml", result(whole[0])
    best = f"step-{figures['training']['best_step']}.ckpt"
    for arguments in ([], ["--ckpt_path", "best"]):
        assert main(["test", "-c", config, *arguments]) == 0
        out = capfd.readouterr().out
        assert f"evaluating: logs/small/one/checkpoints/{best}, the run's best checkpoint" in out
        assert f"{best} on 5 test rows" in out and f"{figures['after']['val/loss']:.4f}" in out
    assert main(["validate", "-c", "small.yaml", "--run", "one"]) == 0
    assert f"{best} on 7 validation rows" in capfd.readouterr().out
    assert main(["test", "-c", config, "--ckpt_path", "last"]) == 0
    assert f"step-{STEPS}.ckpt on 5 test rows" in capfd.readouterr().out


def test_the_untuned_base_is_named(whole, monkeypatch, capfd):
    monkeypatch.chdir(whole[0])
    before = f"{result(whole[0])['before']['val/loss']:.4f}"
    for arguments in (["logs/small/one/config.yaml", "--ckpt_path", "base"], ["small.yaml"]):
        assert main(["test", "-c", *arguments]) == 0
        out = capfd.readouterr().out
        assert "evaluating: untuned base\n" in out and "untuned base on 5 test rows" in out and before in out
        assert main(["predict", "-c", *arguments, "--data.prompts", "test.jsonl", "--answers", "answers.jsonl"]) == 0
        assert "answers of untuned base: 5 in answers.jsonl" in capfd.readouterr().out
        assert {json.loads(line)["model"] for line in Path("answers.jsonl").read_text().splitlines()} == {
            "untuned base"
        }
    assert main(["predict", "-c", "logs/small/one/config.yaml", "--data.prompts", "test.jsonl", "--answers", "s"]) == 0
    assert not any("model" in json.loads(line) for line in Path("s").read_text().splitlines())


def test_an_interrupted_run_is_measured_by_its_best_so_far(interrupted, capfd):
    config, folder = "logs/small/one/config.yaml", Path("logs/small/one/checkpoints")
    state = checkpoint.read(checkpoint.newest(folder))["callbacks"]["OverfittingWatch"]
    validations = OverfittingWatch()
    validations.load_state_dict(state)
    chosen = best(validations.history)
    capfd.readouterr()
    assert main(["test", "-c", config]) == 0
    assert f"step-{chosen.step}.ckpt, the run's best checkpoint" in capfd.readouterr().out
    (folder / f"step-{chosen.step}.ckpt").unlink()
    assert main(["test", "-c", config]) == 2
    one_line(capfd, "has no best checkpoint", "--ckpt_path last", "--ckpt_path base")


@pytest.mark.parametrize("name", ["best", "last"])
def test_the_best_of_no_run_is_refused(work, capfd, name):
    assert main(["test", "-c", "small.yaml", "--ckpt_path", name]) == 2
    one_line(capfd, f"ckpt_path: {name} needs a run", "-c logs/TASK/RUN/config.yaml")


# What must not change before a run resumes

OTHERS = [
    ("90", "another rank", ["--model.lora.r", "2"], "model.lora.r 4, now 2"),
    ("91", "other targets", ["--model.lora.targets", "all-linear"], "model.lora.targets attention, now all-linear"),
    ("93", "another number of rows per step", ["--data.rows_per_step", "4"], "data.rows_per_step 8, now 4"),
    ("94", "another learning rate", ["--model.optimizer.init_args.lr", "0.1"], "lr 0.01, now 0.1"),
]


@pytest.mark.parametrize(
    "arguments, message",
    [pytest.param(*c[2:], marks=pytest.mark.case(*c[:2]), id=c[1].replace(" ", "-")) for c in OTHERS],
)
def test_a_changed_configuration_is_refused_with_the_difference(interrupted, capfd, arguments, message):
    assert main([*FIT, *arguments, "--resume"]) == 2
    one_line(capfd, message, "another --run")


@pytest.mark.case("89", "another base of the same shapes")
def test_another_base_is_refused(work, base, capfd):
    own = shutil.copytree(base, work / "base")
    Path("small.yaml").write_text(Path("small.yaml").read_text().replace(base, str(own)))
    interrupt()
    capfd.readouterr()
    tiny_model(seed=1).save_pretrained(own)
    path = str(checkpoint.newest(Path("logs/small/one/checkpoints")))
    for arguments in ([*FIT, "--resume"], ["test", "-c", "small.yaml", "--ckpt_path", path]):
        assert main(arguments) == 2
        one_line(capfd, "another base")


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param("rows", "training or validation rows", marks=pytest.mark.case("92", "changed data")),
        pytest.param(
            "format", "the format has changed since this run began", marks=pytest.mark.case("92", "a changed format")
        ),
        pytest.param("processes", "began on 2 processes", marks=pytest.mark.case("93", "another number of processes")),
    ],
)
def test_files_that_changed_under_a_run_are_refused(interrupted, capfd, change, message):
    if change == "rows":
        Path("train.jsonl").write_text(Path("train.jsonl").read_text().replace("number 7", "number 70"))
    elif change == "format":
        Path("schema.json").write_text(json.dumps(SCHEMA | {"title": "another"}))
    else:
        path = checkpoint.newest(Path("logs/small/one/checkpoints"))
        state = torch.load(path, weights_only=True)
        state["formtune"]["processes"] = 2
        torch.save(state, path)
    assert main([*FIT, "--resume"]) == 2
    one_line(capfd, message)


@pytest.mark.case("97", "a folder that holds a run, without --resume")
def test_a_run_is_not_overwritten(interrupted, capfd):
    assert main([*FIT]) == 2
    one_line(capfd, "already has a run", "--resume", "another --run")


@pytest.mark.case("98", "two processes in one run's folder")
def test_a_run_of_another_process_is_refused(interrupted, capfd):
    with Path("logs/small/one/.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main([*FIT, "--resume"]) == 2
    one_line(capfd, "another process is using this folder", "--run")


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
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(interrupted, whole, capfd, kind):
    assert steps(interrupted) == [8, 9]
    path = Path("logs/small/one/checkpoints/step-9.ckpt")
    path.write_bytes(DAMAGES[kind][1](path.read_bytes()))
    capfd.readouterr()
    assert main(["test", "-c", "small.yaml", "--ckpt_path", str(path)]) == 2
    one_line(capfd, "step-9.ckpt", "damaged", "another checkpoint")
    assert main([*FIT, "--resume"]) == 0
    assert_same(interrupted, whole[0])


@pytest.mark.case("88", "a checkpoint that does not exist")
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
            state = checkpoint.read(tmp_path / "x.ckpt")
        except UserError:
            refused += 1
        else:  # the bit is padding between two records
            assert state["loops"] == good["loops"] and all(
                torch.equal(value, good["state_dict"][name]) for name, value in state["state_dict"].items()
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
    one_line(capfd, "step-8.ckpt", "No space left on device", "earlier checkpoints are kept", "--resume")
    assert steps(work) == [4] and not list(work.rglob("*.part"))
    assert main([*FIT, "--resume"]) == 0
    assert_same(work, whole[0])


@pytest.mark.case("80", "TMPDIR on another file system, or missing")
def test_no_checkpoint_is_written_through_the_temporary_folder(work, whole, monkeypatch):
    import tempfile

    def make(*args, original=tempfile.mkstemp, **rest):
        assert rest["dir"], "a temporary file elsewhere"
        return original(*args, **rest)

    monkeypatch.setattr(tempfile, "mkstemp", make)
    interrupt()
    assert steps(work) == [8, 9]


@pytest.mark.case("81", "a folder that is not writable")
@pytest.mark.case("82", "a file where the run's folder should be")
def test_a_file_in_place_of_the_folder_is_refused_before_the_model_loads(work, monkeypatch, capfd):
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
    """Makes the gradient of some steps NaN."""

    def poison(*bad):
        backward = FormatModule.manual_backward

        def spoiled(self, loss, *args, **kwargs):
            backward(self, loss, *args, **kwargs)
            if self.trainer.global_step in bad:
                next(p for p in self.parameters() if p.grad is not None).grad.fill_(float("nan"))

        monkeypatch.setattr(FormatModule, "manual_backward", spoiled)

    return poison


@pytest.mark.case("65", "a non-finite gradient, once")
def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted(work, poisoned):
    poisoned(5)
    assert main([*FIT]) == 0
    assert result(work)["training"]["skipped_steps"] == 1 and result(work)["training"]["steps"] == STEPS
    state = checkpoint.read(work / f"logs/small/one/checkpoints/step-{STEPS}.ckpt")
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    assert all(s["step"] == STEPS - 1 for s in state["optimizer_states"][0]["state"].values())


@pytest.mark.case("66", "non-finite gradients in every step")
def test_a_run_without_finite_gradients_stops_and_keeps_its_last_good_adapter(work, poisoned, monkeypatch, capfd):
    monkeypatch.setattr("formtune.model.module.MAX_SKIPPED", 5)
    poisoned(*range(9, 99))
    assert main([*FIT]) == 1
    one_line(capfd, "5 steps in a row", "non-finite gradient", "learning rate")
    state = checkpoint.read(work / "logs/small/one/checkpoints/step-8.ckpt")
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


@pytest.mark.case("67", "a metric that is always NaN")
def test_a_loss_that_is_always_nan_names_no_best(work, monkeypatch, capfd):
    from formtune.evaluation.metrics import LossMetrics

    compute = LossMetrics.compute
    monkeypatch.setattr(LossMetrics, "compute", lambda self: compute(self) | {"val/loss": (float("nan"), 1)})
    assert main([*FIT]) == 2
    one_line(capfd, "no best checkpoint", "model.optimizer.lr")
    assert not (work / "logs/small/one/adapter").exists()


@pytest.mark.case("69", "out of memory")
def test_lack_of_memory_names_the_longest_row_and_what_to_lower(work, monkeypatch, capfd):
    from formtune.model.micro_batches import MicroBatches

    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    at(monkeypatch, "on_train_start", 0, lambda *_: monkeypatch.setattr(MicroBatches, "loss", full))
    assert main([*FIT]) == 1
    line = one_line(capfd, "out of memory in a batch of 8 rows", "model.tokens_per_micro_batch (now 4096)")
    assert re.search(r"train\.jsonl:\d+ with \d+ tokens", line)


@pytest.mark.case("54", "max_steps: 0")
@pytest.mark.parametrize("key", ["max_steps", "max_epochs"])
def test_a_run_of_no_steps_is_refused(work, capfd, key):
    assert main([*FIT, f"--trainer.{key}", "0"]) == 2
    one_line(capfd, f"trainer.{key}", "nothing to train")


@pytest.mark.case("107", "stale SLURM variables in a shell")
def test_slurm_variables_change_nothing(work, whole, monkeypatch):
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
    assert_same(work, whole[0])

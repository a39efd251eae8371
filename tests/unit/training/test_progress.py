"""A run shows how far it is in one line of a terminal, and how fast it trains."""

import io
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from formtune.errors import UserError
from formtune.training import progress_bar, throughput
from formtune.training.progress_bar import ProgressBar
from formtune.training.run_folder import RunFolder
from formtune.training.throughput import Throughput


@pytest.fixture
def terminal(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(progress_bar, "Console", lambda: console)
    monkeypatch.setattr(progress_bar, "PAUSE", 0.0)
    return console


def trainer_at(step, fn="fit", **metrics):
    rows = SimpleNamespace(dataset=range(330))
    measured = {"format/exact": 0.994, "val/loss": 0.0025, "joint/exact": 0.97, "content/field_f1": 0.994}
    return SimpleNamespace(
        global_step=step, estimated_stepping_batches=12000, max_epochs=10, current_epoch=9, world_size=2,
        progress_bar_metrics={"train/loss": 0.0123456, **metrics}, callback_metrics=measured, is_global_zero=True,
        sanity_checking=False, state=SimpleNamespace(fn=fn), val_dataloaders=rows, test_dataloaders=rows,
    )  # fmt: skip


def lines(bar):
    """What the bar shows on 80 columns."""
    out = io.StringIO()
    Console(file=out, width=80).print(bar._progress.get_renderable())
    return out.getvalue().splitlines()


def test_the_bar_of_training_is_one_line_of_80_columns(terminal):
    bar = ProgressBar()
    bar.on_train_start(trainer_at(0), None)
    bar.on_validation_start(trainer_at(100), None)
    bar.on_validation_end(trainer_at(100), None)
    bar.on_train_batch_end(trainer_at(11999, **{"train/tokens_per_second": 123456.7}), None)
    [text] = lines(bar)
    bar.on_train_end(None, None)
    assert len(text) <= 80
    shown = ("epoch 10/10", "11999/12000", "loss 0.0123", "123,457 tok/s", "exact 99.4%")
    assert [part for part in shown if part not in text] == []
    assert "step 100  val/loss 0.0025  format/exact 0.9940" in terminal.file.getvalue()


def test_an_evaluation_counts_the_rows_of_all_processes(terminal):
    bar = ProgressBar()
    bar.on_test_start(trainer_at(0, "test"), None)
    bar.on_test_batch_end(trainer_at(0, "test"), None, [], SimpleNamespace(rows=range(16)), 0)
    [text] = lines(bar)
    bar.on_test_end(None, None)
    assert "evaluating" in text and " 32/330" in text and bar._progress is None


def test_no_bar_is_drawn_into_a_file_or_by_another_process(terminal, monkeypatch):
    quiet = ProgressBar()
    quiet.disable()
    quiet.on_test_start(trainer_at(0, "test"), None)
    monkeypatch.setattr(progress_bar, "Console", lambda: Console(file=io.StringIO()))
    filed = ProgressBar()
    filed.on_test_start(trainer_at(0, "test"), None)
    assert quiet._progress is None and filed._progress is None


def test_tokens_per_second_leave_out_evaluations(monkeypatch):
    clock, logged = [0.0], []
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    module = SimpleNamespace(log=lambda name, value, **_: logged.append((name, value)))
    callback, batch = Throughput(), SimpleNamespace(rows=[range(30), range(20)])
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2)
    callback.on_train_start(trainer, module)
    for step in (1, 2, 3, 4):
        clock[0] += 5.0
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, batch, step)
        if step == 3:
            callback.on_validation_start(trainer, module)
            clock[0] += 1000.0
            callback.on_validation_end(trainer, module)
    assert logged == [("train/tokens_per_second", 10.0)] * 2


def test_a_killed_process_holds_no_run_folder(tmp_path):
    code = "import pathlib, sys, time; from formtune.training.run_folder import RunFolder\n"
    code += "folder = RunFolder(pathlib.Path(sys.argv[1])); folder.hold(); print('held', flush=True); time.sleep(60)"
    folder = RunFolder(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"run: this run is going on in another process; .* name another --run"):
            folder.hold()
        process.send_signal(signal.SIGKILL)
        process.wait()
    folder.hold()
    folder.release()
    assert not folder.path.exists()

"""A run says how fast it trains, and a run's folder is held by one process."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from formtune.errors import UserError
from formtune.training import throughput
from formtune.training.run_folder import RunFolder
from formtune.training.throughput import Throughput


def test_tokens_per_second_leave_out_evaluations(monkeypatch):
    clock, logged = [0.0], []
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    module = SimpleNamespace(log=lambda name, value, **_: logged.append((name, value)))
    callback, batch = Throughput(), SimpleNamespace(rows=[range(30), range(20)])
    for step in (1, 2, 3, 4):
        trainer = SimpleNamespace(global_step=step, log_every_n_steps=2)
        callback.on_train_batch_start(trainer, module, batch, step)
        clock[0] += 5.0
        callback.on_train_batch_end(trainer, module, None, batch, step)
        clock[0] += 1000.0  # of a validation
    assert logged == [("train/tokens_per_second", 10.0)] * 2


def test_a_killed_process_holds_no_run_folder(tmp_path):
    code = "import pathlib, sys, time; from formtune.training.run_folder import RunFolder\n"
    code += "folder = RunFolder(pathlib.Path(sys.argv[1])); folder.hold(); print('held', flush=True); time.sleep(60)"
    folder = RunFolder(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"run: another process is running this run; .* name another --run"):
            folder.hold()
        process.send_signal(signal.SIGKILL)
        process.wait()
    folder.hold()
    folder.release()
    assert not folder.path.exists()

"""A run's folder is held by one process."""

import signal
import subprocess
import sys

import pytest

from formtune.errors import UserError
from formtune.training.run_folder import RunFolder


def test_a_killed_process_holds_no_run_folder(tmp_path):
    code = "import pathlib, sys, time; from formtune.training.run_folder import RunFolder\n"
    code += "with RunFolder(pathlib.Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"
    folder = RunFolder(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=r"run: another process is using this folder; .* choose another --run"),
            folder.locked(),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with folder.locked():
        assert folder.path.exists()
    assert not folder.path.exists()

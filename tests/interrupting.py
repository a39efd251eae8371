"""A small task, and runs of it that are interrupted: each process is forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import Callback

from command import PROCESSES
from formtune.training import checkpoint

FIT = ("train", "-c", "small.yaml", "--run", "one")
STEPS = 18  # 48 rows, 8 a step, 3 epochs; validated after steps 4, 8, 12, 16 and 18
SCHEMA = {"type": "integer"}
ROWS = [{"prompt": f"number {n}", "completion": str(n)} for n in range(60)]  # short answers: decoding costs most


def write_task(folder: Path, base: str) -> None:
    """Write a small task with dropout."""
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    for name, rows in (("train", ROWS[:48]), ("validation", ROWS[48:55]), ("test", ROWS[55:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {
            "base": base,
            "max_new_tokens": 4,
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


def adapter(folder: Path, run: str = "one") -> bytes:
    """The weights that a run exported."""
    return (folder / f"logs/small/{run}/adapter/adapter_model.safetensors").read_bytes()


def result(folder: Path, run: str = "one") -> dict:
    """All figures of a run but its time, and the next command, which names its folder."""
    figures = json.loads((folder / f"logs/small/{run}/metrics.json").read_text())
    for name in ("seconds", "next"):
        figures["training"].pop(name)
    return figures


def assert_same(folder: Path, whole: Path) -> None:
    """The run in `folder` ended as the uninterrupted one did, to the last bit."""
    assert adapter(folder) == adapter(whole)
    assert result(folder) == result(whole)  # its history too: every validation happened once


def steps(folder: Path) -> list[int]:
    """The steps after which the run has a checkpoint."""
    return list(checkpoint.steps(folder / "logs/small/one/checkpoints"))


class Progress(Callback):
    """Writes the number of steps done, so that one can tell where a run is and what a kill has cost."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        with Path(f"step.{trainer.global_rank}").open("w") as file:
            file.write(str(trainer.global_step))


class Sleepy(Callback):
    """Makes the fourth step last a minute."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            Path("sleeping").touch()
            until = time.monotonic() + 60
            while time.monotonic() < until:
                time.sleep(0.05)  # a signal's handler runs in between


class Breaking(Callback):
    """Raises an error in the second process of a run, in its fourth step."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 1:
            raise ValueError("the second process has a mistake of its own")


def start(folder: Path, *args: str, every: float = 0.1) -> Any:
    """Start `formtune ARGS` in a folder, where its output goes to `output.log`.

    Args:
        folder: The working directory.
        args: The command line.
        every: Seconds between two checkpoints.
    """
    process = PROCESSES.Process(target=_child, args=(str(folder), [*args, f"--checkpoint.every_n_seconds={every}"]))
    process.start()
    return process


def signalled(process: Any, number: int | None = None, after: float | None = None) -> int:
    """The exit code of a process that gets a signal after so many seconds, if it still runs."""
    process.join(after)
    if after is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join(120)
    assert process.exitcode is not None, "the process continues after its signal"
    return process.exitcode


def until_finished(folder: Path, args: tuple[str, ...], number: int, seconds: float, rng: random.Random) -> list[int]:
    """Interrupt a run at random moments of so many seconds, and resume it until it is finished: the exit codes."""
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        codes.append(signalled(start(folder, *args, "--resume"), number, rng.uniform(0, seconds)))
        assert codes[-1] in (0, -number, 128 + number), (folder / "output.log").read_text()[-3000:]
    return codes


class TwoProcesses:
    """`formtune ARGS` on two processes: Lightning starts the second one, which takes no import either."""

    def __init__(self, folder: Path, *args: str, strategy: str = "ddp") -> None:
        self.folder = folder
        words = [*args, "--trainer.devices", "2", "--trainer.strategy", strategy]
        words += ["--trainer.callbacks+=interrupting.Progress"]
        self.process = PROCESSES.Process(target=_child, args=(str(folder), words, 2))
        self.process.start()

    def second(self) -> int:
        """The process id of the second process."""
        return int((self.folder / "second.pid").read_text())

    def wait_for_step(self, step: int) -> None:
        """Wait until both have done so many steps."""
        while not all(_number(self.folder / f"step.{rank}") >= step for rank in (0, 1)):
            assert self.process.is_alive(), self.output()
            time.sleep(0.02)

    def finish(self, seconds: float) -> int:
        """The exit code, once both have ended."""
        until = time.monotonic() + seconds
        self.process.join(seconds)
        while self._group():
            assert time.monotonic() < until, f"a process of the run is still there\n{self.output()}"
            time.sleep(0.05)
        return self.process.exitcode

    def _group(self) -> str:
        return subprocess.run(["pgrep", "-g", str(self.process.pid)], capture_output=True, text=True).stdout

    def output(self) -> str:
        return (self.folder / "output.log").read_text()


def _number(path: Path) -> int:
    try:
        return int(path.read_text() or 0)
    except FileNotFoundError:
        return 0


def _child(folder: str, args: list[str], processes: int = 1) -> None:
    os.chdir(folder)
    sys.path.insert(0, folder)  # as `python -m` does
    log = os.open("output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    if processes == 2:
        from lightning.pytorch.strategies.launchers import subprocess_script

        os.setpgid(0, 0)
        subprocess_script.subprocess = types.SimpleNamespace(Popen=_Second(args).start)
    _run(args)


def _run(args: list[str]) -> None:
    import torch

    from formtune.cli import main

    torch.set_num_threads(1)
    try:
        code = main(args)
    except KeyboardInterrupt:  # before `main` has begun to look after it
        code = 130
    sys.exit(code)


class _Second:
    """What `subprocess.Popen` is for Lightning's launcher: a process that was forked early and starts now."""

    def __init__(self, args: list[str]) -> None:
        self.returncode: int | None = None
        reader, writer = os.pipe()
        self.pid = os.fork()
        self._writer = os.fdopen(writer, "w")
        if self.pid == 0:
            self._writer.close()
            with os.fdopen(reader) as pipe:
                environment = pipe.read()
            if not environment:  # the first one ended before it started a second
                os._exit(0)
            os.environ.update(json.loads(environment))
            Path("second.pid").write_text(str(os.getpid()))
            _run(args)
        os.close(reader)

    def start(self, command: list[str], env: dict[str, str], cwd: str | None) -> _Second:
        """Start as `Popen` would."""
        with self._writer:
            json.dump(env, self._writer)
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.Signals(number))

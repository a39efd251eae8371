"""Runs that are interrupted: each in a process of its own, forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from command import PROCESSES


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
    process = PROCESSES.Process(target=_child, args=(str(folder), args, every))
    process.start()
    return process


def signalled(process: Any, number: int | None = None, after: float | None = None) -> int:
    """The exit code of a process that gets a signal after so many seconds, if it still lives."""
    process.join(after)
    if after is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join(120)
    assert process.exitcode is not None, "the process goes on after its signal"
    return process.exitcode


def until_finished(folder: Path, args: tuple[str, ...], number: int, seconds: float, rng: random.Random) -> list[int]:
    """Interrupt a run at random moments of so many seconds, and go on, until it has come to its end: the exit codes."""
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        codes.append(signalled(start(folder, *args, "--resume"), number, rng.uniform(0, seconds)))
        assert codes[-1] in (0, -number, 128 + number), (folder / "output.log").read_text()[-3000:]
    return codes


def _child(folder: str, args: tuple[str, ...], every: float) -> None:
    os.chdir(folder)
    log = os.open("output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    import torch

    from formtune.cli import main

    torch.set_num_threads(1)
    try:
        code = main([*args, f"--checkpoint.every_n_seconds={every}"])
    except KeyboardInterrupt:  # before `main` has begun to look after it
        code = 130
    sys.exit(code)

"""Each run is `formtune fit` in a process of its own: what ends one, such as a lack of memory, ends no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIT = [sys.executable, "-m", "formtune", "fit"]
PAUSE = 0.2  # seconds between two looks at what has ended


@dataclass(frozen=True, slots=True)
class Job:
    """One run.

    Args:
        name: What it is called in messages.
        folder: Where it writes; there from the start, with what it prints in `output.log`.
        words: What stands after `formtune fit`.
    """

    name: str
    folder: Path
    words: list[str]

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder / "output.log"


def devices(trainer: dict[str, Any]) -> list[str | None]:
    """The GPUs that take one run each at a time, as CUDA_VISIBLE_DEVICES names them; None takes what there is.

    Args:
        trainer: What the task says of the trainer; runs that ask for several devices follow one another.
    """
    alone = trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    if not alone or str(trainer.get("devices", "auto")) not in ("auto", "1"):
        return [None]
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = named.split(",")[:count] if named else [str(i) for i in range(count)]
    return [*found] if count > 1 else [None]


def run_all(jobs: Sequence[Job], on: Sequence[str | None], lock: int, ended: Callable[[Job, int], None]) -> None:
    """Run the jobs in their order, one on each device at a time; what interrupts this ends them all at once.

    Args:
        jobs: What to run.
        on: The devices.
        lock: A file descriptor that each run keeps open for as long as it lives.
        ended: Is told each job that has ended, and its exit code.
    """
    waiting, free = deque(jobs), list(on)
    running: dict[subprocess.Popen[bytes], tuple[Job, str | None]] = {}
    try:
        while waiting or running:
            while waiting and free:
                job, device = waiting.popleft(), free.pop(0)
                running[_start(job, device, lock)] = (job, device)
            time.sleep(PAUSE)
            for process in [process for process in running if process.poll() is not None]:
                job, device = running.pop(process)
                free.append(device)
                ended(job, process.returncode)
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)  # at once, and its own processes too: it loses seconds
            process.wait()


def _start(job: Job, device: str | None, lock: int) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    visible = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [*FIT, *job.words], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | visible, pass_fds=(lock,), start_new_session=True,
        )  # fmt: skip

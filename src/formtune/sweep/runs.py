"""Runs are separate processes of `formtune train`, so that one out of memory does not end the sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAIN = [sys.executable, "-m", "formtune", "train"]
PAUSE = 0.2  # seconds between two checks for processes that have ended


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    point: str
    folder: Path
    arguments: list[str]

    @property
    def log(self) -> Path:
        return self.folder / "output.log"

    def result(self) -> dict[str, Any] | None:
        """Its `metrics.json`; None if it is not finished."""
        path = self.folder / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def why(self, code: int) -> str:
        """Why it ended with this exit code, in one line."""
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().rsplit("\n", 1)
        return lines[-1].removeprefix("formtune: error: ") or f"exit code {code}"


def devices(trainer: dict[str, Any]) -> list[str | None]:
    """The GPUs that take one run each at a time, as CUDA_VISIBLE_DEVICES names them; None is whatever there is.

    Runs whose trainer asks for several devices follow one another.
    """
    on_gpu = trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    if not on_gpu or str(trainer.get("devices", "auto")) not in ("auto", "1"):
        return [None]
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",")[:count] if named else [str(i) for i in range(count)]
    return [*gpus] if count > 1 else [None]


def run_all(jobs: Sequence[Job], on: Sequence[str | None]) -> Generator[tuple[Job, int], None, None]:
    """Run the jobs in order, one per device at a time, and yield each with its exit code when it ends.

    Closing the iterator kills all that still run.
    """
    # One thread that polls: a pool of threads would need a lock so that none starts a run while all are being killed.
    waiting, free = deque(jobs), list(on)
    running: dict[subprocess.Popen[bytes], tuple[Job, str | None]] = {}
    try:
        while waiting or running:
            while waiting and free:
                job, device = waiting.popleft(), free.pop(0)
                running[_start(job, device)] = (job, device)
            time.sleep(PAUSE)
            for process in [process for process in running if process.poll() is not None]:
                job, device = running.pop(process)
                free.append(device)
                yield job, process.returncode
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)  # with its own processes; a resumed run loses seconds
            process.wait()


def _start(job: Job, device: str | None) -> subprocess.Popen[bytes]:
    job.folder.mkdir(parents=True, exist_ok=True)
    visible = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [*TRAIN, *job.arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | visible, start_new_session=True,
        )  # fmt: skip

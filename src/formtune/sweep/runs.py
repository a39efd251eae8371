"""The points of a grid, and their runs: separate processes, so that one out of memory does not end the sweep."""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from formtune.errors import UserError

RANKS = "model.lora.r=8,16,32,64"
TRAIN = [sys.executable, "-m", "formtune", "train"]
PAUSE = 0.2  # seconds between two checks for processes that have ended


class Point(NamedTuple):
    """One value for each key of the grid; the name is short, distinct and fit for a folder: `r8-lr1e-4`."""

    name: str
    values: dict[str, str]

    @property
    def arguments(self) -> list[str]:
        return [f"--{key}={value}" for key, value in self.values.items()]


def grid(over: Sequence[str]) -> list[Point]:
    """The points: all combinations of `key=value,value,...`, the last key changing fastest."""
    keys: dict[str, list[str]] = {}
    for text in over:
        key, _, values = text.partition("=")
        if key in keys:
            raise UserError(f"--over {key}: duplicate key; name all its values at once")
        # Commas inside brackets belong to a value. Values stay text: `train` reads 1e-4 as a number, YAML does not.
        keys[key] = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]
        if not re.fullmatch(r"\w+(\.\w+)*", key) or not all(keys[key]) or len(set(keys[key])) < max(2, len(keys[key])):
            raise UserError(f"--over {text}: expected a key and two or more different values, as in --over {RANKS}")
    last = [key.rpartition(".")[2] for key in keys]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}
    combinations = [dict(zip(keys, values, strict=True)) for values in itertools.product(*keys.values())]
    return [Point("-".join(short[key] + _slug(value) for key, value in each.items()), each) for each in combinations]


def seed_numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--seeds {text}: expected whole numbers from 0, as in --seeds 0,1,2")
    return list(dict.fromkeys(map(int, text.split(","))))


def _slug(value: str) -> str:
    plain = re.sub(r"[^\w.+]+", "-", value).strip("-")[:40]
    if plain != value:  # values that differ only in characters that a folder name cannot have need different names
        plain += f"-{hashlib.sha256(value.encode()).hexdigest()[:4]}"
    return plain if plain[:1].isdigit() else f"-{plain}"


class Job(NamedTuple):
    """One run: a point trained with one seed."""

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
    import torch

    on_gpu = trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    one_device = str(trainer.get("devices", "auto")) in ("auto", "1")
    count = torch.cuda.device_count() if on_gpu and one_device else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [*visible.split(",")[:count]] if count > 1 else [None]


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
                job.folder.mkdir(parents=True, exist_ok=True)
                visible = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
                with job.log.open("wb") as log:
                    process = subprocess.Popen(
                        [*TRAIN, *job.arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                        env=os.environ | visible, start_new_session=True,
                    )  # fmt: skip
                running[process] = (job, device)
            time.sleep(PAUSE)
            for process in [process for process in running if process.poll() is not None]:
                job, device = running.pop(process)
                free.append(device)
                yield job, process.returncode
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)  # with its own processes; a resumed run loses seconds
            process.wait()

"""The points of a grid, and their runs: separate processes, so that one out of memory does not end the sweep."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formtune.errors import UserError

RANKS = "model.lora.r=8,16,32,64"
TRAIN = [sys.executable, "-m", "formtune", "train"]


def grid(over: Sequence[str]) -> dict[str, dict[str, str]]:
    """The points, all combinations of `key=value,value,...`, by a name that is fit for a folder: `r8-lr1e-4`."""
    keys: dict[str, list[str]] = {}
    for text in over:
        key, _, values = text.partition("=")
        if key in keys:
            raise UserError(f"--over {key}: duplicate key; name all its values at once")
        # Commas inside brackets belong to a value. Values stay text: `train` reads 1e-4 as a number, YAML does not.
        keys[key] = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]
        if not re.fullmatch(r"\w+(\.\w+)*", key) or not all(keys[key]) or len(set(keys[key])) < max(2, len(keys[key])):
            raise UserError(f"--over {text}: expected a key and two or more different values, as in --over {RANKS}")
    points = [dict(zip(keys, values, strict=True)) for values in itertools.product(*keys.values())]
    return {"-".join(key.rpartition(".")[2] + _slug(value) for key, value in it.items()): it for it in points}


def _slug(value: str) -> str:
    plain = re.sub(r"[^\w.+]+", "-", value).strip("-")[:40]
    if plain != value:  # values that differ only in characters that a folder name cannot have need different names
        plain += f"-{hashlib.sha256(value.encode()).hexdigest()[:4]}"
    return plain if plain[:1].isdigit() else f"-{plain}"


def result(run: Path) -> dict[str, Any] | None:
    """The `metrics.json` of a run; None if it is not finished."""
    path = run / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def train(run: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run `formtune train`: its exit code, and why it failed, in one line.

    An interruption kills the run, which loses seconds when it is resumed.
    """
    run.mkdir(parents=True, exist_ok=True)
    path = run / "output.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [*TRAIN, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its own processes
        process.wait()
    last = path.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    why = last.removeprefix("formtune: error: ") or f"exit code {code}"
    return code, f"ended by {signal.Signals(-code).name}" if code < 0 else why

"""What the benchmark scripts share: reading a workload, memory, versions, and the file that each of them writes."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
from pathlib import Path
from typing import Any

import psutil
import torch

ROWS_PER_STEP = 16
Row = dict[str, list[int]]  # {"prompt": ids, "target": ids}


def read_workload(path: Path, rows: int | None = None) -> dict[str, Any]:
    """The workload at `path`, cut to its first `rows` rows.

    Raises:
        SystemExit: It has fewer.
    """
    workload = json.loads(path.read_text(encoding="utf-8"))
    if rows is not None:
        if len(workload["rows"]) < rows:
            raise SystemExit(f"{path} has {len(workload['rows'])} rows, {rows} are needed: write it with more --steps")
        workload["rows"] = workload["rows"][:rows]
    return workload


def tokens_per_step(rows: list[Row]) -> list[int]:
    """Real tokens of each step, without padding."""
    sizes = [len(row["prompt"]) + len(row["target"]) for row in rows]
    return [sum(sizes[i : i + ROWS_PER_STEP]) for i in range(0, len(sizes), ROWS_PER_STEP)]


def resident() -> int:
    """Bytes of this process in memory now."""
    return psutil.Process().memory_info().rss


def restart_peak() -> None:
    """Forget the peak so far (Linux; elsewhere it stays): loading a model may need more than training it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak() -> int:
    """Most bytes of this process in memory since the start, or since `restart_peak`."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions(*packages: str) -> dict[str, str]:
    """Versions of what a result depends on."""
    names = ("torch", "transformers", "peft", *packages)
    threads = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    return threads | {name: importlib.metadata.version(name) for name in names}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result and say in one line what it is."""
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    seconds = result["seconds"]
    if isinstance(seconds, list):
        timed = seconds[result.get("warm", 0) :] or seconds
        seconds = sum(timed) / len(timed)
    losses = result["loss"] if isinstance(result["loss"], list) else [result["loss"]]
    print(
        f"{path}: {seconds:.2f} s, loss {losses[0]:.5f} -> {losses[-1]:.5f}, "
        f"peak {result['peak_rss_bytes'] / 2**20:,.0f} MiB"
    )

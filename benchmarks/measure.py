"""What the benchmark scripts share: reading a workload, memory, versions, and the file that each of them writes.

    python measure.py OUT.json

measures the machine itself: how many multiplications of matrices it does at most, which is the limit of all the rest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import psutil
import torch

ROWS_PER_STEP = 16  # unless a script is told otherwise
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


def tokens_per_step(rows: list[Row], rows_per_step: int) -> list[int]:
    """Real tokens of each step, without padding."""
    sizes = [len(row["prompt"]) + len(row["target"]) for row in rows]
    return [sum(sizes[i : i + rows_per_step]) for i in range(0, len(sizes), rows_per_step)]


def synchronise() -> None:
    """Wait for the GPU, where there is one: it works on after the call that gave it the work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def resident() -> int:
    """Bytes of this process in memory now."""
    return psutil.Process().memory_info().rss


def restart_peak() -> None:
    """Forget the peak so far (Linux; elsewhere it stays): loading a model may need more than training it does."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak() -> int:
    """Most bytes of this process in memory since the start, or since `restart_peak`."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gpu_peak() -> int | None:
    """The same of the GPU's memory that tensors had, None without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


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


# rows × inner × columns: one that any library does well, and those of SmolLM2-135M for a forward pass of 1,024 tokens
MATMULS = ((2048, 2048, 2048), (1024, 576, 576), (1024, 576, 1536), (1024, 1536, 576))


def matmul_gflops(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", seconds: float = 2.0) -> float:
    """The most GFLOP/s of one product, of as many tries as fit `seconds` (at least two)."""
    m, k, n = shape
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    best, began, tries = float("inf"), time.perf_counter(), 0
    calls = 20 if device != "cpu" else 1  # a GPU is waited for once for many
    while tries < 2 or time.perf_counter() - began < seconds:
        synchronise()
        start = time.perf_counter()
        for _ in range(calls):
            a @ b
        synchronise()
        best, tries = min(best, (time.perf_counter() - start) / calls), tries + 1
    return 2 * m * k * n / best / 1e9


def machine() -> dict[str, Any]:
    """What the measurements ran on."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def main() -> None:
    """Measure the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    peaks = {
        name: {"x".join(map(str, shape)): matmul_gflops(shape, dtype) for shape in MATMULS}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    args.out.write_text(json.dumps({"machine": machine(), "gflops": peaks, "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()

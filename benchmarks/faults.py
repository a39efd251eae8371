"""Writes docs/benchmarks/faults.md: the fault matrix as its tests find it, and what a hundred kills leave of a run.

make faults                                # both, about half an hour on two cores
make faults ARGS="--kills 12 --no-matrix"  # a short one
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/benchmarks/faults.md"
FIGURES = ROOT / "docs/benchmarks/faults.json"
TITLE = "# Interruptions and bad input\n\nWritten by `make faults`; docs/reliability.md says what it means."
NAMES = ("test_bad_input.py", "test_faults.py", "test_two_processes.py")
FILES = [*(f"tests/integration/{name}" for name in NAMES), "tests/unit/training/test_checkpoints.py"]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["TMPDIR"] = "/dev/shm"  # another file system than that of the runs; read when the first of them starts

from conftest import byte_tokenizer, tiny_model  # noqa: E402
from interrupting import FIT, adapter, result, signalled, start, steps, write_task  # noqa: E402


def quantile(values: list[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def matrix() -> list[dict[str, str]]:
    """Each case that a test claims, and what became of its tests."""
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as folder:
        report = Path(folder, "report.xml")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "loadfile", f"--junitxml={report}", *FILES],
            cwd=ROOT,
            check=False,
        )
        by_case: dict[tuple[str, str], list[str]] = defaultdict(list)
        for test in ET.parse(report).iter("testcase"):
            kinds = {child.tag for child in test}
            state = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            names = [p.attrib for p in test.iter("property")]
            cases = [p["value"] for p in names if p["name"] == "case"]
            titles = [p["value"] for p in names if p["name"] == "title"]
            for case, title in zip(cases, titles, strict=True):
                by_case[case, title].append(state)
    rows = [{"case": case, "title": title, **Counter(states)} for (case, title), states in by_case.items()]
    return sorted(rows, key=lambda row: (int(row["case"].split()[0].split("-")[0].split(",")[0]), row["title"]))


class Kills:
    """Runs of the small task that are interrupted at random moments until so many interruptions have been made."""

    def __init__(self, folder: Path, base: str, number: int, extra: tuple[str, ...], seed: int) -> None:
        self.folder, self.base, self.number, self.rng = folder, base, number, random.Random(seed)
        self.args = (*FIT, *extra, "--trainer.callbacks+=interrupting.Progress")
        self.stops: list[float] = []
        self.lost: list[int] = []
        self.equal = self.runs = self.interrupted = 0
        whole = self._new("warm")  # the first process of all waits for the imports
        assert signalled(start(whole, *self.args, every=0.2)) == 0, (whole / "output.log").read_text()
        whole = self._new("whole")
        began = time.monotonic()
        assert signalled(start(whole, *self.args, every=0.2)) == 0, (whole / "output.log").read_text()
        self.seconds, self.expected = time.monotonic() - began, (adapter(whole), result(whole))

    def _new(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        write_task(folder, self.base)
        return folder

    def make(self, count: int) -> None:
        """Interrupt until there are so many interruptions, and let the last run come to its end."""
        while self.interrupted < count:
            self.runs += 1
            folder = self._new(f"{self.number}-{self.runs}")
            while True:
                more = self.interrupted < count
                process = start(folder, *self.args, "--resume", every=0.2)
                process.join(self.rng.uniform(0.1, 0.8 * self.seconds) if more else None)
                if process.is_alive():
                    done, began = _done(folder), time.monotonic()
                    os.kill(process.pid, self.number)
                    process.join(120)
                    self.stops.append(time.monotonic() - began)
                    self.interrupted += process.exitcode != 0
                    saved = steps(folder)
                    self.lost.append(max(done - (saved[-1] if saved else 0), 0))
                    assert process.exitcode in (0, -self.number, 128 + self.number), (folder / "output.log").read_text()
                if process.exitcode == 0:
                    break
            self.equal += (adapter(folder), result(folder)) == self.expected
            print(
                f"{signal.Signals(self.number).name}: {self.interrupted} of {count}; "
                f"{self.equal} of {self.runs} runs equal",
                flush=True,
            )

    def figures(self) -> dict[str, float]:
        """What to write down."""
        return {
            "interruptions": self.interrupted,
            "runs": self.runs,
            "equal": self.equal,
            "seconds to the end, median": statistics.median(self.stops),
            "seconds to the end, P95": quantile(self.stops, 0.95),
            "steps lost, median": statistics.median(self.lost),
            "steps lost, most": max(self.lost),
        }


def _done(folder: Path) -> int:
    try:
        return int((folder / "step.0").read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0


def foreign_temporary_folder(folder: Path, base: str, count: int) -> dict[str, int]:
    """Kill runs that save at every step while TMPDIR lies on another file system: files that are there and damaged."""
    from formtune.errors import UserError
    from formtune.training import checkpoint

    rng, damaged, looked = random.Random(0), 0, 0
    write_task(folder, base)
    for _ in range(count):
        process = start(folder, *FIT, "--trainer.max_epochs", "40", "--resume", every=0.0)
        process.join(rng.uniform(3, 9))
        process.kill()
        process.join()
        for path in checkpoint.steps(folder / "logs/small/one/checkpoints").values():
            looked += 1
            try:
                checkpoint.read(path)
            except UserError:
                damaged += 1
    return {"kills": count, "files": looked, "damaged": damaged}


def checkpoint_cost(folder: Path) -> dict[str, float]:
    """Bytes and milliseconds of a checkpoint of the demo's adapter (rank 16) with Adam's moments."""
    import torch
    from transformers import AutoModelForCausalLM

    from formtune.model.lora import Lora, add_lora
    from formtune.training.checkpoint import CheckpointFiles, read

    model = add_lora(AutoModelForCausalLM.from_pretrained(ROOT / "src/formtune/demo/base"), Lora())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"state_dict": trained, "optimizer_states": [optimizer.state_dict()]}
    path, times, checks = folder / "step-1.ckpt", [], []
    for _ in range(20):
        began = time.perf_counter()
        CheckpointFiles().save_checkpoint(state, path)
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
        read(path)
        checks.append(time.perf_counter() - began)
    return {
        "bytes": path.stat().st_size,
        "write, ms": 1e3 * statistics.median(times),
        "check, ms": 1e3 * statistics.median(checks),
    }


def page(figures: dict) -> str:
    """The part of the page that is written by this script."""
    lines = [TITLE, "", f"On {figures['machine']}, {figures['date']}.", ""]
    kills = figures["kills"]
    lines += ["| | " + " | ".join(kills) + " |", "|---|" + "---|" * len(kills)]
    for name in next(iter(kills.values())):
        lines.append(f"| {name} | " + " | ".join(f"{one[name]:.3g}" for one in kills.values()) + " |")
    foreign, cost = figures["foreign"], figures["checkpoint"]
    lines += [
        "",
        f"TMPDIR on another file system, a checkpoint after every step, {foreign['kills']} kills: "
        f"{foreign['damaged']} of {foreign['files']} checkpoints found damaged.",
        "",
        f"A checkpoint of the demo (rank 16, with Adam's moments): {cost['bytes']:,} bytes, written in "
        f"{cost['write, ms']:.1f} ms (fsync included), checked in {cost['check, ms']:.1f} ms.",
        "",
        "| case | what | tests | result |",
        "|---|---|---|---|",
    ]
    for row in figures["matrix"]:
        count = sum(row.get(state, 0) for state in ("passed", "failed", "skipped"))
        words = ", ".join(f"{row[s]} {s}" if count > 1 else s for s in ("passed", "failed", "skipped") if row.get(s))
        lines.append(f"| {row['case']} | {row['title']} | {count} | {words} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs (default: %(default)s)")
    parser.add_argument("--no-matrix", action="store_true", help="Leave the tests of the matrix out")
    options = parser.parse_args()
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"matrix": []}
    figures |= {"machine": f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}"}
    figures |= {"date": time.strftime("%Y-%m-%d"), "kills": {}}
    (ROOT / ".cache").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as name:
        folder = Path(name)
        base = folder / "base"
        tiny_model().save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        for number, share in ((signal.SIGKILL, 1.0), (signal.SIGTERM, 0.3), (signal.SIGINT, 0.3)):
            place = folder / signal.Signals(number).name
            place.mkdir()
            kills = Kills(place, str(base), number, ("--trainer.max_epochs", "24"), seed=1)
            kills.make(max(int(share * options.kills), 1))
            figures["kills"][signal.Signals(number).name] = kills.figures()
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        (folder / "foreign").mkdir()
        figures["foreign"] = foreign_temporary_folder(folder / "foreign", str(base), max(options.kills * 12 // 100, 1))
        figures["checkpoint"] = checkpoint_cost(folder)
    if not options.no_matrix:
        figures["matrix"] = matrix()
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    PAGE.write_text(page(figures))
    equal = all(one["equal"] == one["runs"] for one in figures["kills"].values()) and not figures["foreign"]["damaged"]
    failed = [row["case"] for row in figures["matrix"] if row.get("failed")]
    print(f"{PAGE.relative_to(ROOT)}: {'all runs equal' if equal else 'RUNS DIFFER'}; failed cases: {failed or 'none'}")
    raise SystemExit(not equal or bool(failed))


if __name__ == "__main__":
    main()

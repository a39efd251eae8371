"""Run all benchmarks, one process after another, and write docs/benchmarks: the command behind `make bench`.

    python run.py                          all parts; what docs/benchmarks/results.json has already is kept
    python run.py --only validate growth   these parts again, from the start
    python run.py --fresh                  forget all results
    python run.py --quick                  the tiniest model for two steps each, to see that everything runs

Each measurement is a process of its own, so that peak memory is each tool's own and nothing is warm from another.
What is compared is interleaved (A B C, A B C), so that a machine that slows down slows all of them. results.json is
written after each measurement: an interrupted run goes on where it stopped. A measurement that fails or takes too long
is recorded with its reason and does not stop the others.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 600  # seconds of one measurement, loading included
ROUNDS = 2
WORKLOADS = ("shared", "plain", "mixed")
BUDGETS = (512, 1024, 2048, 4096)
PREFIXES = (0, 128, 512, 2048)
STEP_ROWS = (4, 16, 64)
SIZES = ("5M", "30M", "135M", "360M")


@dataclass(frozen=True)
class Tool:
    """How a tool is run: its script and options, how many steps (`warm` at the start do not count), how many times."""

    script: str
    options: tuple[str, ...]
    steps: int
    warm: int
    rounds: int = ROUNDS


# The slow ones are timed on fewer steps; ratios use the steps that both tools timed, so they are of the very same rows.
TOOLS = {
    "formtune": Tool("train_formtune.py", (), 4, 1),
    "trl-targets": Tool("train_trl.py", ("--head", "targets", "--micro", "4"), 3, 1),
    "trl": Tool("train_trl.py", ("--head", "all", "--micro", "4"), 2, 1, rounds=1),
    "litgpt": Tool("train_litgpt.py", ("--micro", "4"), 2, 1, rounds=1),
}
UNSHARED = Tool("train_formtune.py", ("--share", "nothing"), 3, 1)
GROWTH = Tool("train_formtune.py", (), 3, 1)


@dataclass(frozen=True)
class Measurement:
    """One process: `command` gets the name of its OUT file where OUT stands."""

    part: str
    tool: str
    about: dict[str, Any]
    command: list[str] = field(repr=False)

    @property
    def key(self) -> str:
        return "-".join([self.part, self.tool, *(f"{name}-{value}" for name, value in self.about.items())])


class Bench:
    """The measurements and what they need.

    Args:
        work: Folder for models, workloads, the demo's run and the logs; what is there is used again.
        quick: Two steps of the tiniest model.
    """

    def __init__(self, work: Path, quick: bool) -> None:
        self.work, self.quick = work, quick
        self.rounds = 1 if quick else ROUNDS

    def measurements(self) -> Iterator[Measurement]:
        """All of them, in the order in which they run."""
        yield Measurement("peak", "machine", {}, [str(HERE / "measure.py"), "OUT"])
        for adapter in ("none", "tuned"):
            for number in range(1, self.rounds + 1):
                yield self._validate("formtune", "validate_formtune.py", adapter, number, "--tokens", "2048")
                for batch in ("32", "64"):
                    name = f"generate-{batch}"
                    yield self._validate(name, "validate_generate.py", adapter, number, "--batch", batch)
        for number in range(1, self.rounds + 1):
            yield self._validate_large("formtune", "validate_formtune.py", number)
            yield self._validate_large("generate-16", "validate_generate.py", number, "--batch", "16")
        for workload in WORKLOADS:
            for number in range(1, self.rounds + 1):
                for name, tool in TOOLS.items():
                    about = {"workload": workload, "dropout": 0.0, "round": number}
                    if number <= tool.rounds:
                        yield self._train("train", name, tool, "135M", about)
        for name in ("formtune", "trl-targets"):
            about = {"workload": "shared", "dropout": 0.05, "round": 1}
            yield self._train("train", name, TOOLS[name], "135M", about, "--dropout", "0.05")
        for number in range(1, self.rounds + 1):
            for name, tool in (("formtune", TOOLS["formtune"]), ("unshared", UNSHARED)):
                yield self._train("lossless", name, tool, "135M", {"workload": "shared", "round": number})
        for budget in BUDGETS:
            about = {"workload": "mixed", "budget": budget}
            yield self._train("memory", "formtune", GROWTH, "135M", about, "--tokens", str(budget))
        grown = [("prefix", prefix, "30M", prefix, 16) for prefix in PREFIXES]
        grown += [("rows", rows, "30M", 512, rows) for rows in STEP_ROWS]
        grown += [("size", size, size, 285, 16) for size in SIZES]
        for what, value, size, prefix, rows in grown:
            about = {"grows": what, "to": value, "workload": f"growth-{prefix}"}
            yield self._train("growth", "formtune", GROWTH, size, about, "--rows-per-step", str(rows))

    def _train(self, part: str, name: str, tool: Tool, size: str, about: dict[str, Any], *more: str) -> Measurement:
        steps, size = (2, "5M") if self.quick else (tool.steps, size)
        files = [str(self.work / "models" / size), str(self.work / "workloads" / f"{about['workload']}.json"), "OUT"]
        # Losses of runs of different length can only be compared without a schedule that depends on the length.
        counted = ["--steps", str(steps), "--warm", str(tool.warm), "--constant"]
        return Measurement(
            part, name, {**about, "model": size}, [str(HERE / tool.script), *files, *tool.options, *counted, *more]
        )

    def _validate(self, name: str, script: str, adapter: str, number: int, *more: str) -> Measurement:
        folder = "none" if adapter == "none" else str(self.adapter)
        files = [str(ROOT / "src/formtune/demo/base"), str(self.work / "workloads/demo.json"), "OUT"]
        few = ["--limit", "24"] if self.quick else []
        options = ["--adapter", folder, "--max-new", "256", *more, *few]
        return Measurement(
            "validate", name, {"adapter": adapter, "round": number}, [str(HERE / script), *files, *options]
        )

    def _validate_large(self, name: str, script: str, number: int, *more: str) -> Measurement:
        """On a model of some size, with long prompts that begin alike, and whose every answer is right."""
        size = "5M" if self.quick else "135M"
        files = [str(self.work / "models" / size), str(self.answers), "OUT"]
        about = {"adapter": f"{size}, predicts its targets", "round": number}
        return Measurement("validate", name, about, [str(HERE / script), *files, "--max-new", "33", *more])

    @property
    def answers(self) -> Path:
        return self.work / "workloads/answers.json"

    @property
    def adapter(self) -> Path:
        return self.work / "logs/demo/bench/adapter"

    def prepare(self, missing: list[Measurement]) -> None:
        """Make what the wanted measurements need and is not there."""
        words = [word for one in missing for word in one.command]
        for size in SIZES:
            folder = self.work / "models" / size
            if str(folder) in words and not (folder / "tokenizer.json").is_file():
                self._must(str(HERE / "make_model.py"), size, str(folder))
        rows = self.work / "workloads"
        if any(str(rows) in word for word in words) and not (rows / "demo.json").is_file():
            self._must(str(HERE / "workloads.py"), str(rows), "--steps", "12")
        if str(self.answers) in words and not self.answers.is_file():
            size = "5M" if self.quick else "135M"
            files = [str(self.work / "models" / size), str(rows / "shared.json"), str(self.work / "answers.out")]
            options = ["--limit", "128", "--batch", "16", "--max-new", "33", "--answers", str(self.answers)]
            self._must(str(HERE / "validate_generate.py"), *files, *options)
        if str(self.adapter) in words and not self.adapter.is_dir():
            self._tune()

    def _tune(self) -> None:
        """The demo's run: its adapter is what validation is timed with."""
        data = self.work / "data/demo"
        shutil.rmtree(self.adapter.parent, ignore_errors=True)  # of an interrupted run
        self._must(str(ROOT / "tools/demo_rows.py"), str(data))
        base, schema = ROOT / "src/formtune/demo/base", ROOT / "src/formtune/demo/ticket.schema.json"
        command = ["-m", "formtune", "fit", "-c", str(ROOT / "configs/demo.yaml"), "--run", "bench"]
        command += ["--model.base", str(base), "--data.format.init_args.schema", str(schema)]
        command += [
            word for name in ("train", "validation", "test") for word in (f"--data.{name}", f"{data}/{name}.jsonl")
        ]
        if self.quick:
            command += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
        self._must(*command)

    def _must(self, *command: str) -> None:
        print("prepare:", " ".join(Path(word).name for word in command[:3]), flush=True)
        reason = self.process(list(command), self.work / "prepare.log", limit=None)
        if reason:
            raise SystemExit(f"{reason} (see {self.work / 'prepare.log'})")

    def process(self, command: list[str], log: Path, limit: int | None) -> str | None:
        """Run a Python process in the work folder; the reason if it did not end well."""
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w", encoding="utf-8") as file:
            try:
                ended = subprocess.run(
                    [sys.executable, *command],
                    cwd=self.work,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                )
            except subprocess.TimeoutExpired:
                return f"took longer than {limit} seconds"
        if ended.returncode == 0:
            return None
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        return f"exit code {ended.returncode}: {([line for line in lines if line] or ['no output'])[-1][:200]}"

    def measure(self, one: Measurement) -> dict[str, Any]:
        """Run one measurement and return its record."""
        out, log = (self.work / "out" / f"{one.key}.{end}" for end in ("json", "log"))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        command = [str(out) if word == "OUT" else word for word in one.command]
        date, began, busy, own = time.strftime("%Y-%m-%d %H:%M"), time.monotonic(), _busy(), _own()
        failed = self.process(command, log, LIMIT)
        elapsed = time.monotonic() - began
        record: dict[str, Any] = {"part": one.part, "tool": one.tool, **one.about, "date": date}
        record["elapsed"] = round(elapsed, 1)
        # Processor time that went to anything else, in cores: timings are worth little where this is not near zero.
        record["others_cores"] = round(max(0.0, _busy() - busy - (_own() - own)) / elapsed, 2)
        if failed:
            return record | {"failed": failed.replace(str(ROOT), "").replace(str(self.work), "")}
        result = json.loads(out.read_text(encoding="utf-8"))
        if "answers" in result:  # only whether they are equal is of interest later
            result["answers"] = [zlib.crc32(json.dumps(answer).encode()) for answer in result["answers"]]
        settings = result.get("settings", {})  # without this machine's folders
        settings.update({name: Path(value).name for name, value in settings.items() if value.startswith("/")})
        return record | {"result": result}


def _busy() -> float:
    """Seconds that all processors have worked."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _own() -> float:
    """Seconds that this process and those it started have used."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in used)


def save(results: dict[str, Any], path: Path) -> None:
    """Write the results, a line for each measurement; an interrupted write leaves the old file."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in results["measurements"].items())
    partial = path.with_suffix(".part")
    partial.write_text(
        f'{{"quick": {json.dumps(results["quick"])}, "measurements": {{\n{lines}\n}}}}\n', encoding="utf-8"
    )
    partial.replace(path)


def main() -> None:
    """Measure what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("peak", "train", "lossless", "validate", "memory", "growth")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache/bench", help="models, workloads, logs")
    parser.add_argument("--out", type=Path, help="folder of the report (default: docs/benchmarks)")
    parser.add_argument("--only", nargs="+", choices=parts, help="run these parts again and no others")
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    parser.add_argument("--quick", action="store_true", help="the tiniest model, two steps: nothing but a test of this")
    args = parser.parse_args()
    work = args.work.resolve() / "quick" if args.quick else args.work.resolve()
    out = (args.out or (work / "report" if args.quick else ROOT / "docs/benchmarks")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    lock = (work / "lock").open("w")  # open, and so held, until the end
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # both would be slower, and each would overwrite what the other has found
        parser.error(f"another run measures in {work}")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not args.fresh else {}
    if results.get("quick", args.quick) != args.quick:
        parser.error(f"{path} is of another kind of run; --fresh starts over")
    results["quick"] = args.quick
    records: dict[str, Any] = results.setdefault("measurements", {})

    bench = Bench(work, args.quick)
    planned = [one for one in bench.measurements() if not args.only or one.part in args.only]
    for key in [key for key, record in records.items() if record["part"] in (args.only or ())]:
        del records[key]
    missing = [one for one in planned if one.key not in records]
    bench.prepare(missing)
    began = time.monotonic()
    try:
        for number, one in enumerate(missing, 1):
            record = records[one.key] = bench.measure(one)
            save(results, path)
            minutes, seconds = divmod(round(time.monotonic() - began), 60)
            success = "{elapsed:.0f} s, {others_cores} cores busy with others"
            outcome = record.get("failed") or success.format(**record)
            print(f"[{number}/{len(missing)} {minutes}:{seconds:02d}] {one.key}: {outcome}", flush=True)
    finally:
        if records:
            report.write(results, out)
            print(f"{out / 'README.md'}")


if __name__ == "__main__":
    main()

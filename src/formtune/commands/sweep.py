"""`formtune sweep`: one `formtune fit` for each point and seed, what they measured, and the point to take."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from formtune.base.renderer import today
from formtune.commands import COMMANDS
from formtune.commands.lightning import run as fit
from formtune.configuration.parsing import CommandParser
from formtune.configuration.yaml_file import config_paths
from formtune.errors import UserError
from formtune.files import LOGS, write_json, write_whole
from formtune.sweep import grid
from formtune.sweep.choice import METRICS, Estimate, findings
from formtune.sweep.grid import Point
from formtune.sweep.runs import Job, devices, run_all
from formtune.training.run_folder import RunFolder

HELP = """\
All other words are passed to `formtune fit`, -c TASK.yaml first of all.

A point is one value for each key, and is trained once with each seed. The sweep takes the point with the fewest
trainable parameters within one standard error of the best format/exact and, among those that are, of the best field F1.
All of it is measured on the validation rows: the choice never sees the test rows, so their figures stay honest.

Runs are in logs/<task>/<sweep>/, with the configuration taken in config.yaml and all figures in sweep.json. The same
command again keeps the finished runs and resumes the others, also with more values or seeds. With several GPUs, each
takes one run at a time.

examples:
  formtune sweep -c configs/demo.yaml
  formtune sweep -c configs/demo.yaml --over model.lora.r=8,16 --over model.optimizer.lr=1e-4,2e-4 --seeds 0,1
  formtune sweep -c configs/demo.yaml --over 'model.lora.targets=attention,all-linear' --trainer.max_epochs 1
  formtune fit -c logs/demo/SWEEP/config.yaml
"""
RESERVED = {  # keys of `fit` that the sweep sets
    "run": "a sweep names its runs; name the sweep itself with --name",
    "resume": "a sweep always resumes what was interrupted",
    "seed_everything": "name the seeds with --seeds",
    "print_config": "a sweep prints none; formtune fit does",
}
FOLLOWED_BY_DATA = ("data.", "model.base", "model.max_new_tokens")
Results = dict[tuple[int, int], dict[str, Any]]  # `metrics.json` by index of the point and seed


def run(command: str, args: list[str]) -> int:
    """Train what is not yet trained, choose, print and write; 1 if a run failed."""
    usage = "%(prog)s -c TASK.yaml [--over KEY=VALUES ...] [--seeds SEEDS] [--key value ...]"
    parser = CommandParser(command, COMMANDS[command].description, usage, HELP)
    parser.add_argument("--over", action="append", metavar="KEY=VALUES", help="A key of the task and the values to "
                        f"try; several make all combinations (default: {grid.RANKS})")  # fmt: skip
    # With fewer, a better rank cannot be told from a luckier seed.
    parser.add_argument("--seeds", default="0,1,2", help="Seeds that each point is trained with (default: %(default)s)")
    parser.add_argument("--name", help="Name of the sweep's folder (default: made from the keys and the task)")
    options, words = parser.parse_known_args(args)
    points, seeds = grid.points(options.over or [grid.RANKS]), grid.seeds(options.seeds)
    _check_words(words, points)
    plain = _configuration(words)
    settings = yaml.safe_load(plain)
    task = settings.get("task") or Path([*config_paths(words), "task"][0]).stem
    words += ["--task", task]
    configurations: dict[str, str] = {}
    for point in points:
        text = _configuration([*words, *point.words])
        if same := next((other for other, known in configurations.items() if known == text), None):
            raise UserError(f"--over: {same} and {point.name} are the same configuration")
        configurations[point.name] = text
    keys = list(points[0].values)
    identity = hashlib.sha256("\n".join([plain, *keys]).encode()).hexdigest()
    name = options.name or f"sweep-{'-'.join(key.rpartition('.')[2] for key in keys)}-{identity[:8]}"
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"--name {name}: expected letters, digits and . + - _")
    folder = LOGS / task / name
    own_date = (settings.get("data") or {}).get("date")
    dated = [] if own_date else [f"--data.date={_first_day(folder)}"]  # all runs see the same rows, on whatever day
    jobs = []
    for seed in seeds:  # all points once before any of them twice: an unfinished sweep shows the most
        for at, point in enumerate(points):
            run_name = f"{point.name}-seed{seed}"
            seeded = [f"--seed_everything={seed}", f"--run={name}/{run_name}", "--resume"]
            jobs.append(Job((at, seed), folder / run_name, [*words, *dated, *point.words, *seeded]))
    with _owned(folder, identity):
        results, failed = _results(jobs, points, devices(settings.get("trainer") or {}), folder)
        over = {key: list(dict.fromkeys(point.values[key] for point in points)) for key in keys}
        found = findings(points, seeds, results)
        (folder / "config.yaml").unlink(missing_ok=True)
        if found["taken"] is not None:
            write_whole(folder / "config.yaml", configurations[found["taken"]])
        found = {"name": name, "over": over, "seeds": seeds, "failed": failed} | found
        write_json(folder / "sweep.json", found)
    print_sweep(found, folder)
    return int(bool(failed))


def print_sweep(found: dict[str, Any], folder: Path) -> None:
    """The table, which point is taken and why, and the files."""
    table = Table("point", title="Sweep (the choice never sees the test rows)", title_justify="left")
    columns = ("trainable\nparameters", "format/exact\nvalidation", "field F1\nvalidation", "test\nexact", "test\nF1")
    for column in (*columns, "seconds"):
        table.add_column(column, justify="right", no_wrap=True, style="dim" if "test" in column else None)
    for point in found["points"]:
        seeds, cells = len(point["runs"]), [""] * 6
        lacking = f" ({seeds} of {len(found['seeds'])} seeds)" if seeds < len(found["seeds"]) else ""
        if seeds:
            validation = [str(Estimate(**point["validation"][name])) for name in METRICS]
            test = [f"{point['test'][name]['mean']:.1%}" for name in METRICS]
            cells = [f"{point['trainable_parameters']:,}", *validation, *test, f"{point['seconds']:,.0f}"]
        table.add_row(
            escape(point["name"]) + lacking, *cells, style="bold" if point["name"] == found["taken"] else None
        )
    console = Console()
    console.print(table)
    console.print(escape(found["reason"]), highlight=False, soft_wrap=True)
    for what, name in {"configuration": "config.yaml", "figures": "sweep.json"}.items():
        if (folder / name).exists():
            console.print(f"{what:>14}: {folder / name}", highlight=False, soft_wrap=True)


def _check_words(words: Sequence[str], points: Sequence[Point]) -> None:
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    for key, remedy in RESERVED.items():
        if key in given or key in points[0].values:
            raise UserError(f"{key}: {remedy}")
    if twice := given & points[0].values.keys():
        raise UserError(f"{twice.pop()}: the sweep sets its values; name them in --over alone")


def _configuration(words: Sequence[str]) -> str:
    """What `formtune fit` makes of these words, as YAML without defaults; its own message if it refuses them."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        fit("fit", [*words, "--print_config=skip_default"])
    return out.getvalue()


def _first_day(folder: Path) -> str:
    """The day that the sweep's runs write where a chat template writes the date: that of the first one."""
    dates = (RunFolder(path.parent).date for path in sorted(folder.glob("*/config.yaml")))
    return next(filter(None, dates), today())


@contextlib.contextmanager
def _owned(folder: Path, identity: str) -> Iterator[None]:
    """The folder, locked; refused if it holds something else. A run locks its own folder, and may outlive a kill."""
    mark = folder / ".sweep"
    if folder.exists() and not mark.exists():
        raise UserError(f"--name: {folder} is not a sweep's folder; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        write_whole(mark, identity)
    try:
        with FileLock(folder / ".lock", timeout=0):
            if mark.read_text(encoding="utf-8") != identity:
                raise UserError(f"--name: {folder} holds a sweep of another task or other keys; choose another name")
            yield
    except Timeout:
        raise UserError(f"{folder}: this sweep is already running") from None


def _results(
    jobs: Sequence[Job], points: Sequence[Point], on: Sequence[str | None], folder: Path
) -> tuple[Results, list[str]]:
    """Run what is not finished: all results, and a line for each run that failed."""
    results = {job.at: result for job in jobs if (result := _finished(job)) is not None}
    failed: list[str] = []
    print(f"{len(jobs)} runs in {folder}, {len(results)} of them already finished", flush=True)
    _check_rows(results, points, folder)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # and not where `nohup` has it ignored
            signal.signal(number, signal.default_int_handler)  # so that no run outlives its sweep
    with contextlib.closing(run_all([job for job in jobs if job.at not in results], on)) as ended:
        for job, code in ended:
            result = _finished(job)
            if result is None:
                message = _message(job, code)
                if code == 2 and not results and not failed and not (job.folder / "outcomes").exists():
                    raise UserError(message)  # on the rows or the base: the other runs would say the same
                failed.append(f"{job.folder.name} failed: {message} (see {job.log})")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            results[job.at] = result
            _check_rows(results, points, folder)
            best = result["training"]["best"]
            figures = f"format/exact {best['exact'] / best['rows']:.1%}, field F1 {best['field_f1']:.1%}"
            print(f"{job.folder.name}: {figures} on validation, {result['training']['seconds']:.0f} s "
                  f"({len(results) + len(failed)}/{len(jobs)})", flush=True)  # fmt: skip
    return results, failed


def _finished(job: Job) -> dict[str, Any] | None:
    try:
        return json.loads((job.folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or cut off while it was written
        return None


def _message(job: Job, code: int) -> str:
    """Why a run ended, in one line."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("formtune: error: ") if code and last else f"no metrics.json, exit code {code}"


def _check_rows(results: Results, points: Sequence[Point], folder: Path) -> None:
    """Refuse to compare runs that saw other rows, such as those from before a file was changed."""
    seen: dict[tuple[str, ...], set[str | None]] = {}
    for (at, _), result in results.items():
        values = tuple(value for key, value in points[at].values.items() if key.startswith(FOLLOWED_BY_DATA))
        seen.setdefault(values, set()).add(result["data"])
    judged = {result["training"]["best"]["rows"] for result in results.values()}
    if len(judged) > 1 or any(len(keys) > 1 for keys in seen.values()):
        raise UserError(f"{folder}: its runs did not see the same rows; begin another sweep with --name")

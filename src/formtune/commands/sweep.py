"""`formtune sweep`: one `formtune fit` for each point and seed, what they measured, and the point to take."""

from __future__ import annotations

import contextlib
import fcntl
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

from formtune.base.renderer import today
from formtune.commands import COMMANDS
from formtune.commands.lightning import run as fit
from formtune.configuration.parsing import CommandParser
from formtune.configuration.yaml_file import config_paths
from formtune.errors import UserError
from formtune.files import LOGS, write_whole
from formtune.sweep import grid
from formtune.sweep.grid import Point
from formtune.sweep.results import findings
from formtune.sweep.runs import Job, devices, run_all
from formtune.sweep.table import print_sweep, write_report
from formtune.training.run_folder import RunFolder

HELP = """\
Every other word is handed to `formtune fit` as it stands, -c TASK.yaml first of all.

A point is one value for each key, and is trained once with each seed. Taken is the point with the fewest trainable
parameters within one standard error of the best format/exact and, among those that are, of the best field F1. All of it
is measured on the validation rows: the test rows have no part in the choice, and the figures on them stay honest.

Runs stand in logs/<task>/<sweep>/, with what was taken in config.yaml, sweep.html and sweep.json. The same command
again keeps the finished runs and begins the others anew, and so does one with more values or seeds. Where there are
several GPUs, each takes one run at a time.

examples:
  formtune sweep -c configs/demo.yaml
  formtune sweep -c configs/demo.yaml --over model.lora.r=8,16 --over model.optimizer.lr=1e-4,2e-4 --seeds 0,1
  formtune sweep -c configs/demo.yaml --over 'model.lora.targets=attention,all-linear' --trainer.max_epochs 1
  formtune fit -c logs/demo/SWEEP/config.yaml
"""
RESERVED = {  # keys of `fit` that are not the user's here
    "run": "a sweep names its runs; name the sweep itself with --name",
    "resume": "a sweep always goes on with what was interrupted",
    "seed_everything": "name the seeds with --seeds",
    "print_config": "a sweep prints none; formtune fit does",
}
FOLLOWED_BY_DATA = ("data.", "model.base", "model.max_new_tokens")


def run(command: str, args: list[str]) -> int:
    """Train what is not yet trained, choose, print and write; 1 if a run failed.

    Args:
        command: Its name.
        args: The rest of the command line.

    Raises:
        UserError: A mistake in the grid or in a configuration, or one that every run would meet.
    """
    parser = CommandParser(
        command,
        COMMANDS[command].description,
        "%(prog)s -c TASK.yaml [--over KEY=VALUES ...] [--seeds SEEDS] [--key value ...]",
        HELP,
    )
    parser.add_argument("--over", action="append", metavar="KEY=VALUES", help="A key of the task and the values to "
                        f"try; several make all combinations (default: {grid.RANKS})")  # fmt: skip
    # With fewer there is no telling a better rank from a luckier seed; more cost as many times the training.
    parser.add_argument("--seeds", default="0,1,2", help="Seeds that each point is trained with (default: %(default)s)")
    parser.add_argument("--name", help="Name of the sweep's folder (default: made from the keys and the task)")
    options, words = parser.parse_known_args(args)
    points, seeds = grid.points(options.over or [grid.RANKS]), grid.seeds(options.seeds)
    _check_words(words, points)
    plain = _configuration(words)
    task = yaml.safe_load(plain).get("task") or (Path(([*config_paths(words), "task"])[0]).stem)
    words += ["--task", task]
    configurations = _configurations(words, points)
    keys = list(points[0].values)
    identity = hashlib.sha256("\n".join([plain, *keys]).encode()).hexdigest()
    name = options.name or f"sweep-{'-'.join(key.rpartition('.')[2] for key in keys)}-{identity[:8]}"
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"--name {name}: expected letters, digits and . + - _")
    folder = LOGS / task / name
    own_date = (yaml.safe_load(plain).get("data") or {}).get("date")
    dated = [] if own_date else [f"--data.date={_first_day(folder)}"]  # all runs see the same rows, on whatever day
    jobs = {
        (at, seed): _job(
            f"{point.name}-seed{seed}", folder, [*words, *dated, *point.words, f"--seed_everything={seed}"]
        )
        for seed in seeds  # all points once before any of them twice: an unfinished sweep shows the most
        for at, point in enumerate(points)
    }
    with _owned(folder, identity) as lock:
        trainer = yaml.safe_load(plain).get("trainer") or {}
        results, failed = _results(jobs, points, devices(trainer), lock, folder)
        found: dict[str, Any] = {"name": name, "over": _over(points), "seeds": seeds, "failed": failed}
        found |= findings(points, seeds, results)
        (folder / "config.yaml").unlink(missing_ok=True)
        if found["taken"] is not None:
            write_whole(folder / "config.yaml", configurations[found["taken"]])
        write_report(found, folder)
    print_sweep(found, folder)
    return int(bool(failed))


def _check_words(words: Sequence[str], points: Sequence[Point]) -> None:
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    for key, remedy in RESERVED.items():
        if key in given or key in points[0].values:
            raise UserError(f"{key}: {remedy}")
    if twice := given & points[0].values.keys():
        raise UserError(f"{twice.pop()}: the sweep gives it its values; name them in --over alone")


def _configuration(words: Sequence[str]) -> str:
    """What `formtune fit` makes of these words, defaults left out, as YAML; its own message where it refuses them."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        fit("fit", [*words, "--print_config=skip_default"])
    return out.getvalue()


def _configurations(words: Sequence[str], points: Sequence[Point]) -> dict[str, str]:
    """The configuration of each point by its name.

    Raises:
        UserError: `fit` refuses one of them, or two are the same.
    """
    found: dict[str, str] = {}
    for point in points:
        text = _configuration([*words, *point.words])
        if same := next((name for name, other in found.items() if other == text), None):
            raise UserError(f"--over: {same} and {point.name} are the same configuration")
        found[point.name] = text
    return found


def _first_day(folder: Path) -> str:
    """The day that the sweep's runs write where a chat template writes the date: that of the first one."""
    dates = (RunFolder(path.parent).date for path in sorted(folder.glob("*/config.yaml")))
    return next(filter(None, dates), today())


def _job(name: str, folder: Path, words: list[str]) -> Job:
    return Job(name, folder / name, [*words, f"--run={folder.name}/{name}", "--resume"])


@contextlib.contextmanager
def _owned(folder: Path, identity: str) -> Iterator[int]:
    """The folder, held by a file descriptor for as long as this process or one of its runs lives.

    Raises:
        UserError: The folder holds something else, or is held already.
    """
    mark = folder / ".sweep"
    if folder.exists() and not mark.exists():
        raise UserError(f"--name: {folder} is no sweep's folder; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    with mark.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: this sweep is running already") from None
        file.seek(0)
        before = file.read()
        if before not in ("", identity):
            raise UserError(f"--name: {folder} holds a sweep of another task or other keys; choose another name")
        if not before:
            file.write(identity)
            file.flush()
        yield file.fileno()


def _results(
    jobs: dict[tuple[int, int], Job], points: Sequence[Point], on: Sequence[str | None], lock: int, folder: Path
) -> tuple[dict[tuple[int, int], dict[str, Any]], list[str]]:
    """`metrics.json` of every run that is finished, by point and seed, and a line for every run that failed."""
    results = {at: result for at, job in jobs.items() if (result := _finished(job)) is not None}
    places = {job.name: at for at, job in jobs.items()}
    failed: list[str] = []
    waiting = [job for at, job in jobs.items() if at not in results]
    print(f"{len(jobs)} runs in {folder}, {len(results)} of them finished before", flush=True)

    def ended(job: Job, code: int) -> None:
        result = _finished(job)
        if result is not None:
            results[places[job.name]] = result
            _check_rows(results, points, folder)
            best = result["training"]["best"]
            figures = f"format/exact {best['exact'] / best['rows']:.1%}, field F1 {best['field_f1']:.1%}"
            print(f"{job.name}: {figures} on validation, {result['training']['seconds']:.0f} s "
                  f"({len(results) + len(failed)}/{len(jobs)})", flush=True)  # fmt: skip
            return
        message = _message(job, code)
        if code == 2 and not results and not failed and not (job.folder / "outcomes").exists():
            raise UserError(message)  # of the rows or the base: the other runs would say the same
        failed.append(f"{job.name} failed: {message} (see {job.log})")
        print(failed[-1], file=sys.stderr, flush=True)

    _check_rows(results, points, folder)
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is signal.SIG_DFL:  # and not where `nohup` has it ignored
            signal.signal(name, signal.default_int_handler)  # so that no run outlives its sweep
    run_all(waiting, on, lock, ended)
    return results, failed


def _finished(job: Job) -> dict[str, Any] | None:
    try:
        return json.loads((job.folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut off while it was written
        return None


def _message(job: Job, code: int) -> str:
    """Why a run ended, in one line."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix("formtune: error: ") if code and last else f"no metrics.json, exit code {code}"


def _check_rows(results: dict[tuple[int, int], dict[str, Any]], points: Sequence[Point], folder: Path) -> None:
    """Refuse to compare runs that saw other rows, such as those from before a file was changed."""
    seen: dict[tuple[str, ...], set[str | None]] = {}
    for (at, _), result in results.items():
        values = tuple(value for key, value in points[at].values.items() if key.startswith(FOLLOWED_BY_DATA))
        seen.setdefault(values, set()).add(result["data"])
    judged = {result["training"]["best"]["rows"] for result in results.values()}
    if len(judged) > 1 or any(len(keys) > 1 for keys in seen.values()):
        raise UserError(f"{folder}: its runs did not see the same rows; begin another sweep with --name")


def _over(points: Sequence[Point]) -> dict[str, list[str]]:
    return {key: list(dict.fromkeys(point.values[key] for point in points)) for key in points[0].values}

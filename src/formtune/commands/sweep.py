"""`formtune sweep`: one `formtune train` for each point and seed, their metrics, and the chosen point."""

import contextlib
import hashlib
import io
import itertools
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from formtune.base.renderer import today
from formtune.commands import COMMANDS
from formtune.commands.lightning import run as lightning
from formtune.configuration.terminal import echo
from formtune.configuration.yaml_file import config_paths
from formtune.errors import UserError
from formtune.files import LOGS, write_atomic, write_json
from formtune.pages.page import render
from formtune.sweep.points import METRICS, RANKS, choose, grid, result, summarize, train
from formtune.tasks.parsers import CommandParser
from formtune.training.run_folder import RunFolder

HELP = """\
All other arguments, such as -c TASK.yaml, are passed to `formtune train`. A point is one value for each key. Repeating
the command keeps finished runs and resumes the others, even with more values or seeds.
"""
RESERVED = {"run", "resume", "seed_everything", "print_config", "dry_run", "trainer.fast_dev_run"}
# Keys on which the encoded rows depend
CHANGES_ROWS = ("data.", "model.base", "model.chat_template", "model.max_new_tokens")


def run(command: str, args: list[str]) -> int:
    """Train what is not yet trained, choose, print and write; 1 if a run failed."""
    usage = "%(prog)s -c TASK.yaml [--over KEY=VALUES ...] [--seeds SEEDS] [--key value ...]"
    parser = CommandParser(command, COMMANDS[command].description, usage, HELP)
    parser.add_argument("--over", action="append", metavar="KEY=VALUES", help="A key of the task and the values to "
                        f"try; several make all combinations (default: {RANKS})")  # fmt: skip
    # With fewer seeds, a better rank cannot be told from a lucky seed.
    parser.add_argument("--seeds", default="0,1,2", help="Seeds for each point (default: %(default)s)")
    options, arguments = parser.parse_known_args(args)
    if not re.fullmatch(r"\d+(,\d+)*", options.seeds):
        raise UserError(f"--seeds {options.seeds}: expected integers from 0, as in --seeds 0,1,2")
    points, seeds = grid(options.over or [RANKS]), list(dict.fromkeys(map(int, options.seeds.split(","))))
    keys = next(iter(points.values())).keys()
    passed = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    for key in passed & keys | RESERVED & (passed | keys):
        reason = "not for a sweep" if key in RESERVED else "the sweep sets it"
        raise UserError(f"{key}: {reason}; --over names the values to try, --seeds the seeds")
    configuration = _configuration(arguments)
    settings = yaml.safe_load(configuration)
    task = settings.get("task") or Path(["task", *config_paths(arguments)][-1]).stem
    arguments += ["--task", task]
    words = {name: [f"--{key}={value}" for key, value in point.items()] for name, point in points.items()}
    # Of all points: a mistake must end the sweep before its first run.
    configurations = {name: _configuration([*arguments, *extra]) for name, extra in words.items()}
    digest = hashlib.sha256("\n".join([configuration, *keys]).encode()).hexdigest()[:8]
    folder = LOGS / task / f"sweep-{'-'.join(key.rpartition('.')[2] for key in keys)}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            if not (settings.get("data") or {}).get("date"):
                # Chat templates may write the date, and all runs must see the same rows.
                begun = (RunFolder(path.parent).date for path in folder.glob("*/config.yaml"))
                arguments.append(f"--data.date={next(filter(None, begun), today())}")
            # All points once before any of them twice: an interrupted sweep shows the most.
            runs = {folder / f"{name}-seed{seed}": [*arguments, *words[name], f"--seed_everything={seed}"]
                    for seed, name in itertools.product(seeds, points)}  # fmt: skip
            failed = _train(runs, folder, same_rows=not any(key.startswith(CHANGES_ROWS) for key in keys))
            results = {name: [result(folder / f"{name}-seed{seed}") for seed in seeds] for name in points}
            finished = {name: [one for one in all_seeds if one] for name, all_seeds in results.items()}
            measured = [summarize(name, ended) for name, ended in finished.items() if ended]
            # A point with a failed seed would be compared by its successful ones.
            complete = [point for point in measured if point.seeds == len(seeds)]
            chosen, why = choose(complete) if complete else (None, "Nothing chosen: no point has finished all seeds.")
            metrics = [asdict(point) for point in measured]
            summary = {"points": metrics, "chosen": chosen, "reason": why, "seeds": seeds, "failed": failed}
            # The configuration last: a folder that has one and no sweep.json is a run.
            (folder / "config.yaml").unlink(missing_ok=True)
            write_json(folder / "sweep.json", summary)
            write_atomic(folder / "report.html", render("sweep/report.html.jinja", sweep=summary, folder=folder))
            if chosen:
                write_atomic(folder / "config.yaml", configurations[chosen])
    except Timeout:
        raise UserError(f"{folder}: this sweep is already running") from None
    print("The choice uses validation rows only. Validation (test):")
    for point in measured:
        fractions = ", ".join(f"{metric} {point.validation[metric]} ({point.test[metric]:.1%})" for metric in METRICS)
        size = f"{point.seeds} of {len(seeds)} seeds, {point.trainable_parameters:,} trainable parameters"
        print(f"{point.name}: {fractions}, {size}")
    echo(why)
    print(f"report: {folder / 'report.html'}\nmetrics: {folder / 'sweep.json'}")
    remedy = (
        f"look at {folder}/*/output.log, then repeat the command" if failed else "sweep with more trainer.max_epochs"
    )
    print(f"next: {f'formtune train -c {folder}/config.yaml' if chosen else remedy}")
    return int(bool(failed))


def _configuration(arguments: Sequence[str]) -> str:
    """The configuration of `formtune train`, as YAML without defaults; a mistake raises its own error."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        lightning("train", [*arguments, "--print_config=skip_default"])
    return out.getvalue()


def _train(runs: Mapping[Path, list[str]], folder: Path, same_rows: bool) -> list[str]:
    """Train the unfinished runs, one after the other; a line for each failure."""
    rows, failed = {path: ended["data"] for path in runs if (ended := result(path))}, list[str]()
    print(f"{len(runs)} runs in {folder}, {len(rows)} of them already finished", flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` has it ignored
            signal.signal(number, signal.default_int_handler)  # so that no run outlives its sweep
    for path in [path for path in runs if path not in rows]:
        code, why = train(path, [*runs[path], f"--run={folder.name}/{path.name}", "--resume"])
        ended = result(path)
        if ended is None:
            if code == 2 and not rows and not failed and not (path / "checkpoints").is_dir():
                raise UserError(why)  # a mistake that the other runs have too
            failed.append(f"{path.name} failed: {why} (see {path}/output.log)")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        rows[path] = ended["data"]
        if same_rows and len(set(rows.values())) > 1:
            raise UserError(f"{folder}: the rows changed after its first runs; delete it to begin again")
        best, seconds = ended["training"]["best"], ended["training"]["seconds"]
        text = f"format/exact {best['exact'] / best['rows']:.1%}, field F1 {best['field_f1']:.1%} on validation"
        print(f"{path.name}: {text}, {seconds:.0f} s ({len(rows) + len(failed)}/{len(runs)})", flush=True)
    return failed

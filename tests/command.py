"""The command line as a user calls it: one process for each call, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["formtune.cli", "command", "formtune.commands.formtune_cli", "formtune.commands.audit"]
)
OUTPUT = ("stdout.txt", "stderr.txt", "peak.txt")


@dataclass(frozen=True)
class Done:
    """What a call left behind.

    Args:
        code: Exit code; negative for a signal.
        out: Standard output.
        err: Standard error.
        new: Files that were not there before or hold something else now, relative to the working directory.
        peak: Memory in MiB that was taken beyond what the imports need.
    """

    code: int
    out: str
    err: str
    new: frozenset[str]
    peak: float


def formtune(folder: Path, *args: str, seconds: float = 60, given: Callable[[], None] | None = None) -> Done:
    """Run `formtune ARGS` in a folder.

    Args:
        folder: The working directory.
        args: The command line.
        seconds: Time after which it is taken to hang.
        given: One of the functions below, called first: what is different for this process.
    """
    before = _contents(folder)
    process = PROCESSES.Process(target=_child, args=(args, str(folder), given))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"formtune {' '.join(args)} hangs: {(folder / 'stderr.txt').read_text()[-2000:]}")
    out, err, peak = ((folder / name).read_text(errors="backslashreplace") for name in OUTPUT)
    for name in OUTPUT:
        (folder / name).unlink()
    after = _contents(folder)
    new = frozenset(name for name in after if after[name] != before.get(name))
    return Done(process.exitcode, out, err, new, float(peak or 0))


def fork_fresh_processes(monkeypatch) -> None:
    """The fresh processes of an export are forked from one that holds no model, instead of spawned."""
    from formtune.export import measure

    monkeypatch.setattr(measure, "multiprocessing", SimpleNamespace(get_context=lambda _: PROCESSES))


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    contents = {}
    for path in folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            contents[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns)
    return contents


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def no_port() -> None:
    """Ends with a traceback where a port is opened."""

    def refuse(event: str, args: tuple) -> None:
        if event == "socket.bind":
            raise AssertionError("a port was opened")

    sys.addaudithook(refuse)


def no_input() -> None:
    """Standard input is closed."""
    os.close(0)
    sys.stdin = None


def no_output() -> None:
    """Standard output is closed."""
    os.close(1)
    sys.stdout = None


def _child(args: tuple[str, ...], folder: str, given: Callable[[], None] | None) -> None:
    os.chdir(folder)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    Path("peak.txt").touch()
    if given:
        given()
    before = _peak()
    from formtune.cli import main

    code = 1
    try:
        code = main(list(args))
    finally:
        Path("peak.txt").write_text(str(_peak() - before))
    sys.exit(code)

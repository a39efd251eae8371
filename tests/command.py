"""The command line as a user calls it: one process for each call, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["formtune.cli", "command", "formtune.lightning_cli", "formtune.audit.verb"])
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


def formtune(folder: Path, *args: str, seconds: float = 60, binds: bool = True) -> Done:
    """Run `formtune ARGS` in a folder.

    Args:
        folder: The working directory.
        args: The command line.
        seconds: Time after which it is taken to hang.
        binds: Whether it may open a port; if not, it ends with a traceback where it tries.
    """
    before = _contents(folder)
    process = PROCESSES.Process(target=_child, args=(args, str(folder), binds))
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


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns)
    return found


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _no_port(event: str, args: tuple) -> None:
    if event == "socket.bind":
        raise AssertionError("a port was opened")


def _child(args: tuple[str, ...], folder: str, binds: bool) -> None:
    os.chdir(folder)
    if not binds:
        sys.addaudithook(_no_port)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    Path("peak.txt").touch()
    before = _peak()
    from formtune.cli import main

    code = 1
    try:
        code = main(list(args))
    finally:
        Path("peak.txt").write_text(str(_peak() - before))
    sys.exit(code)

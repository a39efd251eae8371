"""Files that are written whole or not at all, and are on the disk when the call returns."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LOGS = Path("logs")  # one folder per task, one folder per run

ABANDONED = 3600  # seconds after which an entry that was never finished is removed


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file: a kill, a crash or a full disk leaves the old one as it was.

    The new content stands beside it until it is whole: in another folder, such as TMPDIR, the last step would be a
    copy that can be cut off.
    """
    partial = Path(f"{path}.part")  # a path without a name is refused by the system, not by pathlib
    _write(partial, path, content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as a JSON file for people and programs to read."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write plain data as JSON Lines, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_entry(path: Path, content: bytes, kept: int) -> None:
    """Write an entry of a cache; a process killed at any moment leaves none, or a whole one.

    Several processes may write the same entry, and the last one's file stays. A folder that cannot be written is no
    reason to stop: what it would hold is in memory.

    Args:
        path: The file.
        content: What it shall hold.
        kept: Entries of its kind that the folder may hold; those touched longest ago are removed.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".part")  # a name of its own: others write as well
        os.close(descriptor)
        _write(Path(part), path, content)
        # Another process may prune as well, and a file be gone before it is looked at.
        entries = sorted(path.parent.glob(f"*{path.suffix}"), key=lambda one: one.stat().st_mtime, reverse=True)
        parts = [one for one in path.parent.glob("*.part") if time.time() - one.stat().st_mtime > ABANDONED]
        for old in (*entries[kept:], *parts):
            old.unlink(missing_ok=True)


def _write(partial: Path, path: Path, content: bytes) -> None:
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file or the names in a folder written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

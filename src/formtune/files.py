"""Files that are written whole or not at all, and are on the disk when the call returns."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file: a kill, a crash or a full disk leaves the old one as it was.

    The new content stands beside it until it is whole: in another folder, such as TMPDIR, the last step would be a
    copy that can be cut off.
    """
    partial = Path(f"{path}.part")  # a path without a name is refused by the system, not by pathlib
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    try:
        with partial.open("wb") as file:
            file.write(data)
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

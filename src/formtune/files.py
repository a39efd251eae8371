"""Atomic writes that are on disk when the call returns, cache entries, and the optional folders of this package."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from formtune.errors import UserError

LOGS = Path("logs")  # one folder per task, one folder per run


def leaves_folder(name: str) -> bool:
    """Whether a relative name, such as a task's or a run's, leads out of the folder that it is put into."""
    return bool({"..", "/"} & set(Path(name).parts))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a kill, a crash or a full disk leaves the old file unchanged."""
    if isinstance(content, str):
        content = content.encode("utf-8", errors="backslashreplace")
    # In the same folder: from another one, such as TMPDIR, the rename would be a copy, which can be truncated. With the
    # process id: two processes may write the same cache entry.
    partial = Path(f"{path}.{os.getpid()}.part")  # not with_name(), which raises a ValueError for a path without a name
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name
        os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain data; numbers that JSON does not have, such as NaN, become null."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write plain data as JSON Lines, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_entry(path: Path, value: Any, kept: int) -> None:
    """Write a cache entry, dataclasses as lists of their fields, and delete the least recently used beyond `kept`."""
    content = json.dumps(value, default=_field_values).encode("ascii")  # escaped: keeps lone surrogates
    with contextlib.suppress(OSError):  # such as a folder that is read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _checksum(content) + b"\n" + content)
        entries = sorted(path.parent.glob(f"*{path.suffix}"), key=lambda entry: entry.stat().st_mtime, reverse=True)
        for entry in entries[kept:]:
            entry.unlink(missing_ok=True)


def read_entry(path: Path) -> Any:
    """The value of a cache entry; None if there is none, or its file is damaged."""
    try:
        checksum, _, content = path.read_bytes().partition(b"\n")
        os.utime(path)  # file systems rarely note when a file is read
    except OSError:
        return None
    return json.loads(content) if checksum == _checksum(content) else None


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _field_values(record: Any) -> list[Any]:
    return [getattr(record, field.name) for field in fields(record)]  # `astuple` copies each list of ids, item by item


def own_code(*names: str) -> Iterator[Path]:
    """The source files of these folders, whose hash ties a cached result to the code that computed it."""
    package = Path(__file__).parent
    for folder in (package, *(package / name for name in names)):
        yield from sorted(folder.glob("*.py"))


def optional(module: str, name: str, key: str = "") -> Any:
    """What an optional folder of this package offers; if it was deleted, None, or a UserError that names `key`."""
    if (Path(__file__).parent / f"{module.replace('.', '/')}.py").is_file():
        return getattr(import_module(f"{__package__}.{module}"), name)
    if key:
        raise UserError(f"{key}: needs the optional folder `{module.partition('.')[0]}`, which was deleted")
    return None

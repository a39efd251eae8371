"""What is in production: a pointer for each name, moved whole or not at all, with who, when, why and the evidence.

    deployments/<task>/
      production.json            the pointer: the current version and the history of all moves
      versions/<run>-<kind>/     a copy of the exported folder, so that nothing depends on logs/
      outcomes/<version>.jsonl   its test rows, for the comparison with the next one

Pointer and history are one file and change in one rename: a kill at any moment leaves the old or the new state. What a
pointer names was verified in its place before, and is held fast by the hash of its manifest.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import getpass
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from formtune.errors import UserError, first_line
from formtune.files import write_json
from formtune.training.manifest import NAME, file_hash, read_manifest, verify

DEPLOYMENTS = Path("deployments")


@dataclass(slots=True)
class Pointer:
    """A name such as `production` of a task, and what it pointed to over time.

    Args:
        task: The task.
        alias: The name.
        history: Its moves, the oldest first, each with `action`, `version`, `manifest`, `at`, `by`, `reason`.
    """

    task: str
    alias: str
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.task}/{self.alias}"

    @property
    def folder(self) -> Path:
        return DEPLOYMENTS / self.task

    @property
    def stack(self) -> list[str]:
        """The versions that a rollback goes back through, the current one last."""
        found: list[str] = []
        for move in self.history:
            version = move["version"]
            if move["action"] == "rollback" and version in found:
                del found[len(found) - found[::-1].index(version) :]
            else:
                found.append(version)
        return found

    @property
    def current(self) -> str | None:
        return self.history[-1]["version"] if self.history else None

    def version_folder(self, version: str) -> Path:
        return self.folder / "versions" / version

    def outcomes(self, version: str) -> Path:
        return self.folder / "outcomes" / f"{version}.jsonl"

    def verified(self, version: str) -> Path:
        """The version's folder, if it is what was promoted.

        Raises:
            UserError: It is missing, or a file of it changed.
        """
        folder = self.version_folder(version)
        verify(folder)
        promoted = next((move["manifest"] for move in self.history[::-1] if move["version"] == version), None)
        if promoted != file_hash(folder / NAME):
            raise UserError(f"{folder}: not what was promoted to {self.name}; promote the run again")
        return folder

    def move(self, action: str, version: str, reason: str | None, **more: Any) -> None:
        """Point to a version whose folder is there, and write it."""
        self.history.append(
            {
                "action": action,
                "version": version,
                "manifest": file_hash(self.version_folder(version) / NAME),
                "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "by": _user(),
                "reason": reason,
            }
            | more
        )
        record = {"task": self.task, "alias": self.alias, "current": version, "history": self.history}
        write_json(self.folder / f"{self.alias}.json", record)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


@contextlib.contextmanager
def locked(task: str) -> Iterator[None]:
    """One process at a time changes a task's deployments; the others wait. A killed one holds nothing.

    Raises:
        UserError: The disk is full, or the folder cannot be written.
    """
    folder = DEPLOYMENTS / task
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(f"{folder}: {first_line(error)}; every name points to what it pointed to before") from None


def check_names(*names: str) -> None:
    """Refuse names that are none of a file.

    Raises:
        UserError: A task or an alias is such a name.
    """
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"{name!r}: a name has letters, digits, '.', '_' and '-' and begins with one of the first")


def read_pointer(path: Path) -> Pointer:
    """The pointer in a file; a new one, without history, where there is no file.

    Raises:
        UserError: The file holds something else.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        pointer = Pointer(found["task"], found["alias"], found["history"])
        words = [move[name] for move in pointer.history for name in ("action", "version", "manifest", "at", "by")]
        here = found["current"] == pointer.current and (pointer.task, pointer.alias) == (path.parent.name, path.stem)
        if not words or not here or not all(isinstance(word, str) for word in words):
            raise ValueError
        return pointer
    except FileNotFoundError:
        return Pointer(path.parent.name, path.stem)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a pointer; take it from a backup, or remove it and promote again") from None


def pointers() -> list[Pointer]:
    """All that there are."""
    return [read_pointer(path) for path in sorted(DEPLOYMENTS.glob("*/*.json"))]


def find_pointer(name: str) -> Pointer:
    """The pointer called `task/alias`, or `alias` where only one task has it.

    Raises:
        UserError: There is none, or several.
    """
    found = [pointer for pointer in pointers() if name in (pointer.name, pointer.alias)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name}: several tasks have it; say {' or '.join(pointer.name for pointer in found)}")
    known = ", ".join(pointer.name for pointer in pointers()) or "nothing is deployed yet"
    raise UserError(
        f"{name}: no such deployment ({known}); formtune promote RUN --to {name.rpartition('/')[2]} makes one"
    )


def store(exported: Path, target: Path) -> None:
    """Copy an exported folder to where deployments are kept; it appears under its name only when whole and verified.

    Raises:
        UserError: It is not as it was exported, or another one has this name.
    """
    if target.exists():
        if file_hash(target / NAME) != file_hash(exported / NAME):
            raise UserError(f"{target}: holds another export of this name; rename the folder of the run")
        verify(target)
        return
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed; the lock says that nobody writes it
    shutil.copytree(exported, partial)
    verify(partial)
    partial.replace(target)


def task_of(exported: Path) -> str:
    """The task that an exported folder is for."""
    read_manifest(exported)
    try:
        config = yaml.safe_load((exported / "config.yaml").read_text(encoding="utf-8"))
        return str(config.get("task") or exported.resolve().parent.parent.name)
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        raise UserError(f"{exported / 'config.yaml'}: not a run's configuration; export the folder again") from None

"""What is in production: a pointer for each name, moved whole or not at all, with who, when, why and the evidence.

    deployments/<task>/
      production.json            the pointer: the current version and the history of all moves
      versions/<run>-<kind>/     a copy of the exported folder, so that nothing depends on logs/
      outcomes/<version>.jsonl   its test rows, for the comparison with the next one

The pointer is one file that changes in one rename: a kill at any moment leaves the old or the new state. A version is
verified in place before a pointer names it, and the pointer holds the hash of its manifest.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from formtune.errors import UserError, first_line
from formtune.files import write_json
from formtune.training.manifest import NAME, file_hash, verify

DEPLOYMENTS = Path("deployments")


@dataclass(slots=True)
class Pointer:
    """A name such as `production` of a task, and its moves, the oldest first."""

    task: str
    alias: str
    history: list[dict[str, Any]]  # each with `action`, `version`, `manifest`, `at`, `by`, `reason`

    @property
    def name(self) -> str:
        return f"{self.task}/{self.alias}"

    @property
    def file(self) -> Path:
        return DEPLOYMENTS / self.task / f"{self.alias}.json"

    @property
    def stack(self) -> list[str]:
        """The versions that a rollback goes back through, the current one last."""
        versions: list[str] = []
        for move in self.history:
            version = move["version"]
            if move["action"] == "rollback" and version in versions:
                del versions[len(versions) - versions[::-1].index(version) :]
            else:
                versions.append(version)
        return versions

    @property
    def current(self) -> str | None:
        return self.history[-1]["version"] if self.history else None

    def version_folder(self, version: str) -> Path:
        return DEPLOYMENTS / self.task / "versions" / version

    def outcomes(self, version: str) -> Path:
        return DEPLOYMENTS / self.task / "outcomes" / f"{version}.jsonl"

    def verified(self, version: str) -> Path:
        """The version's folder, if it is what was promoted."""
        folder = self.version_folder(version)
        verify(folder)
        promoted = next((move["manifest"] for move in self.history[::-1] if move["version"] == version), None)
        if promoted != file_hash(folder / NAME):
            raise UserError(f"{folder}: not what was promoted to {self.name}; promote the run again")
        return folder

    def move(self, action: str, version: str, reason: str | None, **evidence: Any) -> None:
        """Point to a version whose folder exists, and write the pointer."""
        manifest = file_hash(self.version_folder(version) / NAME)
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        move = {"action": action, "version": version, "manifest": manifest, "at": at, "by": _user(), "reason": reason}
        self.history.append(move | evidence)
        write_json(self.file, {**asdict(self), "current": version})


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


@contextlib.contextmanager
def locked(task: str) -> Iterator[None]:
    """One process at a time changes a task's deployments; the others wait. A killed process holds no lock."""
    folder = DEPLOYMENTS / task
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield
    except OSError as error:
        raise UserError(f"{folder}: {first_line(error)}; every name points to what it pointed to before") from None


def read_pointer(path: Path) -> Pointer:
    """The pointer in a file; a new one, without history, where there is no file."""
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        pointer = Pointer(record["task"], record["alias"], record["history"])
        words = [move[name] for move in pointer.history for name in ("action", "version", "manifest", "at", "by")]
        consistent = record["current"] == pointer.current and pointer.file == path
        if not words or not consistent or not all(isinstance(word, str) for word in words):
            raise ValueError
        return pointer
    except FileNotFoundError:
        return Pointer(path.parent.name, path.stem, [])
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a pointer; take it from a backup, or remove it and promote again") from None


def all_pointers() -> list[Pointer]:
    return [read_pointer(path) for path in sorted(DEPLOYMENTS.glob("*/*.json"))]


def find_pointer(name: str) -> Pointer:
    """The pointer called `task/alias`, or `alias` where only one task has it."""
    pointers = all_pointers()
    matches = [pointer for pointer in pointers if name in (pointer.name, pointer.alias)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"{name}: several tasks have it; say {' or '.join(pointer.name for pointer in matches)}")
    names = ", ".join(pointer.name for pointer in pointers) or "nothing is deployed yet"
    alias = name.rpartition("/")[2]
    raise UserError(f"{name}: no such deployment ({names}); formtune promote RUN --to {alias} makes one")


def store(exported: Path, target: Path) -> None:
    """Copy an exported folder to a version's place; it appears there only when it is whole and verified."""
    if target.exists():
        if file_hash(target / NAME) != file_hash(exported / NAME):
            raise UserError(f"{target}: holds another export of this name; rename the folder of the run")
        verify(target)
        return
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process; under the lock nobody else writes it
    shutil.copytree(exported, partial)
    verify(partial)
    partial.replace(target)


def task_of(exported: Path) -> str:
    """The task that an exported folder is for."""
    try:
        config = yaml.safe_load((exported / "config.yaml").read_text(encoding="utf-8"))
        return str(config.get("task") or exported.resolve().parent.parent.name)
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        raise UserError(f"{exported / 'config.yaml'}: not a run's configuration; export the folder again") from None

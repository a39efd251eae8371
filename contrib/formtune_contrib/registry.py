"""Deployments: a file for each name, with the history of all moves.

    deployments/<task>/
      production.json            the current version and the history
      versions/<run>-<kind>/     a copy of the exported folder, so that nothing depends on logs/
      outcomes/<version>.jsonl   its test rows, to compare with the next version

The file changes in one rename: a kill at any moment leaves the old or the new state.
"""

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from formtune.errors import UserError, first_line
from formtune.export.exported import Exported, verify
from formtune.export.manifest import NAME
from formtune.files import write_json

DEPLOYMENTS = Path("deployments")


class Deployment:
    """A name such as `demo/production`, and its moves, the oldest first."""

    def __init__(self, name: str) -> None:
        self.name, self._path, self.history = name, DEPLOYMENTS / f"{name}.json", list[dict[str, Any]]()
        try:
            if self._path.is_file():
                record: Any = json.loads(self._path.read_text(encoding="utf-8"))
                self.history = record["history"]
                if record["current"] != self.history[-1]["version"]:
                    raise ValueError
        except (ValueError, LookupError, TypeError):
            remedy = "restore it from a backup, or remove it and promote again"
            raise UserError(f"{self._path}: not a deployment; {remedy}") from None

    @property
    def current(self) -> str | None:
        return self.history[-1]["version"] if self.history else None

    @property
    def previous(self) -> str | None:
        """The version that the current one replaced when it was promoted."""
        promotions = (move for move in reversed(self.history) if move["action"] == "promote")
        return next(move["replaced"] for move in promotions if move["version"] == self.current)

    def version_folder(self, version: str) -> Path:
        return self._path.with_name("versions") / version

    def outcomes(self, version: str) -> Path:
        return self._path.with_name("outcomes") / f"{version}.jsonl"

    def move(self, action: str, version: str, reason: str | None, overruled: Sequence[str] = ()) -> None:
        """Point to a version whose folder exists and is verified."""
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.history.append({
            "action": action, "version": version, "replaced": self.current, "at": at,
            "by": os.environ.get("USER", "unknown"), "reason": reason, "overruled": list(overruled),
        })  # fmt: skip
        write_json(self._path, {"current": version, "history": self.history})


@contextlib.contextmanager
def locked(name: str) -> Iterator[Deployment]:
    """The deployment of this name, locked against other processes; a killed process holds no lock."""
    folder = (DEPLOYMENTS / name).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield Deployment(name)
    except OSError as error:
        raise UserError(f"{folder}: {first_line(error)}; {name} is unchanged") from None


def names() -> list[str]:
    return [f"{path.parent.name}/{path.stem}" for path in sorted(DEPLOYMENTS.glob("*/*.json"))]


def full_name(name: str) -> str:
    """The deployment called `task/name`, or `name` if only one task has it."""
    matches = [full for full in names() if name in (full, full.partition("/")[2])]
    if len(matches) == 1:
        return matches[0]
    choices = ", ".join(matches or names()) or "none so far"
    raise UserError(f"{name}: matches no single deployment; choose from {choices}, or create one with formtune promote")


def find_exported(name: str, kind: str) -> Exported:
    """Verify a run's export of this kind, an exported folder, or what a deployment points to."""
    for folder in (Path(name), Path(name, kind)):
        if (folder / NAME).is_file():
            return Exported(folder)
    if Path(name).is_dir():
        raise UserError(f"{name}: neither an exported folder nor a run with {kind}/; create it with formtune export")
    deployment = Deployment(full_name(name))
    version = str(deployment.current)
    return Exported(deployment.version_folder(version), deployment.outcomes(version))


def store(exported: Path, target: Path) -> None:
    """Copy an exported folder to a version's folder, which appears only when it is complete and verified."""
    if target.exists():
        if verify(target)["files"] != verify(exported)["files"]:
            raise UserError(f"{target}: already has another export of this name; rename the run's folder")
        return
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process; only this process has the lock
    shutil.copytree(exported, partial)
    verify(partial)
    partial.replace(target)

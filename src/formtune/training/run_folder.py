"""The folder of one run: found again after an interruption, held by one process, and never continued as another run."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from formtune.errors import UserError

# Keys that say where and how a run is watched, and not what is trained.
FREE = ("run", "resume", "task", "trainer.default_root_dir", "trainer.enable_progress_bar", "data.prompts")


class RunFolder:
    """A folder with `config.yaml` from the start of a run on, and `metrics.json` once it is finished.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    @property
    def begun(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / "config.yaml").exists()

    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        return (self.path / "metrics.json").exists()

    @property
    def date(self) -> str | None:
        """Day that the run's prompts write, None where they write none or no run has begun."""
        try:
            found = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))["data"]["date"]
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            return None
        return None if found is None else str(found)

    def difference(self, config: str) -> str | None:
        """The first key in which this run's configuration differs from another, with both values; None if none does.

        Args:
            config: The other as YAML, defaults included.
        """
        try:
            old = dict(_leaves(yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{self.path / 'config.yaml'}: cannot be read ({error}); begin another run") from None
        new = dict(_leaves(yaml.safe_load(config)))
        if None in (old.get("data.date"), new.get("data.date")):  # no date is written, or that of the run is taken
            old["data.date"] = new["data.date"] = None
        for key in [*new, *(key for key in old if key not in new)]:
            if old.get(key) != new.get(key) and not key.startswith(FREE):
                return f"{key} {old.get(key)}, now {new.get(key)}"
        return None

    def hold(self) -> None:
        """Make the folder, and keep others from running in it for as long as this process lives.

        Raises:
            UserError: Another process does, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: this run is going on in another process; wait for it or stop it, or name another --run"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}: no run can write here ({error.strerror})") from None

    def release(self) -> None:
        """Let others run here, and leave no trace of a run that did not begin."""
        if self._lock is not None:
            if not self.begun:
                (self.path / ".lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self.path.rmdir()  # unless something stands there to be read
            os.close(self._lock)
            self._lock = None


def choose_run(task: Path, name: str | None, resume: bool, config: Callable[[], str]) -> str | None:
    """The name of the run to begin or to go on with, None for a new one that gets its name from the clock.

    Args:
        task: Folder of the task.
        name: What the user calls the run.
        resume: Whether an interrupted run may go on.
        config: Gives the configuration as YAML, defaults included.

    Raises:
        UserError: The run of that name is another one.
        SystemExit: It is finished, with this configuration; nothing is to be done.
    """
    folder = RunFolder(task / name) if name else _last(task) if resume else None
    if folder is None or not folder.begun or (folder.finished and not name):
        return name
    if not resume:
        raise UserError(f"run: {folder.path} already holds a run; go on with it by --resume, or choose another --run")
    difference = folder.difference(config())
    if difference and name:
        raise UserError(f"resume: {folder.path} began with {difference}; name another --run for another run")
    if folder.finished:
        print(f"nothing to do: {folder.path} is finished")
        raise SystemExit(0)
    new = f"{folder.path} began with {difference}: a new run begins"
    print(new if difference else f"going on with {folder.path}", flush=True)
    return None if difference else name or folder.path.name


def _last(task: Path) -> RunFolder | None:
    """The run of a task that began last."""
    begun = [path for path in task.glob("*/config.yaml") if not (path.parent / ".sweep").exists()]
    newest = max(begun, key=lambda path: path.stat().st_mtime, default=None)
    return RunFolder(newest.parent) if newest else None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value

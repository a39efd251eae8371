"""The folder of one run, locked by one process at a time, and resumed with the same configuration only."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from formtune.errors import UserError, as_user_error
from formtune.evaluation.outcomes import confidences, read_outcomes, threshold

# Keys that change where a run is or how it is watched, but not what is trained.
FREE = (
    *("run", "resume", "task", "trainer.default_root_dir", "trainer.enable_progress_bar", "data.prompts", "logger"),
    *("checkpoint.every_n_seconds", "checkpoint.save_last", "answer_table"),
)
# Keys that a resumed run may change if memory runs out: sums are rounded, and dropout drawn, in another order.
MEMORY = ("model.tokens_per_micro_batch", "model.gradient_checkpointing")
MAX_NAMED = 3  # differences in a message


class RunFolder:
    """A folder that has `config.yaml` once a run has begun, and `metrics.json` once it is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock", timeout=0)  # the system releases it when the process ends

    @property
    def begun(self) -> bool:
        return (self.path / "config.yaml").exists()

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").exists()

    @property
    def date(self) -> str | None:
        """Date that the chat template writes into the run's prompts; None without one, or if no run has begun."""
        date = self.config().get("data.date") if self.begun else None
        return date and str(date)

    def difference(self, config: str) -> str | None:
        """The keys, with both values, in which this run's configuration differs from another (YAML), or None."""
        old, new = self.config(), dict(leaves(yaml.safe_load(config)))
        if None in (old.get("data.date"), new.get("data.date")):  # the template writes none, or the run's is used
            old["data.date"] = new["data.date"] = None
        keys = [key for key in new | old if old.get(key) != new.get(key) and not key.startswith((*FREE, *MEMORY))]
        return "; ".join(f"{key} {old.get(key)}, now {new.get(key)}" for key in keys[:MAX_NAMED]) or None

    def config(self) -> dict[str, Any]:
        """The run's configuration by dotted keys."""
        path = self.path / "config.yaml"
        with as_user_error(f"{path}: cannot be read", "; start a new run"):
            return dict(leaves(yaml.safe_load(path.read_text(encoding="utf-8"))))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and lock it; if nothing was written, delete it at the end."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            what = f"{self.path}: another process is using this folder"
            raise UserError(f"{what}; wait, stop it, or choose another --run") from None
        except OSError as error:
            raise UserError(f"{self.path}: not writable ({error.strerror})") from None
        try:
            yield
        except UserError:
            # If nothing was trained, the corrected command may begin anew.
            if not (self.path / "checkpoints").exists():
                (self.path / "config.yaml").unlink(missing_ok=True)
            raise
        finally:
            if not self.begun:
                (self.path / ".lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self.path.rmdir()
            self._lock.release()


def choose_run(task: Path, name: str | None, resume: bool, config: Callable[[], str]) -> str | None:
    """The run to start or resume in a task's folder; None for a new run, which is named by the clock."""
    # Runs of a sweep do not count.
    begun = [path for path in task.glob("*/config.yaml") if not (path.parent / "sweep.json").exists()]
    begun.sort(key=lambda path: path.stat().st_mtime)
    path = task / name if name else begun[-1].parent if begun and resume else None
    if path is None or not (folder := RunFolder(path)).begun or (folder.finished and not name):
        return name
    if not resume:
        remedy = "choose another --run" if folder.finished else "continue it with --resume, or choose another --run"
        raise UserError(f"run: {folder.path} already has a {'finished ' * folder.finished}run; {remedy}")
    difference = folder.difference(config())
    if difference and name:
        raise UserError(f"resume: {folder.path} was started with {difference}; choose another --run for a new run")
    if folder.finished:
        print(f"nothing to do: {folder.path} is finished")
        raise SystemExit(0)
    new = f"{folder.path} was started with {difference}: starting a new run"
    print(new if difference else f"continuing {folder.path}", flush=True)
    return None if difference else name or folder.path.name


def measured_run(configs: Sequence[Path], named: Path | None) -> Path | None:
    """The run to evaluate: that of `--run`, else the one whose `config.yaml` is given; None if neither is a run."""
    if named and not (named / "checkpoints").is_dir():
        raise UserError(f"run: {named} has no checkpoints; name another run, or train this one")
    folders = [*([named] if named else []), *(path.parent for path in reversed(configs) if path.name == "config.yaml")]
    return next((run for run in folders if RunFolder(run).begun and (run / "checkpoints").is_dir()), None)


def minimum_confidence(config: Any, run: Path | None) -> float:
    """The confidence at which a run's validation answers reach `--target_precision`."""
    path = Path(run or "", "outcomes", "validation.jsonl")
    if (
        run is None or not path.is_file()
        or config.min_confidence is not None or config.ckpt_path not in (None, "best")
        or RunFolder(run).config()["model.constrained"] != config.model.constrained
    ):  # fmt: skip
        needs = "a finished run, its best checkpoint, its value of model.constrained, and no min_confidence"
        raise UserError(f"target_precision: needs {needs}; name the run, or set --min_confidence instead")
    rows = confidences(read_outcomes(path))
    minimum = threshold(rows, config.target_precision)
    if minimum is None:
        what = f"{config.target_precision} on the {len(rows):,} validation rows of {run}"
        raise UserError(f"target_precision: no confidence gives {what}; lower the target, or validate on more rows")
    return minimum


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value

"""Checkpoints: when they are written, which are kept, and how they are read."""

import contextlib
import io
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from formtune.errors import Fault, Stopped, UserError, as_user_error
from formtune.files import write_atomic
from formtune.model.ranks import max_over_ranks
from formtune.training import callback
from formtune.training.callbacks import OverfittingWatch, Signals
from formtune.training.validations import best, can_still_win


class BestCheckpoint(ModelCheckpoint):
    """Writes `checkpoints/step-N.ckpt` after validations and at intervals; keeps the newest and possible best ones.

    A checkpoint contains the full state of training, and a run resumes from the newest. It is never written between a
    step and its validation: Lightning would skip that validation when the run resumes.

    Args:
        every_n_seconds: Seconds of training between two checkpoints, the most that a killed run loses.
        save_last: Number of newest checkpoints to keep; if the newest is damaged, the next one is used.
    """

    def __init__(self, every_n_seconds: NonNegativeFloat = 30.0, save_last: PositiveInt = 2) -> None:
        super().__init__(save_top_k=0)  # so that ModelCheckpoint itself saves nothing
        self.every_n_seconds, self.newest = every_n_seconds, save_last
        self.seconds = 0.0  # of training, validations and the time before an interruption included
        self.stopped = False  # whether a callback ended training early

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "checkpoints"
        self.dirpath = str(self.folder)
        self._watch, self._signals = callback(trainer, OverfittingWatch), callback(trainer, Signals)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "stopped": self.stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.stopped = state_dict["seconds"], state_dict["stopped"]
        self._set_paths()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._saved = time.monotonic()
        self._began = self._saved - self.seconds
        trainer.should_stop |= self.stopped

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= trainer.estimated_stepping_batches:
            trainer.should_stop = True  # makes Lightning validate the last weights too, whatever the interval
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None  # they would prevent that
        late = time.monotonic() - self._saved >= self.every_n_seconds
        signal, due = max_over_ranks(trainer, self._signals.number, late)
        loop = trainer.fit_loop
        # Lightning cannot resume at the end of an epoch or before a validation: the next step is soon enough.
        unsafe = trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if (signal or due) and not unsafe:
            self._save(trainer)
            if signal:
                raise Stopped(int(signal), f"saved at step {trainer.global_step}; {self._signals.remedy}")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: Any) -> None:
        if trainer.fast_dev_run:
            return
        if trainer.is_global_zero and not self.folder.parent.exists():
            raise Fault(f"{self.folder}: the run's folder was removed during training")
        self.seconds = time.monotonic() - self._began
        self.stopped = trainer.should_stop and trainer.global_step < trainer.estimated_stepping_batches
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt")
        self._saved = time.monotonic()
        self._set_paths()
        if trainer.is_global_zero:
            files = steps(self.folder)
            for step in files.keys() - can_still_win(self._watch.history) - set(list(files)[-self.newest :]):
                files[step].unlink(missing_ok=True)

    def _set_paths(self) -> None:
        files, chosen = steps(self.folder), best(self._watch.history)
        self.best_model_path = str(files.get(chosen.step, "")) if chosen else ""
        self.last_model_path = str(files[max(files)]) if files else ""


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint IO, with atomic writes and checked reads."""

    checked = False  # whether a checkpoint of this run can be read

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        if not self.checked:
            buffer.seek(0)
            remedy = "; keep numbers, strings, lists, dictionaries and tensors in it"
            with as_user_error("checkpoint: the state of a callback, optimizer or schedule cannot be loaded", remedy):
                torch.load(buffer, map_location="cpu", weights_only=True)
            self.checked = True
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(path), buffer.getvalue())
        except OSError as error:
            remedy = "earlier checkpoints are kept; free some space and rerun with --resume"
            raise Fault(f"{path}: cannot be written ({error.strerror}); {remedy}") from error

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return read(Path(path))


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, in order."""
    matches = ((path, re.fullmatch(r"step-(\d+)\.ckpt", path.name)) for path in folder.glob("*"))
    return dict(sorted((int(match[1]), path) for path, match in matches if match))


def newest(folder: Path) -> Path | None:
    """The intact checkpoint of the highest step; damaged ones above it are renamed to `*.damaged`."""
    files = steps(folder)
    for path in reversed(files.values()):
        try:
            read(path)
            return path
        except UserError as error:
            with contextlib.suppress(FileNotFoundError):  # another process was first
                path.replace(f"{path}.damaged")
                print(f"{error}; renamed to {path.name}.damaged", flush=True)
    if files or any(folder.glob("*.damaged")):
        raise UserError(f"{folder}: every checkpoint is damaged; start a new run with another --run")
    return None


def choose(name: str | None, run: Path | None) -> Path | None:
    """The intact checkpoint that `--ckpt_path` names, in a run's folder if there is one; None for the untuned base."""
    if name == "base" or (name is None and run is None):
        return None
    path = Path(str(name))
    if name in (None, "best", "last"):
        if run is None:
            raise UserError(f"ckpt_path: {name} needs a run; give -c logs/TASK/RUN/config.yaml")
        files, watch = steps(run / "checkpoints"), OverfittingWatch()
        step = max(files, default=None)
        if step and name != "last":
            # The newest checkpoint has the validations of all earlier steps.
            watch.load_state_dict(read(files[step])["callbacks"][watch.state_key])
            chosen = best(watch.history)
            step = chosen.step if chosen else None
        if step not in files:
            last = "--ckpt_path last for the newest, or " if files else ""
            remedy = f"use {last}--ckpt_path base for the untuned base"
            raise UserError(f"ckpt_path: {run} has no {name or 'best'} checkpoint; {remedy}")
        path = files[step]
    read(path)
    return path


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint's tensors and plain types, never code; a UserError if it is not an intact checkpoint."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a run before the flags, or one of its .ckpt files")
    damaged = f"{path}: damaged, or not a checkpoint of formtune"
    with as_user_error(damaged, "; use another checkpoint in its folder"):
        with zipfile.ZipFile(path) as archive:
            # Compares CRC-32, which torch.load does not; nor does it read a record that is marked as a folder.
            if archive.testzip() is not None or any(entry.external_attr for entry in archive.infolist()):
                raise ValueError("its content has changed")
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"]
    return checkpoint

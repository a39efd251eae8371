"""Checkpoints on disk: written atomically, checked when read, found by their step.

torch.save writes a CRC-32 of every record, but torch.load does not compare it: a flipped bit would load as a number.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from formtune.errors import Fault, UserError, first_line
from formtune.files import write_whole
from formtune.training.validations import Validations, best


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by their step, in order."""
    names = re.compile(r"step-\d+\.ckpt")
    return dict(sorted((step(path), path) for path in folder.glob("*") if names.fullmatch(path.name)))


def step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The intact checkpoint of the highest step; damaged ones above it are renamed to `*.damaged`."""
    for path in reversed(steps(folder).values()):
        try:
            check(path)
        except UserError:
            path.replace(f"{path}.damaged")
        else:
            return path
    return None


def choose(asked: str | None, run: Path | None) -> Path | None:
    """The intact checkpoint that `--ckpt_path` names, of a run's folder if there is one; None for the untuned base."""
    if asked == "base" or (asked is None and run is None):
        return None
    if asked not in (None, "best", "last"):
        path = Path(str(asked))
    elif run is None:
        raise UserError(f"ckpt_path: {asked} of which run? Give its configuration: -c logs/TASK/RUN/config.yaml")
    else:
        path = _of_run(run / "checkpoints", last=asked == "last")
    read(path)
    return path


def _of_run(folder: Path, last: bool) -> Path:
    files = steps(folder)
    if not files:
        raise UserError(f"ckpt_path: {folder} holds no checkpoint yet; --ckpt_path base measures the base")
    latest = list(files.values())[-1]
    if last:
        return latest
    validations = Validations()  # as the newest checkpoint holds them
    validations.load_state_dict(read(latest)["callbacks"][validations.state_key])
    chosen = best(validations.history)
    if chosen is None or chosen.step not in files:
        names = ", ".join(path.name for path in files.values())
        raise UserError(
            f"ckpt_path: {folder.parent} has no best checkpoint; take one of {folder} by --ckpt_path PATH ({names}), "
            "or measure the untuned base by --ckpt_path base"
        )
    return files[chosen.step]


def check(path: Path) -> None:
    """Compare every record with its checksum; raise a UserError if the file is missing or damaged."""
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a checkpoint; name a run before the flags, or one of its .ckpt files")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() is not None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run's best checkpoint is named at its end") from None
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, RuntimeError, EOFError):
        damaged = True  # whatever zipfile raises for a file that is not a zip, cut off or overwritten
    if damaged:
        raise UserError(f"{path}: the file is damaged; take another checkpoint of its folder")


def read(path: Path) -> dict[str, Any]:
    """Load a checkpoint's tensors and plain types, never code; raise a UserError if it is not an intact checkpoint."""
    check(path)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"]
    except Exception as error:  # whatever a foreign archive or its pickle raises
        raise UserError(f"{path}: not a checkpoint of formtune ({first_line(error)})") from None
    return checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint IO, atomic when writing and checked when reading."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(path), buffer.getvalue())
        except OSError as error:
            last = list(steps(Path(path).parent).values())
            kept = (
                f"{last[-1].name} is kept; free some space and rerun with --resume"
                if last
                else "nothing was saved before"
            )
            raise Fault(f"{path}: cannot be written ({error.strerror}); {kept}") from error

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return read(Path(path))

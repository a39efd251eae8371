"""Checkpoints on disk: written whole, checked record by record when read, found again by their step.

torch.save writes a zip archive with a CRC-32 of every record, but torch.load does not compare them: a flipped bit
would be loaded as another number.
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


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by their step, the first ones first."""
    found = {
        int(match[1]): path for path in folder.glob("*") if (match := re.fullmatch(r"step-(\d+)\.ckpt", path.name))
    }
    return dict(sorted(found.items()))


def step(path: Path) -> int:
    """The step of a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step that is whole; damaged ones above it get `.damaged` behind their names."""
    for path in reversed(steps(folder).values()):
        try:
            check(path)
        except UserError:
            path.replace(f"{path}.damaged")
        else:
            return path
    return None


def check(path: Path) -> None:
    """Compare every record with its checksum.

    Raises:
        UserError: There is no such file, or it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() is not None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run's best checkpoint is named at its end") from None
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, RuntimeError, EOFError):
        damaged = True  # whatever zipfile makes of a file that is none, cut off or overwritten
    if damaged:
        raise UserError(f"{path}: the file is damaged; take another checkpoint of its folder")


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: tensors and plain types; code is never run.

    Raises:
        UserError: The file is missing, damaged, or something else.
    """
    check(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign archive or its pickle raises
        raise UserError(f"{path}: no checkpoint of formtune ({first_line(error)})") from None
    if not isinstance(found, dict) or "state_dict" not in found:
        raise UserError(f"{path}: no checkpoint of formtune (no state_dict)")
    return found


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoints, written and read as above; the file before stays until the new one is whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            Fault: The disk is full, or the folder cannot be written or is gone.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            write_whole(Path(path), buffer.getvalue())
        except OSError as error:
            last = list(steps(Path(path).parent).values())
            kept = f"{last[-1].name} is kept; make room and go on with --resume" if last else "nothing was saved before"
            raise Fault(f"{path}: cannot be written ({error.strerror}); {kept}") from error

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint; Lightning moves its tensors to their device."""
        return read(Path(path))

"""`manifest.json` of an exported folder: hashes of its files, and of the base, template and format it belongs to."""

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from formtune import __version__
from formtune.base.folder import base_folder
from formtune.errors import UserError
from formtune.files import write_json

NAME = "manifest.json"
CARD = "README.md"  # not listed: it is written later, and edited by people
KINDS = ("adapter", "merged", "int8", "nf4", "gptq", "awq", "gguf")
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")
# Files that decide a base's weights, shape and tokens; cards and pictures do not.
_BASE_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


def write_manifest(
    folder: Path,
    kind: str,  # of KINDS
    base: str,  # folder or hub id, as configured
    data: str | None,  # content hash of the rows, as in `metrics.json`
    verification: dict[str, Any] | None = None,  # measurements made before the export
    packages: tuple[str, ...] = (),  # further packages whose versions matter for loading
) -> None:
    """Write the manifest of a folder that is otherwise complete."""
    files = _hashes(folder, (path for path in folder.rglob("*") if path.name not in (NAME, CARD)))
    manifest = {
        "formtune": __version__,
        "kind": kind,
        "base": {"path": base, "files": base_files(base)},
        "format": files.get("format.json"),
        "data": data,
        "config": files.get("config.yaml"),
        "template": files.get("chat_template.jinja"),
        "files": files,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in (*PACKAGES, *packages)},
        "verification": verification,
    }
    write_json(folder / NAME, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        base = manifest["base"]
        hashes = [*manifest["files"].values(), *base["files"].values()]
        if manifest["kind"] not in KINDS or not all(isinstance(text, str) for text in (base["path"], *hashes)):
            raise TypeError
        return manifest
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; an exported folder has one (formtune export)") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not a manifest; export the folder again") from None


def verify(folder: Path) -> dict[str, Any]:
    """The folder's manifest; raises a UserError that names a listed file which is missing, changed or outside."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        parts = PurePosixPath(name)
        path = folder / parts
        outside = "\0" in name or parts.is_absolute() or ".." in parts.parts
        if outside or not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder / NAME}: {name!r} leads out of {folder}; export the folder again")
        if not path.is_file():
            raise UserError(f"{path}: missing, but listed in {NAME}; export the folder again")
        if file_hash(path) != expected:
            raise UserError(f"{path}: changed since it was exported; export the folder again")
    return manifest


def base_files(base: str) -> dict[str, str]:
    """Name and hash of each file that decides a base; for a hub id, of those in the local cache."""
    folder = base_folder(base)
    return _hashes(folder, (path for path in folder.iterdir() if path.suffix in _BASE_SUFFIXES))


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(paths) if path.is_file()}

"""`manifest.json` of an exported folder: hashes of its files, and of its base, template and format."""

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from formtune import __version__
from formtune.base.folder import base_folder, identity
from formtune.files import write_json

NAME = "manifest.json"
CARD = "README.md"  # not listed: it is written later, and people edit it
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")
# Files that decide a base's weights, shape and tokens; cards and pictures do not.
_BASE_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


def write_manifest(
    folder: Path,
    kind: str,  # "adapter", or a kind of export
    base: str,  # folder or Hub id, as configured
    data: str | None,  # content hash of the rows, as in `metrics.json`
    verification: dict[str, Any] | None = None,  # measurements made before the export
    packages: tuple[str, ...] = (),  # further packages whose versions matter for loading
    training: dict[str, Any] | None = None,  # what it started from, and the weights of its rows
) -> None:
    """Write the manifest of a folder that is otherwise complete."""
    files = _hashes(folder, (path for path in folder.rglob("*") if path.name not in (NAME, CARD)))
    manifest = {
        "formtune": __version__,
        "kind": kind,
        "base": {"path": base, "files": base_files(base), "identity": identity(base)},
        "format": files.get("format.json"),
        "data": data,
        "training": training,
        "config": files.get("config.yaml"),
        "template": files.get("chat_template.jinja"),
        "files": files,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in (*PACKAGES, *packages)},
        "verification": verification,
    }
    write_json(folder / NAME, manifest)


def base_files(base: str) -> dict[str, str]:
    """Name and hash of each file that decides a base; for a Hub id, of those in the local cache."""
    folder = base_folder(base)
    return _hashes(folder, (path for path in folder.iterdir() if path.suffix in _BASE_SUFFIXES))


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(paths) if path.is_file()}

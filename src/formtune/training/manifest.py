"""`manifest.json` of an exported folder: hashes of its files, and of its base, template and format."""

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from formtune import __version__
from formtune.base.folder import base_folder, identity
from formtune.errors import UserError
from formtune.files import write_json

NAME = "manifest.json"
CARD = "README.md"  # not listed: it is written later, and people edit it
KINDS = ("adapter", "merged", "int8", "nf4", "gptq", "awq", "gguf")
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")
# Files that decide a base's weights, shape and tokens; cards and pictures do not.
_BASE_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


def write_manifest(
    folder: Path,
    kind: str,  # of KINDS
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


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        files, base = manifest["files"], manifest["base"]
        texts = [base["path"], *files.values(), *base["files"].values()]
        if manifest["kind"] in KINDS and all(isinstance(text, str) for text in texts):
            return manifest
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; an exported folder has one (formtune export)") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise UserError(f"{path}: not a manifest; export the folder again")


def verify(folder: Path) -> dict[str, Any]:
    """The folder's manifest; a UserError names a listed file that is missing, changed or outside the folder."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        outside = "\0" in name or ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve())
        if outside or not path.is_file() or file_hash(path) != expected:
            raise UserError(f"{path}: changed since it was exported, missing, or outside the folder; export it again")
    return manifest


def base_files(base: str) -> dict[str, str]:
    """Name and hash of each file that decides a base; for a Hub id, of those in the local cache."""
    folder = base_folder(base)
    return _hashes(folder, (path for path in folder.iterdir() if path.suffix in _BASE_SUFFIXES))


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(paths) if path.is_file()}

"""What an exported folder holds and what it was made from, as hashes in its `manifest.json`.

An adapter is right only on the base it was trained on, with the chat template it was trained with, judged by the
contract it was trained for. Names do not say that, hashes do. The file names every other file of its folder but the
card, so that one that is missing, changed or led elsewhere is found before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from formtune import __version__
from formtune.errors import UserError
from formtune.files import write_json

NAME = "manifest.json"
CARD = "README.md"  # prose, that is written later and that people edit: not listed
KINDS = ("adapter", "merged", "int8", "nf4", "gptq", "awq")
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")
# What decides a base's weights, shape and tokens; cards and pictures beside them do not.
_BASE_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


def write_manifest(
    folder: Path,
    kind: str,
    base: str,
    data: str | None,
    verification: dict[str, Any] | None = None,
    packages: tuple[str, ...] = (),
) -> None:
    """Write the manifest of a folder whose other files are all there.

    Args:
        folder: The folder; it holds `contract.json` and `config.yaml`, and `chat_template.jinja` where the base has
            a template.
        kind: One of `KINDS`.
        base: Folder or hub id of the base, as configured.
        data: Content hash of the rows, as in a run's `metrics.json`.
        verification: What was measured before the folder was written, None where nothing was.
        packages: Further packages whose versions matter to who loads it.
    """
    files = _hashes(folder, (path for path in folder.rglob("*") if path.is_file() and path.name not in (NAME, CARD)))
    manifest = {
        "formtune": __version__,
        "kind": kind,
        "base": {"path": base, "files": base_files(base)},
        "contract": files.get("contract.json"),
        "data": data,
        "config": files.get("config.yaml"),
        "template": files.get("chat_template.jinja"),
        "files": files,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in (*PACKAGES, *packages)},
        "verification": verification,
    }
    write_json(folder / NAME, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
        UserError: There is none, or it is none.
    """
    path = folder / NAME
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; an exported folder has one (formtune export)") from None
    except ValueError:
        raise UserError(f"{path}: not JSON; export the folder again") from None
    if not _is_manifest(found):
        raise UserError(f"{path}: not a manifest; export the folder again")
    return found


def verify(folder: Path) -> dict[str, Any]:
    """The folder's manifest, if every file that it lists is there and as it was.

    Raises:
        UserError: A listed file is missing, changed or lies outside the folder; names it.
    """
    manifest, home = read_manifest(folder), folder.resolve()
    for name, wanted in manifest["files"].items():
        if "\0" in name:
            raise UserError(f"{folder / NAME}: {name!r}: not a file's name; export the folder again")
        parts = PurePosixPath(name)
        path = folder / parts
        if parts.is_absolute() or ".." in parts.parts or not path.resolve().is_relative_to(home):
            raise UserError(f"{path}: leads out of {folder}; export the folder again")
        if not path.is_file():
            raise UserError(f"{path}: missing, but listed in {NAME}; export the folder again")
        if file_hash(path) != wanted:
            raise UserError(f"{path}: changed since it was exported; export the folder again")
    return manifest


def base_files(base: str) -> dict[str, str]:
    """The hash of each file that decides a base, by its name; of a hub id those in the local cache.

    Raises:
        UserError: The base is not there.
    """
    folder = base_folder(base)
    return _hashes(folder, (path for path in folder.iterdir() if path.suffix in _BASE_SUFFIXES and path.is_file()))


def base_folder(base: str) -> Path:
    """The folder of a base's files; of a hub id the one in the local cache.

    Raises:
        UserError: The base is not there.
    """
    if Path(base).is_dir():
        return Path(base)
    from transformers.utils.hub import cached_file

    from formtune.base.folder import check_base

    try:
        return Path(str(cached_file(check_base(base), "config.json", local_files_only=True))).parent
    except OSError:
        raise UserError(f"{base}: the base is neither a folder nor in the local cache of the hub") from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hashes(folder: Path, paths: Any) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(paths)}


def _is_manifest(found: Any) -> bool:
    if not isinstance(found, dict) or found.get("kind") not in KINDS:
        return False
    base = found.get("base")
    listings = [found.get("files"), base.get("files") if isinstance(base, dict) else None]
    return all(
        isinstance(listing, dict) and all(isinstance(value, str) for value in listing.values()) for listing in listings
    ) and isinstance(base.get("path"), str)  # type: ignore[union-attr]

"""Encoded splits on disk, in `.cache/encoded`, each named by a hash of everything that decides its rows.

The conversations themselves are hashed, not the files they were read from: reading costs a twentieth of judging and
encoding, works for any `Source`, and a column that changes nothing changes no hash. So are formtune's own code, the
code of a format of your own (all Python files beside it), and the files that its arguments name. A file that such a
format opens by a path in its code is not seen: name it in an argument.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from formtune.base.row import Row
from formtune.data.cleaning import Example, Quarantined
from formtune.data.encoded import Splits
from formtune.data.settings import DataSettings
from formtune.data.styles import Mixture
from formtune.files import own_code, read_entry, write_entry
from formtune.formats import Format

FOLDER = Path(".cache/encoded")  # in the working directory, like `logs`
KEPT = 8  # entries; the least recently used are removed
STORED = ("rows", "read", "repairs", "quarantine", "mixtures", "origins", "shared", "key")
PACKAGES = ("tokenizers", "transformers", "jinja2", "regex", "jsonschema", "referencing", "ftfy", "rensa")


def load(key: str) -> Splits | None:
    """The splits with this hash, None if there are none or their file is damaged."""
    path = FOLDER / f"{key}.json"
    if (stored := read_entry(path)) is None:
        return None
    return Splits(
        rows={name: [Row(*row) for row in rows] for name, rows in stored["rows"].items()},
        read=Counter(stored["read"]),
        repairs=Counter(stored["repairs"]),
        quarantine=[Quarantined(*row) for row in stored["quarantine"]],
        mixtures=[Mixture(*mixture) for mixture in stored["mixtures"]],
        origins=stored["origins"],
        shared=stored["shared"],
        key=stored["key"],
        cached=path,
    )


def store(key: str, splits: Splits) -> None:
    """Write the splits, or nothing if the folder cannot be written."""
    write_entry(FOLDER / f"{key}.json", {name: getattr(splits, name) for name in STORED}, KEPT)


def fingerprint(examples: Mapping[str, Sequence[Example]], settings: DataSettings) -> str | None:
    """A hash of all that decides the rows; None if an argument of the format is not plain data."""
    format, tokenizer, date = settings.format, settings.renderer.tokenizer, settings.renderer.date
    inputs = {
        "shares": settings.shares,
        "clean": settings.clean,
        "repair_answers": settings.repair_answers,
        "near_duplicates": settings.near_duplicates,
        "limits": [settings.limit, settings.max_new_tokens],
        "format": format.to_dict(),
        "tokenizer": [
            f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            tokenizer.split_special_tokens,
            date,
        ],
        "packages": [*map(version, PACKAGES), platform.python_version()],
    }
    try:
        hashed = hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16)
        for path in (*own_code("base", "data", "formats"), *_format_code(format), *_files(inputs["format"])):
            hashed.update(hashlib.sha256(path.read_bytes()).digest())
    except (TypeError, ValueError, OSError):  # arguments that are not plain data, a class typed into an interpreter
        return None
    for name, rows in examples.items():
        hashed.update(f"{name} {len(rows)}".encode())
        for example in rows:
            hashed.update(json.dumps([example.where, example.messages, example.origin]).encode())
    return hashed.hexdigest()


def _format_code(format: Format) -> Iterator[Path]:
    """The file of a format of your own, and those beside it, which it may import."""
    for cls in type(format).__mro__:
        package = cls.__module__.partition(".")[0]
        if package not in sys.stdlib_module_names and package != "formtune":
            yield from sorted(Path(inspect.getfile(cls)).resolve().parent.glob("*.py"))


def _files(value: Any) -> Iterator[Path]:
    """Files named in a format's arguments: what they hold may decide its verdicts."""
    if isinstance(value, str) and len(value) < 1024 and "\0" not in value and Path(value).is_file():
        yield Path(value)
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _files(inner)

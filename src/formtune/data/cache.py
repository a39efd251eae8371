"""Encoded splits on disk, each below the hash of all that decides it: written whole or not at all, checked when read.

A file holds token ids in one flat array and everything that is text as one JSON array of bytes, in the safetensors
format: no pickle, so reading runs no code, and a fraction of a second for ten thousand rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from formtune.base.row import Row
from formtune.data.cleaning import Quarantined
from formtune.data.encoded import Splits
from formtune.data.styles import Mixture
from formtune.files import write_entry

FOLDER = Path(".cache/encoded")  # of the working directory, like `logs`
KEPT = 8  # entries; those used longest ago are removed


def load(key: str) -> Splits | None:
    """The splits below a key, None if there are none or their file is damaged."""
    path = _path(key)
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if (file.metadata() or {}).get("checksum") != _checksum(arrays):
                return None
        os.utime(path)  # file systems rarely note when a file is read
    except (OSError, SafetensorError):
        return None
    splits = _unpack(arrays)
    splits.cached = path
    return splits


def store(key: str, splits: Splits) -> None:
    """Write splits below a key; two processes that write the same key write the same rows."""
    arrays = _pack(splits)
    write_entry(_path(key), save(arrays, {"checksum": _checksum(arrays)}), KEPT)


def _path(key: str) -> Path:
    return FOLDER / f"{key}.safetensors"


def _checksum(arrays: dict[str, Any]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        hashed.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        hashed.update(np.ascontiguousarray(arrays[name]).data)
    return hashed.hexdigest()


def _pack(splits: Splits) -> dict[str, Any]:
    rows = [row for rows in splits.rows.values() for row in rows]
    text = {
        "rows": {name: len(rows) for name, rows in splits.rows.items()},
        "texts": [(row.source, row.gold, row.where, row.origin, row.messages) for row in rows],
        "read": splits.read,
        "repairs": splits.repairs,
        "quarantine": [astuple(row) for row in splits.quarantine],
        "mixtures": [astuple(mixture) for mixture in splits.mixtures],
        "origins": splits.origins,
        "shared": splits.shared,
        "key": splits.key,
    }
    return {
        "ids": np.array([token for row in rows for token in (*row.prompt, *row.target)], np.int32),
        "is_value": np.array([mark for row in rows for mark in row.is_value], np.bool_),
        "sizes": np.array([(len(row.prompt), len(row.target), row.number) for row in rows], np.int64).reshape(-1, 3),
        # Escaped to ASCII: a lone surrogate in somebody's text survives too.
        "text": np.frombuffer(json.dumps(text).encode("ascii"), np.uint8),
    }


def _unpack(arrays: dict[str, Any]) -> Splits:
    text = json.loads(arrays["text"].tobytes())
    ids, marks = arrays["ids"].tolist(), arrays["is_value"].tolist()
    rows, at, mark = [], 0, 0
    for (prompt, target, number), words in zip(arrays["sizes"].tolist(), text["texts"], strict=True):
        source, gold, where, origin, messages = words
        middle, end = at + prompt, at + prompt + target
        marked = marks[mark : mark + target]
        rows.append(Row(ids[at:middle], ids[middle:end], marked, source, gold, where, number, origin, messages))
        at, mark = end, mark + target
    left = iter(rows)
    return Splits(
        rows={name: [next(left) for _ in range(count)] for name, count in text["rows"].items()},
        read=Counter(text["read"]),
        repairs=Counter(text["repairs"]),
        quarantine=[Quarantined(*row) for row in text["quarantine"]],
        mixtures=[Mixture(*mixture) for mixture in text["mixtures"]],
        origins=text["origins"],
        shared=text["shared"],
        key=text["key"],
    )

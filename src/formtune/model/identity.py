"""Which base and contract a state belongs to: weights of another base with the same shapes load without a word."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from formtune.formats import Format

BLOCK, BLOCKS = 4096, 256  # bytes at a time, and times per file: the whole of a large base takes minutes


def identity(base: str, config: Any) -> str:
    """A hash of samples of a folder's weights, evenly spaced, or the commit of a hub's model.

    Another training of the same base moves nearly all weights, so that samples tell them apart.
    """
    files = sorted(Path(base).glob("*.safetensors"))
    if not files:
        return str(getattr(config, "_commit_hash", None) or base)
    hashed = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        hashed.update(f"{size} ".encode())
        with path.open("rb") as file:
            for i in range(BLOCKS):
                file.seek(i * max(size - BLOCK, 0) // (BLOCKS - 1))
                hashed.update(file.read(BLOCK))
    return hashed.hexdigest()


def contract_hash(contract: Format) -> str:
    """A hash of what the contract says, wherever its files lie."""
    text = json.dumps(contract.to_dict(), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

"""Which base and contract a state belongs to: weights of another base with the same shapes load without a word."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from formtune.errors import UserError
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


def check_identity(known: Any, now: dict[str, Any], goes_on: bool) -> None:
    """Refuse a checkpoint of something else.

    Args:
        known: What the checkpoint says of itself.
        now: `base`, `contract` and number of `processes` of this run.
        goes_on: Whether a run is to go on from it; else it is only judged, by any contract and on any number of
            processes.

    Raises:
        UserError: Names what is another.
    """
    if not isinstance(known, dict):
        raise UserError("ckpt_path: the checkpoint was not written by this version of formtune")
    if known["base"] != now["base"]:
        raise UserError("model.base: the checkpoint was trained on another base")
    if goes_on and known["contract"] != now["contract"]:
        raise UserError("data.format: the contract is another than when this run began; begin a new run")
    if goes_on and known["processes"] != now["processes"]:
        raise UserError(
            f"trainer.devices: this run began on {known['processes']} processes, now there are {now['processes']}; "
            "go on with as many or begin a new run"
        )

"""The base, template and format of a checkpoint: another base with the same shapes would load silently."""

import hashlib
import json
from typing import Any

from formtune.base.folder import base_folder
from formtune.errors import UserError
from formtune.formats import Format

BLOCK, BLOCKS = 4096, 256  # bytes of a block, and blocks per file: reading all of a large base takes minutes


def identity(base: str) -> str:
    """A hash of a base's config and of evenly spaced samples of its weights, which any fine-tuning changes."""
    folder = base_folder(base)
    hashed = hashlib.blake2b(digest_size=16)
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        size = path.stat().st_size
        hashed.update(f"{size} ".encode())
        with path.open("rb") as file:
            for i in range(BLOCKS):
                file.seek(i * max(size - BLOCK, 0) // (BLOCKS - 1))
                hashed.update(file.read(BLOCK))
    return hashed.hexdigest()


def format_hash(format: Format) -> str:
    """A hash of the format's content, independent of where its files are."""
    text = json.dumps(format.to_dict(), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def template_hash(tokenizer: Any) -> str:
    return hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=16).hexdigest()


def check_identity(recorded: Any, current: dict[str, Any], resumes: bool) -> None:
    """Refuse a checkpoint of another base or template; to resume, also of another format or number of processes."""
    if not isinstance(recorded, dict) or not recorded.keys() >= current.keys():
        raise UserError("ckpt_path: not written by this version of formtune; use the one that did, or start a new run")
    before, now = recorded["processes"], current["processes"]
    differing = {
        "base": "model.base: the checkpoint was trained on another base",
        "template": "model.chat_template: the checkpoint was trained with another chat template; name its file",
        "format": "data.format: the format has changed since this run began; start a new run",
        "adapter": "model.adapter: the adapter has changed since this run began; start a new run",
        "processes": f"trainer.devices: this run began on {before} processes, not {now}; resume it on {before}",
    }
    for name in differing if resumes else ("base", "template"):
        if recorded[name] != current[name]:
            raise UserError(differing[name])

"""The base model's folder: what is refused, its context length, and its fingerprint."""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from formtune.errors import UserError, as_user_error
from formtune.formats import Format

BLOCK, BLOCKS = 4096, 256  # bytes of a block, and blocks per file: reading all of a large base takes minutes


def meta_model(base: str) -> Any:
    """The model on the meta device: names and shapes of its layers, no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with as_user_error(f"model.base: {base} cannot be loaded"):
        check_folder(base)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_folder(base: str) -> None:
    """Refuse an adapter, and files that point elsewhere, before `transformers` follows them."""
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(check_base(base)) is not None:
        # transformers would load any base that the adapter names, from anywhere.
        raise UserError(f"model.base: {base} is an adapter; name the base it was trained on, or a merged model")
    index = Path(base, "model.safetensors.index.json")
    if index.is_file():
        for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise UserError(f"model.base: {index} names {name!r}; weights must be safetensors files beside it")
    attention = AutoConfig.from_pretrained(base, trust_remote_code=False)._attn_implementation
    if attention is not None and "/" in attention:
        raise UserError(f"model.base: config.json of {base} asks for a kernel to download ({attention}); remove it")


def check_base(base: str, key: str = "model.base") -> str:
    """Return `base` if it is a local model folder or can be a Hub id, so that a mistyped path never goes online."""
    if not Path(base).is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base) or base.startswith(".") or Path(base).parent.is_dir():
            raise UserError(f"{key}: no folder {base} (Hub ids look like owner/name)")
        _go_offline_if_unreachable()
    return base


@functools.cache
def _go_offline_if_unreachable() -> None:
    """Switch the hub to offline mode if it cannot be reached: else each call would retry for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # no name, no route, no proxy, no certificate
            constants.HF_HUB_OFFLINE = True


def base_folder(base: str) -> Path:
    """The folder of a base; for a Hub id the one in the local cache."""
    if Path(base).is_dir():
        return Path(base)
    from transformers.utils.hub import cached_file

    try:
        return Path(str(cached_file(check_base(base), "config.json", local_files_only=True))).parent
    except OSError:
        raise UserError(f"{base}: the base is neither a folder nor in the local Hub cache") from None


@functools.lru_cache(maxsize=4)
def context_length(base: str) -> int | None:
    """The base model's context length in tokens, None if its config has none."""
    from transformers import AutoConfig

    check_base(base)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except Exception:  # loading the model will say what is wrong with the folder
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)


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

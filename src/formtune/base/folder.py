"""What a model folder may not ask for: files outside it, pickles, another base, code to download and run."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from formtune.errors import UserError

INDEX = "model.safetensors.index.json"


def skeleton(base: str) -> Any:
    """The model without its weights, None where its folder does not say what it is."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        check_folder(base)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except UserError:
        raise
    except Exception:  # of as many kinds as there are ways to damage a file; loading the model says which
        return None


def check_folder(base: str) -> None:
    """Look at a base before `transformers` follows what its files say.

    Raises:
        UserError: It is an adapter, or its files lead elsewhere.
    """
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(check_base(base)) is not None:
        # transformers would load whatever base the adapter names, from anywhere.
        raise UserError(f"model.base: {base} is an adapter; name the base it was trained on, or a merged model")
    index = Path(base) / INDEX
    if index.is_file():
        for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise UserError(f"model.base: {index} names {name!r}; weights must be safetensors files beside it")
    attention = AutoConfig.from_pretrained(base, trust_remote_code=False)._attn_implementation
    if attention is not None and "/" in attention:
        raise UserError(f"model.base: config.json of {base} asks for a kernel to download ({attention}); remove that")


def check_base(base: str) -> str:
    """Return `base` if it is a local model folder or can be a hub id, so that a mistyped path never goes online."""
    if not Path(base).is_dir() and (not re.fullmatch(r"[\w.-]+/[\w.-]+", base) or base.startswith(".")):
        raise UserError(f"model.base: no folder {base} (hub ids look like owner/name)")
    if not Path(base).is_dir():
        _look_for_hub()
    return base


@functools.cache
def _look_for_hub() -> None:
    """Ask once whether the hub can be reached; else each call would ask again for half a minute, and then use the
    files that are there already."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # of many kinds: no name, no route, no proxy, no certificate
            constants.HF_HUB_OFFLINE = True


@functools.lru_cache(maxsize=4)
def context_length(base: str) -> int | None:
    """Tokens that the base model was made for, None where its config does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(check_base(base), trust_remote_code=False)
    except UserError:
        raise
    except Exception:  # of as many kinds as there are ways to damage a file
        return None  # loading the model says what is wrong with the folder
    return getattr(config.get_text_config(), "max_position_embeddings", None)

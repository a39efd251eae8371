"""What a model folder may not ask for: files outside it, pickles, another base, code to download and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from formtune.errors import UserError
from formtune.rendering import check_base

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

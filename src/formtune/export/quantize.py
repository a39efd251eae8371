"""Quantization schemes, called in a fresh process: their packages are never imported in training."""

import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import distributions
from typing import Any

from formtune.export.gguf import to_gguf

GROUPS = (128, 64, 32)  # inputs that share a scale in GPTQ and AWQ; all kernels of vLLM accept these
EXTRAS = {  # extra and its packages, for each kind, server and the chat client
    "int8": ("quantize", ("torchao",)),
    "nf4": ("quantize", ("bitsandbytes",)),
    "gptq": ("gptq", ("gptqmodel", "optimum")),
    "awq": ("gptq", ("gptqmodel", "optimum")),
    "gguf": ("gguf", ("xllamacpp",)),
    "llamacpp": ("gguf", ("xllamacpp",)),
    "transformers": ("serve", ("fastapi", "uvicorn", "openai")),
    "chat": ("synthesize", ("openai",)),
}


def missing_package(what: str) -> str | None:
    """The package that a kind or server needs and that is not installed, with its install command."""
    extra, packages = EXTRAS.get(what, ("", ()))
    missing = (name for name in packages if not list(distributions(name=name)))
    return next((f"needs {name}; pip install -e '.[{extra}]'" for name in missing), None)


def folder_name(kind: str, quant: str | None = None, adapter: str | None = None, **_: Any) -> str:
    """Name of an export's folder in its run, such as `gguf-q8_0`."""
    return "-".join(filter(None, [kind, "adapter" if adapter else None, quant]))


def group_size(model: Any) -> int | None:
    """The largest group that divides the inputs of every linear layer; None if none does."""
    from torch import nn

    head = model.get_output_embeddings()  # not quantized by any scheme
    widths = {layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head}
    return next((group for group in GROUPS if all(width % group == 0 for width in widths)), None)


def _transformers(scheme: str, source: str, target: str, rows: list[list[int]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    if scheme == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        # Without double quantization, a forward pass on a CPU with AVX512-BF16 repacks the weights in place, and saving
        # then writes another model (bitsandbytes 0.50).
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map=device, trust_remote_code=False, use_safetensors=True
    ).save_pretrained(target)


def _gptqmodel(scheme: str, source: str, target: str, rows: list[list[int]]) -> None:
    # Its loader needs two workers, but sets one on a small machine, and fails.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    from formtune.base.folder import meta_model

    method, layout = (METHOD.GPTQ, FORMAT.GPTQ) if scheme == "gptq" else (METHOD.AWQ, FORMAT.GEMM)
    group = group_size(meta_model(source))
    config = QuantizeConfig(bits=4, group_size=group, method=method, format=layout, offload_to_disk=False)
    model = GPTQModel.load(source, config)
    # The default AWQ backend needs a GPU.
    backend = BACKEND.AUTO if torch.cuda.is_available() or scheme == "gptq" else BACKEND.AWQ_TORCH
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows], backend=backend)
    model.save(target)


# How each kind is made. A new one also needs a name in `exported.KINDS`, and `EXTRAS` if it needs packages.
SCHEMES: dict[str, Callable[..., None]] = {
    "int8": partial(_transformers, "int8"),
    "nf4": partial(_transformers, "nf4"),
    "gptq": partial(_gptqmodel, "gptq"),
    "awq": partial(_gptqmodel, "awq"),
    "gguf": to_gguf,
}

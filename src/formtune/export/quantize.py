"""Quantize a merged model folder into another. Called in a fresh process: the packages never reach training."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import distributions
from typing import Any

GROUPS = (128, 64, 32)  # inputs that share a scale in GPTQ and AWQ; all kernels of vLLM take these
CALIBRATED = ("gptq", "awq")  # need rows, whose activations they look at
PACKAGES = {  # that make and load each scheme
    "int8": ("torchao",),
    "nf4": ("bitsandbytes",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "optimum"),
}


def lacking(scheme: str) -> str | None:
    """The package that a scheme needs and that is not installed, with the command that installs it."""
    for package in PACKAGES.get(scheme, ()):
        if not list(distributions(name=package)):
            return f"needs {package}: pip install -e '.[{'gptq' if scheme in CALIBRATED else 'quantize'}]'"
    return None


def group_size(inputs: Iterable[int]) -> int | None:
    """The largest group that divides the inputs of every layer; None where none does."""
    widths = list(inputs)
    return next((group for group in GROUPS if all(width % group == 0 for width in widths)), None)


def quantize(scheme: str, source: str, target: str, rows: list[list[int]], group: int | None) -> None:
    """Quantize the merged model in a folder into another one; `CALIBRATED` look at rows of token ids."""
    if scheme in CALIBRATED:
        return _gptqmodel(scheme, source, target, rows, group)
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    if scheme == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        # Without double quantization a forward pass on a CPU with AVX512-BF16 repacks the weights in place, and saving
        # after it writes another model (bitsandbytes 0.50).
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map=device, trust_remote_code=False, use_safetensors=True
    )
    model.save_pretrained(target)


def _gptqmodel(scheme: str, source: str, target: str, rows: list[list[int]], group: int | None) -> None:
    # Its loader asks for two workers; on a small machine it gives itself one, and fails.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    method, form = (METHOD.GPTQ, FORMAT.GPTQ) if scheme == "gptq" else (METHOD.AWQ, FORMAT.GEMM)
    config = QuantizeConfig(bits=4, group_size=group, method=method, format=form, offload_to_disk=False)
    model = GPTQModel.load(source, config)
    # The default AWQ backend needs a GPU.
    backend = BACKEND.AUTO if torch.cuda.is_available() or scheme == "gptq" else BACKEND.AWQ_TORCH
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows], backend=backend)
    model.save(target)

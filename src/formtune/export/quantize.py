"""Quantise a merged model folder into another, in a process of its own.

Run by its path with any interpreter that has the scheme's packages, so that theirs never reach training: it imports
nothing of formtune. `python quantize.py SCHEME SOURCE TARGET REQUEST`, the last one a JSON file with `rows`, token ids
of rows like those that the model will see, `group`, as `group_size` says, and `maker`, one of `MAKERS`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GROUPS = (128, 64, 32)  # input features that share a scale in GPTQ and AWQ, of which all kernels of vLLM know these
CALIBRATED = ("gptq", "awq")  # look at activations
MAKERS = ("llmcompressor", "gptqmodel")  # of these two
PACKAGES = {  # that load what was made
    "int8": ("torchao",),
    "nf4": ("bitsandbytes",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "optimum"),
    "llmcompressor": ("compressed-tensors",),  # its GPTQ and AWQ
}


def group_size(inputs: Iterable[int]) -> int | None:
    """The largest group that divides the inputs of every layer; None where none does."""
    widths = list(inputs)
    return next((group for group in GROUPS if all(width % group == 0 for width in widths)), None)


def quantize(scheme: str, source: str, target: str, rows: list[list[int]], group: int | None, maker: str) -> None:
    """Write the quantised model into a folder, in safetensors.

    Args:
        scheme: `int8`, `nf4` or one of `CALIBRATED`.
        source: Folder of the merged model.
        target: Folder to create.
        rows: Token ids, for `CALIBRATED`.
        group: Input features that share a scale, for the same schemes.
        maker: One of `MAKERS`, for the same schemes.
    """
    if scheme in CALIBRATED:
        (_llmcompressor if maker == "llmcompressor" else _gptqmodel)(scheme, source, target, rows, group)
        return
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    config: Any
    if scheme == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        # With double quantisation: without it a forward pass on a CPU with AVX512-BF16 repacks the weights in place,
        # and what is saved after it is another model (bitsandbytes 0.50).
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
    # Its loader asks for two workers, of which it gives itself one on a small machine.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    method, form = (METHOD.GPTQ, FORMAT.GPTQ) if scheme == "gptq" else (METHOD.AWQ, FORMAT.GEMM)
    config = QuantizeConfig(bits=4, group_size=group, method=method, format=form, offload_to_disk=False)
    model = GPTQModel.load(source, config)
    # The default AWQ backend wants a GPU.
    backend = BACKEND.AUTO if torch.cuda.is_available() or scheme == "gptq" else BACKEND.AWQ_TORCH
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows], backend=backend)
    model.save(target)


def _llmcompressor(scheme: str, source: str, target: str, rows: list[list[int]], group: int | None) -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    if not torch.accelerator.is_available():
        # Its AWQ pins memory, for a faster way to a GPU, whether there is one or not; torch refuses without one (0.14).
        IntermediatesCache.pin_memory = lambda *_: None
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False, use_safetensors=True)
    # Symmetric: transformers 5.23 does not load the zero points of its other form.
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    what: Any = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [path for path, layer in model.named_modules() if layer is model.get_output_embeddings()],
    }
    recipe = [GPTQModifier(**what)] if scheme == "gptq" else [AWQModifier(), QuantizationModifier(**what)]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]})
    oneshot(
        model=model, dataset=dataset, recipe=recipe, num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(target)


if __name__ == "__main__":
    scheme, source, target, request = sys.argv[1:]
    quantize(scheme, source, target, **json.loads(Path(request).read_text(encoding="utf-8")))

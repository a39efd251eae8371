"""Convert a merged model's folder into another. Called in a fresh process: the packages never reach training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Any


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to store a merged model. A new one is an entry in `SCHEMES` and a name in `training.manifest.KINDS`."""

    convert: Callable[[str, str], None]  # from one folder to another
    packages: tuple[str, ...]  # that make and load it
    extra: str  # of `pip install`, with these packages


def lacking(kind: str) -> str | None:
    """The package that a kind needs and that is not installed, with the command that installs it."""
    for package in SCHEMES[kind].packages if kind in SCHEMES else ():
        if not list(distributions(name=package)):
            return f"needs {package}: pip install -e '.[{SCHEMES[kind].extra}]'"
    return None


def _int8(source: str, target: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    _convert(source, target, TorchAoConfig(Int8WeightOnlyConfig()))


def _nf4(source: str, target: str) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    # Without double quantization a forward pass on a CPU with AVX512-BF16 repacks the weights in place, and saving
    # after it writes another model (bitsandbytes 0.50).
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    _convert(source, target, config)


def _convert(source: str, target: str, config: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map=device, trust_remote_code=False, use_safetensors=True
    ).save_pretrained(target)


SCHEMES = {
    "int8": Scheme(_int8, ("torchao",), "quantize"),
    "nf4": Scheme(_nf4, ("bitsandbytes",), "quantize"),
}

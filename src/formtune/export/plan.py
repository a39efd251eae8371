"""What is to be deployed, as far as rules need to know it: shapes and names, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from formtune.base.folder import check_base
from formtune.errors import UserError, first_line


@dataclass(frozen=True, slots=True)
class Plan:
    """A base and the adapter on it.

    Args:
        adapter: The adapter's configuration as PEFT writes it.
        targets: Paths of the layers that the adapter changes.
        layers: Path, and (inputs, outputs), of each linear layer but the output head.
        biased: Paths of the linear layers with a bias.
        conv1d: Whether linear layers are Conv1D, their weights transposed (GPT-2).
        embeddings: Paths of the input embeddings and of the output head.
        tied: Whether these two share their weights.
        quantized: Method by which the base is quantised on disk, None where it is whole.
        qlora: Whether the adapter is trained on a base in 4 bits.
    """

    adapter: dict[str, Any]
    targets: frozenset[str]
    layers: dict[str, tuple[int, int]]
    biased: frozenset[str]
    conv1d: bool
    embeddings: frozenset[str]
    tied: bool
    quantized: str | None
    qlora: bool


def read_config(base: str) -> Any:
    """The base's configuration.

    Raises:
        UserError: There is none that transformers can read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(check_base(base), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.base: {base} cannot be loaded ({first_line(error)})") from None


def skeleton(base: str) -> Any:
    """The base without weights: every layer's name and shape.

    Raises:
        UserError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(base)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever an architecture raises, the user's remedy is another folder
        raise UserError(f"model.base: {base} cannot be loaded ({first_line(error)})") from error


def plan(model: Any, adapter: Any, qlora: bool) -> Plan:
    """What the rules look at.

    Args:
        model: The base, with or without weights.
        adapter: A `LoraConfig`.
        qlora: Whether it is trained on the base in 4 bits.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    layers, biased, targets, ends = {}, set(), set(), set()
    conv1d = False
    for path, layer in model.named_modules():
        linear = isinstance(layer, nn.Linear)
        if layer is head or layer is embedding:
            ends.add(path)
        elif linear:
            layers[path] = (layer.in_features, layer.out_features)
        elif type(layer).__name__ == "Conv1D":
            conv1d = linear = True
            layers[path] = (layer.nx, layer.nf)
        if linear and getattr(layer, "bias", None) is not None:
            biased.add(path)
        if adapter.target_modules == "all-linear":
            targets |= {path} & layers.keys()
        elif adapter.target_modules and (linear or layer is embedding) and check_target_module_exists(adapter, path):
            targets.add(path)
    quantization = getattr(model.config, "quantization_config", None) or {}
    quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return Plan(
        adapter=adapter.to_dict(),
        targets=frozenset(targets),
        layers=layers,
        biased=frozenset(biased),
        conv1d=conv1d,
        embeddings=frozenset(ends),
        tied=bool(model.config.get_text_config().tie_word_embeddings),
        quantized=quantization.get("quant_method"),
        qlora=qlora,
    )

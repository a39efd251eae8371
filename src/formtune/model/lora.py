"""Load a frozen base model and add LoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor, nn

from formtune.base.folder import check_folder, skeleton
from formtune.errors import UserError, first_line
from formtune.model.shared_lora import LoraLinear, share_inputs


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters W + (alpha / r) B A on chosen layers of a frozen base (Hu et al. 2021, arXiv:2106.09685).

    Args:
        r: Rank of the adapters; choose it by evidence among 8, 16, 32, 64.
        alpha: Numerator of the scale alpha / r; twice the rank where it is not given.
        dropout: Share of the adapter's inputs that is dropped in training.
        targets: `attention` (query, key, value and output projections), `all-linear`, or names of layers.
        rslora: Scale by alpha / sqrt(r), which keeps high ranks stable (arXiv:2312.03732).
        dora: Learn magnitude and direction separately (arXiv:2402.09353); slower.
        initialization: How A and B begin: true for Kaiming and zero, or a method of PEFT's that needs no data.
        modules_to_save: Names of layers to train in full and to store with the adapter.
    """

    r: PositiveInt = 16
    alpha: PositiveInt | None = None
    dropout: ClosedUnitInterval = 0.05
    targets: Literal["attention", "all-linear"] | list[str] = "attention"
    rslora: bool = False
    dora: bool = False
    initialization: Literal[True, "gaussian", "pissa", "olora", "orthogonal"] = True
    modules_to_save: list[str] = field(default_factory=list)


def load_base(base: str, dtype: torch.dtype, quantize: str | None, device: torch.device) -> Any:
    """The base model of a folder or hub id; refuses a folder that is damaged, incomplete or needs remote code."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    extra: dict[str, Any] = {}
    if quantize:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise UserError("model.quantize: 4-bit needs bitsandbytes; pip install 'formtune[qlora]'") from None
        extra["device_map"] = {"": device}
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    try:
        check_folder(base)
        # Pickle files are never read: a base without safetensors is refused.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **extra
        )
    except UserError:
        raise
    except Exception as error:  # whatever a damaged folder raises, the remedy is another folder
        raise UserError(f"model.base: {base} cannot be loaded ({first_line(error)})") from error
    model, info = loaded
    wrong = {name: sorted(info[name]) for name in ("missing_keys", "mismatched_keys", "error_msgs") if info.get(name)}
    if wrong:
        # transformers would continue with random numbers in these tensors.
        name, keys = next(iter(wrong.items()))
        raise UserError(f"model.base: {base} is incomplete ({len(keys)} {name.replace('_', ' ')}, first {keys[0]})")
    if any(p.is_floating_point() and not torch.isfinite(p).all() for p in model.parameters()):
        raise UserError(f"model.base: {base} holds weights that are not finite numbers")
    # A base may ship sampling, penalties or forced tokens; `generate` would merge them into every call.
    model.generation_config = GenerationConfig()
    # Only adapters get dropout: the base's own from pre-training (GPT-2 ships 0.1) would only add noise to the loss.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def check_layers(base: str, lora: Lora) -> None:
    """Check the layers' names before the base's weights are read."""
    if (model := skeleton(base)) is not None:
        lora_config(model, lora)


def lora_config(model: Any, lora: Lora) -> Any:
    """PEFT's configuration of the adapters; the model's weights are not read."""
    from peft import LoraConfig

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha or 2 * lora.r,
        lora_dropout=lora.dropout,
        target_modules=target_names(model, lora.targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=lora.initialization,
        modules_to_save=_checked(model, lora.modules_to_save, "modules_to_save", nn.Module) or None,
        # Conv1D (GPT-2) stores its weight transposed; PEFT warns if it is not told.
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )
    tied = {"lm_head", "embed_out", "embed_tokens", "embed_in", "wte"} & set(lora.modules_to_save)
    if tied and model.config.get_text_config().tie_word_embeddings:
        raise UserError(
            f"model.lora.modules_to_save: this base ties its embeddings, so {min(tied)} cannot be trained alone"
        )
    return config


def add_lora(model: Any, lora: Lora, quantized: bool = False) -> Any:
    """The model with trainable adapters; everything else is frozen."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    config = lora_config(model, lora)
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if not (quantized or lora.dora):
        config._register_custom_module({nn.Linear: LoraLinear})
    # from_pretrained returns the model in evaluation mode, and Lightning keeps it: dropout would stay off.
    tuned = get_peft_model(model, config).train()
    share_inputs(tuned)
    for parameter in tuned.parameters():
        if parameter.requires_grad:  # copies of layers trained in full would stay in the base's 16 bits
            parameter.data = parameter.data.float()
    return tuned


def compile_layers(model: nn.Module) -> None:
    """Compile the decoder layers: their code is the same, while a whole model is recompiled for each kind of call."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)


def check_adapters(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose adapters have other names or shapes than the model's own, or non-finite weights."""
    names = sorted(set(own) ^ set(loaded)) or sorted(name for name in own if loaded[name].shape != own[name].shape)
    if names:
        raise UserError(f"ckpt_path: the checkpoint has another model.lora (targets or rank); first {names[0]}")
    if not all(torch.isfinite(value).all() for value in loaded.values()):
        raise UserError("ckpt_path: the checkpoint holds weights that are not finite numbers")


def target_names(model: nn.Module, targets: str | list[str]) -> str | list[str]:
    """PEFT's `target_modules` for any architecture.

    `attention` means every linear layer inside an attention module: q, k, v, o where they are separate (Llama, Qwen,
    Mistral, Gemma), or fused (qkv_proj, query_key_value, c_attn). A name that also occurs outside attention, such as
    GPT-2's `c_proj`, is prefixed with its parent's name.
    """
    if targets == "all-linear":
        return targets
    if isinstance(targets, list):
        if not targets:
            raise UserError("model.lora.targets: the list is empty; name layers, or `attention`, or `all-linear`")
        return _checked(model, targets, "targets", None)
    inside, outside = set(), set()
    for path, layer in model.named_modules():
        if _is_linear(layer) and "." in path:
            parent, _, name = path.rpartition(".")
            if "attention" in type(model.get_submodule(parent)).__name__.lower():
                inside.add((parent.rpartition(".")[2], name))
            else:
                outside.add(name)
    if not inside:
        raise UserError("model.lora.targets: this model has no attention layers by that name; use all-linear or a list")
    return sorted({f"{parent}.{name}" if name in outside else name for parent, name in inside})


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def _checked(model: nn.Module, names: list[str], key: str, kind: type | None) -> list[str]:
    """The names, each of which must be the end of some layer's path."""
    layers = {path for path, layer in model.named_modules() if (isinstance(layer, kind) if kind else _is_linear(layer))}
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in layers):
            linear = ", ".join(sorted({path.rpartition(".")[2] for path, m in model.named_modules() if _is_linear(m)}))
            raise UserError(f"model.lora.{key}: no layer is called {name!r}; the linear ones are {linear}")
    return names

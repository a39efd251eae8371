"""Load a frozen base model and add LoRA adapters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor, nn

from formtune.base.folder import check_folder
from formtune.errors import UserError, first_line
from formtune.model.shared_lora import LoraLinear, share_inputs


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters W + (alpha / r) B A on chosen layers of a frozen base (Hu et al. 2021, arXiv:2106.09685).

    Args:
        r: Rank of the adapters; choose it by evidence among 8, 16, 32, 64.
        alpha: Numerator of the scale alpha / r; twice the rank if not given.
        dropout: Share of the adapter's inputs that is dropped in training.
        targets: `attention` (query, key, value and output projections), `all-linear`, or names of layers.
        rslora: Scale by alpha / sqrt(r), which keeps high ranks stable (arXiv:2312.03732).
        dora: Learn magnitude and direction separately (arXiv:2402.09353); slower.
    """

    r: PositiveInt = 16
    alpha: PositiveInt | None = None
    dropout: ClosedUnitInterval = 0.05
    targets: Literal["attention", "all-linear"] | list[str] = "attention"
    rslora: bool = False
    dora: bool = False


def load_base(base: str, dtype: torch.dtype, quantize: str | None, device: torch.device) -> Any:
    """The base model of a folder or hub id; refuses a folder that is damaged, incomplete or needs remote code."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    extra = _in_4_bits(dtype, device) if quantize else {}
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
    for name in ("missing_keys", "mismatched_keys", "error_msgs"):
        if keys := info.get(name):  # transformers would continue with random numbers in these tensors
            words = name.replace("_", " ")
            raise UserError(f"model.base: {base} is incomplete ({len(keys)} {words}, first {min(keys)})")
    if any(p.is_floating_point() and not torch.isfinite(p).all() for p in model.parameters()):
        raise UserError(f"model.base: {base} has non-finite weights")
    # A base may ship sampling, penalties or forced tokens; `generate` would merge them into every call.
    model.generation_config = GenerationConfig()
    # Only adapters get dropout: the base's own from pre-training (GPT-2 ships 0.1) would only add noise to the loss.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def _in_4_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("model.quantize: 4-bit needs bitsandbytes; pip install 'formtune[qlora]'") from None
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"device_map": {"": device}, "quantization_config": config}


def lora_config(model: Any, lora: Lora) -> Any:
    """PEFT's configuration of the adapters; the model's weights are not read."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha or 2 * lora.r,
        lora_dropout=lora.dropout,
        target_modules=target_names(model, lora.targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        # Conv1D (GPT-2) stores its weight transposed; PEFT warns if it is not told.
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )


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
    return tuned


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def check_adapters(expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose adapters have other names or shapes than the model's, or non-finite weights."""
    shapes = ({(name, tensor.shape) for name, tensor in state.items()} for state in (expected, loaded))
    if different := set.symmetric_difference(*shapes):
        name = min(name for name, _ in different)
        raise UserError(f"ckpt_path: the checkpoint has a different model.lora (targets or rank); first {name}")
    if not all(torch.isfinite(value).all() for value in loaded.values()):
        raise UserError("ckpt_path: the checkpoint has non-finite weights")


def target_names(model: nn.Module, targets: str | list[str]) -> str | list[str]:
    """PEFT's `target_modules`; `attention` means every linear layer in an attention module of any architecture.

    A name that also occurs outside attention, such as GPT-2's `c_proj`, is prefixed with its parent's name.
    """
    if targets == "all-linear":
        return targets
    linear = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    if isinstance(targets, list):
        if not targets:
            raise UserError("model.lora.targets: the list is empty; name layers, or `attention`, or `all-linear`")
        for name in targets:
            if not any(f".{path}".endswith(f".{name}") for path in linear):
                names = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
                raise UserError(f"model.lora.targets: no layer is called {name!r}; the linear ones are {names}")
        return targets
    parents = {path: path.rpartition(".")[0] for path in linear}
    inside = {path for path in linear if "attention" in type(model.get_submodule(parents[path])).__name__.lower()}
    if not inside:
        raise UserError("model.lora.targets: no attention layers recognized in this model; use all-linear or a list")
    outside = {path.rpartition(".")[2] for path in parents.keys() - inside}
    pairs = ((path.rpartition(".")[2], ".".join(path.split(".")[-2:])) for path in inside)
    return sorted({with_parent if name in outside else name for name, with_parent in pairs})

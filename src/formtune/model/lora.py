"""Load a frozen base model and add LoRA adapters.

Adapters with the same input x, such as query, key and value, compute dropout and A together: they share one dropout
mask m and one product h = (x * m) [A_1; A_2; ...]^T, since one A of a few rows is too thin for matrix units. Each adds
alpha/r h_i B_i^T to its base layer's output in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from formtune.base.folder import check_folder
from formtune.errors import UserError, as_user_error


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters W + (alpha / r) B A on chosen layers of a frozen base (Hu et al. 2021, arXiv:2106.09685).

    Args:
        r: Rank of the adapters; `formtune sweep` compares 8 to 64.
        alpha: Numerator of the scale alpha / r; twice the rank by default.
        dropout: Dropout probability of the adapters' inputs.
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


class SharedInput:
    """x A^T of layers that are called one after the other with the same tensor."""

    def __init__(self, layers: list["LoraLinear"]) -> None:
        # Layers are keyed by index: with objects as keys, torch.compile would recompile for each decoder layer.
        self.layers, self.sharing = layers, list(range(len(layers)))
        self._input: Tensor | None = None
        self._unused: dict[int, Tensor] = {}

    def down(self, index: int, x: Tensor) -> Tensor:
        """x A^T of one layer, shape (..., r), with dropout in training."""
        if self._input is not x or index not in self._unused:
            dropout = self.layers[index].lora_dropout["default"]
            if index != self.sharing[0]:
                return F.linear(dropout(x), self.layers[index].lora_a)
            # A layer that did not use its part last time has another input; from now on it computes alone.
            self.sharing = [i for i in self.sharing if i not in self._unused]
            weights = [self.layers[i].lora_a for i in self.sharing]
            h = F.linear(dropout(x), torch.cat(weights))
            self._unused = dict(zip(self.sharing, h.split([len(w) for w in weights], -1), strict=True))
        h = self._unused.pop(index)
        self._input = x if self._unused else None  # frees the activation as soon as possible
        return h


class LoraLinear(Linear):
    """PEFT's LoRA layer, computed together with those that share its input; parameter names stay the same."""

    shared: SharedInput
    index: int  # in `shared.layers`

    @property
    def lora_a(self) -> Tensor:
        return self.lora_A["default"].weight  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs or self.active_adapters != ["default"]:
            return super().forward(x, *args, **kwargs)
        out = self.base_layer(x)
        h, up = self.shared.down(self.index, x).to(out.dtype), self.lora_B["default"].weight.to(out.dtype)
        out.view(-1, out.size(-1)).addmm_(h.reshape(-1, h.size(-1)), up.T, alpha=self.scaling["default"])
        return out


def load_base(base: str, dtype: torch.dtype, quantize: str | None, device: torch.device) -> Any:
    """Load the base of a folder or Hub id on a device; refuse one that is damaged, incomplete or needs remote code."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    extra: dict[str, Any] = {}
    if quantize:
        if find_spec("bitsandbytes") is None:
            raise UserError("model.quantize: 4-bit needs bitsandbytes; pip install -e '.[qlora]'")
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        extra = {"device_map": {"": device}, "quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4)}
    with device, as_user_error(f"model.base: {base} cannot be loaded"):
        check_folder(base)
        # Pickle files are never read: a base without safetensors is refused.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **extra
        )
    model, info = loaded
    if keys := info["missing_keys"]:  # transformers would continue with random numbers in these tensors
        raise UserError(f"model.base: {base} is incomplete ({len(keys)} missing keys, first {min(keys)})")
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


def lora_config(model: Any, lora: Lora) -> Any:
    """PEFT's configuration of the adapters; the model's weights are not read."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha or 2 * lora.r,
        lora_dropout=lora.dropout,
        target_modules=target_names(model, lora.targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        # Conv1D (GPT-2) stores its weight transposed; PEFT warns without this key.
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )


def add_lora(model: Any, lora: Lora, quantized: bool = False) -> Any:
    """The model with trainable adapters; everything else is frozen."""
    config = lora_config(model, lora)
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if not (quantized or lora.dora):
        config._register_custom_module({nn.Linear: LoraLinear})
    # from_pretrained returns the model in evaluation mode, and Lightning keeps it: dropout would stay off.
    tuned = get_peft_model(model, config).train()
    for module in tuned.modules():
        layers = [layer for layer in module.children() if isinstance(layer, LoraLinear)]
        for width in {layer.in_features for layer in layers}:
            group = [layer for layer in layers if layer.in_features == width]
            shared = SharedInput(group)
            for index, layer in enumerate(group):
                layer.shared, layer.index = shared, index
    return tuned


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def raise_recompile_limit() -> None:
    """Let torch.compile keep 64 compiled versions of a function; beyond its default of 8, calls silently run eager."""
    torch._dynamo.config.recompile_limit = 64


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer: a compiled model would be recompiled for each kind of call."""
    raise_recompile_limit()
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def difference(expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> str | None:
    """The first parameter that only one of two state dicts has, or whose shape differs; None if there is none."""
    shapes = ({(name, tensor.shape) for name, tensor in state.items()} for state in (expected, loaded))
    return min((name for name, _ in set.symmetric_difference(*shapes)), default=None)


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

"""LoRA layers with the same input x, such as query, key and value, compute dropout and A together.

They share one dropout mask m and one product h = (x * m) [A_1; A_2; ...]^T, since one A of a few rows is too thin for
matrix units; each adds alpha/r h_i B_i^T to its base layer's output in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class SharedInput:
    """x A^T of layers that are called one after the other with the same tensor."""

    def __init__(self, layers: list["LoraLinear"]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        self._waiting: dict[LoraLinear, Tensor] = {}
        self.scale = 1.0  # 1 / (1 - dropout), applied by `LoraLinear.forward`

    def down(self, layer: "LoraLinear", x: Tensor) -> Tensor:
        """x A^T of one layer, shape (..., r), with dropout in training, to be multiplied by `scale`."""
        if self._input is not x or layer not in self._waiting:
            if layer is not self.layers[0]:
                return F.linear(self._drop(layer, x), layer.down)
            # A layer that did not take its part last time has another input; from now on it computes alone.
            self.layers = [sharing for sharing in self.layers if sharing not in self._waiting]
            weights = [sharing.down for sharing in self.layers]
            h = F.linear(self._drop(layer, x), torch.cat(weights) if len(weights) > 1 else weights[0])
            self._waiting = dict(zip(self.layers, h.split([len(w) for w in weights], -1), strict=True))
        h = self._waiting.pop(layer)
        self._input = x if self._waiting else None  # frees the activation as soon as possible
        return h

    def _drop(self, layer: "LoraLinear", x: Tensor) -> Tensor:
        dropout = layer.lora_dropout["default"]  # nn.Identity for a share of 0
        self.scale = 1.0
        if not layer.training or not isinstance(dropout, nn.Dropout):
            return x
        dropped = round(dropout.p * 2**16)
        if x.device.type != "cpu" or dropped == 2**16:  # 2**16: all are dropped, there is no scale
            return F.dropout(x, dropout.p)
        # On a CPU torch draws a number per element on one core; 16 bits of a draw are enough, so one serves four.
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
        self.scale = 2**16 / (2**16 - dropped)
        return torch.where(keep, x, 0.0)


class LoraLinear(Linear):
    """PEFT's LoRA layer, computed together with those that share its input; parameter names stay the same."""

    shared: SharedInput

    @property
    def down(self) -> Tensor:
        return self.lora_A["default"].weight  # type: ignore[return-value]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs or self.active_adapters != ["default"]:
            return super().forward(x, *args, **kwargs)
        out = self.base_layer(x)
        h, up = self.shared.down(self, x).to(out.dtype), self.lora_B["default"].weight.to(out.dtype)
        scale = self.scaling["default"] * self.shared.scale
        out.view(-1, out.size(-1)).addmm_(h.reshape(-1, h.size(-1)), up.T, alpha=scale)
        return out


def share_inputs(model: nn.Module) -> None:
    """Group the adapters of each module that have inputs of the same width."""
    for module in model.modules():
        layers = [layer for layer in module.children() if isinstance(layer, LoraLinear)]
        for width in {layer.in_features for layer in layers}:
            group = [layer for layer in layers if layer.in_features == width]
            shared = SharedInput(group)
            for layer in group:
                layer.shared = shared

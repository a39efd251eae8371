"""A causal language model under LoRA, trained on answers whose format is checked."""

from formtune.model.lora import Lora
from formtune.model.module import FormatModule

__all__ = ["FormatModule", "Lora"]

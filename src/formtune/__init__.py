"""LoRA fine-tuning of small language models whose answers must have exactly the declared format."""

__version__ = "0.1.0"

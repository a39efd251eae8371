"""Try an export before training, on two layers with random weights and the base's width."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.export.exporter import make, measure_fresh, merged
from formtune.export.measure import EXACT, Closeness, Reference, compare, last_logits
from formtune.model.lora import Lora, add_lora

LAYERS, CALIBRATION, COMPARED_ROWS = 2, 16, 2
NOISE = 0.02  # standard deviation of noise on the adapter, which would otherwise have no effect
ANSWER = 8  # tokens
# Random weights give nearly equal logits, so the most likely token says nothing. Another model is 1 or more apart,
# the same one rounded to 4 bits 0.1 to 0.3.
ROUNDED = Closeness(relative_max=0.6)


def attempt(
    target: str, base: str, lora: Lora, length: int, renderer: Renderer, prompts: Sequence[Row], folder: Path
) -> str:
    """Make a target in a folder, without the base's weights, and describe it; llama.cpp must render the prompts."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    gguf = target == "gguf"
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    config = shrink(config, full_vocabulary=gguf)  # the prompts need it
    dtype = getattr(config, "dtype", None) or torch.float32  # saving makes it a string
    vocabulary, draw = config.get_text_config().vocab_size, random.Random(0)
    rows = [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(CALIBRATION)]
    answered = prompts if gguf else [Row(rows[0], [], "", None, "")]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "base")
    model = add_lora(model, lora).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += NOISE * torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    renderer.tokenizer.save_pretrained(folder / "adapter")
    tuned = Reference(
        folder / "adapter", str(folder / "base"), None, dtype, rows, rows[:COMPARED_ROWS], answered,
        [ANSWER] * len(answered), renderer.stop_ids if gguf else (0,), renderer.tags,
    )  # fmt: skip
    if target == "merge":
        closeness = compare(last_logits(model, tuned.compared), last_logits(merged(tuned), tuned.compared))
        return f"{closeness.within(EXACT, 'the merged model')} after saving, loading and merging in float32"
    closeness, *_ = measure_fresh(tuned, target, make(tuned, target, folder))
    measured = f"{closeness.within(ROUNDED, 'the quantized model')} in a fresh process, at {len(answered[0])} tokens"
    return measured + (f"; llama.cpp renders {len(prompts)} prompts as training does" if gguf else "")


def shrink(config: Any, full_vocabulary: bool = False) -> Any:
    """The configuration with two layers, and a vocabulary that fits a small machine."""
    text = config.get_text_config()
    text.num_hidden_layers = min(LAYERS, text.num_hidden_layers)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = [kinds[0], kinds[-1]][: text.num_hidden_layers]
    if full_vocabulary:
        return config
    # A large vocabulary would be nine tenths of the work. Indivisible widths stay so.
    if text.vocab_size > 8192:
        text.vocab_size = 4096 + text.vocab_size % 4096
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # may exceed it
        setattr(text, name, None)
    return config

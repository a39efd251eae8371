"""Try the whole way to production before training, on two layers of the base's width with random weights: what fails
there depends on shapes, packages and the machine, not on what was learned."""

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from formtune.base.renderer import Renderer
from formtune.base.row import Row
from formtune.errors import UserError, first_line
from formtune.export.exporter import convert, measure_fresh
from formtune.export.measure import EXACT, POSITIONS, Closeness, Sample, compare, last_logits, merge
from formtune.model.lora import Lora, add_lora

LAYERS, CALIBRATION, COMPARED = 2, 16, 2
NOISE = 0.02  # standard deviation of what is added to the adapter, which would otherwise change nothing
ANSWER = 8  # tokens
# Random weights give nearly equal logits, so the most likely token says nothing. Another model is 1 and more apart,
# one that was rounded to 4 bits 0.1 to 0.3.
ROUNDED = Closeness(relative_max=0.6)


class Trial:
    """The task's adapter on a base of which only configuration and tokenizer are read."""

    def __init__(
        self, base: str, lora: Lora, length: int, folder: Path, renderer: Renderer, prompts: Sequence[Row] = ()
    ) -> None:
        from transformers import AutoConfig

        self.lora, self.folder, self.renderer = lora, folder, renderer
        self.prompts = prompts  # that llama.cpp must render; they need the whole vocabulary
        self.config = shrink(AutoConfig.from_pretrained(base, trust_remote_code=False), bool(prompts))
        self.dtype = getattr(self.config, "dtype", None) or torch.float32  # saving makes it a text
        vocabulary, draw = self.config.get_text_config().vocab_size, random.Random(0)
        self.rows = [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(CALIBRATION)]

    def attempt(self, target: str) -> tuple[str, str]:
        """Whether merging and, for a scheme, quantizing is `ok` or `fails`, and what was measured or went wrong."""
        try:
            measured = self.merged  # every scheme begins with it
            return "ok", measured if target == "merge" else self._quantized(target)
        except UserError as error:
            return "fails", str(error)
        except Exception as error:  # whatever a library raises here it would raise after training
            return "fails", f"{type(error).__name__}: {first_line(error)}"

    @functools.cached_property
    def merged(self) -> str:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        rows = [ids[:POSITIONS] for ids in self.rows[:COMPARED]]
        base = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        base.save_pretrained(self.folder / "base")
        tuned = add_lora(base, self.lora).eval()
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter += NOISE * torch.randn_like(parameter)
        tuned.save_pretrained(self.folder / "adapter", save_embedding_layers=False)
        logits = last_logits(tuned, rows)
        base = AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32)
        merged = merge(PeftModel.from_pretrained(base, self.folder / "adapter").eval(), rows)
        measured = compare(logits, last_logits(merged, rows)).within(EXACT, "the merged model")
        merged.to(self.dtype).save_pretrained(self.folder / "merged")
        self.renderer.tokenizer.save_pretrained(self.folder / "merged")  # GPTQModel opens it
        return f"{measured} after saving, loading and merging in float32"

    def _quantized(self, scheme: str) -> str:
        """Quantize the merged model, load it in a fresh process and let it answer; what was measured, in words."""
        source, target = self.folder / "merged", self.folder / scheme
        convert(scheme, source, target, self.rows)
        self.renderer.tokenizer.save_pretrained(target)
        gguf = scheme == "gguf"
        rows = self.prompts if gguf else [Row(self.rows[0], [], "", None, "")]
        sample = Sample(rows, [ANSWER] * len(rows), [-1] if gguf else [0], self.rows[:COMPARED], self.renderer.thinking)
        closeness, *_ = measure_fresh(scheme, {"folder": str(target)}, {"folder": str(source)}, sample)
        proven = f"; llama.cpp renders {len(rows)} prompts as training does" if gguf else ""
        measured = closeness.within(ROUNDED, "the quantized model")
        return f"{measured} in a fresh process, at {len(rows[0])} tokens{proven}"


def shrink(config: Any, whole_vocabulary: bool = False) -> Any:
    """The configuration with two layers, and a vocabulary that fits a small machine."""
    text = config.get_text_config()
    text.num_hidden_layers = min(LAYERS, text.num_hidden_layers)
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = [kinds[0], kinds[-1]][: text.num_hidden_layers]
    if whole_vocabulary:
        return config
    # A large vocabulary would be nine tenths of the work. A width that does not divide evenly still does not.
    if text.vocab_size > 8192:
        text.vocab_size = 4096 + text.vocab_size % 4096
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # may be beyond it
        setattr(text, name, None)
    return config

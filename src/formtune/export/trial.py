"""The way to production on a model of the real shape with random weights, before hours of training are spent.

Two layers of the base's width with the task's own adapter on them are saved, loaded, merged, quantised and loaded again
as the trained model will be. What goes wrong there depends on shapes, packages and the machine, not on what was learnt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from formtune.base.renderer import Renderer
from formtune.errors import UserError, first_line
from formtune.export.closeness import EXACT, POSITIONS, Closeness, Tolerance, compare, last_logits
from formtune.export.fresh_process import Maker, run_measurement, run_quantizer
from formtune.export.measure import Model, Request
from formtune.export.merge import merge
from formtune.export.plan import read_config
from formtune.export.quantize import group_size
from formtune.model.lora import Lora, add_lora

LAYERS = 2
NOISE = 0.02  # standard deviation of what is added to the adapter, which would otherwise do nothing
ROWS, CALIBRATION = 2, 16
ANSWER = 8  # tokens
# Random weights leave nearly equal logits, of which the largest says nothing. Another model is 1 and more apart, one
# that was rounded to 4 bits .1 to .3.
ROUNDED = Tolerance(relative_max=0.6)


class Trial:
    """One model, taken step by step.

    Args:
        base: Folder or hub id of the base, of which only the configuration is read.
        lora: The task's adapter.
        length: Tokens of the longest input to expect.
        folder: Where to write.
    """

    def __init__(self, base: str, lora: Lora, length: int, folder: Path) -> None:
        self.base, self.lora, self.folder = base, lora, folder
        self.config = cut(read_config(base))
        self.dtype = getattr(self.config, "dtype", None) or torch.float32
        vocabulary, draw = self.config.get_text_config().vocab_size, random.Random(0)
        self.rows = [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(max(ROWS, CALIBRATION))]

    def merged(self) -> str:
        """Save, load and merge the adapter; what was measured, in words.

        Raises:
            UserError: A step fails, or the model is another one after it.
        """
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.manual_seed(0)
        rows = [ids[:POSITIONS] for ids in self.rows[:ROWS]]  # length is nothing to a merge
        base = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        base.save_pretrained(self.folder / "base")
        tuned = add_lora(base, self.lora).eval()
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter += NOISE * torch.randn_like(parameter)
        tuned.save_pretrained(self.folder / "adapter", save_embedding_layers=False)
        made = last_logits(tuned, rows)
        del tuned, base
        again = AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32)
        model = PeftModel.from_pretrained(again, self.folder / "adapter").eval()
        _check("the adapter is another one after it was saved", compare(made, last_logits(model, rows)), EXACT)
        whole, closeness = merge(model, rows)
        _check("the merged model is another one", closeness, EXACT)
        self.group = group_size(
            layer.in_features
            for layer in whole.modules()
            if isinstance(layer, torch.nn.Linear) and layer is not whole.get_output_embeddings()
        )
        whole.to(self.dtype).save_pretrained(self.folder / "merged")
        Renderer.load(self.base).tokenizer.save_pretrained(self.folder / "merged")  # GPTQModel opens it
        return f"{closeness} after saving, loading and merging in float32"

    def quantized(self, scheme: str, maker: Maker = Maker()) -> str:
        """Quantise the merged model, load it in a fresh process and let it answer; what was measured, in words.

        Raises:
            UserError: A step fails, or the model is another one after it.
        """
        source, target = self.folder / "merged", self.folder / scheme
        if not source.exists():
            raise UserError("not reached: there is no merged model to quantise")
        run_quantizer(scheme, source, target, self.rows[:CALIBRATION], self.group, maker)
        request = Request(
            model=Model(str(target)),
            reference=Model(str(source), dtype="float32"),
            compared=self.rows[:ROWS],
            answered=[(self.rows[0], [])],
            timed=[],
            stop=[0],
            limits=[ANSWER],
        )
        closeness = Closeness(**run_measurement(request)["closeness"])
        _check("the quantised model is another one", closeness, ROUNDED)
        return f"{closeness} in a fresh process, at {len(self.rows[0])} tokens"


def attempt(step: Callable[[], str]) -> tuple[bool, str]:
    """Whether a step went well, and what it says."""
    try:
        return True, step()
    except UserError as error:
        return False, str(error)
    except Exception as error:  # whatever a library raises here is what it would raise after training
        return False, f"{type(error).__name__}: {first_line(error)}"


def cut(config: Any) -> Any:
    """The configuration with two layers, and a vocabulary that fits a small machine."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = min(LAYERS, text.num_hidden_layers)
    if kinds:
        text.layer_types = [kinds[0], kinds[-1]][: text.num_hidden_layers]
    # Embeddings of a large vocabulary would be nine tenths of the work; what does not divide evenly stays so.
    if text.vocab_size > 8192:
        text.vocab_size = 4096 + text.vocab_size % 4096
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # may lie beyond it
        setattr(text, name, None)
    return config


def _check(what: str, found: Closeness, tolerance: Tolerance) -> None:
    if broken := tolerance.broken_by(found):
        raise UserError(f"{what}: {broken}")

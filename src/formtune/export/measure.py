"""Compare a model's logits with a reference, let it answer, and time it, with plain transformers and PEFT."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import threading
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from formtune.base.row import Row, Tags
from formtune.errors import UserError, first_line
from formtune.evaluation.outcomes import Decoded
from formtune.model.lora import load_base
from formtune.model.micro_batches import MicroBatches

POSITIONS = 64  # the last of each row: the answer and the end of its prompt
TOKENS = 16_384  # of one micro-batch, answers included
COMPARED_ROWS = 32
TIMED, TRIES = 48, 5  # tokens of a timed answer, and repetitions


@dataclass(frozen=True, slots=True)
class Reference:
    """The adapter on its base, and the data to calibrate and measure an export with."""

    adapter: Path
    base: str
    quantize: str | None  # of the base in training
    dtype: torch.dtype  # of the stored base
    calibration: Sequence[list[int]]  # rows of token ids
    compared: Sequence[list[int]]  # token ids, on which two models' logits are compared
    rows: Sequence[Row]  # to answer
    limits: Sequence[int]  # tokens that each answer may have
    stop: Sequence[int]  # tokens that end an answer
    tags: Tags = None  # around the reasoning
    timed: Sequence[int] = ()  # token ids of a prompt; if empty, nothing is timed
    schema: Any = None  # of every answer; llama.cpp is timed with and without it

    def bounds(self, kind: str) -> Closeness:
        """How close an export of this kind must be."""
        stored = EXACT if self.dtype is torch.float32 else ROUNDED
        return {"adapter": stored, "merged": QLORA if self.quantize else stored}.get(kind, QUANTIZED)


@dataclass(frozen=True, slots=True)
class Closeness:
    """How close a model is to its reference, or must be; NaN if a logit is not finite."""

    relative_max: float = math.inf  # largest difference of two logits, as a fraction of the largest logit
    kl: float = math.inf  # Kullback-Leibler divergence from the reference, mean over tokens, in nats
    top1: float = 0.0  # fraction of tokens whose most likely token is the same

    def __str__(self) -> str:
        return f"logits {self.relative_max:.1e} apart, KL {self.kl:.1e}, top-1 {self.top1:.1%}"

    def violation(self, closeness: Closeness) -> str | None:
        """The metrics and the bounds if one is broken, also by NaN; else None."""
        kept = closeness.relative_max <= self.relative_max and closeness.kl <= self.kl and closeness.top1 >= self.top1
        return None if kept else f"{closeness}; the limits are {self}"

    def within(self, bounds: Closeness, name: str) -> Self:
        """Returns itself if the model of this name is within the limits; else raises a UserError."""
        if broken := bounds.violation(self):
            raise UserError(f"{name} is not the same model as the adapter: {broken}")
        return self


# Measured differences were 2 to 100 times below the first two (docs/deployment.md). The last two are estimates; the
# test rows decide too.
EXACT = Closeness(relative_max=1e-4)  # float32: only the order of sums differs
# Stored in 16 bits: correct adapters and merges of the demo were 2.4e-2 and 5.4e-2 apart, at one logit of thousands.
ROUNDED = Closeness(relative_max=1e-1, kl=1e-3, top1=0.99)
QLORA = Closeness(kl=1e-2, top1=0.97)  # trained on a 4-bit base, merged into the full-precision base
QUANTIZED = Closeness(kl=0.05, top1=0.95)


@torch.no_grad()
def last_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of the last positions of each row of token ids, in float32 on the CPU; one row at a time, no padding."""
    logits = []
    for ids in rows:
        output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        logits.append(output.logits[0, -POSITIONS:].float().cpu())
    return logits


def compare(reference: Sequence[Tensor], logits: Sequence[Tensor]) -> Closeness:
    """How close the second model's logits are to the reference's, over all rows."""
    largest = scale = torch.zeros(())
    nats = same = tokens = 0.0
    for expected, actual in zip(reference, logits, strict=True):
        largest = torch.maximum(largest, (actual - expected).abs().max())  # keeps a NaN, unlike Python's max
        scale = torch.maximum(scale, expected.abs().max())
        nats += float(F.kl_div(actual.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True))
        same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        tokens += len(expected)
    return Closeness(float(largest / scale), max(nats / tokens, 0.0), same / tokens)


def merge(model: Any, rows: Sequence[Sequence[int]]) -> Any:
    """Merge a float32 `PeftModel` in place; raise a UserError if the result differs on rows of token ids."""
    # PEFT's own `safe_merge` only looks for non-finite numbers; a wrong merge into shared embeddings passes it.
    unmerged = last_logits(model, rows)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except Exception as error:  # the kind depends on the layer
        raise UserError(f"the adapter cannot be merged: {first_line(error)}") from error
    compare(unmerged, last_logits(merged, rows)).within(EXACT, "the merged model")
    return merged


def load(folder: Path, base: str | None = None, dtype: Any = "auto", quantize: str | None = None) -> Any:
    """Load the model in a folder, or the adapter there on its base (quantized as in training)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if base is None:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, trust_remote_code=False, use_safetensors=True
        ).eval()
    return PeftModel.from_pretrained(load_base(base, dtype, quantize, device), folder).eval()


def measure(tuned: Reference, kind: str, folder: Path) -> tuple[Closeness, list[Decoded], dict[str, float]]:
    """How close an export is to the adapter in float32, its answers, and its tokens per second."""
    expected = last_logits(load(tuned.adapter, tuned.base, torch.float32, tuned.quantize), tuned.compared)
    dtype = tuned.dtype if tuned.quantize else "auto"  # which bitsandbytes does not take
    loaded = load(folder, tuned.base, dtype, tuned.quantize) if kind == "adapter" else load(folder)
    closeness = compare(expected, last_logits(loaded, tuned.compared))
    micro_batches, limits = MicroBatches(loaded), tuned.limits
    micro_batches.alone = not micro_batches.ignores_padding()
    split = micro_batches.split(tuned.rows, TOKENS, max(limits, default=0))
    answers = micro_batches.decode(tuned.rows, split, tuned.stop, limits)
    return closeness, answers, {"tokens_per_second": _speed(loaded, tuned.timed)} if tuned.timed else {}


@torch.no_grad()
def _speed(model: Any, prompt: Sequence[int]) -> float:
    """Tokens per second of a single answer, prompt included; the best of several tries."""
    ids = torch.tensor([prompt], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    answer = partial(model.generate, **inputs, min_new_tokens=TIMED, max_new_tokens=TIMED)
    return TIMED / min(timeit.repeat(answer, repeat=TRIES, number=1))


def call_fresh(function: Callable[..., Any], failure: str, **arguments: Any) -> Any:
    """Call a function in a fresh process; `failure` begins the message if it raises."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _quiet_and_offline) as pool:
        try:
            return pool.submit(function, **arguments).result()
        except BrokenProcessPool:
            raise UserError(f"{failure}: its process was killed, usually because memory ran out") from None
        except Exception as error:
            raise UserError(f"{failure}: {first_line(error)}") from None
        except KeyboardInterrupt:  # the pool would wait for its process
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _quiet_and_offline() -> None:
    parent: Any = multiprocessing.parent_process()  # if it is killed, nothing else ends this process
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ["HF_HUB_OFFLINE"] = "1"  # every file is on this disk already
    logging.disable(logging.WARNING)
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)

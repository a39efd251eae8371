"""Compare a model with the one that it should equal, logit by logit, and let it answer and be timed.

Models are loaded by plain transformers and PEFT, as production will load them.
"""

from __future__ import annotations

import timeit
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formtune.base.row import Row
from formtune.errors import UserError, first_line
from formtune.model.length_buckets import LengthBuckets
from formtune.model.lora import load_base

POSITIONS = 64  # the last ones of each row: the answer, and the end of its prompt
TOKENS = 16_384  # of one micro-batch, answers included
TIMED, TRIES = 48, 5  # tokens of a timed answer, and how often it is timed


@dataclass(frozen=True, slots=True)
class Closeness:
    """How close a model is to its reference."""

    relative_max: float  # largest difference of two logits, as a share of the largest logit
    kl: float  # Kullback-Leibler divergence from the reference, mean over tokens, in nats
    top1: float  # share of tokens whose most likely token is the same
    finite: bool  # whether every logit is a finite number

    def __str__(self) -> str:
        return f"logits {self.relative_max:.1e} apart, KL {self.kl:.1e}, top-1 {self.top1:.1%}"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The bounds of a `Closeness`; None where there is none."""

    relative_max: float | None = None
    kl: float | None = None
    top1: float | None = None

    def broken_by(self, closeness: Closeness) -> str | None:
        """The bound that is broken, in words; None if none is. NaN breaks every bound."""
        if not closeness.finite:
            return "logits that are not finite numbers"
        if self.relative_max is not None and not closeness.relative_max <= self.relative_max:
            return f"logits {closeness.relative_max:.1e} apart (at most {self.relative_max:.0e})"
        if self.kl is not None and not closeness.kl <= self.kl:
            return f"KL {closeness.kl:.1e} (at most {self.kl:.0e})"
        if self.top1 is not None and not closeness.top1 >= self.top1:
            return f"top-1 {closeness.top1:.1%} (at least {self.top1:.0%})"
        return None


# The first two were measured with room of 2 to 100 times (docs/deployment.md). The last two are judgement; the test
# rows decide beside them.
EXACT = Tolerance(relative_max=1e-4)  # float32: only the order of sums differs
# Stored in 16 bits: correct adapters and merges of the demo were 2.4e-2 and 5.4e-2 apart, at one logit of thousands.
ROUNDED = Tolerance(relative_max=1e-1, kl=1e-3, top1=0.99)
QLORA = Tolerance(kl=1e-2, top1=0.97)  # trained on a 4-bit base, merged into the full-precision base
QUANTIZED = Tolerance(kl=0.05, top1=0.95)


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
    largest = scale = nats = same = tokens = 0.0
    finite = True
    for expected, actual in zip(reference, logits, strict=True):
        finite &= bool(torch.isfinite(actual).all())
        largest = max(largest, float((actual - expected).abs().max()))
        scale = max(scale, float(expected.abs().max()))
        nats += float(F.kl_div(actual.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True))
        same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        tokens += len(expected)
    return Closeness(largest / scale, max(nats / tokens, 0.0), same / tokens, finite)


def merge(model: Any, rows: Sequence[Sequence[int]]) -> tuple[Any, Closeness]:
    """Merge a float32 `PeftModel` (it is used up) and compare the result with it on rows of token ids.

    PEFT's own `safe_merge` only looks for non-finite numbers; a wrong merge into shared embeddings passes it.
    """
    unmerged = last_logits(model, rows)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except Exception as error:  # ValueError, NotImplementedError, RuntimeError, AttributeError: by kind of layer
        raise UserError(f"the adapter cannot be merged: {first_line(error)}") from error
    return merged, compare(unmerged, last_logits(merged, rows))


def load(folder: str, base: str | None = None, dtype: str = "auto", quantize: str | None = None) -> Any:
    """The model in a folder, or the adapter there on its base (quantized as in training), ready to answer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    if base is None:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, device_map={"": device}, trust_remote_code=False, use_safetensors=True
        ).eval()
    model = load_base(base, kind, quantize, device)
    if quantize is None:  # a quantized base is on its device already
        model = model.to(device)
    return PeftModel.from_pretrained(model, folder).eval()


def measure(
    model: dict[str, Any],  # arguments of `load`
    reference: dict[str, Any],
    compared: list[list[int]],
    answered: list[tuple[list[int], list[int]]],  # prompts and targets
    limits: list[int],  # tokens that the answer to each of them may have
    stop: list[int],  # tokens that end an answer
    timed: list[int],
) -> dict[str, Any]:
    """`closeness` to the reference, `answers` in token ids, and `tokens_per_second` of single answers to `timed`."""
    expected = last_logits(load(**reference), compared)
    loaded = load(**model)
    closeness = asdict(compare(expected, last_logits(loaded, compared)))
    rows = [Row(prompt, target, "", None, "") for prompt, target in answered]
    micro_batches = LengthBuckets(loaded)
    answers = micro_batches.decode(rows, micro_batches.split(rows, TOKENS, max(limits, default=0)), stop, limits)
    speed = _speed(loaded, timed) if timed else None
    return {"closeness": closeness, "answers": answers, "tokens_per_second": speed}


@torch.no_grad()
def _speed(model: Any, prompt: Sequence[int]) -> float:
    """Tokens per second of a single answer, prompt included; the best try, which other work slowed the least."""
    ids = torch.tensor([prompt], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    answer = partial(model.generate, **inputs, min_new_tokens=TIMED, max_new_tokens=TIMED)
    return TIMED / min(timeit.repeat(answer, repeat=TRIES, number=1))

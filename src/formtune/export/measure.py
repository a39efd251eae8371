"""What a model folder says, in a fresh process and by plain transformers and PEFT: as production will load it.

In the process that made it a quantised model still holds what it was made from, and says the right thing from memory.
`python -m formtune.export.measure REQUEST RESULT`, both JSON files, in the form of `Request` and of `measure`'s result.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from formtune.base.row import Row
from formtune.export.closeness import compare, last_logits
from formtune.model.length_buckets import LengthBuckets
from formtune.model.lora import load_base

TOKENS = 16_384  # of one pass, answers included
TIMED = 48  # tokens of each timed answer
TRIES = 5


@dataclass(frozen=True, slots=True)
class Model:
    """Where a model lies.

    Args:
        folder: A whole model, or an adapter.
        base: Folder or hub id of the adapter's base, None for a whole model.
        dtype: Name of the type to compute in; `auto` is the one it is stored in.
        quantize: How the adapter's base is quantised, as `model.quantize`.
    """

    folder: str
    base: str | None = None
    dtype: str = "auto"
    quantize: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure.

    Args:
        model: The model.
        reference: The model whose logits it is compared with.
        compared: Token ids of the rows to compare on.
        answered: Prompts and wanted answers, in token ids, of the rows to answer; none to leave that out.
        timed: A prompt to time answers to; none to leave that out.
        stop: Tokens that end an answer.
        limits: Tokens that the answer to each row may have.
    """

    model: Model
    reference: Model
    compared: list[list[int]]
    answered: list[tuple[list[int], list[int]]]
    timed: list[int]
    stop: list[int]
    limits: list[int]


def load(where: Model) -> Any:
    """The model, ready to answer; on the GPU where there is one."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype: Any = where.dtype if where.dtype == "auto" else getattr(torch, where.dtype)
    if where.base is not None:
        from peft import PeftModel

        model: Any = load_base(where.base, dtype, where.quantize, device)
        if where.quantize is None:  # else it was placed when it was quantised
            model = model.to(device)
        model = PeftModel.from_pretrained(model, where.folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            where.folder, dtype=dtype, device_map={"": device}, trust_remote_code=False, use_safetensors=True
        )
    return model.eval()


def measure(request: Request) -> dict[str, Any]:
    """`closeness` to the reference, `answers` in token ids, and `tokens_per_second` of single answers."""
    wanted = last_logits(load(request.reference), request.compared)
    model = load(request.model)
    found: dict[str, Any] = {"closeness": compare(wanted, last_logits(model, request.compared)).to_dict()}
    rows = [Row(prompt, target, [False] * len(target), "", None, "") for prompt, target in request.answered]
    answers: list[list[int]] = [[] for _ in rows]
    for indices, _, said in LengthBuckets(model).evaluate(rows, TOKENS, request.stop, request.limits):
        for i, answer in zip(indices, said, strict=True):
            answers[i] = answer
    found["answers"] = answers
    found["tokens_per_second"] = _speed(model, request.timed) if request.timed else None
    return found


@torch.no_grad()
def _speed(model: Any, prompt: Sequence[int]) -> float:
    """Tokens per second of a single answer, its prompt included; the best of some, which other work slows the least."""
    ids = torch.tensor([prompt], device=model.device)
    seconds = []
    for _ in range(TRIES):
        started = time.perf_counter()
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=TIMED,
            max_new_tokens=TIMED, pad_token_id=0,
        )  # fmt: skip
        seconds.append(time.perf_counter() - started)
    return TIMED / min(seconds)


def _request(values: dict[str, Any]) -> Request:
    return Request(**values | {name: Model(**values[name]) for name in ("model", "reference")})


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    question, result = map(Path, sys.argv[1:])
    found = measure(_request(json.loads(question.read_text(encoding="utf-8"))))
    result.write_text(json.dumps(found), encoding="utf-8")

"""Validate as transformers alone does it: the loss with full logits, then batched greedy `generate`.

    python validate_generate.py MODEL ROWS.json OUT.json --adapter none --batch 32 --max-new 128

This is what a user of the Trainer gets who also wants generated answers: `evaluate` pads rows on the right, in the
order of the file, and computes logits for every position; `generate` takes prompts sorted by length, longest first,
padded on the left, until each has a stop token or `--max-new` tokens. A model with random weights never stops, so it
shows the longest a validation can take.

`--answers` gives a model of any size that predicts its targets, as a tuned one does: run again on the workload it
writes.

OUT.json: seconds of both parts and in total, the loss (mean over all target tokens), answers as ids in the order of the
rows, each up to and including its stop token.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import measure
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig


def pad(rows: list[list[int]], value: int, left: bool) -> Tensor:
    """The rows as one tensor."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(r)) + r if left else r + [value] * (width - len(r)) for r in rows])


@torch.no_grad()
def mean_loss(model: Any, rows: list[measure.Row], batch: int, pad_id: int) -> float:
    """Mean loss over the target tokens of all rows."""
    total, targets = 0.0, 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        whole = [row["prompt"] + row["target"] for row in part]
        ids = pad(whole, pad_id, left=False)
        # By position: the pad token may be the end of turn, which counts.
        seen = pad([[1] * len(r) for r in whole], 0, left=False)
        labels = pad([[-100] * len(row["prompt"]) + row["target"] for row in part], -100, left=False)
        count = sum(len(row["target"]) for row in part)
        total += model(input_ids=ids, attention_mask=seen, labels=labels, use_cache=False).loss.item() * count
        targets += count
    return total / targets


@torch.no_grad()
def answers(
    model: Any, prompts: list[list[int]], batch: int, max_new: int, stop: list[int], pad_id: int
) -> list[list[int]]:
    """Greedy answers in the order of the prompts."""
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new, eos_token_id=stop, pad_token_id=pad_id)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    result: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        ids = pad([prompts[i] for i in part], pad_id, left=True)
        seen = pad([[1] * len(prompts[i]) for i in part], 0, left=True)
        out = model.generate(input_ids=ids, attention_mask=seen, generation_config=config)
        for i, new in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
            end = next((at for at, token in enumerate(new) if token in stop), len(new) - 1)
            result[i] = new[: end + 1]
    return result


def arguments(description: str | None, batch: int) -> argparse.ArgumentParser:
    """What both ways of validating take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the base model")
    parser.add_argument("rows", type=Path, help="workload that workloads.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapter", default="none", help="folder of a PEFT adapter, or none")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--max-new", type=int, default=128)
    parser.add_argument("--stop", type=int, nargs="+", help="ids that end an answer (default: the workload's)")
    parser.add_argument("--limit", type=int, help="rows to use (default: all)")
    return parser


def main() -> None:
    """Validate once and write the measurements."""
    parser = arguments(__doc__, batch=32)
    parser.add_argument("--answers", type=Path, help="write the workload again, the answers as its targets")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()

    workload = measure.read_workload(args.rows, args.limit)
    rows, pad_id = workload["rows"], workload["model"]["pad_id"]
    stop = args.stop or workload["model"]["stop_ids"]
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")
    model.generation_config = GenerationConfig()  # what a base ships would be merged into every call
    if args.adapter != "none":
        model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    baseline = measure.resident()
    measure.restart_peak()

    began = time.perf_counter()
    loss = mean_loss(model, rows, args.batch, pad_id)
    between = time.perf_counter()
    given = answers(model, [row["prompt"] for row in rows], args.batch, args.max_new, stop, pad_id)
    ended = time.perf_counter()
    if args.answers:
        answered = [{"prompt": row["prompt"], "target": answer} for row, answer in zip(rows, given, strict=True)]
        args.answers.write_text(json.dumps(workload | {"rows": answered}), encoding="utf-8")
    measure.write(
        args.out,
        {
            "tool": "transformers",
            "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
            "seconds": ended - began,
            "seconds_loss": between - began,
            "seconds_generate": ended - between,
            "loss": loss,
            "peak_rss_bytes": measure.peak(),
            "baseline_rss_bytes": baseline,
            "versions": measure.versions(),
            "answers": given,
        },
    )


if __name__ == "__main__":
    main()

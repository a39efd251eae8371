"""Validate as formtune does it: loss and greedy answers from one forward pass, decoded where they leave their target.

    python validate_formtune.py MODEL ROWS.json OUT.json --adapter none --batch 256 --max-new 256

The interface is validate_generate.py's, and so is OUT.json, except that loss and answers come from one forward pass and
have no times of their own. What runs is what `FormatModule.validation_step` runs: `--batch` rows at once (the data
module hands over 256), split by the evaluation's token budget, and the rows that are decoded in full once more, which
show that both ways of decoding agree, are in the time as well. Judging the answers by a format is not.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import measure
import torch
from peft import PeftModel
from validate_generate import arguments

from formtune.base.row import Row
from formtune.data.datamodule import EVALUATION_ROWS
from formtune.evaluation.metrics import LossMetrics
from formtune.model.lora import load_base
from formtune.model.micro_batches import MicroBatches, choose_micro_batches
from formtune.model.module import EVALUATION_FACTOR, PARITY_ROWS


def decode(
    way: MicroBatches, rows: list[Row], budget: int, max_new: int, context: int, stop: list[int]
) -> tuple[list[list[int]], float]:
    """The answers in the order of the rows, and the loss summed over all targets."""
    limits = [min(max_new, context - len(row.prompt_ids)) for row in rows]
    losses = LossMetrics()
    answers = way.decode(rows, way.split(rows, budget, max(limits)), stop, limits, losses=losses.to(way.device))
    return [answer.ids for answer in answers], losses.compute()["val/loss"][0]


def main() -> None:
    """Validate once and write the measurements."""
    parser = arguments(__doc__, batch=EVALUATION_ROWS)
    parser.add_argument("--tokens", type=int, default=4096, help="token budget of one training micro-batch")
    args = parser.parse_args()

    workload = measure.read_workload(args.rows, args.limit)
    stop = args.stop or workload["model"]["stop_ids"]
    rows = [Row(row["prompt"], row["target"], "", "", f"row {n}", n) for n, row in enumerate(workload["rows"])]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model: Any = load_base(args.model, dtype, None, device)
    if args.adapter != "none":
        model = PeftModel.from_pretrained(model, args.adapter)
    model.to(device).eval()
    context = getattr(model.config, "max_position_embeddings", 10**9)
    baseline = measure.resident()
    measure.restart_peak()

    measure.synchronise()
    began = time.perf_counter()
    way, budget = choose_micro_batches(model), EVALUATION_FACTOR * args.tokens
    given: list[list[int]] = []
    nats, same = 0.0, []
    for start in range(0, len(rows), args.batch):
        batch = rows[start : start + args.batch]
        answers, part = decode(way, batch, budget, args.max_new, context, stop)
        sample = sorted({len(batch) * i // PARITY_ROWS for i in range(PARITY_ROWS)})
        blind = [replace(batch[i], target_ids=[]) for i in sample]
        in_full, _ = decode(way, blind, budget, args.max_new, context, stop)
        same += [answer == answers[i] for i, answer in zip(sample, in_full, strict=True)]
        given += answers
        nats += part
    measure.synchronise()
    ended = time.perf_counter()
    measure.write(
        args.out,
        {
            "tool": "formtune",
            "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
            "seconds": ended - began,
            "loss": nats / sum(len(row.target_ids) for row in rows),
            "peak_rss_bytes": measure.peak(),
            "peak_gpu_bytes": measure.gpu_peak(),
            "baseline_rss_bytes": baseline,
            "micro_batches": type(way).__name__,
            "decoded_in_full": {"rows": len(same), "same": sum(same)},
            "versions": measure.versions("lightning"),
            "answers": given,
        },
    )


if __name__ == "__main__":
    main()

"""Train with formtune, as `formtune fit` does: its LightningModule under Lightning's Trainer.

    python train_formtune.py MODEL ROWS.json OUT.json --precision fp32 --steps 12 --warm 2

The ids come from the workload and not from formtune's data module, so that every tool is timed on the same rows in
the same order. A step's time goes from one end of `training_step` to the next: packing, optimizer, schedule and logging
are in it. bf16 means what the other tools' does: base weights in bfloat16, adapters in float32, autocast.
"""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import measure
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from train_trl import SEED, arguments, recipe

from formtune.base.row import Row
from formtune.formats import JsonSchema
from formtune.model import FormatModule, Lora


class Clock(Callback):
    """Seconds and loss of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.loss: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        measure.restart_peak()
        self.baseline = measure.resident()
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.loss.append(float(trainer.callback_metrics["train/loss"]))
        measure.synchronise()
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now


class ConstantRate(FormatModule):
    """Without warmup and without the fall to zero, which both depend on the number of steps."""

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        # The rate to begin with is kept by the optimizer, whatever the schedule before has made of it.
        return optimizers | {"lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizers["optimizer"], lambda _: 1.0)}


class Rows(L.LightningDataModule):
    """The workload's steps, collated by the model as formtune's data module does it."""

    def __init__(self, rows: list[Row], rows_per_step: int) -> None:
        super().__init__()
        self.rows: Any = rows
        self.rows_per_step = rows_per_step

    def train_dataloader(self) -> DataLoader:
        model: Any = self.trainer.lightning_module
        return DataLoader(
            self.rows, batch_size=self.rows_per_step, collate_fn=functools.partial(model.collate, evaluation=False)
        )


def rows_of(workload: dict[str, Any]) -> list[Row]:
    """The workload's rows as the model takes them."""
    return [Row(row["prompt"], row["target"], "", "", f"row {n}", n) for n, row in enumerate(workload["rows"])]


def weights(model: Any) -> dict[str, int]:
    """What operations are counted by: base weights that each computed token meets, and the output layer's shape."""
    base = model.get_base_model()
    head = base.get_output_embeddings().weight
    tables = {id(head), id(base.get_input_embeddings().weight)}
    met = [p for p in base.parameters() if not p.requires_grad and p.dim() == 2 and id(p) not in tables]
    return {"inner": sum(p.numel() for p in met), "vocabulary": head.size(0), "width": head.size(1)}


def main() -> None:
    """Train and write the measurements."""
    parser = arguments()
    recipe(parser)
    parser.add_argument("--tokens", type=int, default=4096, help="token budget of one micro-batch")
    parser.add_argument("--share", choices=("prefixes", "nothing"), default="prefixes")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", type=Path, help="write torch.profiler's table here (slows all steps down)")
    args = parser.parse_args()
    workload = measure.read_workload(args.rows, args.steps * args.rows_per_step)
    if args.share == "nothing":
        from formtune.model import packing

        packing.MIN_SAVED = float("inf")
    module = (ConstantRate if args.constant else FormatModule)(
        base=args.model,
        format=JsonSchema({"type": "object"}),
        lora=Lora(dropout=args.dropout, targets=args.targets),
        optimizer=functools.partial(torch.optim.AdamW, lr=args.lr, weight_decay=0.0, fused=True),
        tokens_per_micro_batch=args.tokens,
        compile=args.compile,
    )
    clock = Clock()
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = L.Trainer(
        max_steps=args.steps,
        max_epochs=-1,
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed" if args.precision == "bf16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[clock],
    )
    torch.manual_seed(SEED)
    rows = rows_of(workload)
    with torch.profiler.profile() if args.profile else contextlib.nullcontext() as profile:
        trainer.fit(module, Rows(rows, args.rows_per_step))
    if profile:
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        args.profile.write_text(profile.key_averages().table(sort_by=order, row_limit=40), encoding="utf-8")
    peaks = {"peak_rss_bytes": measure.peak(), "peak_gpu_bytes": measure.gpu_peak()}
    steps = [rows[i : i + args.rows_per_step] for i in range(0, len(rows), args.rows_per_step)]
    computed = [[group.ids.numel() for group in module.micro_batches.split(step, args.tokens)] for step in steps]
    measure.write(
        args.out,
        {
            "tool": "formtune" if args.share == "prefixes" else "formtune, nothing shared",
            "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
            "warm": args.warm,
            "seconds": clock.seconds,
            "loss": clock.loss,
            **peaks,
            "baseline_rss_bytes": clock.baseline,
            "tokens": measure.tokens_per_step(workload["rows"], args.rows_per_step),
            "micro_batches": type(module.micro_batches).__name__,
            "computed_tokens": computed,  # of each micro-batch of each step
            "weights": weights(module.model),
            "targets": [sum(len(row.target_ids) for row in step) for step in steps],
            "versions": measure.versions("lightning"),
        },
    )


if __name__ == "__main__":
    main()

"""Train with TRL's SFTTrainer and PEFT: a peer's time per optimizer step, on the same ids in the same order.

    python train_trl.py MODEL ROWS.json OUT.json --precision fp32 --micro 8 --steps 12 --warm 2

The settings are the fastest that TRL 1.16 has for this work on a processor, and the default is said where it is slower:

* no gradient checkpointing (TRL's default is on, about 20 % slower by its own account);
* `loss_type="nll"`: since 1.16 this is the chunked loss ("chunked_nll" is its old name and a deprecated alias);
* fused AdamW, sdpa attention, no workers, no evaluation, no saving, no logger;
* bf16: the base is loaded in bfloat16 (TRL would load float32 and cast in every forward), adapters stay float32 as PEFT
  makes them, the forward passes run under autocast.

What TRL cannot be told:

* Packing and padding-free batches are left off because they would be wrong here, not only slow. Both flatten a batch
  into one sequence without an attention mask, and the boundaries are kept by FlashAttention 2 or 3 alone (the
  documentation of `padding_free`); with sdpa TRL only warns. FlashAttention needs a GPU.
* Only where Triton runs (CUDA, XPU) does TRL's loss skip the prompt's positions. Elsewhere it multiplies every
  position, padding included, by the output layer, forward and backward (`add_fused_lm_head`, `compact`), and works out
  entropy and accuracy over the vocabulary for each. `--head targets` lets it skip them on a processor too, by telling
  that one function that it may: more than a user can set, and the best that TRL could do.

`--warm` steps are trained like the others and are left out of the printed mean; OUT.json holds all steps.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # each trainer would send a ping

import measure
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

SEED = 1


class Clock(TrainerCallback):
    """Seconds and loss of each optimizer step.

    The Trainer has fetched and padded the step's rows before it says that the step begins, so that is not in here.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.loss: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        measure.synchronise()
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        measure.synchronise()
        self.seconds.append(time.perf_counter() - self._began)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.loss.append(logs["loss"])  # the Trainer divides by the targets of the whole step


def columns(row: measure.Row) -> dict[str, list[int]]:
    """A row as TRL takes pre-tokenised data."""
    prompt, target = row["prompt"], row["target"]
    return {"input_ids": prompt + target, "completion_mask": [0] * len(prompt) + [1] * len(target)}


def build(args: argparse.Namespace, rows: list[measure.Row], clock: Clock, folder: str) -> tuple[SFTTrainer, int]:
    """The trainer, and the bytes in memory once the model was loaded."""
    bf16 = args.precision == "bf16"
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16 if bf16 else torch.float32, attn_implementation="sdpa"
    )
    baseline = measure.resident()
    settings = SFTConfig(
        output_dir=folder,
        seed=SEED,
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16,
        max_steps=args.steps,
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=args.rows_per_step // args.micro,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        max_length=None,
        packing=False,
        loss_type="nll",
        use_liger_kernel=args.liger,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        learning_rate=args.lr,
        weight_decay=0.0,
        lr_scheduler_type="constant" if args.constant else "cosine",
        warmup_steps=0 if args.constant else 0.1,  # below 1: a share of all steps
        max_grad_norm=1.0,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        torch_compile=args.compile,
        logging_steps=1,
        logging_nan_inf_filter=False,  # otherwise it looks at every micro-batch's loss
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
    )
    # SFTTrainer seeds and then puts PEFT's default initialization on, as `manual_seed` and `get_peft_model` would.
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=32,
        lora_dropout=args.dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if args.targets == "attention" else args.targets,
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([columns(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=lora,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, baseline


def arguments() -> argparse.ArgumentParser:
    """The interface that the training scripts have in common."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the base model")
    parser.add_argument("rows", type=Path, help="workload that workloads.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--micro", type=int, choices=(1, 2, 4, 8, 16), default=8, help="rows of one micro-batch")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, warmup included")
    parser.add_argument("--warm", type=int, default=1, help="steps at the start that do not count")
    parser.add_argument("--rows-per-step", type=int, default=measure.ROWS_PER_STEP)
    parser.add_argument(
        "--constant",
        action="store_true",
        help="a constant learning rate, so that the losses of runs of different length can be compared",
    )
    return parser


def recipe(parser: argparse.ArgumentParser) -> None:
    """Add what quality_trl.py changes."""
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    parser.add_argument("--targets", choices=("attention", "all-linear"), default="attention")


def main() -> None:
    """Train and write the measurements."""
    parser = arguments()
    recipe(parser)
    parser.add_argument("--head", choices=("all", "targets"), default="all", help="positions that get logits")
    parser.add_argument("--compile", action="store_true", help="torch.compile, which recompiles for new lengths")
    parser.add_argument("--save", type=Path, help="folder for the adapter")
    parser.add_argument("--liger", action="store_true", help="Liger's kernels (GPU; the package must be there)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()

    rows = measure.read_workload(args.rows, args.steps * args.rows_per_step)["rows"]
    if args.head == "targets":
        # The name in this module decides on the positions alone; the kernels have their own and stay in torch.
        trl_utils._use_triton = lambda device: True
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer, baseline = build(args, rows, clock, folder)
        measure.restart_peak()
        trainer.train()
        if args.save:
            trainer.model.save_pretrained(args.save)
    measure.write(
        args.out,
        {
            "tool": "trl" if args.head == "all" else "trl, logits of targets only",
            "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
            "warm": args.warm,
            "seconds": clock.seconds,
            "loss": clock.loss,
            "peak_rss_bytes": measure.peak(),
            "peak_gpu_bytes": measure.gpu_peak(),
            "baseline_rss_bytes": baseline,
            "tokens": measure.tokens_per_step(rows, args.rows_per_step),
            "versions": measure.versions("trl", "accelerate"),
        },
    )


if __name__ == "__main__":
    main()

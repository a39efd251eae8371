"""Train with LitGPT's LoRA recipe: a peer's time per optimizer step, on the same ids in the same order.

    python train_litgpt.py MODEL ROWS.json OUT.json --precision fp32 --micro 8 --steps 12 --warm 2

The recipe's own `fit` (litgpt/finetune/lora.py) runs, on its GPT, Fabric, optimizer, schedule, collate function and
chunked cross-entropy; its `setup` and `main` are gone through by hand, because they take text and shuffle it. They also
validate, generate, save and merge at the end, which is not measured. The checkpoint is converted by LitGPT's
convert_hf_checkpoint, once, into MODEL/litgpt, under a configuration made from MODEL's config.json (LitGPT knows the
two SmolLM2 shapes by name, not the smaller ones).

Where the recipe differs from the other tools, it stays as it is:

* the loss is the mean of the micro-batches' means, not weighted by tokens; OUT.json has it as `loss_recipe`, and as
  `loss` the token-weighted one, worked out from the same numbers;
* no gradient clipping (the recipe refuses `max_norm`), warmup beginning at a rate of zero (without `--constant`);
* bf16 means "bf16-true", the recipe's choice on hardware that has it: adapters and optimizer are in bfloat16, too;
* tied embeddings are held twice;
* no attention mask: rows are padded on the right, where nothing that counts can see the padding;
* logits of every position, prompt and padding included.

`fit` also checks the validation loader before it begins; that is one short row, outside the timing.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import litgpt.config
import litgpt.finetune.lora as recipe
import measure
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import get_sft_collate_fn
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.utils import instantiate_torch_optimizer, load_checkpoint
from torch import Tensor
from torch.utils.data import DataLoader
from train_trl import SEED, arguments


def convert(model: Path) -> Path:
    """The checkpoint in LitGPT's format, made if it is not there."""
    folder = model / "litgpt"
    if (folder / "lit_model.pth").is_file():
        return folder
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.is_file():
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(Path("..") / file.name)
    hf = json.loads((model / "config.json").read_text(encoding="utf-8"))
    name = "benchmark-llama"
    litgpt.config.name_to_config[name] = {
        "name": name,
        "hf_config": {},
        "block_size": hf["max_position_embeddings"],
        "vocab_size": hf["vocab_size"],
        "padded_vocab_size": hf["vocab_size"],
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_embd": hf["hidden_size"],
        "n_query_groups": hf["num_key_value_heads"],
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": hf["intermediate_size"],
        "rope_base": hf["rope_parameters"]["rope_theta"],
        "norm_eps": hf["rms_norm_eps"],
    }
    convert_hf_checkpoint(folder, model_name=name)
    return folder


def sample(row: measure.Row) -> dict[str, Any]:
    """A row as LitGPT's SFTDataset yields it with `mask_prompt`."""
    ids = torch.tensor(row["prompt"] + row["target"])
    labels = ids.clone()
    labels[: len(row["prompt"])] = -100
    return {"input_ids": ids, "labels": labels, "token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)}}


class Meter:
    """Times the steps of `fit` and keeps the losses, from the calls it makes anyway.

    A step begins with the fetching of its first micro-batch and ends when the schedule has moved on.
    """

    def __init__(self, loader: DataLoader, micro_batches: int) -> None:
        self.loader, self.dataset, self.micro_batches = loader, loader.dataset, micro_batches
        self.seconds: list[float] = []
        self.losses: list[tuple[Tensor, int]] = []
        self._began = 0.0
        self._loss = recipe.chunked_cross_entropy

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batches = iter(self.loader)
        for number in range(len(self.loader)):
            if number % self.micro_batches == 0:
                self._began = time.perf_counter()
            yield next(batches)

    def cross_entropy(self, logits: Any, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        loss = self._loss(logits, targets, *args, **kwargs)
        if torch.is_grad_enabled():  # not in validation
            self.losses.append((loss.detach(), int((targets != -100).sum())))
        return loss

    def watch(self, scheduler: Any) -> None:
        """Stop the clock when `fit` moves the schedule, the last thing of a step."""
        original = scheduler.step

        def step(_: Any) -> None:
            original()
            measure.synchronise()
            self.seconds.append(time.perf_counter() - self._began)

        scheduler.step = types.MethodType(step, scheduler)

    def per_step(self, weighted: bool) -> list[float]:
        """The loss of each step."""
        result = []
        for i in range(0, len(self.losses), self.micro_batches):
            part = [(loss.item(), count if weighted else 1) for loss, count in self.losses[i : i + self.micro_batches]]
            result.append(sum(loss * count for loss, count in part) / sum(count for _, count in part))
        return result


def main() -> None:
    """Train and write the measurements."""
    args = arguments().parse_args()
    warnings.filterwarnings("ignore")
    rows = measure.read_workload(args.rows, args.steps * args.rows_per_step)["rows"]
    with contextlib.redirect_stdout(io.StringIO()):
        folder = convert(Path(args.model))

    # As `setup` and `main` of the recipe do, in their order.
    config = Config.from_file(
        folder / "model_config.yaml",
        lora_r=16,
        lora_alpha=32,
        lora_dropout=args.dropout,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
    )
    precision = {"fp32": "32-true", "bf16": "bf16-true"}[args.precision]
    fabric = L.Fabric(devices=1, precision=precision)
    fabric.launch()
    micro_batches = args.rows_per_step // args.micro
    train = TrainArgs(
        save_interval=None,
        log_interval=micro_batches,
        global_batch_size=args.rows_per_step,
        micro_batch_size=args.micro,
        lr_warmup_steps=max(1, -(-args.steps // 10)),
        epochs=1,
        max_steps=args.steps,
    )
    samples = [sample(row) for row in rows]
    collate = get_sft_collate_fn(pad_id=0)
    meter = Meter(DataLoader(samples, batch_size=args.micro, collate_fn=collate), micro_batches)
    check = DataLoader([sample({"prompt": rows[0]["prompt"][:8], "target": rows[0]["target"][:8]})], collate_fn=collate)
    fabric.seed_everything(SEED, verbose=False)
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    settings = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-4, "weight_decay": 0.0, "fused": True}}
    optimizer = fabric.setup_optimizers(instantiate_torch_optimizer(settings, model.parameters()))
    scheduler: Any = recipe.get_lr_scheduler(optimizer, warmup_steps=train.lr_warmup_steps, max_steps=args.steps)
    if args.constant:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    load_checkpoint(fabric, model, folder / "lit_model.pth", strict=False)
    baseline = measure.resident()

    meter.watch(scheduler)
    recipe.chunked_cross_entropy = meter.cross_entropy
    measure.restart_peak()
    with contextlib.redirect_stdout(sys.stderr):  # a line for each step
        recipe.fit(
            fabric=fabric,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            train_dataloader=meter,
            val_dataloader=check,
            devices=1,
            checkpoint_dir=folder,
            out_dir=folder,
            train=train,
            eval=EvalArgs(interval=args.steps + 1, max_new_tokens=1, final_validation=False),
            data=None,
        )
    measure.write(
        args.out,
        {
            "tool": "litgpt",
            "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
            "warm": args.warm,
            "seconds": meter.seconds,
            "loss": meter.per_step(weighted=True),
            "loss_recipe": meter.per_step(weighted=False),
            "peak_rss_bytes": measure.peak(),
            "peak_gpu_bytes": measure.gpu_peak(),
            "baseline_rss_bytes": baseline,
            "tokens": measure.tokens_per_step(rows, args.rows_per_step),
            "versions": measure.versions("litgpt", "lightning"),
        },
    )


if __name__ == "__main__":
    main()

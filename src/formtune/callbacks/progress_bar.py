"""The progress bar, and a plain line per validation where there is no terminal to draw on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Rich progress bar with loss, learning rate, tokens per second and the headline metrics."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        short: dict[str, Any] = {
            name.rpartition("/")[2] if name.startswith("train/") else name: value for name, value in items.items()
        }
        if "tokens_per_second" in short:
            short["tokens/s"] = f"{float(short.pop('tokens_per_second')):,.0f}"
        return short

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            names = ("val/loss", "format/exact", "joint/exact", "content/field_f1")
            figures = "  ".join(f"{name} {float(trainer.callback_metrics[name]):.4f}" for name in names)
            print(f"step {trainer.global_step}  {figures}", flush=True)

"""The progress bar, and a plain line per validation that stays in the log."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_SHORT = {  # names that leave room for the bar on 80 columns
    "train/loss": "loss",
    "train/tokens_per_second": "tokens/s",
    "val/loss": "val",
    "format/exact": "exact",
}


class ProgressBar(RichProgressBar):
    """Rich progress bar with training loss, tokens per second and the last validation."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown: dict[str, Any] = super().get_metrics(trainer, pl_module)
        shown = {short: shown[name] for name, short in _SHORT.items() if name in shown}
        if "tokens/s" in shown:
            shown["tokens/s"] = f"{float(shown['tokens/s']):,.0f}"
        return shown

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and trainer.is_global_zero and not trainer.sanity_checking:
            names = ("val/loss", "format/exact", "joint/exact", "content/field_f1")
            figures = "  ".join(f"{name} {float(trainer.callback_metrics[name]):.4f}" for name in names)
            print(f"step {trainer.global_step}  {figures}", flush=True)

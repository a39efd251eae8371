"""Settings and final figures of a run for TensorBoard's HPARAMS page."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

SHOWN = ("format/exact", "joint/exact", "content/field_f1", "val/loss")


def log_hyperparameters(logger: Any, config: Any, result: dict[str, Any]) -> None:
    """Log them, if the logger is TensorBoard's."""
    if not isinstance(logger, TensorBoardLogger):
        return
    lora = config.model.lora
    parameters = {
        "base": config.model.base,
        "r": lora.r,
        "alpha": lora.alpha or 2 * lora.r,
        "dropout": lora.dropout,
        "targets": str(lora.targets),
        "optimizer": str(config.model.optimizer.as_dict()),
        "rows_per_step": config.data.rows_per_step,
        "epochs": config.trainer.max_epochs,
        "precision": config.trainer.precision,
        "seed": config.seed_everything,
    }
    logger.log_hyperparams(parameters, {f"final/{name}": result["after"][name] for name in SHOWN})
    logger.save()

"""The data as soon as it is prepared, before anything slow begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback

from formtune.data.encoded import FEW_ROWS
from formtune.summary import print_data


class DataTable(Callback):
    """Prints rows per split, what was repaired and what was set aside, and the date in the prompts, once."""

    def __init__(self) -> None:
        self._done = False

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        splits = getattr(trainer.datamodule, "splits", None)
        if splits is not None and trainer.is_global_zero and not self._done:
            print_data(splits, Path(trainer.default_root_dir) if trainer.loggers else None)
            count = len(splits.rows.get("train", ()))
            if 0 < count < FEW_ROWS:
                print(f"few rows: {count} to train on, where {FEW_ROWS} are the least for a task; see formtune audit")
            if date := trainer.datamodule.preparation.date:
                print(
                    f"the chat template writes the date; frozen at {date} for this run; a server writes its own day, "
                    "unless the date is written into the chat_template.jinja that it serves"
                )
            self._done = True

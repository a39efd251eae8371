"""The data as soon as it is prepared, before anything slow begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback

from formtune.data.encoded import FEW_ROWS
from formtune.data.table import print_data, print_ignored


class DataTable(Callback):
    """Prints rows per split, what was repaired, quarantined and ignored, and the date in the prompts, once."""

    def __init__(self) -> None:
        self._done = False

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        if trainer.datamodule is not None:
            self.show(trainer, trainer.datamodule)

    def show(self, trainer: Any, data: Any) -> None:
        """Print it, if it was not printed yet."""
        if not trainer.is_global_zero or self._done:
            return
        if data.splits is not None:
            print_data(data.splits, Path(trainer.default_root_dir) if trainer.loggers else None)
        for key, counts in data.settings.ignored.items():
            print_ignored(counts, key)
        count = len(data.splits.rows.get("train", ())) if data.splits else 0
        if 0 < count < FEW_ROWS:
            print(f"few rows: {count} to train on, where {FEW_ROWS} are the least for a task; see formtune audit")
        if data.splits and (date := data.settings.date):
            print(
                f"the chat template writes the date; frozen at {date} for this run; a server writes its own day, "
                "unless the date is written into the chat_template.jinja that it serves"
            )
        self._done = True

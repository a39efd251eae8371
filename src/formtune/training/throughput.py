"""Tokens per second of training, in the logs and the progress bar."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Logs `train/tokens_per_second`: prompt and target tokens of all devices by the time of the optimizer steps."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._tokens += sum(map(len, batch.rows))
        self._seconds += time.perf_counter() - self._started
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            rate = self._tokens / self._seconds
            pl_module.log("train/tokens_per_second", rate, prog_bar=True, batch_size=1, sync_dist=True, reduce_fx="sum")
            self._tokens, self._seconds = 0, 0.0

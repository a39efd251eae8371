"""Tokens per second of training, in the logs and the progress bar."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Logs `train/tokens_per_second`: prompt and target tokens of all devices, without the time of evaluations.

    Lightning's `ThroughputMonitor` logs a dozen more curves, of evaluations too, and none of them for the progress bar.
    """

    def on_train_start(self, *_: Any) -> None:
        self._tokens, self._started = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._tokens += sum(map(len, batch.rows))
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            rate = self._tokens / (time.perf_counter() - self._started)
            pl_module.log("train/tokens_per_second", rate, prog_bar=True, batch_size=1, sync_dist=True, reduce_fx="sum")
            self.on_train_start()

    def on_validation_start(self, *_: Any) -> None:
        self._validated = time.perf_counter()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._started += time.perf_counter() - self._validated

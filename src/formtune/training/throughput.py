"""Tokens per second of training, in the logs and the progress bar."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Logs `train/tokens_per_second`: prompt and target tokens of all devices, without the time of evaluations."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self, *_: Any, **__: Any) -> None:
        self._tokens, self._seconds, self._clock = 0, 0.0, time.perf_counter()

    on_train_start = _restart

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._tokens += sum(map(len, batch.rows))
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            rate = self._tokens / (self._seconds + time.perf_counter() - self._clock)
            pl_module.log("train/tokens_per_second", rate, prog_bar=True, batch_size=1, sync_dist=True, reduce_fx="sum")
            self._restart()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._seconds += time.perf_counter() - self._clock

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._clock = time.perf_counter()

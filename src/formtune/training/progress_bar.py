"""The progress bar: optimizer steps of the whole fit, and the rows of an evaluation; tokens per second."""

import math
import time
from typing import Any

from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import convert_inf


class StepsBar(TQDMProgressBar):
    """One line: steps, rows, training loss, and the time left at the mean speed so far, validations included."""

    BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} rows |{bar}| {elapsed}"

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.total = convert_inf(self.trainer.estimated_stepping_batches)
        bar.initial = bar.n = self.trainer.global_step
        clock = "left={remaining}" if bar.total else "{elapsed}"
        bar.bar_format = "{desc}{n_fmt}/{total_fmt} steps{postfix}, " + clock + " |{bar}|"
        return bar

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        if trainer.sanity_checking:
            return {}
        loader = trainer.train_dataloader
        rows = trainer.current_epoch * _rows(loader, trainer.num_training_batches)
        rows += _rows(loader, trainer.fit_loop.batch_idx + 1)
        return {"rows": f"{rows:,}", "loss": f"{float(trainer.callback_metrics.get('train/loss', math.nan)):.4f}"}

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        stage = "test" if trainer.testing else "predict" if trainer.predicting else "val"
        bar, loader = getattr(self, f"{stage}_progress_bar"), getattr(trainer, f"{stage}_dataloaders")
        bar.total, bar.n = _rows(loader, getattr(trainer, f"num_{stage}_batches")[0]), _rows(loader, batch_idx)
        bar.refresh()

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self.on_validation_batch_start(trainer, args[0], args[2], args[3] + 1)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]


def _rows(loader: Any, batches: int) -> int:
    return min(len(loader.dataset), batches * loader.batch_sampler.batch_size)


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

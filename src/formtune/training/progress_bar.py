"""The progress bar: optimizer steps of the whole fit, and the rows of an evaluation; tokens per second."""

import math
import time
from typing import Any

from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import convert_inf


class StepsBar(TQDMProgressBar):
    """One line: steps, rows, training loss, and the time left, validations included (`+` until one was timed)."""

    BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} rows |{bar}| {elapsed}"
    _first = _validated = 0  # steps at which this process began, and at the last validation
    _began = _validation = 0.0  # seconds: the clock at the first step, without validations; the last validation

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc}{n_fmt}/{total_fmt} steps{postfix} |{bar}|"
        bar.total, bar.n = convert_inf(self.trainer.estimated_stepping_batches), self.trainer.global_step
        self._first, self._validated, self._began = bar.n, bar.n, time.monotonic()
        return bar

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        step, total, loader = trainer.global_step, self.train_progress_bar.total, trainer.train_dataloader
        if total is None:  # a sanity check, or a training without end
            return {}
        rows = trainer.current_epoch * _rows(loader, trainer.num_training_batches)
        rows += _rows(loader, trainer.fit_loop.batch_idx + 1)
        loss = float(trainer.callback_metrics.get("train/loss", math.nan))
        interval = (trainer.val_check_batch or math.inf) * (trainer.check_val_every_n_epoch or 1)
        # The last step is always validated, and nothing after it.
        validations = (self._validated < total) * (max(1, math.ceil(total / interval)) - self._validated // interval)
        step_seconds = (time.monotonic() - self._began) / max(step - self._first, 1)
        seconds = (total - step) * step_seconds + validations * self._validation
        left = self.train_progress_bar.format_interval(seconds) + ("" if self._validation else "+")
        return {"rows": f"{rows:,}", "loss": f"{loss:.4f}", "left": left}

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._validation_began = time.monotonic()
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._validation, self._validated = time.monotonic() - self._validation_began, trainer.global_step
            self._began += self._validation
        super().on_validation_end(trainer, pl_module)

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

"""A progress bar of one line, and a plain line per validation that stays in the log."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PAUSE = 0.2  # seconds between updates: reading the loss makes a GPU wait
LINE = ("val/loss", "format/exact", "joint/exact", "content/field_f1")


class ProgressBar(LightningProgressBar):
    """Epoch, optimizer steps, time left, loss, tokens/s and the last validation; an evaluation counts its rows."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled, self._exact, self._updated = True, "", 0.0
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._rows: TaskID | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _begin(self, description: str, total: float, completed: int = 0) -> TaskID | None:
        """Show a task; the bar is drawn in a terminal only."""
        if self._progress is None and self._enabled and (console := Console()).is_terminal:
            columns = (BarColumn(8), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
            text = TextColumn("{task.description}"), TextColumn("{task.fields[figures]}")
            self._progress = Progress(text[0], *columns, text[1], console=console, transient=True)
            self._progress.start()
        if self._progress is None:
            return None
        known = total if total != float("inf") else None
        return self._progress.add_task(description, total=known, completed=completed, figures="")

    def _stop(self, *_: Any, **__: Any) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._training = self._rows = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._training = self._begin("epoch 1", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self._progress is None or self._training is None or time.monotonic() - self._updated < PAUSE:
            return
        metrics, epochs = trainer.progress_bar_metrics, trainer.max_epochs
        figures = f"loss {metrics['train/loss']:.3g}"
        if "train/tokens_per_second" in metrics:
            figures += f"  {metrics['train/tokens_per_second']:,.0f} tok/s"
        epoch = f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs and epochs > 0 else "")
        task, step = self._training, trainer.global_step
        self._progress.update(task, completed=step, description=epoch, figures=figures + self._exact)
        self._updated = time.monotonic()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluate("validating", trainer.val_dataloaders)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluate("evaluating", trainer.test_dataloaders)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluate("predicting", trainer.predict_dataloaders)

    def _evaluate(self, description: str, loader: Any) -> None:
        self._rows = self._begin(description, len(loader.dataset))
        if self._progress is not None and self._training is not None:
            self._progress.update(self._training, visible=False)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        if self._progress is not None and self._rows is not None:
            self._progress.advance(self._rows, len(batch.rows) * trainer.world_size)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._progress is not None and self._training is not None and self._rows is not None:
            self._progress.remove_task(self._rows)
            self._progress.update(self._training, visible=True)
        else:
            self._stop()
        metrics = trainer.callback_metrics
        self._exact = f"  exact {float(metrics['format/exact']):.1%}"
        if trainer.state.fn == "fit" and trainer.is_global_zero and not trainer.sanity_checking:
            figures = "  ".join(f"{name} {float(metrics[name]):.4f}" for name in LINE)
            print(f"step {trainer.global_step}  {figures}", flush=True)

    on_train_end = on_test_end = on_predict_end = on_exception = _stop

"""The best checkpoint, those that can still become it, and the newest ones to resume from.

Which is the best, and which can become it, is decided in `validations`. A run resumes from its newest checkpoint, best
or not: each holds the whole state of training.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch.callbacks import ModelCheckpoint

from formtune.errors import Fault, Stopped, UserError
from formtune.model.ranks import highest
from formtune.training import checkpoint_files
from formtune.training.signals import Signals
from formtune.training.validations import Validations, contenders


class BestCheckpoint(ModelCheckpoint):
    """Writes `checkpoints/step-N.ckpt` after each validation and at intervals, and deletes those that are not needed.

    A checkpoint is written between two steps, and never between a step and its validation: Lightning would skip that
    validation when the run resumes.

    Args:
        monitor: Metric of a validation to choose the best checkpoint by, such as `val/loss`. None: of the checkpoints
            whose `format/exact` is within one standard error of the best, the one with the most right answers.
        mode: Whether the best value of `monitor` is the highest or the lowest.
        every_n_seconds: Seconds of training between two checkpoints: what a killed run loses at most.
        save_last: Newest checkpoints to keep, to resume from; the second is for the case that the first is damaged.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        every_n_seconds: NonNegativeFloat = 30.0,
        save_last: PositiveInt = 2,
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, filename="step-{step}", auto_insert_metric_name=False)
        self.every_n_seconds, self.newest = every_n_seconds, save_last
        self.values: dict[int, float] = {}  # of the monitored metric, by step
        self.seconds = 0.0  # of training, before this process
        self._started = self._saved = 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.dirpath = str(Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "checkpoints")
        self._validations = next((one for one in trainer.callbacks if isinstance(one, Validations)), Validations())
        self._signals = next((one for one in trainer.callbacks if isinstance(one, Signals)), Signals())

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.elapsed(), "values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "scores" in state_dict:
            raise UserError("the run began with a formtune that did not record each row's verdict; begin a new run")
        self.seconds, self.values = state_dict["seconds"], state_dict["values"]
        self._name_paths()

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint so far, None if no validation gave finite figures."""
        if self.monitor is None:
            best = self._validations.best
            return best.step if best else None
        sign = -1 if self.mode == "max" else 1
        return min(self.values, key=lambda step: (sign * self.values[step], step), default=None)

    def summary(self) -> dict[str, Any]:
        """For `metrics.json`, where `monitor` decides and not the rule of `validations`."""
        if self.monitor is None:
            return {}
        figures = {one.step: one.figures() | {"loss": one.val_loss} for one in self._validations.history}
        step = self.best_step or 0
        best = "highest" if self.mode == "max" else "lowest"
        why = f"best checkpoint: step {step} (the {best} {self.monitor}, {self.values[step]:.4g})"
        return {"best_step": step, "best_reason": why, "best": figures[step]}

    def elapsed(self) -> float:
        """Seconds of training so far, validations and the time before an interruption included."""
        return self.seconds + (time.monotonic() - self._started if self._started else 0.0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._started = self._saved = time.monotonic()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds, self._started = self.elapsed(), 0.0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= trainer.estimated_stepping_batches:
            trainer.should_stop = True  # makes Lightning validate the last weights too, whatever the interval
        overdue = time.monotonic() - self._saved >= self.every_n_seconds
        signal, due = highest(trainer, self._signals.number, overdue)
        loop = trainer.fit_loop
        # Between two epochs Lightning cannot find its place again: the next step is soon enough.
        between = trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if (signal or due) and not between:
            self._save(trainer)
            if signal:
                raise Stopped(int(signal), f"saved at step {trainer.global_step}; {self._signals.remedy}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pass  # validations and intervals decide when to save

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.state.fn == "fit":
            [signal] = highest(trainer, self._signals.number)
            if signal:
                last = list(checkpoint_files.steps(Path(str(self.dirpath))).values())
                saved = f"the newest checkpoint is {last[-1].name}" if last else "no checkpoint yet"
                raise Stopped(int(signal), f"stopped in a validation, {saved}; {self._signals.remedy}")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor is not None:
            value = float(trainer.callback_metrics[self.monitor])
            if math.isfinite(value):
                self.values[trainer.global_step] = value
        self._save(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        pass  # a step that failed is computed again from the last checkpoint

    def _save(self, trainer: Any) -> None:
        if trainer.fast_dev_run:
            return
        folder = Path(str(self.dirpath))
        if trainer.is_global_zero and not folder.parent.exists():
            raise Fault(f"{folder}: No such file or directory: the run's folder was removed")
        trainer.save_checkpoint(folder / f"step-{trainer.global_step}.ckpt")
        self._saved = time.monotonic()
        self._name_paths()
        if trainer.is_global_zero:
            files = checkpoint_files.steps(folder)
            best = {self.best_step} if self.monitor else contenders(self._validations.history)
            for step in files.keys() - best - set(list(files)[-self.newest :]):
                files[step].unlink(missing_ok=True)

    def _name_paths(self) -> None:
        """Keep the attributes of `ModelCheckpoint` that others read."""
        files = checkpoint_files.steps(Path(str(self.dirpath)))
        best = files.get(self.best_step or 0)
        self.best_model_path = str(best) if best else ""
        self.last_model_path = str(list(files.values())[-1]) if files else ""
        if self.monitor and self.best_step is not None:
            self.best_model_score = torch.tensor(self.values[self.best_step])

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        """What Lightning's `ckpt_path="last"` chooses from."""
        return {str(path) for path in checkpoint_files.steps(Path(str(self.dirpath))).values()}

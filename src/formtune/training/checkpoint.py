"""The best checkpoint, those that can still become the best, and the newest ones to resume from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch.callbacks import ModelCheckpoint

from formtune.errors import Fault, Stopped
from formtune.model.ranks import highest
from formtune.training import callback, checkpoint_files
from formtune.training.signals import Signals
from formtune.training.validations import Validations, best, contenders


class BestCheckpoint(ModelCheckpoint):
    """Writes `checkpoints/step-N.ckpt` after each validation and at intervals, and deletes those that are not needed.

    A checkpoint holds the whole state of training, and a run resumes from the newest one. It is written between two
    steps, and never between a step and its validation: Lightning would skip that validation when the run resumes.

    Args:
        every_n_seconds: Seconds of training between two checkpoints: what a killed run loses at most.
        save_last: Newest checkpoints to keep, to resume from; the second is for the case that the first is damaged.
    """

    def __init__(self, every_n_seconds: NonNegativeFloat = 30.0, save_last: PositiveInt = 2) -> None:
        super().__init__(filename="step-{step}", auto_insert_metric_name=False)
        self.every_n_seconds, self.newest = every_n_seconds, save_last
        self.seconds = 0.0  # of training, validations and the time before an interruption included

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.dirpath = str(Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "checkpoints")
        self._validations, self._signals = callback(trainer, Validations), callback(trainer, Signals)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]
        self._set_paths()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._counted = self._saved = time.monotonic()

    def _count_time(self) -> None:
        before, self._counted = self._counted, time.monotonic()
        self.seconds += self._counted - before

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= trainer.estimated_stepping_batches:
            trainer.should_stop = True  # makes Lightning validate the last weights too, whatever the interval
        self._count_time()
        overdue = self._counted - self._saved >= self.every_n_seconds
        signal, due = highest(trainer, self._signals.number, overdue)
        loop = trainer.fit_loop
        # Lightning cannot resume at the end of an epoch or before a validation: the next step is soon enough.
        unsafe = trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if (signal or due) and not unsafe:
            self._save(trainer)
            if signal:
                raise Stopped(int(signal), f"saved at step {trainer.global_step}; {self._signals.remedy}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pass  # validations and intervals decide when to save

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._count_time()
            self._save(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        pass  # a step that failed is computed again from the last checkpoint

    def _files(self) -> dict[int, Path]:
        return checkpoint_files.steps(Path(str(self.dirpath)))

    def _save(self, trainer: Any) -> None:
        if trainer.fast_dev_run:
            return
        folder = Path(str(self.dirpath))
        if trainer.is_global_zero and not folder.parent.exists():
            raise Fault(f"{folder}: No such file or directory: the run's folder was removed")
        trainer.save_checkpoint(folder / f"step-{trainer.global_step}.ckpt")
        self._saved = time.monotonic()
        self._set_paths()
        if trainer.is_global_zero:
            files = self._files()
            for step in files.keys() - contenders(self._validations.history) - set(list(files)[-self.newest :]):
                files[step].unlink(missing_ok=True)

    def _set_paths(self) -> None:
        """Set the attributes of `ModelCheckpoint` that others read."""
        files, chosen = self._files(), best(self._validations.history)
        self.best_model_path = str(files.get(chosen.step, "")) if chosen else ""
        self.last_model_path = str(list(files.values())[-1]) if files else ""

    def _find_last_checkpoints(self, trainer: Any) -> set[str]:
        """What Lightning's `ckpt_path="last"` chooses from."""
        return {str(path) for path in self._files().values()}

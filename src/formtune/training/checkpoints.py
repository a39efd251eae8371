"""Keep the checkpoint that answers best, those that can still become it, and the newest ones to continue from.

Which is the best, and which can become it, is in `validations`. A run continues from its newest checkpoint, whichever
that is: all hold the whole state of training.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Checkpoint

from formtune.errors import Stopped, UserError
from formtune.model.ranks import highest
from formtune.training import checkpoint_files
from formtune.training.signals import Signals
from formtune.training.validations import Validations, contenders

EVERY = 30.0  # seconds of training that a killed run loses at most
NEWEST = 2  # checkpoints kept to go on from: the second should the first be damaged


class Checkpoints(Checkpoint):
    """Writes `checkpoints/step-N.ckpt` after each validation and every `EVERY` seconds, and removes what nobody needs.

    Kept are those that can be the best and the `NEWEST`. A checkpoint is written between two steps, and never between
    a step and its validation: Lightning would leave that validation out when the run goes on.

    Args:
        signals: Tells whether the run is to stop; it is saved then.
        validations: What the checkpoints are chosen by.
    """

    def __init__(self, signals: Signals, validations: Validations) -> None:
        self.signals, self.validations = signals, validations
        self.seconds = 0.0  # of training, before this process
        self._started = self._saved = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "scores" in state_dict:
            raise UserError("the run began with a formtune that did not record each row's verdict; begin a new run")
        self.seconds = state_dict["seconds"]

    def elapsed(self) -> float:
        """Seconds of training so far, validations included, those before an interruption too."""
        return self.seconds + (time.monotonic() - self._started if self._started else 0.0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._started = self._saved = time.monotonic()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds, self._started = self.elapsed(), 0.0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= trainer.estimated_stepping_batches:
            trainer.should_stop = True  # makes Lightning validate the last weights too, whatever the interval
        signal, due = highest(trainer, self.signals.number, time.monotonic() - self._saved >= EVERY)
        loop = trainer.fit_loop
        # Between two epochs Lightning does not find its place again: the next step is soon enough.
        between = trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if (signal or due) and not between:
            self._save(trainer)
            if signal:
                raise Stopped(int(signal), f"saved at step {trainer.global_step}; {self.signals.remedy}")

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.state.fn == "fit":
            [signal] = highest(trainer, self.signals.number)
            if signal:
                last = list(checkpoint_files.steps(self._folder(trainer)))
                saved = f"the newest checkpoint is of step {last[-1]}" if last else "no checkpoint yet"
                raise Stopped(int(signal), f"stopped in a validation, {saved}; {self.signals.remedy}")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    @staticmethod
    def _folder(trainer: Any) -> Path:
        return Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "checkpoints"

    def _save(self, trainer: Any) -> None:
        if trainer.fast_dev_run:
            return
        folder = self._folder(trainer)
        if trainer.is_global_zero and folder.parent.exists():  # else it was removed: not to be begun again
            folder.mkdir(exist_ok=True)
        trainer.save_checkpoint(folder / f"step-{trainer.global_step}.ckpt")
        self._saved = time.monotonic()
        if trainer.is_global_zero:
            there = checkpoint_files.steps(folder)
            keep = contenders(self.validations.history) | set(list(there)[-NEWEST:])
            for step in there.keys() - keep:
                there[step].unlink(missing_ok=True)

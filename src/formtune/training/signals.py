"""Signals that ask a run to stop: noted when they come, obeyed between two steps, by all processes at the same one.

A handler that saved or exchanged something by itself would meet a half-done step, and processes that wait for others.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from lightning.pytorch.callbacks import Callback

from formtune.errors import Stopped
from formtune.model.ranks import highest

# What a terminal, a shell, a batch system (SLURM announces a preemption by SIGUSR1 if asked to) and its end send.
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Signals(Callback):
    """Notes a signal in `number` while there is something to lose, stops at once elsewhere and at a second Ctrl-C.

    Args:
        remedy: How to go on, for the last line.
    """

    def __init__(self, remedy: str = "") -> None:
        self.remedy = remedy
        self.number = 0
        self._looping = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals over, but for those that are ignored (as `nohup` does)."""
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before = signal.signal(number, self._note)
                    self._before.setdefault(number, before)

    def restore(self) -> None:
        """Give them back."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def _note(self, number: int, frame: Any) -> None:
        if not self._looping:
            self.number = number  # for the next poll, should this be raised where nothing can be
            raise Stopped(number, self.remedy)
        if self.number and number == signal.SIGINT:
            os._exit(128 + number)
        self.number = number

    def begin(self, at_once: bool = False) -> None:
        """Batches begin; Lightning has just put a handler of its own in front, which exchanges data and kills.

        Args:
            at_once: Stop in their midst.
        """
        self.install()
        self._looping = not at_once

    def end(self) -> None:
        """Batches have ended."""
        self._looping = False

    def poll(self, trainer: Any) -> None:
        """Stop if a signal came to any process, nothing being there to save.

        Raises:
            Stopped: It did.
        """
        [number] = highest(trainer, self.number)
        if number:
            raise Stopped(int(number), self.remedy)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.begin()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end()

    # Nothing of an evaluation is kept, and a batch of it can last minutes; but several processes have to agree.
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.begin(at_once=trainer.world_size == 1)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.state.fn != "fit":  # in training it is known what was saved
            self.poll(trainer)

    def on_test_batch_end(self, trainer: Any, *_: Any) -> None:
        self.poll(trainer)

    def on_predict_batch_end(self, trainer: Any, *_: Any) -> None:
        self.poll(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._looping = trainer.state.fn == "fit"

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self.end()

    on_predict_end = on_test_end

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.end()

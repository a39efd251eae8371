"""Signals that stop a run: noted when they arrive, acted on between two steps, by all processes at the same step."""

import os
import signal
import threading
from typing import Any

from lightning.pytorch.callbacks import Callback

from formtune.errors import Stopped
from formtune.model.ranks import highest

# From a terminal, a shell, a batch system (SLURM can announce a preemption by SIGUSR1), and the end of a session.
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Signals(Callback):
    """Notes a signal in `number` while a step could be lost; elsewhere, and at a second Ctrl-C, stops at once."""

    def __init__(self) -> None:
        self.remedy = ""  # how to continue, for the last line
        self.number = 0
        self._in_loop = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Install the handlers, except for ignored signals (`nohup`)."""
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before.setdefault(number, signal.signal(number, self._note))

    def restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: Any) -> None:
        if not self._in_loop:
            self.number = number  # for the next poll, if the exception is swallowed where it is raised
            raise Stopped(number, self.remedy)
        if self.number and number == signal.SIGINT:
            os._exit(128 + number)
        self.number = number

    def _poll(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Stop if any process has noted a signal."""
        [number] = highest(trainer, self.number)
        if number:
            raise Stopped(int(number), self.remedy)

    def _end(self, *_: Any, **__: Any) -> None:
        self._in_loop = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.install()  # again: Lightning has just installed its own, which communicate and kill
        self._in_loop = True

    # An evaluation has nothing to save and a batch of it can take minutes, so a single process stops at once.
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.install()
        self._in_loop = trainer.world_size > 1

    on_test_start = on_predict_start = on_validation_start

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _poll

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._in_loop = trainer.state.fn == "fit"

    on_train_end = on_test_end = on_predict_end = on_exception = _end

"""How formtune ends when it does not end well: each with one line and an exit code of its own."""

from __future__ import annotations

import signal


class UserError(Exception):
    """A mistake in configuration, data, contract or model folder.

    The message is one line: it names the key or `file:line` and the remedy. `main` prints it without a
    traceback and exits with code 2, so a script can tell it from a crash.
    """


class Fault(Exception):
    """What stopped a run that was in order: no space, no memory, a process that was lost. One line, exit code 1."""


class Stopped(BaseException):
    """A signal was obeyed; exit code 128 and its number.

    Args:
        number: The signal's number.
        detail: What was saved, and how to go on.
    """

    def __init__(self, number: int, detail: str = "") -> None:
        super().__init__(f"{signal.Signals(number).name}: {detail or 'stopped'}")
        self.code = 128 + number


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

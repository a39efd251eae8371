"""Exceptions and their exit codes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in configuration, data, format or model folder: one line with key or `file:line`, and exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a key or a value may contain line breaks


class Fault(Exception):
    """A problem that stops a correct run, such as a full disk: one line, and exit code 1."""


class Stopped(BaseException):
    """A signal that stopped the run: what was saved, how to continue, and exit code 128 + the signal's number."""

    def __init__(self, number: int, detail: str = "") -> None:
        super().__init__(f"{signal.Signals(number).name}: {detail or 'stopped'}")
        self.code = 128 + number


@contextmanager
def as_user_error(what: str, remedy: str = "") -> Iterator[None]:
    """Turn any exception into a UserError: damaged files and code by others can raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({first_line(error)}){remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the error's name if that is not a sentence."""
    name = type(error).__name__
    text = f"{name}: {error}" if isinstance(error, KeyError) else str(error).strip() or name
    return text.splitlines()[0]

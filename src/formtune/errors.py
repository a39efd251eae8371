"""The one error type for mistakes that the user can mend."""


class UserError(Exception):
    """A mistake in configuration, data, contract or model folder.

    The message is one line: it names the key or `file:line` and the remedy. `main` prints it without a
    traceback and exits with code 2, so a script can tell it from a crash.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

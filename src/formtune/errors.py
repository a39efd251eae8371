"""The one error type for mistakes that the user can mend."""


class UserError(Exception):
    """A mistake in configuration, data, contract or model folder.

    The message is one line: it names the key or `file:line` and the remedy. `main` prints it without a
    traceback and exits with code 2, so a script can tell it from a crash.
    """

"""Errors that a user can act on."""

import signal


class InputError(ValueError):
    """Bad input from outside: a file, a folder, a config value.

    The message is one sentence that says what was given, what is expected and what to do.
    `run.py` prints it and exits with status 2.
    """


INTERRUPTED = 130
"""Exit status after Ctrl-C; after SIGTERM it is 0, for then the run did what was asked."""


class Stopped(BaseException):
    """A signal ended the run: like KeyboardInterrupt no error, and not to be caught as one.

    Attributes:
        status: that the program should exit with.
    """

    def __init__(self, number: int):
        super().__init__(f"Stopped by {signal.Signals(number).name}")
        self.status = INTERRUPTED if number == signal.SIGINT else 0

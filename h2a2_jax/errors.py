"""Errors that a user can act on, and the end of a run by a signal."""

import signal


class InputError(ValueError):
    """Bad input from outside: a file, a folder, a config value.

    The message is one sentence: the value that was given, the value that is expected and what to do.
    `run.py` prints it and exits with status 2.
    """


INTERRUPTED = 130
"""Exit status after Ctrl-C; after SIGTERM the status is 0, because the run did what was asked."""


class Stopped(BaseException):
    """A signal ended the run. Like KeyboardInterrupt it is no error, so that `except Exception` does not catch it.

    Attributes:
        status: exit status for the program.
        signal_name: as "SIGTERM".
        together: True if all processes of the run stop at the same step.
    """

    def __init__(self, number: int, *, together: bool = False):
        self.together, self.signal_name = together, signal.Signals(number).name
        super().__init__(f"Stopped by {self.signal_name}")
        self.status = INTERRUPTED if number == signal.SIGINT else 0

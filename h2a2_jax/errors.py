"""Errors that a user can act on."""


class InputError(ValueError):
    """Bad input from outside: a file, a folder, a config value.

    The message is one sentence that says what was given, what is expected and what to do.
    `run.py` prints it and exits with status 2.
    """

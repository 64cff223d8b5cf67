"""Errors that a user can act on, and the end of a run by a signal."""

import signal

MOST_LETTERS = 1000
"""Length of the longest error message; what a longer one quotes in its middle is left out."""


class InputError(ValueError):
    """Bad input from outside: a file, a folder, a config value.

    The message is one sentence: the value that was given, the value that is expected and what to do.
    `run.py` prints it and exits with status 2.

    A message may quote a file. It is made one line of printable letters (`one_line`) of at most `MOST_LETTERS`, so that
    no file writes to the terminal that shows it.
    """

    def __init__(self, message: object = ""):
        text = one_line(str(message))
        if len(text) > MOST_LETTERS:
            end = MOST_LETTERS // 3  # what to do
            text = f"{text[: MOST_LETTERS - end - 5]} ... {text[-end:]}"
        super().__init__(text)


def one_line(text: str) -> str:
    """Return a text with escapes, as in a string of Python, for the letters that cannot be printed.

    Those are line breaks, commands to a terminal, and bytes of file names that are no UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(value: object, most: int = 200) -> str:
    """Return a text of unknown origin, or the message of an error about it, as a part of a sentence.

    White space becomes single blanks; of more than `most` letters the first are left.
    """
    text = one_line(" ".join(str(value)[: 10 * most].split()))
    return text if len(text) <= most else f"{text[:most]}..."


def reason_of(error: BaseException, most: int = 200) -> str:
    """Return why something failed, as a part of a sentence: the system's words, else the error's message or its kind.

    A message is `quoted`, with at most `most` letters.
    """
    return getattr(error, "strerror", None) or quoted(error, most) or type(error).__name__


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

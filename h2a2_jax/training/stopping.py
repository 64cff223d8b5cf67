"""Signals that end a run in order: SIGTERM, as schedulers send, and Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from h2a2_jax.errors import Stopped
from h2a2_jax.host import restore_handler

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Takes note of SIGTERM and SIGINT while a run steps, and raises `Stopped` on them outside of its steps.

    A second SIGINT raises at once, wherever the run is. Outside of the main thread, where Python delivers no signals,
    nothing is changed.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._received: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._received is not None

    def stopped(self) -> Stopped:
        """What to raise for the signal that came."""
        assert self._received is not None
        return Stopped(self._received)

    def request(self, number: int) -> None:
        """As if the signal had come; another process of the run may have got it."""
        self._received = number

    @contextmanager
    def watched(self) -> Iterator["StopSignals"]:
        """Handles the signals inside, and as before after it."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # What is ignored, as Ctrl-C below nohup, stays so.
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before: dict[int, Any] = {number: signal.signal(number, self._receive) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                restore_handler(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is taken note of only."""
        with self._set(True):
            yield

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Inside, and `deferred` outside, a signal raises at once."""
        if self.requested:
            raise self.stopped()
        with self._set(False):
            yield

    @contextmanager
    def _set(self, deferring: bool) -> Iterator[None]:
        before, self._deferring = self._deferring, deferring
        try:
            yield
        finally:
            self._deferring = before

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self._received == signal.SIGINT == number
        self._received = number
        if again or not self._deferring:
            raise self.stopped()

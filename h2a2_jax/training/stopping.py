"""What ends a run early: signals, also while a program compiles, and a workdir that vanishes."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from h2a2_jax.distributed import ExchangeFuture, end_now, is_main
from h2a2_jax.errors import InputError, Stopped
from h2a2_jax.host import restore_handler
from h2a2_jax.loader.stream import JointStep
from h2a2_jax.training.callbacks import Callback, Training
from h2a2_jax.training.step import StepMetrics


class StopSignals(Callback):
    """End a run on SIGTERM, SIGHUP or SIGINT: after the step under way, and at once outside of steps.

    A second SIGINT raises `Stopped` at once, wherever the run is. Outside of the main thread, where Python delivers no
    signals, nothing is handled.

    Python delivers a signal only when the main thread runs Python code, which it does not while XLA compiles a
    program. A thread looks after that: outside of steps, and while a step compiles, it prints what is saved and ends
    the process. So it does where Python drops `Stopped`, as it does in functions that JAX has called while it collects
    garbage.

    Attributes:
        rescue: saves what can be saved, if the argument is True, and describes what is saved; called in that thread.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))

    _PATIENCE_S = 2.0
    """The main thread has this time to handle a signal itself."""
    _RESCUE_S = 6.0

    def __init__(self) -> None:
        self._deferring = False
        self._received: int | None = None
        self._exchanged: ExchangeFuture | None = None
        self._together = False
        self.rescue: Callable[[bool], str] = lambda save: "nothing was under way"
        self._seen: set[tuple[Any, ...]] = set()  # shapes of batches whose step is compiled
        self._compiling = self._between_steps = self._leaves = False
        self._leaving = threading.RLock()  # held by the thread that ends the process

    @property
    def requested(self) -> bool:
        """True if a signal arrived."""
        return self._received is not None

    def stopped(self) -> Stopped:
        """The exception for the signal that arrived."""
        assert self._received is not None
        with self._leaving:
            self._leaves = True
            return Stopped(self._received, together=self._together)

    def before_batch(self, training: Training, item: JointStep) -> None:
        """Note if the step is compiled for this batch."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(item.batch))
        self._compiling, self._between_steps = (
            shapes not in self._seen,
            item.step % training.config.optim.accumulate_steps == 0,
        )
        self._seen.add(shapes)

    def after_batch(self, training: Training, item: JointStep, metrics: StepMetrics) -> None:
        """Note that the step is compiled."""
        with self._leaving:
            self._compiling = False

    def after_step(self, training: Training, metrics: StepMetrics) -> None:
        """Set `training.stopping`, in all processes at the same step.

        One process decides at once. Several processes exchange their flags without waiting, and decide a step later.
        """
        if training.process_layout.alone:
            training.stopping = self.requested
            return
        before, self._exchanged = self._exchanged, self._exchange(training)
        training.stopping = before is not None and self._any(before)

    def after_steps(self, training: Training) -> None:
        """Raise `Stopped` if a signal arrived in any process; no later step would notice it."""
        if self._any(self._exchange(training)):
            raise self.stopped()

    @contextlib.contextmanager
    def handle(self) -> Iterator["StopSignals"]:
        """Handle the signals inside, and put the handlers back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # Ignored signals, as Ctrl-C below nohup, stay ignored.
        handled = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before: dict[int, Any] = {number: signal.signal(number, self._receive) for number in handled}
        noted, note = os.pipe()  # Python writes the number of each signal to it, whatever the main thread does
        os.set_blocking(note, False)
        earlier = signal.set_wakeup_fd(note, warn_on_full_buffer=False)
        hook = sys.unraisablehook

        def drop(unraisable: Any) -> None:
            # Python drops what a handler raises in a garbage collection: then the thread ends the process.
            if isinstance(unraisable.exc_value, Stopped):
                self._leaves = False
            else:
                hook(unraisable)

        sys.unraisablehook = drop
        # In a shell of Python, a notebook too, Ctrl-C stops the call and not the process with all that is in it.
        is_shell = hasattr(sys, "ps1")
        watched = [number for number in handled if number != signal.SIGINT or not is_shell]
        threading.Thread(target=self._watch, args=(noted, watched), name="watch-signals", daemon=True).start()
        try:
            yield self
        finally:
            sys.unraisablehook = hook
            signal.set_wakeup_fd(earlier)
            os.close(note)
            for number, handler in before.items():
                restore_handler(number, handler)

    @contextlib.contextmanager
    def defer(self, deferring: bool = True) -> Iterator[None]:
        """Only note signals inside."""
        before, self._deferring = self._deferring, deferring
        try:
            yield
        finally:
            self._deferring = before

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise on signals at once inside, although `defer` outside."""
        if self.requested:
            raise self.stopped()
        with self.defer(False):
            yield

    def _exchange(self, training: Training) -> ExchangeFuture:
        return training.process_layout.exchange_flag(self.requested)

    def _any(self, exchanged: ExchangeFuture) -> bool:
        """Return True if a process received a signal, and stop this process too then."""
        found = bool(exchanged.result().any())
        if found and not self.requested:
            self._received = signal.SIGTERM
        self._together = found
        return found

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self._received == signal.SIGINT == number
        self._received = number
        if again or not self._deferring:
            self._together = False
            raise self.stopped()

    def _watch(self, noted: int, handled: Sequence[int]) -> None:
        """End the process on a signal that the main thread cannot handle; until the other end of the pipe closes."""
        arrived: list[int] = []
        since = 0.0
        with open(noted, "rb", buffering=0) as file:
            while True:
                if wait([file.fileno()], 0.2 if arrived else None):
                    numbers = file.read(64)
                    if not numbers:
                        return
                    since = since if arrived else time.monotonic()
                    arrived += [number for number in numbers if number in handled]
                if not arrived or self._leaves or time.monotonic() - since < self._PATIENCE_S:
                    continue
                if not self._deferring or self._compiling or arrived.count(signal.SIGINT) > 1:
                    self._leave(arrived[-1])

    def _leave(self, number: int) -> None:
        """End the process while the main thread is in C++; return if a step began to change the state meanwhile."""
        with self._leaving:
            if self._leaves:
                return
            save = self._deferring and self._compiling and self._between_steps
            found: list[str] = []

            def rescue() -> None:
                with contextlib.suppress(RuntimeError):  # the step has taken the arrays
                    found.append(self.rescue(save))

            thread = threading.Thread(target=rescue, daemon=True)
            thread.start()
            thread.join(self._RESCUE_S)
            if not thread.is_alive() and not found:
                return
            if not found:
                found.append("the same command goes on from the newest checkpoint")
            end_now(Stopped(number), f"Stopped by {signal.Signals(number).name}; {found[0]}.")


class KeepWorkdir(Callback):
    """End a run whose workdir was removed, emptied, moved or replaced, before it writes to another one.

    Args:
        workdir: folder of the run, with the config in it.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._identity: tuple[int, int] | None = None

    def begin(self) -> None:
        """Note which folder the workdir is; until then, and in processes that do not write, nothing is checked."""
        if is_main():
            self._identity = self._find(self._workdir)

    @contextlib.contextmanager
    def explain(self) -> Iterator[None]:
        """Replace an error that the loss of the workdir may have caused."""
        try:
            yield
        except Exception:
            self.check()
            raise

    def check(self) -> None:
        """Look for the workdir.

        Raises:
            InputError: it is there no more.
        """
        if self._identity is not None and self._find(self._workdir) != self._identity:
            raise InputError(
                f"the workdir {self._workdir} was removed, moved, replaced or unmounted while a run wrote to it: put "
                "it back, and the same command goes on from its newest checkpoint; without it the run begins anew."
            )

    def after_step(self, training: Training, metrics: StepMetrics) -> None:
        """Look before a line or a checkpoint is written."""
        if training.is_logged:
            jax.block_until_ready(metrics)  # or the line would be written long after the look
            self.check()

    def after_steps(self, training: Training) -> None:
        """Look before the last evaluation."""
        self.check()

    @staticmethod
    def _find(workdir: Path) -> tuple[int, int] | None:
        try:
            found = workdir.stat()
            (workdir / "config.json").stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

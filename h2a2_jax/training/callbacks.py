"""Callbacks of the training loop: stop signals, profiles, counted compilations, checkpoints, progress.

The callback for metrics is in `h2a2_jax.training.metrics`, that for values that are not finite in
`h2a2_jax.training.nonfinite`, that for evaluations in `h2a2_jax.training.loop`.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax import monitoring
from tqdm import tqdm

from h2a2_jax.balancers.packing import unpack
from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.checkpoint.train_state import TrainState
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import ExchangeFuture, MeshLayout, end_now, is_main, say
from h2a2_jax.errors import InputError, Stopped
from h2a2_jax.host import duration, restore_handler
from h2a2_jax.loader.stream import JointStep, JointStream
from h2a2_jax.models import DetectorNetwork
from h2a2_jax.training.build import Trainer
from h2a2_jax.training.step import StepMetrics


@dataclass
class Training:
    """A run under way, for callbacks to read.

    Attributes:
        config: the run's configuration.
        workdir: folder of the run.
        process_layout: processes of the run and their devices.
        stream: batches of training scans.
        trainer: compiled step and learning rate.
        store: checkpoints.
        total: optimiser steps of the whole run.
        start: the detector before the first step; None if it is not known any more.
        state: the newest state.
        step: optimiser steps done.
        first_step: optimiser steps done before this process.
        doubtful: steps whose evaluation cannot be relied on until it is made anew, with the reason; in the process that
            writes.
        stopping: True if the run ends after this step, because of a signal.
    """

    config: ExperimentConfig
    workdir: Path
    process_layout: MeshLayout
    stream: JointStream
    trainer: Trainer
    store: CheckpointStore
    total: int
    start: DetectorNetwork | None
    state: TrainState
    step: int
    first_step: int
    doubtful: dict[int, str] = field(default_factory=dict)
    stopping: bool = False

    def is_due(self, every: int) -> bool:
        """Return True every `every` steps, if that is not 0, and after the last one."""
        return self.step == self.total or (every > 0 and self.step % every == 0)

    @property
    def is_saved(self) -> bool:
        """True if this step has a checkpoint."""
        train = self.config.train
        return self.stopping or self.is_due(train.evaluate_every) or self.is_due(train.checkpoint_every)

    @property
    def is_logged(self) -> bool:
        """True if this step has a line of metrics."""
        return self.is_saved or self.is_due(self.config.train.log_every)


class Callback:
    """Work beside the steps; every hook does nothing by default.

    A step consists of `optim.accumulate_steps` batches. `training.step` counts the steps done, in `after_step` with the
    present one.
    """

    def before_steps(self, training: Training) -> None:
        """Called once, before the first batch."""

    def before_batch(self, training: Training, item: JointStep) -> None:
        """Called before each batch."""

    def after_batch(self, training: Training, item: JointStep, metrics: StepMetrics) -> None:
        """Called after each batch, when the device has begun to work on it."""

    def after_step(self, training: Training, metrics: StepMetrics) -> None:
        """Called after the last batch of each step, with the metrics of that batch."""

    def after_steps(self, training: Training) -> None:
        """Called once, after the last step of a run that nothing stopped."""

    def close(self) -> None:
        """Called at the end of the run, however it ends."""


class SaveCheckpoint(Callback):
    """Save the state in the background.

    Args:
        saved: step of the newest checkpoint; None without one.
    """

    def __init__(self, saved: int | None):
        self.saved = saved

    def after_step(self, training: Training, metrics: StepMetrics) -> None:
        """Save if a checkpoint is due."""
        if training.is_saved:
            self.save(training)

    def save(self, training: Training) -> None:
        """Save the state, unless this step has a checkpoint already."""
        if self.saved == training.step:
            return
        whole = training.process_layout.fetch(training.state)
        if is_main():
            names, scans = training.config.dataset_names, training.stream.num_scans
            training.store.save(training.step, unpack(whole), training.config, names, scans)
        self.saved = training.step


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


PROFILES = "profile"
"""In the workdir of a run."""


class StepProfiler(Callback):
    """Trace chosen steps into <workdir>/profile, and the next five after a SIGUSR1 (`kill -USR1 PID`).

    A trace that fails prints a message and ends no run. The signal is handled from the start, in the main thread of
    systems that have it, until `close`, which puts the handler back. Each of several processes has its own
    folder, <workdir>/profile/process_<number>, and handles its own signal.

    Args:
        workdir: folder of the run; the folder in it is made by the first trace.
        first: first step to trace, counted from 1; 0: no step.
        last: last step to trace, inclusive; 0 with `first` 0.
    """

    ON_SIGNAL = 5

    def __init__(self, workdir: str | Path, first: int = 0, last: int = 0):
        self.folder = Path(workdir) / PROFILES
        if jax.process_count() > 1:
            self.folder /= f"process_{jax.process_index()}"
        self._first, self._last = first, last
        self._ends: int | None = None  # step after which the running trace ends
        self._requested = False
        self._before: Any = None
        self._handles = hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread()
        if self._handles:
            self._before = signal.signal(signal.SIGUSR1, self._request)

    def before_batch(self, training: Training, item: JointStep) -> None:
        """Start a trace with the first batch of a step, if one is due."""
        step = training.step + 1
        if self._ends is not None or item.step % training.config.optim.accumulate_steps:
            return
        if self._requested:
            self._requested = False
            self._start(step, step + self.ON_SIGNAL - 1)
        elif 0 < self._first <= step <= self._last:
            self._start(step, self._last)

    def after_step(self, training: Training, metrics: Any) -> None:
        """End the trace after its last step, and wait for the device only then."""
        if self._ends is not None and training.step >= self._ends:
            jax.block_until_ready(metrics)
            self._stop()

    def after_steps(self, training: Training) -> None:
        """End a running trace."""
        self._stop()

    def close(self) -> None:
        """End a running trace, and put back the handler of the signal."""
        self._stop()
        if self._handles:
            self._handles = False
            restore_handler(signal.SIGUSR1, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def _start(self, first: int, last: int) -> None:
        try:
            # Found out now, not when the trace is written: JAX would hold on to one that it could not write.
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.folder))
        except Exception as error:  # the run is worth more than a trace
            self._print_failure(error)
            self._first = self._last = 0  # or it would fail at each of the chosen steps
            return
        self._ends = last
        print(f"Profiling steps {first} to {last}.", flush=True)

    def _stop(self) -> None:
        if self._ends is None:
            return
        self._ends = None
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            self._print_failure(error)
            return
        print(
            f"A profile is in {self.folder}: open it with `pip install xprof` and `xprof --logdir={self.folder}`, or "
            "drop the newest *.trace.json.gz in it on https://ui.perfetto.dev.",
            flush=True,
        )

    def _print_failure(self, error: Exception) -> None:
        print(f"The steps could not be profiled ({error}); training goes on.", flush=True)


_COMPILED = "/jax/core/compile/backend_compile_duration"
"""A program was compiled, or loaded from the persistent cache; in the thread that asked for it."""
_LOADED = "/jax/compilation_cache/cache_hits"
"""A program was loaded; comes before the event above."""


class CompilationCounter(Callback):
    """Count the programs that JAX compiles while this is entered, in all threads of this process.

    The train step is compiled once for each bucket of padded shapes, and a run meets most of its buckets early. If late
    steps compile more than that, a warning is printed, and again whenever the number doubled.

    Args:
        expected: programs that late steps may compile without a warning: the number of buckets.
        first_steps: batches of this process that are not late yet.

    Attributes:
        count: programs, compiled or loaded.
        loaded: programs that were loaded from the persistent compilation cache.
        seconds: time that compiling and loading took.
    """

    def __init__(self, expected: int, first_steps: int = 20):
        self.count, self.loaded, self.seconds = 0, 0, 0.0
        self._expected, self._first_steps = expected, first_steps
        self._batches, self._late, self._late_seconds = 0, 0, 0.0
        self._warn_at = expected + 1
        self._stepping: int | None = None
        self._lock = threading.Lock()

    def before_batch(self, training: Training, item: JointStep) -> None:
        """Count the programs of this thread as the step's."""
        self._batches += 1
        self._stepping = threading.get_ident()

    def after_batch(self, training: Training, item: JointStep, metrics: StepMetrics) -> None:
        """Stop counting for the step."""
        self._stepping = None

    def after_step(self, training: Training, metrics: StepMetrics) -> None:
        """Print the warning, if one is due."""
        if self._late < self._warn_at:
            return
        self._warn_at = 2 * self._late
        say(
            f"Step {training.step}: {self._late} programs were compiled after the first {self._first_steps} steps, "
            f"which took {self._late_seconds:.0f} s; the buckets of padded shapes account for {self._expected} at "
            "most. Shapes keep changing from step to step: JAX_EXPLAIN_CACHE_MISSES=1 in the environment says which, "
            "and train.max_bucket=0 gives all steps one shape (larger batches are cropped)."
        )

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event != _COMPILED:
            return
        with self._lock:
            self.count += 1
            self.seconds += duration_secs
            if self._stepping == threading.get_ident() and self._batches > self._first_steps:
                self._late += 1
                self._late_seconds += duration_secs

    def _on_event(self, event: str, **_: Any) -> None:
        if event == _LOADED:
            with self._lock:
                self.loaded += 1

    def __enter__(self) -> "CompilationCounter":
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(self, *exception: object) -> None:
        # Another user of JAX's listeners may have cleared them all, which JAX asserts has not happened.
        with contextlib.suppress(AssertionError, ValueError):
            monitoring.unregister_event_duration_listener(self._on_duration)
        with contextlib.suppress(AssertionError, ValueError):
            monitoring.unregister_event_listener(self._on_event)


class Progress:
    """A line of progress on standard error: step of total, loss, scans per second, time taken and time left.

    A terminal shows one line, updated in place. A log gets a new line at most every `interval` seconds, and always for
    the last step. The time left extrapolates from the steps of this process, so that a resumed run is not overrated.

    Args:
        total_steps: steps of the whole run.
        first_step: steps done before this process.
        interval: seconds between two lines of a log.
    """

    def __init__(self, total_steps: int, first_step: int = 0, interval: float = 30.0):
        self._total, self._first, self._interval = total_steps, first_step, interval
        self._scans = 0
        self._start = self._last_line = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step") if terminal else None

    def update(self, step: int, loss: float, scans: int) -> None:
        """Show a step.

        Args:
            step: steps done, with this one.
            loss: the loss to show.
            scans: scans that were trained on since the last call.
        """
        self._scans += scans
        now = time.monotonic()
        elapsed = now - self._start
        rate = self._scans / max(elapsed, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} scans/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step >= self._total or now - self._last_line >= self._interval:
            self._last_line = now
            left = elapsed / max(step - self._first, 1) * (self._total - step)
            print(
                f"step {step}/{self._total}  loss {loss:.4f}  {rate:.1f} scans/s  "
                f"elapsed {duration(elapsed)}  left {duration(left)}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._bar is not None:
            self._bar.close()

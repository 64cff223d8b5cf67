"""Callbacks of the training loop: profiles, counted compilations, checkpoints, progress.

Those that end a run early are in `h2a2_jax.training.stopping`, the one for metrics is in `h2a2_jax.training.metrics`,
that for values that are not finite in `h2a2_jax.training.nonfinite`, that for evaluations in `h2a2_jax.training.loop`.
"""

import contextlib
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
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
from h2a2_jax.distributed import MeshLayout, is_main, say
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

"""What the machine does during some steps, recorded by JAX's profiler when asked for."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from h2a2_jax.host import restore_handler

FOLDER = "profile"
"""In the workdir of a run."""
_ON_SIGNAL = 5
_HOW_TO_OPEN = (
    "open it with `pip install xprof` and `xprof --logdir={folder}`, or drop the newest *.trace.json.gz in it on "
    "https://ui.perfetto.dev"
)


class StepProfiler:
    """Traces chosen steps into <workdir>/profile, and the next five after a SIGUSR1 (`kill -USR1 PID`).

        with StepProfiler(workdir, first, last) as profiler, profiler.steps():
            for ...:
                profiler.before_step(step)
                state, metrics = take_step(state, batch)
                profiler.after_step(step, metrics)

    A trace that fails is said and ends no run. The signal is heard where this is made in the main thread, on systems
    that have it, until `close`, which puts back the handler from before. In a run of several processes each has a
    folder of its own, <workdir>/profile/process_<number>, and hears its own signal.

    Args:
        workdir: of the run; the folder in it is made by the first trace.
        first: first step to trace, counted from 1; 0: none is.
        last: last step to trace, which is traced too; 0 with `first` 0.
    """

    def __init__(self, workdir: str | Path, first: int = 0, last: int = 0):
        self.folder = Path(workdir) / FOLDER
        if jax.process_count() > 1:
            self.folder /= f"process_{jax.process_index()}"
        self._first, self._last = first, last
        self._ends: int | None = None  # after this step, where a trace is under way
        self._requested = False
        self._before: Any = None
        self._listens = hasattr(signal, "SIGUSR1") and threading.current_thread() is threading.main_thread()
        if self._listens:
            self._before = signal.signal(signal.SIGUSR1, self._request)

    def before_step(self, step: int) -> None:
        """Start a trace if one is due.

        Args:
            step: the one to come, counted from 1.
        """
        if self._ends is not None:
            return
        if self._requested:
            self._requested = False
            self._start(step, step + _ON_SIGNAL - 1)
        elif 0 < self._first <= step <= self._last:
            self._start(step, self._last)

    def after_step(self, step: int, outputs: Any) -> None:
        """End the trace after its last step.

        Args:
            step: the one just given to the device.
            outputs: its results, which are waited for when a trace ends and not otherwise.
        """
        if self._ends is not None and step >= self._ends:
            jax.block_until_ready(outputs)
            self._stop()

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Behind the steps a trace under way ends; a signal that comes then is passed over."""
        try:
            yield
        finally:
            self._end()

    def close(self) -> None:
        """End a trace under way, and listen no longer."""
        self._end()
        if self._listens:
            self._listens = False
            restore_handler(signal.SIGUSR1, self._before)

    def _end(self) -> None:
        if self._ends is not None:
            self._stop()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def _start(self, first: int, last: int) -> None:
        try:
            # Found out now, not when the trace is written: JAX would hold on to one that it could not write.
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.folder))
        except Exception as error:  # whatever it is, the run is worth more
            _say_failure(error)
            self._first = self._last = 0  # or it would fail at each of the chosen steps
            return
        self._ends = last
        print(f"Profiling steps {first} to {last}.", flush=True)

    def _stop(self) -> None:
        self._ends = None
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            _say_failure(error)
            return
        print(f"A profile is in {self.folder}: {_HOW_TO_OPEN.format(folder=self.folder)}.", flush=True)

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _say_failure(error: Exception) -> None:
    print(f"The steps could not be profiled ({error}); training goes on.", flush=True)

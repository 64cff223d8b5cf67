"""How many programs a run compiles, and a warning when that does not end."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from jax import monitoring

_BACKEND = "/jax/core/compile/backend_compile_duration"
"""A program was compiled, or loaded from the persistent cache; in the thread that asked for it."""
_LOADED = "/jax/compilation_cache/cache_hits"
"""It was loaded; told before the event above."""


class CompilationCounter:
    """Counts what JAX compiles while it is entered, in all threads of this process.

    The train step is compiled once for each bucket of padded shapes, and a run meets most of its buckets early. What
    the steps after the first ones compile is counted apart, for `warning`.

        with CompilationCounter(expected=config.train.max_rung + 1) as compilations:
            for ...:
                with compilations.step():
                    state, metrics = take_step(state, batch)
                if sentence := compilations.warning(step):
                    say(sentence)

    Args:
        expected: programs that late steps may compile without a warning: the number of buckets.
        first_steps: of this process, that are not late yet.

    Attributes:
        count: programs, compiled or loaded.
        loaded: those of them that were loaded from the persistent compilation cache.
        seconds: that compiling and loading took.
    """

    def __init__(self, expected: int, first_steps: int = 20):
        self.count, self.loaded, self.seconds = 0, 0, 0.0
        self._expected, self._first_steps = expected, first_steps
        self._steps, self._late, self._late_seconds = 0, 0, 0.0
        self._warn_at = expected + 1
        self._stepping: int | None = None
        self._lock = threading.Lock()

    @property
    def compiled(self) -> int:
        """Programs that were not loaded."""
        return self.count - self.loaded

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """To be entered around a train step: what this thread compiles inside is the step's."""
        self._steps += 1
        self._stepping = threading.get_ident()
        try:
            yield
        finally:
            self._stepping = None

    def warning(self, step: int) -> str | None:
        """A sentence when late steps compiled more than is expected; again whenever the number doubled, else None.

        Args:
            step: optimiser steps done, for the sentence.
        """
        if self._late < self._warn_at:
            return None
        self._warn_at = 2 * self._late
        return (
            f"Step {step}: {self._late} programs were compiled after the first {self._first_steps} steps, which took "
            f"{self._late_seconds:.0f} s; the buckets of padded shapes account for {self._expected} at most. Shapes "
            "keep changing from step to step: JAX_EXPLAIN_CACHE_MISSES=1 in the environment says which, and "
            "train.max_rung=0 gives all steps one shape (larger batches are cropped)."
        )

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event != _BACKEND:
            return
        with self._lock:
            self.count += 1
            self.seconds += duration_secs
            if self._stepping == threading.get_ident() and self._steps > self._first_steps:
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
        # Who else uses JAX's listeners may have cleared them all, which JAX asserts has not happened.
        with contextlib.suppress(AssertionError, ValueError):
            monitoring.unregister_event_duration_listener(self._on_duration)
        with contextlib.suppress(AssertionError, ValueError):
            monitoring.unregister_event_listener(self._on_event)

"""Timing of the benchmarks: rivals take turns in one run; medians; the rate of the machine's matmul beside them."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def alternate(functions: Mapping[str, Callable[[], object]], repeats: int, *, calls: int = 1) -> dict[str, float]:
    """Median seconds of a call of each function, measured in turns: A B C A B C ...

    Each turn begins with a call that does not count: it compiles, wakes the threads of one library and lets those of
    the one before it fall asleep, as in a network whose layers are all of one library.

    Args:
        functions: functions by name; a result on a device is waited for.
        repeats: number of rounds.
        calls: number of calls of a function before its last result is waited for; more than one hides the time to start
            a call on an accelerator.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            jax.block_until_ready(function())
            start = time.perf_counter()
            for _ in range(calls):
                result = function()
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def rounds(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of one call of each function in every round, by name, to be compared round by round; the order turns."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def thread_state(step: Callable[..., tuple], state: Any, batches: Sequence[Any]) -> Callable[[], object]:
    """A call of a train step on the batches in turn, which passes its state to the next call."""
    held, turns = [state], itertools.cycle(batches)

    def call() -> object:
        held[0], metrics = step(held[0], next(turns))
        return held[0], metrics

    return call


def matmul_rate(repeats: int, *, calls: int = 1) -> float:
    """Operations a second of a square float32 matmul in JAX's default precision: the machine's ceiling."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * n**3 / alternate({"matmul": lambda: product(a, a)}, repeats, calls=calls)["matmul"]


def report(message: str) -> None:
    """Print a line of progress on standard error."""
    print(message, file=sys.stderr, flush=True)


def peak_memory() -> float:
    """Peak of the memory in use, MB: of the accelerator; on CPUs the resident memory of this process."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e6
    return resident_peak()


def resident_peak() -> float:
    """Peak of the resident memory of this process, MB."""
    # Not getrusage's ru_maxrss, which begins at the memory of the parent.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3

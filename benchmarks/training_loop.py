"""What the training loop costs beside the device step: bare steps, the loop on ready batches, the loop as it is.

    python -m benchmarks.training_loop [--config demo] [--steps 20] [--rounds 5]

Three ways of taking the same steps take turns, after a warm-up. "bare": nothing but the compiled step, on batches that
lie on the device. "loop": `take_steps` on the same batches, with all that a run does with each step and every
`log_every` steps (looking for what is not finite, metrics.jsonl, TensorBoard, kernel selection, progress). "loop and
input": the same with scans prepared beside it by the run's own stream, which on CPUs shares the cores with the step. A
checkpoint is timed apart, for how long the loop stands still, and counted by `checkpoint_every`. Medians over rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from benchmarks.timing import report
from configs.joint import get_config
from h2a2_jax.config import ExperimentConfig, experiment_config
from h2a2_jax.loader.stream import JointStep, JointStream
from h2a2_jax.training.callbacks import (
    CompilationCounter,
    SaveCheckpoint,
    StepProfiler,
    Training,
)
from h2a2_jax.training.loop import set_up, take_steps
from h2a2_jax.training.metrics import LogMetrics
from h2a2_jax.training.nonfinite import NonFiniteWatch
from h2a2_jax.training.stopping import StopSignals


class ReadyStream:
    """A stream whose batches are there already; everything else is the stream's."""

    def __init__(self, stream: JointStream, items: list[JointStep]):
        self._stream, self._items = stream, items

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def steps(self, first: int, last: int) -> Generator[JointStep]:
        """Steps first..last-1, in turn one of the batches."""
        for step in range(first, last):
            yield replace(self._items[step % len(self._items)], step=step)


def bare(run: Training, items: list[JointStep], steps: int) -> float:
    """Seconds of a step, waited for at the end of all."""
    started = time.perf_counter()
    for step in range(steps):
        run.state, metrics = run.trainer.take_step(run.state, items[step % len(items)].batch)
    jax.block_until_ready((run.state, metrics))
    return (time.perf_counter() - started) / steps


def looped(run: Training, stream: Any, compilations: CompilationCounter, steps: int) -> float:
    """Seconds of a step in the loop."""
    run.stream, run.total = stream, run.step + steps
    signals, saver = StopSignals(), SaveCheckpoint(run.total)  # checkpoints are timed apart
    with closing(StepProfiler(run.workdir)) as profiler, closing(LogMetrics(run, compilations)) as log:
        started = time.perf_counter()
        take_steps(run, [profiler, compilations, signals, NonFiniteWatch(run), log, saver], signals, saver)
        jax.block_until_ready(run.state)
        return (time.perf_counter() - started) / steps


def saving(run: Training) -> float:
    """Seconds for which the loop stands still at a checkpoint."""
    run.store.wait()
    run.step += 1
    started = time.perf_counter()
    SaveCheckpoint(None).save(run)
    return time.perf_counter() - started


def measure(config: ExperimentConfig, steps: int, rounds: int) -> dict[str, Any]:
    """Medians, and what the loop adds as shares of a bare step."""
    seconds: dict[str, list[float]] = {"bare": [], "loop": [], "loop and input": [], "checkpoint": []}
    with TemporaryDirectory() as folder, ExitStack() as opened:
        run, _, compilations = set_up(config, Path(folder) / "run", None, opened)
        stream = run.stream
        items = [stream.step(step) for step in range(min(steps, 8))]
        bare(run, items, 2)
        for number in range(rounds):
            seconds["bare"].append(bare(run, items, steps))
            seconds["loop"].append(looped(run, ReadyStream(stream, items), compilations, steps))
            seconds["loop and input"].append(looped(run, stream, compilations, steps))
            seconds["checkpoint"].append(saving(run))
            report(f"round {number + 1} of {rounds}: " + ", ".join(f"{k} {v[-1]:.4f} s" for k, v in seconds.items()))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    step = medians["bare"]
    added = {
        "loop": statistics.median(b - a for a, b in zip(seconds["bare"], seconds["loop"], strict=True)) / step,
        "checkpoints": medians["checkpoint"] / config.train.checkpoint_every / step,
        "input beside it": statistics.median(
            b - a for a, b in zip(seconds["loop"], seconds["loop and input"], strict=True)
        )
        / step,
    }
    return {"seconds": medians, "share of a step": added, "steps": steps, "rounds": rounds}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo", help="variant of configs/joint.py")
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = experiment_config(get_config(options.config))
    config = replace(config, train=replace(config.train, steps=10**6, evaluate_every=0, checkpoint_every=100))
    found = measure(config, options.steps, options.rounds)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found["seconds"].items():
        print(f"{name:<16}{1000 * value:9.1f} ms")
    for name, share in found["share of a step"].items():
        print(f"{name:<16}{100 * share:9.2f} % of a bare step")


if __name__ == "__main__":
    main()

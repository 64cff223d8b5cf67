"""What the input of training costs: scans per second per core, from a prepared folder to the padded maps of a step.

    python -m benchmarks.loader                          procedural scans of full size, 16 a dataset, prepared before
    python -m benchmarks.loader --root scannet=data/scannet --root sunrgbd=data/sun_rgbd
    python -m benchmarks.loader --workers 2              and how many scans a second come out of two worker processes
    python -m benchmarks.loader --profile                and which functions the time goes to

Seconds are those of a core (CPU time of the thread), so that other work on the machine counts for little; medians over
steps. Scans are loaded from disk, sampled and augmented by their dataset's recipe, voxelised at 1 cm.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO

import jax
import numpy as np

from h2a2_jax.config import ExperimentConfig, TrainConfig
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.host import available_cores
from h2a2_jax.loader.stream import JointStream, Log
from h2a2_jax.models.maps import Machine
from h2a2_jax.prepare.prepare import synthetic_command
from h2a2_jax.scans.sources import SourceConfig, build_source
from h2a2_jax.scans.specs import SPECS


def joint_stream(
    roots: dict[str, str], names: Sequence[str], batch: int, machine: Machine, workers: int
) -> JointStream:
    """The training stream of some datasets."""
    datasets = tuple(SourceConfig(name, root=roots[name]) for name in names)
    config = ExperimentConfig(datasets, train=TrainConfig(batch_size=batch, max_bucket=3, workers=workers))
    layout = MeshLayout(train_mesh(len(names), jax.devices()[:1]), len(names))
    stream = JointStream(config, [build_source(source, "train") for source in datasets], layout)
    stream.layout = replace(stream.layout, machine=machine)
    return stream


def milliseconds(stream: JointStream, steps: int) -> dict[str, float]:
    """Milliseconds of a core for a scan, by part, medians over steps; the first step warms up."""
    rounds: list[dict[str, float]] = []
    for step in range(steps + 1):
        stream.log = Log()
        stream.step(step)
        rounds.append({part: 1000 * spent / stream.log.scans for part, spent in stream.log.seconds.items()})
    return {part: float(np.median([each[part] for each in rounds[1:]])) for part in rounds[0]}


def delivered(stream: JointStream, steps: int) -> float:
    """Scans a second that come out of the stream, once its workers have begun."""
    scans, started = 0, 0.0
    for item in stream.steps(0, steps + 2):
        if item.step >= 2:
            scans += item.num_scans
        elif item.step == 1:
            started = time.monotonic()
    return scans / (time.monotonic() - started)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", action="append", default=[], help="dataset=folder; without one, procedural scans")
    parser.add_argument("--scans", type=int, default=16, help="procedural scans of each dataset")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--machine", choices=["cpu", "accelerator"], default="cpu", help="whose lists the maps carry")
    parser.add_argument("--workers", type=int, default=0, help="worker processes to measure as well")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    print(f"{available_cores()} cores; batches of {options.batch}, maps for {options.machine}")
    with tempfile.TemporaryDirectory() as folder:
        roots = dict(root.split("=", 1) for root in options.root)
        if not roots:
            for spec in SPECS:
                arguments = [f"--train={options.scans}", "--val=1", f"--output={folder}/{spec.name}"]
                with redirect_stdout(StringIO()):
                    synthetic_command(f"synthetic_{spec.name}", spec.name, arguments)
                roots[spec.name] = f"{folder}/{spec.name}"
        for name in roots:
            stream = joint_stream(roots, [name], options.batch, options.machine, workers=0)
            with cProfile.Profile() if options.profile else nullcontext() as profile:
                parts = milliseconds(stream, options.steps)
            rate = 1000 / sum(parts.values())
            print(
                f"{name:8}  {rate:5.1f} scans/s per core; "
                + ", ".join(f"{p} {ms:.1f}" for p, ms in parts.items())
                + " ms"
            )
            if profile is not None:
                pstats.Stats(profile).sort_stats("tottime").print_stats(12)
        if options.workers:
            for workers in (0, options.workers):
                rate = delivered(
                    joint_stream(roots, list(roots), options.batch, options.machine, workers), options.steps
                )
                print(f"joint, {workers or 'no'} workers: {rate:.1f} scans/s delivered")


if __name__ == "__main__":
    main()

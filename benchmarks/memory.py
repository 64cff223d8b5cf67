"""Memory of the joint train step on one of three devices, and what half precision and rematerialisation change.

    python -m benchmarks.memory [--scan FILE] [--size full|demo] [--batches 1 2 4] [--rounds 5]

The step is that of configs/joint.py, SF-KS and NGH included, one dataset a device; a batch is of copies of one scan.
Nothing but compiling is needed for the memory, which is XLA's own account of the program: "held" is what lies on a
device before and after the step (parameters, optimiser, batch), "temporaries" what the step needs besides. The time is
measured with batches of the first size, in turns; `--rounds 0` leaves it out. On CPUs three devices share the cores.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from benchmarks.scans import load_points
from configs.joint import demo, paper
from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores
from h2a2_jax.inputs.batching import Batch, collate, pad_batch, stack_batches
from h2a2_jax.inputs.scan import Scan
from h2a2_jax.models import LevelSizes, PlanLayout
from h2a2_jax.training.build import Trainer, build_detector, build_trainer
from h2a2_jax.training.config import ExperimentConfig
from h2a2_jax.training.distributed import MeshDivision
from h2a2_jax.training.mesh import train_mesh

SIZES = {"full": paper, "demo": demo}
"""Configs by name."""
VARIANTS = [(precision, remat) for precision in ("float32", "bfloat16") for remat in (False, True)]
"""Precision of the products, and whether blocks are computed twice."""
_BLOCK, _BOXES, _MAX_BOXES = 64, 16, 64


def run(scan: Path | None, size: str, batches: Sequence[int], rounds: int) -> dict[str, Any]:
    """Measure; the result is what `--json` prints.

    Raises:
        InputError: the scan cannot be read.
    """
    config = SIZES[size]()
    name, points = load_points(scan)
    mesh = train_mesh(len(config.specs), jax.devices()[: len(config.specs)])
    division = MeshDivision(mesh, len(config.specs))
    rows, programs = [], {}
    for count in batches:
        batch, voxels = _batch(config, _scan(name, points), count)
        for precision, rematerialize in VARIANTS:
            started = time.perf_counter()
            trainer = _trainer(config, precision, rematerialize, division)
            step: Any = trainer.take_step
            program = step.lower(trainer.start, batch).compile()
            memory, seconds = program.memory_analysis(), time.perf_counter() - started
            rows.append(
                {
                    "batch": count,
                    "voxels": voxels,
                    "precision": precision,
                    "rematerialize": rematerialize,
                    "held_mb": memory.argument_size_in_bytes / 1e6,
                    "temporaries_mb": memory.temp_size_in_bytes / 1e6,
                    "compile_s": seconds,
                }
            )
            timing.report(f"batch {count}, {_label(precision, rematerialize)}: compiled in {seconds:.0f} s")
            if count == batches[0] and rounds:
                programs[_label(precision, rematerialize)] = (program, trainer, batch)
    return {
        "scan": name,
        "size": size,
        "machine": {"device": jax.devices()[0].device_kind, "cores": available_cores(), "jax": jax.__version__},
        "memory": rows,
        "step_s": _times(programs, rounds),
    }


def _scan(name: str, points: np.ndarray) -> Scan:
    """With boxes around some of its points."""
    rng = np.random.default_rng(0)
    centers = points[rng.integers(len(points), size=_BOXES)]
    boxes = np.hstack([centers, rng.uniform(0.3, 1.5, (_BOXES, 3)), np.zeros((_BOXES, 1))]).astype(np.float32)
    labels = rng.integers(5, size=_BOXES).astype(np.int32)  # which all datasets have
    return Scan(name, points, np.full_like(points, 0.5), boxes, labels)


def _batch(config: ExperimentConfig, scan: Scan, count: int) -> tuple[Batch, int]:
    """The same for every dataset, on the host, and its number of voxels."""
    collated = collate([scan] * count, config.model.voxel_size)
    sizes = collated.tables.sizes
    capacities = LevelSizes(*(-(-size // _BLOCK) * _BLOCK for size in sizes))
    padded = pad_batch(collated, capacities, _MAX_BOXES, PlanLayout.of(config.model, "any"))
    return stack_batches([[padded] for _ in config.specs]), sizes.voxels


def _trainer(config: ExperimentConfig, precision: Any, rematerialize: bool, division: MeshDivision) -> Trainer:
    config = replace(config, train=replace(config.train, precision=precision, rematerialize=rematerialize))
    return build_trainer(config, build_detector(config), division, 100, 100)


def _times(programs: dict[str, tuple[Any, Trainer, Batch]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round's step; the first, which wakes everything up, does not count."""
    states = {name: trainer.start for name, (_, trainer, _) in programs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1 if programs else 0):
        for name, (program, _, batch) in programs.items():
            placed = jax.device_put(batch, program.input_shardings[0][1])
            started = time.perf_counter()
            states[name], metrics = program(states[name], placed)
            jax.block_until_ready(metrics)
            if turn:
                seconds[name].append(time.perf_counter() - started)
        timing.report(f"round {turn} of {rounds}")
    return seconds


def _label(precision: str, rematerialize: bool) -> str:
    return f"{precision}{', rematerialised' if rematerialize else ''}"


def table_of(result: dict[str, Any]) -> str:
    """The result for people."""
    machine = result["machine"]
    lines = [
        f"{result['scan']}, {result['size']} width, a device of three ({machine['device']}, {machine['cores']} cores)",
        f"{'batch':>5} {'voxels':>9}  {'':26}{'held MB':>9}{'temporaries MB':>16}",
    ]
    for row in result["memory"]:
        label = _label(row["precision"], row["rematerialize"])
        lines.append(
            f"{row['batch']:5} {row['voxels']:9,}  {label:26}{row['held_mb']:9.0f}{row['temporaries_mb']:16.0f}"
        )
    first: list[float] = next(iter(result["step_s"].values()), [])
    for label, seconds in result["step_s"].items():
        ratio = statistics.median(b / a for a, b in zip(first, seconds, strict=True))
        lines.append(f"step, {label}: {statistics.median(seconds):.2f} s, {ratio:.2f} of the first")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, help=".bin (float32 rows of six) or .ply; default a procedural room")
    parser.add_argument("--size", choices=tuple(SIZES), default="full", help="default full, TR3D's own widths")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="scans of a device (default 1 2 4)")
    parser.add_argument("--rounds", type=int, default=5, help="of timed steps; the median counts (default 5)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    if min(options.batches) < 1:
        parser.error(f"--batches has {min(options.batches)}, expected 1 or more")
    jax.config.update("jax_num_cpu_devices", 3)
    if len(jax.devices()) < 3:
        timing.report(f"There are {len(jax.devices())} devices, one for each of three datasets is needed.")
        return 2
    try:
        result = run(options.scan, options.size, options.batches, options.rounds)
    except (InputError, FileNotFoundError) as error:
        timing.report(str(error))
        return 2
    print(json.dumps(result, indent=1) if options.json else table_of(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

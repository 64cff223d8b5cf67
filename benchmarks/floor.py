"""A detector on a scan beside the machine's floor: `python -m benchmarks.floor --scan FILE`.

Evaluation (folded) and a step of training (SGD, the mean square of the predictions for a loss), each with the maps made
anew on the host from the voxels, without and with kernel selection, all in turns in one run; medians. The floor is the
time of the products of the pairs there are, 2 * pairs * Cin * Cout, at the best rate of a 2048^3 matmul in the same
run; three times that for a step. "temporaries" are what XLA's program needs beside its inputs. With `--memory` the peak
of the resident memory is measured too, in a process for each pass that compiles it and makes it three times.

    python -m benchmarks.floor --scan scan.bin --algorithm auto tiles --json
    H2A2_NATIVE=0 python -m benchmarks.floor --scan scan.bin       # XLA alone
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import timing
from benchmarks.convolution import detector_layers
from benchmarks.scans import load_points
from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores, release_memory
from h2a2_jax.inference.folding import fold
from h2a2_jax.layers import DatasetContext, ForwardContext, SelectionConfig
from h2a2_jax.models import (
    TR3D,
    DetectorConfig,
    DetectorNetwork,
    DetectorPlan,
    HeadConfig,
    PlanLayout,
    detector_tables,
    pad_plan,
)
from h2a2_jax.sparse import native_maps
from h2a2_jax.sparse.conv import Algorithm
from h2a2_jax.sparse.xla_cpu import compiler_options

PASSES = ("forward", "step")
FORMS = ("tr3d", "sfks")


@dataclass(frozen=True)
class Job:
    """A pass of a detector by an algorithm."""

    form: str
    kind: str
    algorithm: Algorithm

    @property
    def name(self) -> str:
        """Name in results."""
        return f"{self.form} {self.kind} {self.algorithm}"

    @property
    def floors(self) -> int:
        """Number of floors to compare with."""
        return 1 if self.kind == "forward" else 3


def make_plan(points: np.ndarray, config: DetectorConfig) -> DetectorPlan:
    """Maps of a scan, from its points, on the device."""
    tables = detector_tables(sparse.voxelize([points], config.voxel_size).sites)
    capacities = sparse.BucketLadder(tables.sizes).capacities(0)
    return jax.device_put(pad_plan(tables, capacities, PlanLayout.of(config)))


def compile_job(
    job: Job, plan: DetectorPlan, options: dict[str, str | bool] | None = None
) -> tuple[Callable[[DetectorPlan], object], dict[str, float]]:
    """A call of a pass on a plan, the seconds that compiling it took, and its temporaries in MB.

    Args:
        job: pass to compile.
        plan: maps of the shapes to compile for.
        options: XLA's options; by default those that the package's own programs have.
    """
    config = DetectorConfig(selection=SelectionConfig() if job.form == "sfks" else None)
    heads, one = [HeadConfig("scan", 18, 6)], DatasetContext.one(0, 1)

    def build(key: Any) -> DetectorNetwork:
        model = TR3D(config, heads, rngs=nnx.Rngs(key))
        return fold(model, one, 0) if job.kind == "forward" else model

    def make(key: Any) -> nnx.State:
        return nnx.state(build(key))

    model = nnx.eval_shape(build, jax.random.key(0))
    state = jax.block_until_ready(jax.jit(make)(jax.random.key(0)))
    release_memory()
    features = jnp.asarray(np.random.default_rng(0).random((plan.voxels.capacity, config.in_channels), np.float32))
    context = partial(ForwardContext, one, algorithm=job.algorithm)

    def forward(state: Any, features: Any, plan: Any) -> Any:
        return nnx.merge(nnx.graphdef(model), state)(features, plan, context(training=False))

    graph = nnx.split(model, nnx.Param, ...)[0]
    optimizer = optax.sgd(1e-4)

    def step(params: Any, rest: Any, features: Any, plan: Any) -> Any:
        def loss(params: Any) -> Any:
            out = nnx.merge(graph, params, rest, copy=True)(features, plan, context(training=True))
            return (out.logits**2).mean() + (out.boxes**2).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates), value

    options = compiler_options() if options is None else options
    start = time.perf_counter()
    if job.kind == "forward":
        program = jax.jit(forward).lower(state, features, plan).compile(options)
        call: Callable[[DetectorPlan], object] = partial(program, state, features)
    else:
        params, rest = nnx.split_state(state, nnx.Param, ...)
        program = jax.jit(step, donate_argnums=0).lower(params, rest, features, plan).compile(options)
        kept = [params]

        def call(plan: DetectorPlan) -> object:
            kept[0], value = program(kept[0], rest, features, plan)
            return value

    del state
    release_memory()
    memory = program.memory_analysis()
    temporaries = float("nan") if memory is None else memory.temp_size_in_bytes / 1e6
    return call, {"compile_s": time.perf_counter() - start, "temporaries_mb": temporaries}


def _with_maps(call: Callable[[DetectorPlan], object], points: np.ndarray, config: DetectorConfig) -> object:
    return call(make_plan(points, config))


def run(scan: Path | None, jobs: Sequence[Job], *, repeats: int, memory: bool) -> dict[str, Any]:
    """Measure; `--json` prints the result.

    Raises:
        InputError: the scan cannot be read.
    """
    name, points = load_points(scan)
    config = DetectorConfig()
    tables = detector_tables(sparse.voxelize([points], config.voxel_size).sites)
    plan = make_plan(points, config)
    flops = sum(layer.flops * layer.times for layer in detector_layers(config, tables, plan))
    functions: dict[str, Callable[[], object]] = {"maps": lambda: make_plan(points, config)}
    costs: dict[str, dict[str, float]] = {}
    for job in jobs:
        call, costs[job.name] = compile_job(job, plan)
        timing.report(f"{job.name}: compiled in {costs[job.name]['compile_s']:.1f} s")
        functions[job.name] = partial(_with_maps, call, points, config)
    rounds: dict[str, list[float]] = {key: [] for key in functions}
    rates = []
    for turn in range(repeats):
        timing.report(f"round {turn + 1} of {repeats}")
        rates.append(timing.matmul_rate(3))
        for key, seconds in timing.alternate(functions, 1).items():
            rounds[key].append(seconds)
    floor = flops / max(rates)
    medians = {key: statistics.median(values) for key, values in rounds.items()}
    result: dict[str, Any] = {
        "scan": {"name": name, "points": len(points), "sites": tables.sizes._asdict()},
        "machine": {"device": jax.devices()[0].device_kind, "cores": available_cores(), "jax": jax.__version__},
        "native_maps": native_maps.library() is not None,
        "repeats": repeats,
        "gflop": flops / 1e9,
        "matmul_gflops": max(rates) / 1e9,
        "floor_ms": floor * 1e3,
        "maps_ms": medians["maps"] * 1e3,
        "jobs": {
            job.name: {
                "ms": medians[job.name] * 1e3,
                "least_ms": min(rounds[job.name]) * 1e3,
                "over_floor": medians[job.name] / (job.floors * floor),
                **costs[job.name],
                "peak_mb": _peak_of(scan, job) if memory else None,
            }
            for job in jobs
        },
        "sfks_over_tr3d": {},
    }
    for job in jobs:
        plain = Job("tr3d", job.kind, job.algorithm)
        if job.form == "sfks" and plain in jobs:
            ratios = [a / b for a, b in zip(rounds[job.name], rounds[plain.name], strict=True)]
            result["sfks_over_tr3d"][f"{job.kind} {job.algorithm}"] = statistics.median(ratios)
    return result


def _peak_of(scan: Path | None, job: Job) -> float:
    """Peak of the resident memory, MB, of a process that makes a pass three times."""
    command = [sys.executable, "-m", "benchmarks.floor", "--peak", job.form, job.kind, job.algorithm]
    command += [] if scan is None else ["--scan", str(scan)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_peak(scan: Path | None, job: Job) -> None:
    """Make a pass three times and print the peak of the resident memory of this process, MB."""
    _, points = load_points(scan)
    call, _ = compile_job(job, make_plan(points, DetectorConfig()))
    for _ in range(3):
        jax.block_until_ready(call(make_plan(points, DetectorConfig())))
    print(timing.resident_peak())


def table_of(result: dict[str, Any]) -> str:
    """Format the result as a table."""
    scan, machine = result["scan"], result["machine"]
    lines = [
        f"{scan['name']}: {scan['points']:,} points, {scan['sites']['voxels']:,} voxels, {scan['sites']['up0']:,} "
        f"sites at 16; {machine['device']}, {machine['cores']} cores, JAX {machine['jax']}, "
        f"maps by {'the extension' if result['native_maps'] else 'numpy'}",
        f"matmul {result['matmul_gflops']:.0f} GFLOP/s, {result['gflop']:.1f} GFLOP: floor {result['floor_ms']:.0f} "
        f"ms, of a step {3 * result['floor_ms']:.0f} ms; maps {result['maps_ms']:.0f} ms, part of all",
        "",
        f"{'':24}{'ms':>9}{'least':>9}{'x floor':>9}{'compile s':>11}{'temporaries MB':>16}{'peak MB':>9}",
    ]
    for key, job in result["jobs"].items():
        peak = "" if job["peak_mb"] is None else f"{job['peak_mb']:9.0f}"
        lines.append(
            f"{key:24}{job['ms']:9.0f}{job['least_ms']:9.0f}{job['over_floor']:9.2f}{job['compile_s']:11.1f}"
            f"{job['temporaries_mb']:16.0f}{peak}"
        )
    lines += [f"SF-KS over TR3D, {kind}: {ratio:.3f}" for kind, ratio in result["sfks_over_tr3d"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.floor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, help=".bin (float32 rows of six) or .ply; default a procedural room")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="detectors (default both)")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default both")
    parser.add_argument("--algorithm", nargs="+", choices=get_args(Algorithm), default=["auto"], help="default auto")
    parser.add_argument("--memory", action="store_true", help="measure the peak of each pass in a process of its own")
    parser.add_argument("--peak", nargs=3, metavar=("FORM", "PASS", "ALGORITHM"), help="print the peak of one pass")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the median counts (default 7)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, expected 1 or more")
    jobs = [Job(f, k, a) for f in options.forms for k in options.passes for a in options.algorithm]
    try:
        if options.peak:
            print_peak(options.scan, Job(*options.peak))
            return 0
        result = run(options.scan, jobs, repeats=options.repeats, memory=options.memory)
    except (InputError, FileNotFoundError) as error:
        timing.report(str(error))
        return 2
    print(json.dumps(result, indent=1) if options.json else table_of(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

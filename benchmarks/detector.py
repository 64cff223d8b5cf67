"""Time and memory of the whole detector on a scan: maps, forward, forward and backward, a step of training.

    python -m benchmarks.detector --scan scan.bin [--width full] [--sfks on|off|both] [--batch N] [--dtype bfloat16]

Every figure is a median of runs that take turns after a warm-up. The floor is what the machine's own matmul would need
for the products of the pairs there are, 2 * pairs * Cin * Cout, three times that with the backward pass; its rate is
the best of those measured between the rounds. "folded" evaluates the detector of one dataset in which everything that
depends on the dataset alone is computed once, as prediction does. "plain" is the same detector by one gather and one
matmul an offset (`algorithm="gather"`), "again" computes blocks twice and keeps less (`rematerialize`), which
matters only with a backward pass. "temporaries" are what XLA's program needs beside its inputs. The loss is a stand-in,
the mean square of the predictions; a step adds AdamW.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from h2a2_jax.host import available_cores
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
    fits_layout,
    pad_plan,
)
from h2a2_jax.sparse.xla_cpu import compiler_options

WIDTHS: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"depth": 10, "stem_channels": 16, "stage_channels": (16, 32, 32, 32), "neck_channels": 32},
}
"""Architectures by name: TR3D's own, and one for small machines."""
PASSES = ("evaluate", "folded", "forward", "forward+backward", "step")


def run(
    scan: Path | None,
    *,
    width: str,
    sfks: str,
    batch: int,
    dtype: str,
    repeats: int,
    plain: bool,
    passes: Sequence[str] = PASSES,
    rematerialize: str = "off",
) -> dict[str, Any]:
    """Measure; `--json` prints the result.

    Raises:
        InputError: the scan cannot be read.
    """
    name, points = load_points(scan)
    maps, plan, tables, config = _maps([points] * batch, DetectorConfig(**WIDTHS[width]), repeats)
    flops = sum(layer.flops * layer.times for layer in detector_layers(config, tables, plan))
    calls = 1 if jax.default_backend() == "cpu" else 10
    products = None if dtype == "float32" else jnp.dtype(dtype)
    variants = {"off": [False], "on": [True], "both": [False, True]}[sfks]
    functions: dict[str, Callable[[], object]] = {}
    compiled: dict[str, dict[str, float]] = {}
    for selective in variants:
        label = "sfks" if selective else "tr3d"
        for algorithm in ("auto", "gather") if plain else ("auto",):
            for again in {"off": [False], "on": [True], "both": [False, True]}[rematerialize]:
                suffix = ("" if algorithm == "auto" else " plain") + (" again" if again else "")
                context = partial(ForwardContext, algorithm=algorithm, dtype=products, rematerialize=again)
                for kind, (function, cost) in _passes(config, selective, plan, context, passes).items():
                    timing.report(f"{label}{suffix} {kind}: compiled in {cost['compile_s']:.1f} s")
                    functions[f"{label}{suffix} {kind}"], compiled[f"{label}{suffix} {kind}"] = function, cost
    rounds: dict[str, list[float]] = {key: [] for key in functions}
    rates = []
    for turn in range(repeats):
        timing.report(f"round {turn + 1} of {repeats}")
        rates.append(timing.matmul_rate(5, calls=calls))
        for key, seconds in timing.alternate(functions, 1, calls=calls).items():
            rounds[key].append(seconds)
    rate = max(rates)
    floor = flops / rate
    ms = {key: statistics.median(values) * 1e3 for key, values in rounds.items()}
    return {
        "scan": {"name": name, "points": len(points), "batch": batch, "sites": tables.sizes._asdict()},
        "machine": {"device": jax.devices()[0].device_kind, "cores": available_cores(), "jax": jax.__version__},
        "width": width,
        "dtype": dtype,
        "repeats": repeats,
        "matmul_gflops": rate / 1e9,
        "forward_gflop": flops / 1e9,
        "floor_ms": {"forward": floor * 1e3, "forward+backward": 3 * floor * 1e3},
        "maps_ms": maps,
        "ms": ms,
        "scans_per_second": {key: batch / (value / 1e3) for key, value in ms.items()},
        "over_floor": {
            key: value / (floor * 1e3) / (1 if key.endswith(("forward", "evaluate", "folded")) else 3)
            for key, value in ms.items()
        },
        "sfks_over_tr3d": {
            kind: statistics.median(
                on / off for on, off in zip(rounds[f"sfks {kind}"], rounds[f"tr3d {kind}"], strict=True)
            )
            for kind in passes
        }
        if sfks == "both" and rematerialize != "on"
        else None,
        "again_over_kept": {
            f"{label} {kind}": statistics.median(
                again / kept
                for kept, again in zip(rounds[f"{label} {kind}"], rounds[f"{label} again {kind}"], strict=True)
            )
            for label in ("tr3d", "sfks")
            for kind in passes
            if {f"{label} {kind}", f"{label} again {kind}"} <= rounds.keys()
        },
        "compiled": compiled,
        "peak_memory_mb": timing.peak_memory(),
    }


def _maps(
    clouds: list[np.ndarray], config: DetectorConfig, repeats: int
) -> tuple[dict[str, float], DetectorPlan, Any, DetectorConfig]:
    """Median ms of the steps from points to a plan; the plan on the device; its tables."""
    stages: dict[str, list[float]] = {"voxelize": [], "tables": [], "lists": []}
    layout = PlanLayout.of(config)
    for turn in range(repeats + 1):
        clock = [time.perf_counter()]
        voxels = sparse.voxelize(clouds, config.voxel_size).sites
        clock.append(time.perf_counter())
        tables = detector_tables(voxels)
        clock.append(time.perf_counter())
        capacities = sparse.BucketLadder(tables.sizes).capacities(0)
        if not fits_layout(tables, capacities, layout):
            layout = PlanLayout.of(config, "any")
        plan = pad_plan(tables, capacities, layout)
        clock.append(time.perf_counter())
        if turn:
            for stage, start, end in zip(stages, clock[:-1], clock[1:], strict=True):
                stages[stage].append((end - start) * 1e3)
    ms = {stage: statistics.median(values) for stage, values in stages.items()}
    ms["all"] = statistics.median(map(sum, zip(*stages.values(), strict=True)))
    return ms, jax.device_put(plan), tables, config


def _passes(
    config: DetectorConfig,
    selective: bool,
    plan: DetectorPlan,
    made_context: Callable[..., ForwardContext],
    passes: Sequence[str],
) -> dict[str, tuple[Callable[[], object], dict[str, float]]]:
    """Compiled passes by name, with the time of compiling and the memory that each needs."""
    config = DetectorConfig(**{**vars(config), "selection": SelectionConfig() if selective else None})
    heads = [HeadConfig("scan", 18, 6)]
    model = jax.jit(lambda: nnx.split(TR3D(config, heads, rngs=nnx.Rngs(0)), nnx.Param, ...)[1:])()
    graph = nnx.split(nnx.eval_shape(lambda: TR3D(config, heads, rngs=nnx.Rngs(0))), nnx.Param, ...)[0]
    params, rest = model
    optimizer = optax.adamw(1e-3)
    opt_state = jax.jit(optimizer.init)(params)
    features = jax.random.uniform(jax.random.key(0), (plan.voxels.capacity, config.in_channels))

    def predict(params: Any, features: Any, plan: Any, training: bool) -> Any:
        context = made_context(DatasetContext.one(0, 1), training=training)
        return nnx.merge(graph, params, rest, copy=True)(features, plan, context)

    def loss(params: Any, features: Any, plan: Any) -> Any:
        out = predict(params, features, plan, training=True)
        return (out.logits**2).mean() + (out.boxes**2).mean()

    def step(params: Any, opt_state: Any, features: Any, plan: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, features, plan)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    one = DatasetContext.one(0, 1)

    def folded_model(params: Any) -> DetectorNetwork:
        return fold(nnx.merge(graph, params, rest), one, 0)

    folded_graph = nnx.graphdef(nnx.eval_shape(folded_model, params))

    def predict_folded(state: Any, features: Any, plan: Any) -> Any:
        return nnx.merge(folded_graph, state)(features, plan, made_context(one))

    jobs: dict[str, tuple[Any, tuple]] = {
        "evaluate": (partial(predict, training=False), (params, features, plan)),
        "folded": (predict_folded, (jax.jit(lambda params: nnx.state(folded_model(params)))(params), features, plan)),
        "forward": (partial(predict, training=True), (params, features, plan)),
        "forward+backward": (jax.value_and_grad(loss), (params, features, plan)),
        "step": (step, (params, opt_state, features, plan)),
    }
    plain = ("forward", "forward+backward")
    is_plain = made_context(one).algorithm != "auto"
    jobs = {kind: job for kind, job in jobs.items() if kind in passes and (not is_plain or kind in plain)}
    compiled = {kind: _compile(function, arguments) for kind, (function, arguments) in jobs.items()}
    return {
        kind: (_thread_state(program, jobs[kind][1]) if kind == "step" else partial(program, *jobs[kind][1]), cost)
        for kind, (program, cost) in compiled.items()
    }


def _thread_state(step: Callable[..., tuple], arguments: tuple) -> Callable[[], object]:
    """A call of a step that passes its state to the next call and donates the buffers, as in training."""
    state = list(jax.tree.map(jnp.copy, arguments[:2]))

    def function() -> object:
        *state[:], value = step(*state, *arguments[2:])
        return value

    return function


def _compile(function: Any, arguments: tuple) -> tuple[Callable[..., Any], dict[str, float]]:
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=(0, 1) if len(arguments) == 4 else ()).lower(*arguments)
    traced = time.perf_counter()
    program = lowered.compile(compiler_options())
    seconds = time.perf_counter() - traced
    memory = program.memory_analysis()
    cost = {
        "trace_s": traced - start,
        "compile_s": seconds,
        "temporaries_mb": memory.temp_size_in_bytes / 1e6 if memory is not None else float("nan"),
    }
    return program, cost


def table_of(result: dict[str, Any]) -> str:
    """Format the result as a table."""
    scan, maps = result["scan"], result["maps_ms"]
    lines = [
        f"{scan['name']} x {scan['batch']}: {scan['points']:,} points, {scan['sites']['voxels']:,} voxels, "
        f"{scan['sites']['up0']:,} sites at 16; {result['width']} width, {result['dtype']} products",
        f"{result['machine']['device']}, {result['machine']['cores']} cores; matmul {result['matmul_gflops']:.0f} "
        f"GFLOP/s; {result['forward_gflop']:.1f} GFLOP forward: floor {result['floor_ms']['forward']:.0f} ms, with "
        f"backward {result['floor_ms']['forward+backward']:.0f} ms",
        "maps on the host: " + ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in maps.items()),
        "",
        f"{'':24}{'ms':>9}{'x floor':>9}{'scans/s':>9}{'compile s':>11}{'temporaries MB':>16}",
    ]
    for key, ms in result["ms"].items():
        cost = result["compiled"][key]
        lines.append(
            f"{key:24}{ms:9.1f}{result['over_floor'][key]:9.2f}{result['scans_per_second'][key]:9.2f}"
            f"{cost['compile_s']:11.1f}{cost['temporaries_mb']:16.0f}"
        )
    if result["sfks_over_tr3d"] is not None:
        ratios = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in result["sfks_over_tr3d"].items())
        lines += ["", f"SF-KS over TR3D: {ratios}"]
    for key, ratio in result["again_over_kept"].items():
        lines.append(f"{key}: computing blocks twice takes {ratio:.3f} times as long")
    lines += ["", f"peak memory of the process or device: {result['peak_memory_mb']:.0f} MB"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.detector",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scan", type=Path, help=".bin (float32 rows of six) or .ply; default a procedural room")
    parser.add_argument("--width", choices=tuple(WIDTHS), default="full", help="default full, TR3D's own")
    parser.add_argument("--sfks", choices=("on", "off", "both"), default="off", help="kernel selection (default off)")
    parser.add_argument("--batch", type=int, default=1, help="copies of the scan in a batch (default 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products")
    parser.add_argument("--rematerialize", choices=("on", "off", "both"), default="off", help="compute blocks twice")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="only these")
    parser.add_argument("--plain", action="store_true", help="measure the plain form too")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="what JAX computes on; default JAX's own choice")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the median counts (default 7)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    for name in ("repeats", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected 1 or more")
    if options.device is not None:
        jax.config.update("jax_platforms", "cpu" if options.device == "cpu" else "cuda,rocm")
    try:
        jax.default_backend()
    except RuntimeError as error:
        timing.report(f"JAX finds no {options.device}: {error}")
        return 2
    try:
        result = run(
            options.scan, width=options.width, sfks=options.sfks, batch=options.batch, dtype=options.dtype,
            repeats=options.repeats, plain=options.plain, passes=options.passes,
            rematerialize=options.rematerialize,
        )  # fmt: skip
    except (InputError, FileNotFoundError) as error:
        timing.report(str(error))
        return 2
    print(json.dumps(result, indent=1) if options.json else table_of(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

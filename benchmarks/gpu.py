"""Check and time the detector on a GPU in one call of a few minutes, beside the estimate of `benchmarks.gpu_aot`.

    python -m benchmarks.gpu [--scan scan.bin] [--seconds 420] > gpu.json

First every algorithm of the convolution is compared with its definition, output and all gradients, in float32 and in
bfloat16. Then evaluation and a training step are compiled and timed, the most telling cases first, until the seconds
are used up; what was left out is listed. The estimate beside each time is the roofline of the very program that ran
(`hlo_roofline`), autotuned; `rates` holds what the device itself reached in a large matmul and in a copy.

`--tiny --platform=cpu` runs the same code on a CPU in seconds, to find mistakes before a GPU is lent.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import hlo_roofline
from benchmarks.gpu_programs import Case
from benchmarks.timing import matmul_rate, report
from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.sparse.conv_parts import Algorithm

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest error of an output or gradient that passes, as a share of its largest value. Winograd rounds more."""
_WINOGRAD = 10
_NARROW = ("im2col", "pairs", "implicit")
_CALLS = 5


_CHECKED = (("submanifold", True), ("generative", False), ("strided", True))
"""Maps of the comparison, and whether scans select their kernels."""


def check_parity(tiny: bool) -> list[dict[str, Any]]:
    """Errors of every algorithm against the definition, in products of full precision.

    In bfloat16 those for accelerators alone. `tiny` takes the first map alone.
    """
    rng = np.random.default_rng(0)
    points = [rng.integers(0, 5 if tiny else 24, (60 if tiny else 6000, 3)) for _ in range(2)]
    coords = np.concatenate([np.insert(p, 0, scan, axis=1) for scan, p in enumerate(points)])
    sites = sparse.site_set(coords.astype(np.int32))
    coarse = sparse.downsample(sites, 2)
    tables = {
        "submanifold": sparse.submanifold_neighbors(sites, 3),
        "strided": sparse.strided_neighbors(sites, coarse, 3),
        "generative": sparse.generative_neighbors(coarse, sparse.generate(coarse, 3), 3),
    }
    channels = (4, 8) if tiny else (64, 128)
    results = []
    for name, selects in _CHECKED[: 1 if tiny else None]:
        table = tables[name]
        inputs, outputs = (sparse.pad_sites(s, -(-len(s) // 64) * 64) for s in (table.inputs, table.outputs))
        blocks: Any = "always" if name == "submanifold" else None
        kmap = sparse.pad_map(table, inputs, outputs, tile_size=64, blocks=blocks)
        shapes = (kmap.in_capacity, channels[0]), (1 + selects, kmap.kernel_volume, *channels)
        x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
        g = jnp.asarray(rng.normal(size=(kmap.out_capacity, channels[1])), jnp.float32)
        gamma = jnp.asarray(rng.integers(0, 2, (2, kmap.kernel_volume)), jnp.float32) if selects else None
        arguments = (x, w, gamma, g, kmap)
        expected = _output_and_gradients("segment_sum", jnp.float32, *arguments)
        for algorithm in get_args(Algorithm):
            if algorithm == "segment_sum" or (algorithm == "winograd" and blocks is None):
                continue
            for dtype in ("float32", "bfloat16") if algorithm in _NARROW else ("float32",):
                got = _output_and_gradients(algorithm, jnp.dtype(dtype), *arguments)
                error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(got, expected, strict=True))
                limit = TOLERANCES[dtype] * (_WINOGRAD if algorithm == "winograd" else 1)
                case = {"algorithm": algorithm, "map": name, "selects": selects, "dtype": dtype}
                results.append({**case, "error": error, "limit": limit, "passed": error <= limit})
    return results


@partial(jax.jit, static_argnums=(0, 1))
def _output_and_gradients(algorithm: Any, dtype: Any, x: Any, w: Any, gamma: Any, g: Any, kmap: Any) -> list[Any]:
    def forward(x: Any, w: Any, gamma: Any) -> Any:
        return sparse.convolve(
            x, w, kmap, gamma=gamma, algorithm=algorithm, dtype=dtype, precision=jax.lax.Precision.HIGHEST
        )

    y, pull = jax.vjp(forward, x, w, gamma)
    valid = jnp.arange(kmap.out_capacity)[:, None] < kmap.n_out
    return [a for a in (y, *pull(jnp.where(valid, g, 0))) if a is not None]


def cases(tiny: bool) -> Iterator[tuple[str, str, int, str, Algorithm]]:
    """Pass, model, batch, type and algorithm of the programs to time, the most telling first."""
    batches = (2, 1) if tiny else (16, 1)
    algorithms: tuple[Algorithm, ...] = ("implicit", "auto")
    for algorithm in algorithms:
        for model in ("sfks", "tr3d"):
            for kind in ("evaluate", "step"):
                yield kind, model, batches[0], "bfloat16", algorithm
    for batch, dtype in ((batches[1], "bfloat16"), (batches[0], "tf32")):
        for algorithm in algorithms:
            for kind in ("evaluate", "step"):
                yield kind, "sfks", batch, dtype, algorithm


def time_case(scan: Path | None, width: str, repeats: int, *case: Any) -> dict[str, Any]:
    """Compile and time one program; the result also holds its estimate."""
    kind, model, batch, dtype, algorithm = case
    made = Case.of(scan, batch, model, width, algorithm)
    function, make = made.program(kind, dtype, algorithm)
    arguments, plan = jax.jit(make)(), jax.device_put(made.plan)
    start = time.perf_counter()
    program = jax.jit(function, donate_argnums=(0,) if kind == "step" else ()).lower(*arguments, plan).compile()
    compile_s = time.perf_counter() - start
    call = _calls(program, kind, arguments, plan)
    call()
    rounds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(_CALLS):
            result = call()
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / _CALLS * 1e3)
    memory, stats = program.memory_analysis(), jax.devices()[0].memory_stats() or {}
    pairs = {}
    for layer in made.layers:
        volume, n_out, n_in = (
            layer.kernel_map.kernel_volume,
            layer.kernel_map.out_capacity,
            layer.kernel_map.in_capacity,
        )
        pairs[volume, n_out, n_in] = pairs[volume, n_in, n_out] = float(layer.pairs)
    maps = hlo_roofline.Maps(pairs, "f32" if dtype == "float32" else "tf32")
    on_gpu = jax.devices()[0].platform != "cpu"
    cost = hlo_roofline.estimate(hlo_roofline.parse(program.as_text() or ""), maps) if on_gpu else None
    ms = statistics.median(rounds)
    return {
        **dict(zip(("pass", "model", "batch", "dtype", "algorithm"), case, strict=True)),
        "ms": ms,
        "rounds_ms": rounds,
        "scans_per_second": batch / ms * 1e3,
        "estimate_ms": cost.seconds * 1e3 if cost is not None else None,
        "over_estimate": ms / (cost.seconds * 1e3) if cost is not None else None,
        "launches": cost.launches if cost is not None else None,
        "needed_tflop": made.flops * (3 if kind == "step" else 1) / 1e12,
        "compile_s": compile_s,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9 if memory is not None else None,
        "peak_memory_gb": stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None,
    }


def _calls(program: Any, kind: str, arguments: tuple, plan: Any) -> Callable[[], Any]:
    """A call of a program; a step passes its state to the next one."""
    if kind == "evaluate":
        return lambda: program(*arguments, plan)
    state, *rest = arguments
    kept = [state]

    def step() -> Any:
        kept[0], value = program(kept[0], *rest, plan)
        return value

    return step


def copy_rate(size: int) -> float:
    """Bytes a second, read and written, of adding one to an array of `size` bytes."""
    add = jax.jit(lambda a: a + 1)
    array = jnp.zeros(size // 4, jnp.float32)
    jax.block_until_ready(add(array))
    start = time.perf_counter()
    for _ in range(_CALLS):
        array = add(array)
    jax.block_until_ready(array)
    return 2 * size * _CALLS / (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if an algorithm is not at parity, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, help=".bin (float32 rows of six) or .ply; default a procedural room")
    parser.add_argument("--seconds", type=float, default=420, help="no case begins later than this (default 420)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each case; the median counts (default 5)")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: try the benchmark itself")
    parser.add_argument("--tiny", action="store_true", help="small channels and small maps, first case alone")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    if options.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    device = jax.devices()[0]
    if options.platform == "gpu" and device.platform not in ("gpu", "cuda", "rocm"):
        report(f"JAX computes on {device.device_kind}; expected a GPU: install jax[cuda12], or give --platform=cpu.")
        return 2
    parity = check_parity(options.tiny)
    report(f"parity checked after {time.perf_counter() - start:.0f} s")
    results, left_out, failed = [], [], []
    for number, case in enumerate(cases(options.tiny)):
        if time.perf_counter() - start > options.seconds or (options.tiny and number > 0):
            left_out.append(list(case))
            continue
        report(f"{' '.join(map(str, case))}, after {time.perf_counter() - start:.0f} s")
        # The interpreter of Pallas takes minutes for a detector.
        tried = (*case[:4], "auto") if options.platform == "cpu" else case
        try:
            width, repeats = ("small", 1) if options.tiny else ("full", options.repeats)
            results.append(time_case(options.scan, width, repeats, *tried))
        except (InputError, FileNotFoundError) as error:
            report(str(error))
            return 2
        except jax.errors.JaxRuntimeError as error:  # one that does not fit the device does not end the call
            failed.append([*case, str(error)[:2000]])
    size = 2**20 if options.tiny else 2**30
    rates = {"copy_tb_per_second": copy_rate(size) / 1e12, "matmul_tflop_per_second": matmul_rate(3, calls=3) / 1e12}
    document = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "seconds": time.perf_counter() - start,
        "parity": parity,
        "cases": results,
        "failed": failed,
        "left_out": left_out,
        "rates": rates,
    }
    print(json.dumps(document, indent=1))
    return 0 if all(case["passed"] for case in parity) else 1


if __name__ == "__main__":
    sys.exit(main())

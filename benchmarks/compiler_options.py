"""XLA's libraries for products on a CPU: `python -m benchmarks.compiler_options [--scan FILE]`.

XLA's CPU compiler gives a product to YNNPACK or, with an empty `xla_cpu_experimental_ynn_fusion_type`, to Eigen. The
products that convolutions consist of, and with a scan the whole detector, are compiled both ways and run in turns:
rows of a tile by a kernel, its transpose (the gradient of a kernel), the batched products of Winograd convolution, and
the plain products of the heads. A ratio above 1 says how many times Eigen is faster. `sparse.xla_cpu.compiler_options`
holds what follows.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.floor import FORMS, PASSES, Job, compile_job, make_plan
from benchmarks.scans import load_points
from h2a2_jax.models import DetectorConfig
from h2a2_jax.sparse.xla_cpu import WITHOUT_YNNPACK, knows_option

ROWS = (64, 256, 512, 1024, 2048, 4096)
WIDTHS = ((64, 64), (64, 128), (128, 128), (256, 256), (512, 512))
_FLOP = 4e8
"""Products are repeated in a program until it computes this much."""


def products() -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Products of convolutions: name, formula and shapes."""
    named: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {}
    for c, d in WIDTHS:
        for n in ROWS:
            named[f"tile of {n}, {c}-{d}"] = "nc,cd->nd", (n, c), (c, d)
        for n in (512, 1024, 4096):
            named[f"gradient of {n}, {c}-{d}"] = "nc,nd->cd", (n, c), (n, d)
    for n in (32, 64, 96):
        named[f"winograd of {n}, 128-128"] = "tnc,tcd->tnd", (36, n, 128), (36, 128, 128)
        named[f"winograd gradient of {n}, 128-128"] = "tnc,tnd->tcd", (36, n, 128), (36, n, 128)
    return named


def compile_product(
    formula: str, left: tuple[int, ...], right: tuple[int, ...], options: dict[str, str | bool]
) -> Callable[[], Any]:
    """A call of a program that computes a product often enough to be timed."""
    a, b = jnp.ones(left, jnp.float32), jnp.ones(right, jnp.float32)
    times = max(1, round(_FLOP / (2 * a.size * right[-1])))

    def repeat(a: jax.Array, b: jax.Array) -> jax.Array:
        def body(i: jax.Array, total: jax.Array) -> jax.Array:
            # The first entry of the sum passes through the product, so that it cannot leave the loop.
            return jnp.einsum(formula, a + 0 * total.ravel()[0], b)

        shape = jax.eval_shape(lambda: jnp.einsum(formula, a, b)).shape
        return jax.lax.fori_loop(0, times, body, jnp.zeros(shape))

    program = jax.jit(repeat).lower(a, b).compile(options)
    return lambda: program(a, b)


def compare(calls: Callable[[dict[str, str | bool]], Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median ms of a program by each library, in turns, and the median of ratios."""
    both = {"ynnpack": calls({}), "eigen": calls(WITHOUT_YNNPACK)}
    rounds = [timing.alternate(both, 1) for _ in range(repeats)]
    ms = {name: 1e3 * statistics.median(r[name] for r in rounds) for name in both}
    return {**ms, "ratio": statistics.median(r["ynnpack"] / r["eigen"] for r in rounds)}


def run(scan: Path | None, repeats: int) -> dict[str, Any]:
    """Measure; `--json` prints the result."""
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "products": {}}
    for name, product in products().items():
        timing.report(name)
        result["products"][name] = compare(partial(compile_product, *product), repeats)
    if scan is not None:
        plan = make_plan(load_points(scan)[1], DetectorConfig())
        result["detector"] = {}
        for job in (Job(form, kind, "auto") for form in FORMS for kind in PASSES):
            timing.report(job.name)

            def call(options: dict[str, str | bool], job: Job = job) -> Callable[[], Any]:
                function, _ = compile_job(job, plan, options)
                return lambda: function(plan)

            result["detector"][job.name] = compare(call, repeats)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiler_options",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scan", type=Path, help="measure the detector on it too: .bin (float32 rows of six) or .ply")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the median counts (default 7)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "cpu" or not knows_option(*WITHOUT_YNNPACK):
        timing.report(f"JAX {jax.__version__} has no choice of libraries on {jax.default_backend()}.")
        return 2
    result = run(options.scan, options.repeats)
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{'':36}{'YNNPACK ms':>12}{'Eigen ms':>10}{'ratio':>8}")
    for name, row in {**result["products"], **result.get("detector", {})}.items():
        print(f"{name:36}{row['ynnpack']:12.2f}{row['eigen']:10.2f}{row['ratio']:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Growth of a convolution's cost with the number of sites: map, forward, forward and backward, temporaries.

    python -m benchmarks.scaling [--channels 32] [--most 1000000] [--repeats 5]

One 3^3 submanifold layer on clouds of surfaces. Linear growth shows as a constant number of nanoseconds a site.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.maps import COUNTS, surfaces
from h2a2_jax import sparse


def measure(count: int, channels: int, repeats: int) -> dict[str, float]:
    """Milliseconds of each part and MB of temporaries on a cloud of about `count` sites."""
    sites = surfaces(count)
    table = sparse.submanifold_neighbors(sites)
    tile = sparse.choose_tile_size(float(table.pairs_per_offset.mean()), channels)

    def build() -> sparse.KernelMap:
        rows = sparse.pad_sites(sites, len(sites))
        return sparse.pad_map(sparse.submanifold_neighbors(sites), rows, rows, tile_size=tile)

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        kmap = build()
        seconds.append(time.perf_counter() - start)
    kmap = jax.device_put(kmap)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(len(sites), channels)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(1, 27, channels, channels)), jnp.float32)

    def forward(x: jax.Array, w: jax.Array, kmap: sparse.KernelMap) -> jax.Array:
        return sparse.convolve(x, w, kmap)

    def both(x: jax.Array, w: jax.Array, kmap: sparse.KernelMap) -> tuple:
        y, pull = jax.vjp(lambda x, w: forward(x, w, kmap), x, w)
        return y, *pull(y)

    once, twice = (jax.jit(function).lower(x, w, kmap).compile() for function in (forward, both))
    programs = {"forward": partial(once, x, w, kmap), "both": partial(twice, x, w, kmap)}
    times = timing.alternate(programs, repeats)
    memory = twice.memory_analysis()
    return {
        "sites": len(sites),
        "map": statistics.median(seconds[1:]) * 1e3,
        "forward": times["forward"] * 1e3,
        "both": times["both"] * 1e3,
        "temporaries": memory.temp_size_in_bytes / 1e6 if memory is not None else float("nan"),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=32, help="in and out (default 32)")
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="largest number of sites (default a million)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts (default 5)")
    options = parser.parse_args()
    print(f"{'sites':>9} {'map ms':>15} {'forward ms':>15} {'with backward':>15} {'temporaries MB':>15}   (ns a site)")
    for count in (count for count in COUNTS if count <= options.most):
        row = measure(count, options.channels, options.repeats)
        cells = (f"{row[part]:8.1f} ({1e6 * row[part] / row['sites']:4.0f})" for part in ("map", "forward", "both"))
        print(f"{row['sites']:>9,}", *(f"{cell:>15}" for cell in cells), f"{row['temporaries']:15.0f}", flush=True)


if __name__ == "__main__":
    main()

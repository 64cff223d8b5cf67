"""The compiled kernels under the address and the undefined-behaviour sanitizer: `python -m benchmarks.sanitize`.

Builds the extension with `-fsanitize=address,undefined` in a temporary folder and calls every kernel with it, in each
instruction set of this machine: all kinds of maps, channels that fill no vector, scans with kernels of their own,
scans without sites, blocks, bfloat16, pooling, and the search of neighbours and the cut of tiles on the host. An access
outside of an array, or an operation that C++ leaves undefined, ends the process with the sanitizer's report. Takes
eight minutes on two cores; needs g++ with libasan.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from h2a2_jax import sparse
from h2a2_jax.sparse import KernelMap, NeighborTable, native_maps

ROOT = Path(__file__).parents[1]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
CHANNELS = ((1, 1), (3, 17), (16, 32), (33, 31))


def run(folder: Path) -> int:
    """Build, and call the kernels in a process of its own; returns the exit status of that process."""
    environment = {**os.environ, "CFLAGS": FLAGS, "LDFLAGS": FLAGS}
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, env=environment, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    # The C++ library too: the sanitizer looks its functions up when the process begins.
    preloaded = [_find_library(name) for name in ("libasan.so", "libstdc++.so.6")]
    environment |= {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory to its end
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    command = [sys.executable, "-m", "benchmarks.sanitize", "--calls", str(folder / "h2a2_jax" / "sparse")]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def _find_library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def call_all(folder: Path) -> int:
    """Call every kernel of the extension in a folder; returns the number of calls.

    Raises:
        ValueError: the extension is not there, or a result differs from XLA's.
    """
    native_maps.__file__ = str(folder / "native_maps.py")
    from h2a2_jax.sparse.native_call import library

    loaded = library()
    if loaded is None:
        raise ValueError(f"there is no extension that can be used in {folder}.")
    calls = 0
    for form in ("avx512", "avx2", "portable"):
        if not loaded.h2a2_choose_form(form.encode()):
            continue
        for name, kmap in _maps().items():
            for i, channels in enumerate(CHANNELS):
                for dtype in (jnp.float32, jnp.bfloat16):
                    _compare(f"{form} {name} {channels}", kmap, channels, dtype, has_gamma=i % 2 == 1)
                    calls += 1
        timing.report(f"{form}: no error")
    return calls


def _maps() -> dict[str, KernelMap]:
    rng = np.random.default_rng(0)
    coords = [rng.integers(0, 9, (count, 3)).astype(np.float32) for count in (400, 0, 60)]
    fine = sparse.voxelize(coords, 1.0).sites
    coarse = sparse.downsample(fine, 2)
    tables = {
        "submanifold": sparse.submanifold_neighbors(fine),
        "submanifold 5, dilated": sparse.submanifold_neighbors(fine, 5, 2),
        "even": sparse.submanifold_neighbors(fine, 2),
        "strided": sparse.strided_neighbors(fine, coarse, 3),
        "inverse": sparse.inverse_neighbors(sparse.strided_neighbors(fine, coarse, 2)),
        "generative": sparse.generative_neighbors(coarse, sparse.generate(coarse, 3), 3),
    }
    maps = {name: _pad(table, tile_size=64) for name, table in tables.items()}
    return {**maps, "blocks": _pad(tables["submanifold"], tile_size=None, blocks="always")}


def _pad(table: NeighborTable, **lists: object) -> KernelMap:
    inputs = sparse.pad_sites(table.inputs, len(table.inputs) + 7)
    same = table.outputs is table.inputs
    outputs = inputs if same else sparse.pad_sites(table.outputs, len(table.outputs) + 5)
    return sparse.pad_map(table, inputs, outputs, **lists)  # type: ignore[arg-type]


def _compare(name: str, kmap: KernelMap, channels: tuple[int, int], dtype: Any, *, has_gamma: bool) -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(kmap.in_capacity, channels[0])), dtype)
    w = jnp.asarray(rng.normal(size=(2 if has_gamma else 1, kmap.kernel_volume, *channels)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(kmap.out_capacity, channels[1])), dtype)
    shape = (kmap.num_scans, kmap.kernel_volume)
    gamma = jnp.asarray(rng.integers(0, 2, shape), jnp.float32) if has_gamma else None
    results = []
    for algorithm in ("native", "gather"):
        y, pull = jax.vjp(
            lambda x, w, gamma, how=algorithm: sparse.convolve(x, w, kmap, gamma=gamma, algorithm=how), x, w, gamma
        )
        pooled, pull_pool = jax.vjp(lambda x: sparse.max_pool(x, kmap), x)
        results.append([y, *pull(weight), pooled, *pull_pool(pooled)])
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        scale = float(jnp.abs(theirs).max(initial=1e-3))
        if float(jnp.abs(ours.astype(jnp.float32) - theirs.astype(jnp.float32)).max(initial=0)) > 0.02 * scale:
            raise ValueError(f"{name}: the kernels differ from XLA's by more than 2 % of the largest value.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--calls", type=Path, help="call the kernels of the extension in this folder, without building")
    options = parser.parse_args(arguments)
    if options.calls is not None:
        print(f"{call_all(options.calls)} calls, no error")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder))


if __name__ == "__main__":
    sys.exit(main())

"""Times of the detector's convolutions, each algorithm beside spconv on the CPU: `python -m benchmarks.convolution`.

Layers are those of the full-width detector on the maps of one scan, in float32, maps built beforehand on all sides. All
rivals of a layer take turns in one run; medians. spconv counts with the faster of one thread and all, and its results
are compared with ours first. GFLOP/s count 2 * pairs * Cin * Cout, the work of the pairs there are, once forward and
three times forward and backward: Winograd convolution may pass the matmul's rate.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import spconv_cpu, timing
from benchmarks.scans import load_points
from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.maps import DetectorPlan, DetectorTables, Machine, PlanLayout, detector_tables, pad_plan
from h2a2_jax.sparse import KernelMap, NeighborTable
from h2a2_jax.sparse.conv import Algorithm
from h2a2_jax.sparse.kernel_map import fits_blocks

ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
DIRECTIONS = ("forward", "forward_backward")
PAIRS_TILE = 256
"""Pairs in a tile of "pairs" where the plan has none cut for it."""
LARGEST_ERROR = 1e-4
"""Largest difference from spconv, as a fraction of the largest value: Winograd and float32 sums stay far below."""
COMPARED_CHANNELS, COMPARED_SITES = 64, 2000
"""Submanifold layers at least this wide, on more sites than this, are those whose time matters."""


@dataclass(frozen=True)
class Layer:
    """A convolution of the detector: its host table, its map in the detector's plan, and how often it occurs."""

    name: str
    table: NeighborTable
    kernel_map: KernelMap
    channels: tuple[int, int]
    times: int

    @property
    def pairs(self) -> int:
        """Pairs (input, output) of all offsets."""
        return int(self.table.pairs_per_offset.sum())

    @property
    def flops(self) -> float:
        """Floating-point operations of the forward pass."""
        return 2.0 * self.pairs * self.channels[0] * self.channels[1]


def detector_layers(config: DetectorConfig, tables: DetectorTables, plan: DetectorPlan) -> Iterator[Layer]:
    """Every convolution of a detector with neighbours, once for each shape."""
    yield Layer("stem", tables.stem, plan.stem, (config.in_channels, config.stem_channels), 1)
    width = config.stem_channels
    for s, blocks in enumerate(config.stage_blocks):
        down, skip, residual = tables.stages[s]
        maps, channels = plan.stages[s], config.stage_channels[s]
        yield Layer(f"stage{s + 1}.down", down, maps.down, (width, channels), 1)
        yield Layer(f"stage{s + 1}.skip", skip, maps.skip, (width, channels), 1)
        yield Layer(f"stage{s + 1}.residual", residual, maps.residual, (channels, channels), 2 * blocks - 1)
        width = channels
    for u, (up, up_maps) in enumerate(zip(tables.ups, plan.ups, strict=True)):
        level, channels = len(tables.ups) - 1 - u, config.stage_channels[2 - u]
        yield Layer(f"up{level}.generate", up.generate, up_maps.generate, (width, channels), 1)
        yield Layer(f"up{level}.lateral", up.lateral, up_maps.lateral, (channels, channels), 2)
        width = channels


def map_for(algorithm: str, layer: Layer) -> KernelMap | None:
    """The layer's map with the lists that an algorithm reads; None where the algorithm does not serve it."""
    kmap, table = layer.kernel_map, layer.table
    scans, channels = table.inputs.num_scans, int(np.sqrt(layer.channels[0] * layer.channels[1]))
    if algorithm in ("tiles", "pairs") and len(table.rows) == 1:
        return None
    if algorithm == "implicit" and jax.default_backend() == "cpu":  # there it is interpreted
        return None
    if algorithm == "native" and (jax.default_backend() != "cpu" or not sparse.has_native()):
        return None
    if algorithm == "winograd":
        return sparse.pad_map(table, kmap.inputs, kmap.outputs, blocks="always") if fits_blocks(table) else None
    if algorithm == "tiles" and kmap.tiles is None:
        tile_size = sparse.choose_tile_size(layer.pairs / len(table.rows) / scans, channels)
        return sparse.pad_map(table, kmap.inputs, kmap.outputs, tile_size=tile_size)
    if algorithm == "pairs":
        kmap = sparse.pad_map(table, kmap.inputs, kmap.outputs, tile_size=PAIRS_TILE)
        return sparse.limit_tiles(kmap, max(1, int(kmap.tiles.count)))  # type: ignore[union-attr]
    return kmap


def jax_functions(
    algorithm: str, kmap: KernelMap, x: jax.Array, kernels: jax.Array, cotangent: jax.Array
) -> dict[str, Callable[[], Any]]:
    """Compiled calls by direction; the map is an argument, so that nothing of it is computed at compile time."""
    kmap = jax.device_put(kmap)

    def forward(x: jax.Array, w: jax.Array, kmap: KernelMap) -> jax.Array:
        return sparse.convolve(x, w[None], kmap, algorithm=algorithm)  # type: ignore[arg-type]

    def both(x: jax.Array, w: jax.Array, kmap: KernelMap, cotangent: jax.Array) -> tuple:
        y, pull = jax.vjp(lambda x, w: forward(x, w, kmap), x, w)
        return y, pull(cotangent)

    compiled = jax.jit(forward), jax.jit(both)
    return {
        "forward": lambda: compiled[0](x, kernels, kmap),
        "forward_backward": lambda: compiled[1](x, kernels, kmap, cotangent),
    }


def measure_layer(
    layer: Layer, algorithms: Sequence[str], *, repeats: int, calls: int, with_spconv: bool
) -> dict[str, Any]:
    """Times of one layer and what they are times of.

    Raises:
        RuntimeError: spconv does not compute what we do.
    """
    rng = np.random.default_rng(0)
    c_in, c_out = layer.channels
    rows = rng.normal(size=(len(layer.table.inputs), c_in)).astype(np.float32)
    kernels = (rng.normal(size=(len(layer.table.rows), c_in, c_out)) / np.sqrt(c_in)).astype(np.float32)
    grads = rng.normal(size=(layer.kernel_map.out_capacity, c_out)).astype(np.float32)
    x = jnp.asarray(sparse.pad_rows(rows, layer.kernel_map.in_capacity))
    rivals: dict[str, dict[str, Callable[[], Any]]] = {direction: {} for direction in DIRECTIONS}
    for algorithm in algorithms:
        kmap = map_for(algorithm, layer)
        if kmap is not None:
            functions = jax_functions(algorithm, kmap, x, jnp.asarray(kernels), jnp.asarray(grads))
            for direction in DIRECTIONS:
                rivals[direction][algorithm] = functions[direction]
    error = None
    if with_spconv:
        rival = spconv_cpu.SpconvLayer(layer.table, rows, kernels)
        theirs, error = rival(1), 0.0
        for algorithm, function in rivals["forward"].items():
            ours = np.asarray(function())[: len(theirs)]
            error = max(error, float(np.abs(ours - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), 1e-30)))
            if not error < LARGEST_ERROR:
                raise RuntimeError(
                    f"{layer.name}: {algorithm} differs from spconv by {error:.1e} of the largest value."
                )
        for threads in sorted({available_cores(), 1}):
            rivals["forward"][f"spconv {threads} thr"] = partial(rival, threads)
    result: dict[str, Any] = {
        "name": layer.name,
        "kind": layer.table.kind,
        "sites": [len(layer.table.inputs), len(layer.table.outputs)],
        "channels": list(layer.channels),
        "offsets": len(layer.table.rows),
        "pairs": layer.pairs,
        "fill": layer.pairs / max(1, len(layer.table.rows) * len(layer.table.outputs)),
        "times": layer.times,
        "difference_from_spconv": error,
    }
    for direction, work in zip(DIRECTIONS, (1, 3), strict=True):
        seconds = timing.alternate(rivals[direction], repeats, calls=calls)
        result[direction] = {
            name: {"ms": 1e3 * s, "gflops": work * layer.flops / s / 1e9} for name, s in seconds.items()
        }
    forward = {name: times["ms"] for name, times in result["forward"].items()}
    rival_ms = [ms for name, ms in forward.items() if name.startswith("spconv")]
    result["auto_over_spconv"] = forward["auto"] / min(rival_ms) if rival_ms and "auto" in forward else None
    return result


def slower_than_spconv(layers: Sequence[dict[str, Any]]) -> list[str]:
    """Wide submanifold layers with many sites on which "auto" takes longer than spconv, forward."""
    return [
        layer["name"]
        for layer in layers
        if layer["kind"] == "submanifold"
        and min(layer["channels"]) >= COMPARED_CHANNELS
        and layer["sites"][1] > COMPARED_SITES
        and (layer["auto_over_spconv"] or 0) > 1
    ]


def run(
    scan: Path | None, algorithms: Sequence[str], *, repeats: int, layers: Sequence[str] | None, with_spconv: bool
) -> dict[str, Any]:
    """Measure; `--json` prints the result.

    Raises:
        InputError: the scan cannot be read, or a layer's name is none of the detector's.
    """
    name, points = load_points(scan)
    config = DetectorConfig()
    tables = detector_tables(sparse.voxelize([points], config.voxel_size).sites)
    # On CPUs with the lists of every algorithm, also where the compiled kernels need none.
    machine: Machine | None = "cpu" if jax.default_backend() == "cpu" else None
    plan = pad_plan(tables, tables.sizes, PlanLayout.of(config, machine))
    every = list(detector_layers(config, tables, plan))
    unknown = set(layers or ()) - {layer.name for layer in every}
    if unknown:
        raise InputError(
            f"no layer is called {', '.join(sorted(unknown))}; there are {', '.join(layer.name for layer in every)}."
        )
    calls = 1 if jax.default_backend() == "cpu" else 20
    measured, rates = [], []
    for layer in every:
        if layers and layer.name not in layers:
            continue
        timing.report(f"{layer.name}: {len(layer.table.outputs):,} sites, {layer.pairs:,} pairs")
        rates.append(timing.matmul_rate(3, calls=calls))
        measured.append(measure_layer(layer, algorithms, repeats=repeats, calls=calls, with_spconv=with_spconv))
    return {
        "scan": {"name": name, "points": len(points), "voxels": len(tables.voxels), "voxel_size": config.voxel_size},
        "machine": {
            "device": jax.devices()[0].device_kind,
            "processor": platform.machine(),
            "cores": available_cores(),
        },
        "jax": jax.__version__,
        "spconv": spconv_cpu.version() if with_spconv else None,
        "repeats": repeats,
        "matmul_gflops": float(np.median(rates)) / 1e9,
        "layers": measured,
        "slower_than_spconv": slower_than_spconv(measured),
    }


def table_of(result: dict[str, Any]) -> str:
    """The result as text."""
    scan, machine = result["scan"], result["machine"]
    lines = [
        f"{scan['name']}: {scan['points']:,} points, {scan['voxels']:,} voxels of {scan['voxel_size']} m; "
        f"{machine['device']}, {machine['cores']} cores, JAX {result['jax']}, "
        f"{'spconv ' + result['spconv'] if result['spconv'] else 'without spconv'}; "
        f"float32, medians of {result['repeats']}, rivals in turn",
        f"matmul of this machine in this run: {result['matmul_gflops']:,.0f} GFLOP/s",
    ]
    for direction, title in zip(DIRECTIONS, ("forward", "forward and backward"), strict=True):
        lines += ["", f"{title}, ms", *_rows(result["layers"], direction)]
    lines += ["", _verdict(result)]
    return "\n".join(lines)


def _rows(layers: Sequence[dict[str, Any]], direction: str) -> list[str]:
    names = list(dict.fromkeys(name for layer in layers for name in layer[direction]))
    extras = []
    if direction == "forward" and any(layer["auto_over_spconv"] is not None for layer in layers):
        extras.append("auto/spconv")
    if "auto" in names:
        extras.append("GFLOP/s")
    lines = [f"{'layer':<17}{'x':>3}{'sites':>8}{'fill':>6}{'width':>9}" + "".join(f"{h:>13}" for h in names + extras)]
    for layer in layers:
        values, (c_in, c_out) = layer[direction], layer["channels"]
        cells = [format(values[name]["ms"], ".2f") if name in values else "-" for name in names]
        if "auto/spconv" in extras:
            cells.append(format(layer["auto_over_spconv"], ".2f"))
        if "GFLOP/s" in extras:
            cells.append(format(values["auto"]["gflops"], ".0f"))
        head = (
            f"{layer['name']:<17}{layer['times']:>3}{layer['sites'][1]:>8}{layer['fill']:>6.2f}{f'{c_in}-{c_out}':>9}"
        )
        lines.append(head + "".join(f"{cell:>13}" for cell in cells))
    sums = [
        format(sum(layer["times"] * layer[direction][name]["ms"] for layer in layers), ".1f")
        if all(name in layer[direction] for layer in layers)
        else "-"
        for name in names
    ]
    return [*lines, f"{'sum, x times each':<43}" + "".join(f"{total:>13}" for total in sums)]


def _verdict(result: dict[str, Any]) -> str:
    what = f"submanifold layers of {COMPARED_CHANNELS} channels or more on more than {COMPARED_SITES:,} sites"
    if all(layer["auto_over_spconv"] is None for layer in result["layers"]):
        return f"auto was not compared with spconv on {what}."
    slower = result["slower_than_spconv"]
    return f"auto slower than spconv among {what}: {', '.join(slower) if slower else 'none'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convolution",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scan", type=Path, help=".bin (float32 rows of six) or .ply; default a procedural room")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="what JAX computes on; default JAX's own choice")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), metavar="NAME",
                        help=f"of {', '.join(ALGORITHMS)}; default all")  # fmt: skip
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="only these, such as stage2.residual up0.lateral")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the median counts (default 7)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, expected 1 or more")
    if options.device is not None:
        jax.config.update("jax_platforms", "cpu" if options.device == "cpu" else "cuda,rocm")
    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        timing.report(f"JAX finds no {options.device}: {error}")
        return 2
    with_spconv = backend == "cpu" and not spconv_cpu.MISSING
    if backend == "cpu" and spconv_cpu.MISSING:
        timing.report(spconv_cpu.MISSING)
    try:
        result = run(
            options.scan, options.algorithms, repeats=options.repeats, layers=options.layers, with_spconv=with_spconv
        )
    except (InputError, FileNotFoundError) as error:
        timing.report(str(error))
        return 2
    print(json.dumps(result, indent=1) if options.json else table_of(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

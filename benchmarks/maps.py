"""Cost of building maps: `python -m benchmarks.maps [--scan FILE]`.

Median times, after a warm-up, of voxelising a scan, of every table of a detector on it and of padding them; of
submanifold maps of 10,000 to 1,000,000 sites on surfaces like those of a room, and of a random blob. Host (numpy, one
thread) and in-jit (JAX on its default device) side by side; the results of both are equal.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.scans import load_points
from benchmarks.timing import alternate, report
from h2a2_jax import sparse
from h2a2_jax.models import detector_tables, pad_plan
from h2a2_jax.sparse import Sites, SiteSet

Step = tuple[str, SiteSet, Callable[[], object], Callable[[], object] | None]
"""What is measured: its name, the sites it gives or works on, the host's function, the function inside jit."""
COUNTS = (10_000, 30_000, 100_000, 300_000, 1_000_000)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, help=".bin or .ply (default: a procedural room)")
    parser.add_argument("--voxel-size", type=float, default=0.01, help="metres (default 0.01)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each (default 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    name, points = load_points(arguments.scan)
    report(f"{name}: {len(points)} points")
    steps = time_scan(points, arguments.voxel_size, arguments.repeats)
    sweep = time_sweep(arguments.repeats)
    if arguments.json:
        print(json.dumps({"scan": name, "device": jax.default_backend(), "steps": steps, "sweep": sweep}))
        return
    print(f"{name}, voxels of {arguments.voxel_size} m; ms on the host and in jit on {jax.default_backend()}")
    for row in steps:
        traced = f"{row['jit ms']:9.2f}" if "jit ms" in row else " " * 9
        print(f"  {row['step']:<34}{row['sites']:>9} sites {row['host ms']:9.2f} {traced}")
    print("submanifold maps of 3^3 offsets; ms and ns a site, on the host and in jit")
    for row in sweep:
        costs = (f"{row[f'{side} ms']:10.2f} {1e6 * row[f'{side} ms'] / row['sites']:7.0f}" for side in ("host", "jit"))
        print(f"  {row['cloud']:<9}{row['sites']:>9} sites", *costs)


def time_scan(points: np.ndarray, voxel_size: float, repeats: int) -> list[dict[str, Any]]:
    """Host and in-jit times of every step from points to a padded plan."""
    voxels = sparse.voxelize([points], voxel_size).sites
    tables = detector_tables(voxels)
    capacities = sparse.BucketLadder(tables.sizes).capacities(0)
    rows, scan = jnp.asarray(points), jnp.zeros(len(points), jnp.int32)
    steps: list[Step] = [
        (
            "voxelize",
            voxels,
            lambda: sparse.voxelize([points], voxel_size),
            partial(
                jax.jit(lambda p, s: sparse.voxelize_points(p, s, len(p), voxel_size, capacities.voxels, 1)), rows, scan
            ),
        )
    ]
    fine = voxels
    for stride in (2, 4, 8, 16, 32, 64):
        coarse = sparse.downsample(fine, 2)
        steps += _level_steps(fine, coarse, stride)
        fine = coarse
    for up in tables.ups:
        steps += _up_steps(up.generate.inputs, up.generate.outputs, up.lateral.outputs)
    steps += [
        ("all tables of the detector", voxels, lambda: detector_tables(voxels), None),
        ("padding them, with lists", voxels, lambda: pad_plan(tables, capacities), None),
    ]
    return [_measure(label, sites, host, traced, repeats) for label, sites, host, traced in steps]


def _level_steps(fine: SiteSet, coarse: SiteSet, stride: int) -> list[Step]:
    fine_rows, coarse_rows = _on_device(fine), _on_device(coarse)
    capacity = coarse_rows.capacity
    steps: list[Step] = [
        (
            f"downsample to {stride}",
            coarse,
            partial(sparse.downsample, fine, 2),
            partial(jax.jit(lambda r: sparse.downsample_sites(r, 2, capacity)), fine_rows),
        ),
    ]
    if stride == 4:
        pool = jax.jit(lambda a, b: sparse.pool_map(a, b, 2))
        host: Callable[[], object] = partial(sparse.pool_neighbors, fine, coarse, 2)
        return [*steps, (f"pooling 2^3 onto {stride}", coarse, host, partial(pool, fine_rows, coarse_rows))]
    strided = jax.jit(lambda a, b: sparse.strided_map(a, b, 3))
    host = partial(sparse.strided_neighbors, fine, coarse, 3)
    steps.append((f"strided 3^3 onto {stride}", coarse, host, partial(strided, fine_rows, coarse_rows)))
    if stride >= 8:
        steps.append(_submanifold_step(coarse, coarse_rows))
    return steps


def _up_steps(coarse: SiteSet, children: SiteSet, union: SiteSet) -> list[Step]:
    coarse_rows, children_rows, union_rows = map(_on_device, (coarse, children, union))
    capacity = children_rows.capacity
    stride = children.stride
    return [
        (
            f"generate 3^3 onto {stride}",
            children,
            partial(sparse.generate, coarse, 3),
            partial(jax.jit(lambda r: sparse.generate_sites(r, 3, capacity)), coarse_rows),
        ),
        (
            f"generative 3^3 onto {stride}",
            children,
            partial(sparse.generative_neighbors, coarse, children, 3),
            partial(jax.jit(lambda a, b: sparse.generative_map(a, b, 3)), coarse_rows, children_rows),
        ),
        _submanifold_step(union, union_rows, "union "),
    ]


def _submanifold_step(sites: SiteSet, rows: Sites, note: str = "") -> Step:
    return (
        f"submanifold 3^3 on {note}{sites.stride}",
        sites,
        partial(sparse.submanifold_neighbors, sites),
        partial(jax.jit(sparse.submanifold_map), rows),
    )


def time_sweep(repeats: int) -> list[dict[str, Any]]:
    """Submanifold maps of growing clouds."""
    clouds = [("surfaces", surfaces(count)) for count in COUNTS] + [("blob", blob(COUNTS[-1]))]
    rows = []
    for name, sites in clouds:
        step = _submanifold_step(sites, _on_device(sites))
        row = _measure(*step, repeats=min(repeats, 5) if len(sites) > 200_000 else repeats)
        rows.append({"cloud": name, **row})
    return rows


def _measure(
    label: str, sites: SiteSet, host: Callable[[], object], traced: Callable[[], object] | None, repeats: int
) -> dict[str, Any]:
    report(label)
    # One after the other, not in turns: each has the caches to itself, as in a run.
    row: dict[str, Any] = {"step": label, "sites": len(sites)}
    row["host ms"] = 1e3 * alternate({"host": host}, repeats)["host"]
    if traced is not None:
        row["jit ms"] = 1e3 * alternate({"jit": traced}, repeats)["jit"]
    return row


def _on_device(sites: SiteSet) -> Sites:
    return jax.tree.map(jnp.asarray, sparse.pad_sites(sites, max(64, -(-len(sites) // 64) * 64)))


def surfaces(count: int, seed: int = 0) -> SiteSet:
    """Sites on axis-parallel planes like walls, floors and tables, one to two voxels thick."""
    rng = np.random.default_rng(seed)
    scale = (count / 1e6) ** 0.5
    sites = np.zeros((0, 3), np.int32)
    while len(sites) < count:
        size, axis = (scale * rng.integers(100, 500, 2)).astype(int), rng.integers(3)
        corner = (scale * rng.integers(-400, 400, 3)).astype(int)
        u, v = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
        plane = np.stack([rng.integers(0, 2, u.size), u.ravel(), v.ravel()], 1)
        sites = _distinct(np.concatenate([sites, np.roll(plane, axis, 1) + corner]).astype(np.int32))
    return sparse.site_set(np.pad(sites[:count], ((0, 0), (1, 0))))


def blob(count: int, seed: int = 0) -> SiteSet:
    """Sites drawn from a normal distribution."""
    rng = np.random.default_rng(seed)
    spread = 0.6 * count ** (1 / 3)
    coords = _distinct(rng.normal(0, spread, (3 * count, 3)).round().astype(np.int32))
    chosen = coords[rng.choice(len(coords), count, replace=False)]
    return sparse.site_set(np.pad(chosen, ((0, 0), (1, 0))))


def _distinct(coords: np.ndarray) -> np.ndarray:
    return sparse.site_set(np.pad(coords, ((0, 0), (1, 0)))).coords[:, 1:]


if __name__ == "__main__":
    main()

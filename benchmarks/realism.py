"""How far procedural scans are from real ones: `python -m benchmarks.realism --scans 60`.

For each dataset that a real scan at hand belongs to, statistics of the real scan beside those of procedural scans of
the scales "full" and "varied": sites of one level per site of the finer one, occupied neighbours of a site by kind of
offset, heights above the floor, directions and roughness of surfaces, brightness and colour. F is the squared distance
of the real scan from the mean of the procedural ones, in units of their variance: 1 is usual among them, 10 is seen in
none. Labels are not read. Real scans are scene0000_00.bin, 000017.bin and pcl_room_scan1.pcd in H2A2_SCANS_DIR.
"""

import argparse
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from benchmarks.timing import report
from h2a2_jax.host import available_cores
from h2a2_jax.scans.formats.point_cloud import read_point_cloud, unit_colors
from h2a2_jax.scans.specs import dataset_spec
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource

REAL_FILES = {"scannet": "scene0000_00.bin", "sunrgbd": "000017.bin", "s3dis": "pcl_room_scan1.pcd"}
_OFFSETS = {"4 cm": 0.04, "8 cm": 0.08, "16 cm": 0.16}
_POINTS = 30_000  # of every scan, so that density does not decide


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=60, help="procedural scans of each dataset and scale (default 60)")
    parser.add_argument(
        "--dataset", choices=REAL_FILES, nargs="+", default=list(REAL_FILES), help="which (default all)"
    )
    parser.add_argument("--jobs", type=int, default=available_cores(), help="processes (default one per core)")
    arguments = parser.parse_args()
    root = Path(os.environ["H2A2_SCANS_DIR"])
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for name in arguments.dataset:
            file = REAL_FILES[name]
            cloud = read_point_cloud(root / file)
            colors = unit_colors(cloud)
            has_colors = colors is not None
            real = statistics(
                np.asarray(cloud.points, np.float32),
                np.zeros((len(cloud.points), 3), np.float32) if colors is None else colors,
            )
            found = {}
            for scale in ("full", "varied"):
                rows = list(pool.map(partial(_procedural, name, scale), range(arguments.scans)))
                found[scale] = {key: np.array([row[key] for row in rows]) for key in real}
                report(f"{name}, {scale}: {arguments.scans} scans")
            _print(f"{name}, {file}", real, found, has_colors)


def _procedural(name: str, scale: str, index: int) -> dict[str, float]:
    scan = SyntheticSource(dataset_spec(name), "val", index + 1, scale=scale)[index]  # type: ignore[arg-type]
    return statistics(scan.points, scan.colors)


def statistics(points: np.ndarray, colors: np.ndarray) -> dict[str, float]:
    """Numbers of one scan, from at most 30,000 of its points; see the module."""
    chosen = np.random.default_rng(0).permutation(len(points))[:_POINTS]
    points, colors = points[chosen], colors[chosen]
    points = points[np.all(np.abs(points - np.median(points, axis=0)) < 8.0, axis=1)]
    found: dict[str, float] = {}
    counts = {}
    for label, size in _OFFSETS.items():
        cells = np.unique(np.floor(points / size).astype(np.int64), axis=0)
        counts[label] = len(cells)
        keys = set(map(tuple, cells.tolist()))
        sample = cells[np.random.default_rng(1).permutation(len(cells))[:1500]]
        for kind, offsets in _KINDS.items():
            hits = [(cell[0] + a, cell[1] + b, cell[2] + c) in keys for cell in sample.tolist() for a, b, c in offsets]
            found[f"{kind} at {label}"] = float(np.mean(hits))
    found["sites, 8 cm per 4 cm"] = counts["8 cm"] / counts["4 cm"]
    found["sites, 16 cm per 8 cm"] = counts["16 cm"] / counts["8 cm"]
    heights = points[:, 2] - np.percentile(points[:, 2], 1)
    edges = [-1.0, 0.1, 0.4, 0.8, 1.2, 1.8, 2.4]
    for low, high in pairwise(edges):
        found[f"points between {max(low, 0):.1f} and {high:.1f} m"] = float(
            np.mean((heights >= low) & (heights < high))
        )
    tree = cKDTree(points)
    centers = points[np.random.default_rng(2).permutation(len(points))[:2000]]
    _, near = tree.query(centers, k=16)
    groups = points[near] - points[near].mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.einsum("nki,nkj->nij", groups, groups))
    rise = np.abs(vectors[:, 2, 0])
    rough = values[:, 0] / np.maximum(values.sum(axis=1), 1e-12)
    found["level surfaces"] = float(np.mean(rise > 0.9))
    found["upright surfaces"] = float(np.mean(rise < 0.2))
    found["slanting surfaces"] = float(np.mean((rise >= 0.2) & (rise <= 0.9)))
    found["roughness, median"] = float(np.median(rough))
    found["roughness, 90 %"] = float(np.percentile(rough, 90))
    found["brightness, mean"] = float(colors.mean())
    found["brightness, deviation"] = float(colors.mean(axis=1).std())
    found["colourfulness"] = float((colors.max(axis=1) - colors.min(axis=1)).mean())
    return found


_KINDS: Mapping[str, list[tuple[int, int, int]]] = {
    "beside": [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0)],
    "above or below": [(0, 0, 1), (0, 0, -1)],
    "level corners": [(a, b, 0) for a in (-1, 1) for b in (-1, 1)],
    "slanting edges": [(a, b, c) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1)) for c in (-1, 1)],
    "corners": [(a, b, c) for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)],
}


def _print(title: str, real: Mapping[str, float], found: Mapping[str, Mapping[str, np.ndarray]], colors: bool) -> None:
    print(f"\n{title}\n")
    print("| statistic | real | " + " | ".join(f"{scale} | F" for scale in found) + " |")
    print("|---|---|" + "---|---|" * len(found))
    squares: dict[str, list[float]] = {scale: [] for scale in found}
    for key, value in real.items():
        if not colors and key.startswith(("brightness", "colour")):
            continue
        cells = []
        for scale, rows in found.items():
            mean, spread = rows[key].mean(), rows[key].std(ddof=1)
            squares[scale].append(float(((value - mean) / max(spread, 1e-6)) ** 2))
            cells.append(f"{mean:.3f} ± {spread:.3f} | {squares[scale][-1]:.1f}")
        print(f"| {key} | {value:.3f} | " + " | ".join(cells) + " |")
    print("| median F | | " + " | ".join(f" | {np.median(squares[scale]):.1f}" for scale in found) + " |")
    print(
        "| mean of F, at most 25 each | | "
        + " | ".join(f" | {np.minimum(squares[s], 25).mean():.1f}" for s in found)
        + " |"
    )


if __name__ == "__main__":
    main()

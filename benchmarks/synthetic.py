"""Figures of the procedural scans: `python -m benchmarks.synthetic --scans 30`.

Prints a table for each dataset with measured figures beside specified ones and, for ScanNet and SUN RGB-D, beside those
of one real scan: points, spacing, extents, sites at every stride, boxes, classes, sizes, yaw, the visible share of
objects, the share of missing points, noise, colours, and the time to generate a scan. The real scans are scene0000_00
and frame 17 in mmdetection3d's demo folder; where H2A2_SCANS_DIR names a folder that holds scene0000_00.bin and
000017.bin, they are measured again.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from scipy.spatial import cKDTree

from benchmarks.timing import report
from h2a2_jax.host import available_cores
from h2a2_jax.models.maps import pyramid_sizes
from h2a2_jax.scans.scan import points_in_box
from h2a2_jax.scans.specs import SPECS, DatasetSpec, dataset_spec
from h2a2_jax.scans.synthetic.furniture import Solids
from h2a2_jax.scans.synthetic.rooms import Room, furnish_room, label_of, programme
from h2a2_jax.scans.synthetic.sensors import Capture
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.sparse import voxelize

VOXEL_SIZE = 0.01
STRIDES = {"1 cm": "voxels", "2 cm": "stem", "4 cm": "pool", "8 cm": "stage1", "16 cm": "stage2", "32 cm": "stage3"}
SAMPLED = 100_000  # points that the recipe of S3DIS draws from a scan
REAL_FILES = {"scannet": "scene0000_00.bin", "sunrgbd": "000017.bin"}
REAL = {
    "scannet": {
        "points": "40,684",
        "extent x, y, z (m)": "8.4 x 8.7 x 3.0",
        "spacing (cm)": "3.6",
        "sites 1 cm": "40,681",
        "sites 2 cm": "40,347",
        "sites 4 cm": "36,248",
        "sites 16 cm": "6,814",
    },
    "sunrgbd": {
        "points": "50,000",
        "spacing (cm)": "0.9",
        "sites 1 cm": "44,430",
        "sites 2 cm": "29,686",
        "sites 4 cm": "12,432",
        "sites 16 cm": "1,152",
    },
    "s3dis": {},
}
SPECIFIED = {
    "scannet": {
        "points": "50,000-150,000",
        "spacing (cm)": "2-3",
        "extent x, y, z (m)": "3-8 x 3-8 x 2.4-3",
        "boxes": "8-16",
        "holes (%)": "10-25",
        "noise on the floor (mm)": "5-8",
        "floor z (m)": "0",
    },
    "sunrgbd": {
        "points": "50,000",
        "boxes": "2-6",
        "dropout (%)": "5-15",
        "noise on the floor, of the formula's": "1",
        "floor z (m)": "-1.2 +- 0.3",
        "forward (m)": "0.6-8 along the axis",
        "yaw along a wall (%)": "80",
    },
    "s3dis": {
        "points": "200,000-1,000,000",
        "extent x, y, z (m)": "3-10 x 3-12 x 2.7-3.2",
        "boxes": "6-14",
        "holes (%)": "2-5",
        "noise on the floor (mm)": "2",
        "floor z (m)": "0",
    },
}
# Mean sizes (m) of the real boxes: length, width, height; of axis-aligned boxes the first two swap with the room.
MEAN_SIZES: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "sunrgbd": {
        "bed": (2.11, 1.62, 0.93), "table": (0.79, 1.28, 0.72), "sofa": (0.92, 1.87, 0.85),
        "chair": (0.59, 0.55, 0.83), "toilet": (0.70, 0.45, 0.76), "desk": (0.70, 1.35, 0.74),
        "dresser": (0.53, 1.00, 1.17), "night_stand": (0.50, 0.63, 0.68), "bookshelf": (0.40, 1.07, 1.69),
        "bathtub": (0.77, 1.40, 0.47),
    },
    "scannet": {
        "cabinet": (0.77, 0.81, 0.93), "door": (0.53, 0.60, 1.75), "window": (0.96, 0.72, 1.15),
        "picture": (0.21, 0.42, 0.54), "counter": (1.44, 1.90, 0.27), "curtain": (1.38, 0.66, 1.68),
        "refrigerator": (0.67, 0.71, 1.30), "showercurtrain": (0.42, 0.38, 1.75), "sink": (0.51, 0.51, 0.30),
        "bathtub": (1.15, 1.05, 0.50), "garbagebin": (0.48, 0.49, 0.58),
    },
    "s3dis": {
        "chair": (0.6, 0.6, 0.8), "table": (1.5, 0.9, 0.75), "bookcase": (1.0, 0.4, 2.0), "board": (2.0, 0.1, 1.2),
        "sofa": (1.8, 0.9, 0.8),
    },
}  # fmt: skip


def main() -> None:
    """Measure and print."""
    names = [spec.name for spec in SPECS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=30, help="scans of each dataset (default 30)")
    parser.add_argument("--rooms", type=int, default=300, help="rooms drawn without a sensor, for sizes and yaw (300)")
    parser.add_argument("--dataset", choices=names, nargs="+", default=names, help="which datasets (default all)")
    parser.add_argument("--scale", choices=("full", "demo"), default="full", help="size of the rooms (default full)")
    parser.add_argument("--jobs", type=int, default=available_cores(), help="processes (default one per core)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for name in arguments.dataset:
            start = time.perf_counter()
            one = partial(measure, name, arguments.scans, arguments.scale)
            scans = list(pool.map(one, range(arguments.scans)))
            report(f"{name}: {arguments.scans} scans generated and measured in {time.perf_counter() - start:.0f} s")
            results[name] = {"scans": scans, "rooms": measure_rooms(name, arguments.rooms, arguments.scale)}
    if arguments.json:
        print(json.dumps(results))
        return
    for name in arguments.dataset:
        print_tables(name, results[name]["scans"], results[name]["rooms"])
    seconds = sum(float(np.mean([scan["core seconds"] for scan in results[name]["scans"]])) for name in results)
    print(f"\n300 scans of each of these datasets: {300 * seconds / 60:.1f} core minutes.")


def measure(dataset: str, size: int, scale: str, index: int) -> dict[str, Any]:
    """Figures of one scan; see the module."""
    source = SyntheticSource(dataset_spec(dataset), "train", size, scale=scale)  # type: ignore[arg-type]
    start = time.process_time()
    scan, room, capture = source.acquire(index)
    seconds = time.process_time() - start
    spec = source.spec
    figures: dict[str, Any] = {"core seconds": seconds, **cloud_figures(scan.points, scan.colors)}
    figures["boxes"] = len(scan.boxes)
    figures["classes"] = [spec.classes[label] for label in scan.labels.tolist()]
    figures["sizes"] = scan.boxes[:, 3:6].tolist()
    figures["points in a box"] = [int(points_in_box(scan.points, box).sum()) for box in scan.boxes]
    figures["surface seen (%)"] = surface_seen(room, capture, figures["spacing (cm)"] / 100)
    figures.update({f"{kind} (%)": 100 * share for kind, share in capture.losses.items()})
    figures.update(floor_figures(spec, room, capture))
    if dataset == "sunrgbd":
        figures["forward (m)"] = (float(scan.points[:, 1].min()), float(scan.points[:, 1].max()))
    if dataset == "s3dis":
        drawn = np.random.default_rng(0).choice(len(scan.points), min(SAMPLED, len(scan.points)), replace=False)
        figures.update({f"{key} of 100,000 points": value for key, value in sites(scan.points[drawn]).items()})
    return figures


def cloud_figures(points: Float32[np.ndarray, "m 3"], colors: Float32[np.ndarray, "m 3"]) -> dict[str, Any]:
    """Figures of points (m) and colours (0-1), which exist for a real scan too."""
    figures: dict[str, Any] = {"points": len(points), "extent x, y, z (m)": tuple(np.ptp(points, axis=0).tolist())}
    figures["spacing (cm)"] = 100 * spacing(points)
    figures.update(sites(points))
    figures["colours: least, most"] = (float(colors.min()), float(colors.max()))
    figures["colours: mean, deviation"] = (float(colors.mean()), float(colors.std()))
    return figures


def sites(points: Float32[np.ndarray, "m 3"]) -> dict[str, int]:
    """Number of sites of a detector's backbone at every stride, for voxels of 1 cm."""
    sizes = pyramid_sizes(voxelize([points], VOXEL_SIZE).sites)
    return {f"sites {stride}": getattr(sizes, level) for stride, level in STRIDES.items()}


def spacing(points: Float32[np.ndarray, "m 3"]) -> float:
    """Median distance (m) of a point to its nearest neighbour."""
    some = points[:: max(1, len(points) // 5000)]
    return float(np.median(cKDTree(points).query(some, k=2)[0][:, 1]))


def surface_seen(room: Room, capture: Capture, distance: float, samples: int = 300) -> list[float]:
    """Share (%) of the outer surface of every boxed object with a point of it within twice the spacing or 3 cm."""
    parts, rng = room.solids, np.random.default_rng(0)
    seen = []
    for index in np.flatnonzero((room.labels >= 0) & (capture.visible >= 0.15)):
        own = np.flatnonzero(parts.owners == index)
        surface = outer_surface(parts, own, samples, rng)
        # From the frame of the room to that of the capture, by the change of the box.
        turn = capture.boxes[index, 6] - room.boxes[index, 6]
        cos, sin = math.cos(turn), math.sin(turn)
        moved = (surface - room.boxes[index, :3]) @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        points = capture.points[capture.owners == index]
        if len(points) >= 30:
            near, _ = cKDTree(points).query(moved + capture.boxes[index, :3])
            seen.append(100 * float(np.mean(near < max(2 * distance, 0.03))))
    return seen


def outer_surface(
    parts: Solids, own: np.ndarray, samples: int, rng: np.random.Generator
) -> Float[np.ndarray, "samples 3"]:
    """Points spread evenly over the surface of some primitives, where no other of them covers it."""
    halves = parts.halves[own].astype(float)
    faces = np.stack([halves[:, 1] * halves[:, 2], halves[:, 0] * halves[:, 2], halves[:, 0] * halves[:, 1]], axis=1)
    found: list[np.ndarray] = []
    count = 0
    while count < samples:
        chosen = rng.choice(3 * len(own), 4 * samples, p=(faces / faces.sum()).ravel())
        part, axis = chosen // 3, chosen % 3
        local = rng.uniform(-1, 1, (len(chosen), 3))
        rows = np.arange(len(chosen))
        local[rows, axis] = rng.choice([-1.0, 1.0], len(chosen))
        round_ = parts.is_round[own[part]]
        radius = np.hypot(local[:, 0], local[:, 1])
        side = round_ & (axis < 2)
        local[side, :2] /= radius[side, None]
        kept = ~(round_ & (axis == 2) & (radius > 1))
        placed = parts.to_common(own[part], local * halves[part])
        inside = np.zeros(len(chosen), bool)
        for other in range(len(own)):
            where = parts.to_local(np.full(len(chosen), own[other]), placed) / halves[other]
            flat = np.hypot(where[:, 0], where[:, 1]) if parts.is_round[own[other]] else np.abs(where[:, :2]).max(1)
            inside |= (part != other) & (flat < 0.999) & (np.abs(where[:, 2]) < 0.999)
        found.append(placed[kept & ~inside])
        count += len(found[-1])
    return np.concatenate(found)[:samples]


def floor_figures(spec: DatasetSpec, room: Room, capture: Capture) -> dict[str, float]:
    """Height of the floor and the noise of its points."""
    shell = capture.points[capture.owners < 0].astype(float)
    # Back to the frame of the room, where the floor is z = 0 and the walls are upright on the axes.
    turn = room.boxes[0, 6] - capture.boxes[0, 6]
    cos, sin = math.cos(turn), math.sin(turn)
    there = (shell - capture.boxes[0, :3]) @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + room.boxes[0, :3]
    inner = ((there[:, :2] > 0.3) & (there[:, :2] < room.size[:2] - 0.3)).all(axis=1)
    points = shell[inner & (np.abs(there[:, 2]) < 0.1)]
    floor = float(capture.boxes[0, 2] - room.boxes[0, 2])
    if spec.name == "sunrgbd":
        # The frame is level: the lowest ray of the middle column gives the pitch of the camera.
        middle = capture.points[np.abs(capture.points[:, 0]) < 0.05 * capture.points[:, 1]].astype(float)
        pitch = np.quantile(np.arctan2(middle[:, 2], middle[:, 1]), 0.001) + math.radians(45 / 2)
        measured = points[:, 1] * math.cos(pitch) + points[:, 2] * math.sin(pitch)
        depth = measured * floor / points[:, 2]  # where the ray meets the floor
        sigma = np.hypot(0.0012 + 0.0019 * (depth - 0.4) ** 2, 0.00285 * depth**2 / math.sqrt(12))
        error = ((measured - depth) / sigma)[depth < 4]
        return {"floor z (m)": floor, "noise on the floor, of the formula's": deviation(error[np.abs(error) < 5])}
    level = points[np.abs(points[:, 2] - floor) < 0.04, 2]
    return {"floor z (m)": floor, "noise on the floor (mm)": 1000 * deviation(level)}


def deviation(values: Float[np.ndarray, " n"]) -> float:
    """Standard deviation without outliers, such as flying points."""
    for _ in range(3):
        values = values[np.abs(values - values.mean()) < 3.5 * values.std()] if len(values) else values
    return float(values.std()) if len(values) > 50 else math.nan


def measure_rooms(dataset: str, rooms: int, scale: str) -> dict[str, Any]:
    """Sizes, classes and yaw of the furniture placed, without a sensor."""
    spec = dataset_spec(dataset)
    turns, classes, spreads = [], [], []
    plan = programme(spec, scale)  # type: ignore[arg-type]
    kinds = {label_of(name, spec): kind for name, kind in plan.kinds.items()}
    for seed in range(rooms):
        room = furnish_room(plan, spec, np.random.default_rng([seed, 77]))
        for box, label in zip(room.boxes.tolist(), room.labels.tolist(), strict=True):
            if label >= 0:
                classes.append(spec.classes[label])
                spreads.append([math.log(a / b) for a, b in zip(box[3:6], kinds[label].size, strict=True)])
                if kinds[label].mount != "hung":
                    turns.append(abs((box[6] + math.pi / 4) % (math.pi / 2) - math.pi / 4))
    return {
        "yaw along a wall (%)": 100 * float(np.mean(np.array(turns) < math.radians(3))),
        "classes": classes,
        "log sizes": spreads,
    }


def real_figures(dataset: str) -> dict[str, Any]:
    """Figures of the real scan in H2A2_SCANS_DIR; empty where there is none."""
    folder, name = os.environ.get("H2A2_SCANS_DIR"), REAL_FILES.get(dataset)
    if folder is None or name is None or not (Path(folder) / name).is_file():
        return {}
    rows = np.fromfile(Path(folder) / name, np.float32).reshape(-1, 6)
    return cloud_figures(rows[:, :3].copy(), rows[:, 3:] / np.float32(dataset_spec(dataset).color_scale))


def print_tables(dataset: str, scans: Sequence[Mapping[str, Any]], rooms: Mapping[str, Any]) -> None:
    """Print the tables of one dataset."""
    spec, measured = dataset_spec(dataset), real_figures(dataset)
    print(f"\nsynthetic_{dataset}: {len(scans)} scans; median (smallest, largest)")
    print(f"{'':38} {'measured':42} {'specified':24} real scan")
    skipped = ("classes", "sizes")
    for key in [key for key in scans[0] if key not in skipped]:
        values = [scan[key] for scan in scans if key in scan]
        real = summary([measured[key]]) if key in measured else REAL[dataset].get(key, "")
        print(f"{key:38} {summary(values):42} {SPECIFIED[dataset].get(key, ''):24} {real}")
    expected = SPECIFIED[dataset].get("yaw along a wall (%)", "80")
    print(f"{'yaw along a wall (%), of the rooms':38} {rooms['yaw along a wall (%)']:<42.1f} {expected}")
    labels = [name for scan in scans for name in scan["classes"]]
    sizes = np.array([size for scan in scans for size in scan["sizes"]])
    logs = np.array(rooms["log sizes"])
    print(
        f"{'class':16} {'boxes':>7} {'share':>7} {'of rooms':>8}   {'mean size (m)':22} {'specified':22} "
        "spread of log size"
    )
    for name in sorted(spec.classes, key=lambda name: -labels.count(name)):
        chosen = np.array([label == name for label in labels])
        made = np.array([label == name for label in rooms["classes"]])
        mean = sizes[chosen].mean(axis=0) if chosen.any() else np.full(3, math.nan)
        wanted = MEAN_SIZES[dataset].get(name)
        if not spec.has_yaw:
            # Walls run either way by chance: the horizontal sides count as one.
            mean[:2] = mean[:2].mean()
            wanted = wanted and (sum(wanted[:2]) / 2, sum(wanted[:2]) / 2, wanted[2])
        print(
            f"{name:16} {chosen.sum():7} {chosen.mean():7.1%} {made.mean():8.1%}   {triple(mean):22} "
            f"{triple(wanted) if wanted else '':22} {triple(logs[made].std(axis=0)) if made.any() else ''}"
        )


def summary(values: Sequence[Any]) -> str:
    """Median and range of some figures; of triples and the like, column by column."""
    if isinstance(values[0], tuple):
        return "  ".join(summary(column) for column in zip(*values, strict=True))
    if isinstance(values[0], list):
        values = [item for value in values for item in value]
    array = np.array(values, float)
    array = array[~np.isnan(array)]
    if len(array) == 0:
        return ""
    if len(array) == 1:
        return number(array[0])
    return f"{number(np.median(array))} ({number(array.min())}, {number(array.max())})"


def number(value: float) -> str:
    """Figure with a number of digits that suits its size."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) >= 2 else f"{value:.2f}"


def triple(values: Iterable[float]) -> str:
    """Three numbers with two decimals."""
    return ", ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()

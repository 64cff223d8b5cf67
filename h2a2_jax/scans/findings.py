"""Measurements of one scan and of its boxes, for a check of a folder before training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.scans.file_frame import frame_signs
from h2a2_jax.scans.formats.colors import GREY
from h2a2_jax.scans.orientation import UpVotes
from h2a2_jax.scans.scan import ScanError, ScanSource, points_in_box
from h2a2_jax.scans.scan_folder import ScanFolder
from h2a2_jax.scans.sources import Split

NEARLY_SAME = 0.95
"""IoU above which a box nearly repeats another."""
_SAME_YAW = 0.05  # rad
_MOST_COMPARED = 1000  # boxes of a class in a scan


@dataclass(frozen=True)
class BoxFinding:
    """Measurements of one box.

    Attributes:
        size: dx, dy, dz (m).
        held: points in the box.
        held_clockwise: points the box would hold if yaw counted clockwise.
        held_crossed: points the box would hold if dx and dy changed places.
        held_from_bottom: points the box would hold if its centre were that of its bottom.
        turned: True if yaw makes a difference.
        outside: True if the box does not even meet the box around all points.
    """

    label: int
    size: tuple[float, float, float]
    held: int
    held_clockwise: int
    held_crossed: int
    held_from_bottom: int
    turned: bool
    outside: bool


@dataclass(frozen=True)
class RepeatedBox:
    """Several boxes of one scan with the same numbers.

    Attributes:
        labels: their classes, each once.
        count: number of the boxes.
    """

    labels: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class ScanFinding:
    """Measurements of one scan.

    Attributes:
        error: why the scan cannot be used; then the fields below have their defaults, but for `extent` and `up` of a
            file that can be read.
        extent: of all but the outermost .2 % of points along x, y, z of the file, in its unit; None of no points.
        up: votes on the axis of the file that points up.
        colors: smallest and largest number in the file; None without colours, or of prepared files, which are scaled.
        network_colors: smallest, mean and largest number after scaling to 0-1; None for a scan that is grey throughout.
        duplicates: share of points that are exactly where another one is.
        boxes: usable boxes of a class, in metres, z up.
        repeated: boxes that are there more than once.
        nearly_repeated: boxes that overlap another, unequal one of their class nearly wholly.
        notes: counts by kind of what loading left out or repaired.
        assumed: remarks on what the file leaves open, ends of sentences.
    """

    split: str
    name: str
    error: str | None = None
    points: int = 0
    extent: tuple[float, float, float] | None = None
    up: UpVotes | None = None
    colors: tuple[float, float] | None = None
    network_colors: tuple[float, float, float] | None = None
    duplicates: float = 0.0
    boxes: tuple[BoxFinding, ...] = ()
    repeated: tuple[RepeatedBox, ...] = ()
    nearly_repeated: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()


def measure_scan(sources: Mapping[Split, ScanSource], place: str) -> ScanFinding:
    """Measure one scan, named by its split and number; this may run in another process."""
    split, number = place.split()
    source, index, cloud = sources[cast(Split, split)], int(number), None
    remarks: list[str] = []
    try:
        if isinstance(source, ScanFolder):  # whose files have a frame of their own
            cloud = source.read(index)
            scan = source.convert(index, cloud, remarks)
        else:
            scan = source[index]
    except ScanError as error:
        # A scan in another unit than declared may reach too far to be used, and its extent still shows its unit.
        extent, _, up = (None if cloud is None else frame_signs(cloud.points)) or (None, None, None)
        return ScanFinding(split, source.names[index], str(error), extent=extent, up=up)
    points, colors = (scan.points, None) if cloud is None else (cloud.points, cloud.colors)
    bits = np.ascontiguousarray(scan.points, np.float32).view(np.uint32).astype(np.uint64)
    mixed = bits @ np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
    labelled = scan.labels >= 0
    extent, _, up = frame_signs(points) or (None, None, None)
    repeated, nearly_repeated = _repeats(scan.boxes[labelled], scan.labels[labelled])
    return ScanFinding(
        split,
        scan.name,
        points=len(scan.points),
        extent=extent,
        up=up,
        colors=None if colors is None or not len(colors) else (float(colors.min()), float(colors.max())),
        network_colors=None if (scan.colors == GREY).all() else _low_mean_high(scan.colors),
        duplicates=1 - len(np.unique(mixed)) / len(scan.points),
        boxes=tuple(
            _box(scan.points, box, int(label))
            for box, label in zip(scan.boxes[labelled], scan.labels[labelled], strict=True)
        ),
        repeated=repeated,
        nearly_repeated=nearly_repeated,
        notes=dict(scan.notes),
        assumed=(*(() if cloud is None else cloud.assumed), *remarks),
    )


def _low_mean_high(colors: np.ndarray) -> tuple[float, float, float]:
    return float(colors.min()), float(colors.mean(dtype=np.float64)), float(colors.max())


def _box(points: np.ndarray, box: np.ndarray, label: int) -> BoxFinding:
    # Points in the box are counted among those nearby: boxes are small, scans are not.
    near = points[(np.abs(points - box[:3]) <= 1.5 * np.linalg.norm(box[3:6])).all(axis=1)]
    clockwise, crossed, raised = box.copy(), box[[0, 1, 2, 4, 3, 5, 6]], box.copy()
    clockwise[6] *= -1
    raised[2] += box[5] / 2
    dx, dy, dz = (float(size) for size in box[3:6])
    cos, sin = np.abs(np.cos(box[6])), np.abs(np.sin(box[6]))
    half = np.array([dx * cos + dy * sin, dx * sin + dy * cos, dz]) / 2
    outside = (box[:3] + half < points.min(axis=0)).any() or (box[:3] - half > points.max(axis=0)).any()
    held, *others = (int(points_in_box(near, b).sum()) for b in (box, clockwise, crossed, raised))
    held_clockwise, held_crossed, held_from_bottom = others
    turned = bool(cos * sin > 0.1)
    size = dx, dy, dz
    return BoxFinding(label, size, held, held_clockwise, held_crossed, held_from_bottom, turned, bool(outside))


def _repeats(boxes: Float[np.ndarray, "g 7"], labels: Int[np.ndarray, " g"]) -> tuple[tuple[RepeatedBox, ...], int]:
    """Find boxes with the same numbers, and count those that nearly repeat an unequal one of their class."""
    distinct, group, counts = np.unique(boxes, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    repeated = [
        RepeatedBox(tuple(np.unique(labels[group == g]).tolist()), int(counts[g])) for g in np.flatnonzero(counts > 1)
    ]
    near = 0
    for label in np.unique(labels):
        rows = np.unique(group[labels == label])[:_MOST_COMPARED]
        overlap = np.triu(_overlaps(distinct[rows].astype(np.float64)), 1)
        near += int((overlap > NEARLY_SAME).any(axis=0).sum())
    return tuple(repeated), near


def _overlaps(boxes: Float[np.ndarray, "n 7"]) -> Float[np.ndarray, "n n"]:
    """IoU of all pairs of boxes that are turned alike; 0 of others."""
    turn = np.abs(np.remainder(boxes[:, None, 6] - boxes[:, 6] + np.pi / 2, np.pi) - np.pi / 2)
    away = boxes[:, None, :3] - boxes[:, :3]
    cos, sin = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    away[..., 0], away[..., 1] = away[..., 0] * cos + away[..., 1] * sin, away[..., 1] * cos - away[..., 0] * sin
    sizes = boxes[:, 3:6]
    shared = np.minimum((sizes[:, None] + sizes) / 2 - np.abs(away), np.minimum(sizes[:, None], sizes))
    common = np.clip(shared, 0, None).prod(axis=-1)
    volumes = sizes.prod(axis=-1)
    return np.where(turn < _SAME_YAW, common / (volumes[:, None] + volumes - common), 0.0)

"""Content of a picture of a scan: points in their colours, boxes, labels."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial import cKDTree

from h2a2_jax.boxes.codec import box_corners
from h2a2_jax.boxes.matching import IOU_THRESHOLDS, GroundTruth, Pool, best_overlaps, match
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import Scan

# Vivid ones first: datasets of few classes get the most distinct colours.
_CLASS_COLORS = (
    "#e6194b #2f7ff0 #f58231 #2fa84a #b13fd6 #12b5c9 #f032c8 #b8860b #7a5cff #86b300 "
    "#a8323e #0f8a7a #ff8fa3 #5b7fa6 #c9643b #6b8e23 #d19ae6 #7fc8f8 #d4b106 #8c6d5a"
).split()
_CEILING = 0.25  # m below the highest points
_WALL, _SKIRTING = 0.3, 0.8  # m: depth of the walls that are left out, and height from which they are
_SPACING_PROBES = 1000
_SMALLEST_ROOM = 1.0  # m
_BULK = (0.2, 99.8)  # percentiles of the points to frame: a few strays seen through a window do not count


@runtime_checkable
class Viewable(Protocol):
    """A scan with boxes in one object, as a detector returns them."""

    @property
    def scan(self) -> Scan:
        """Points and colours."""

    @property
    def detections(self) -> Detections:
        """Boxes in the scan's frame."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by label."""


def parts_of(
    scan: Scan | Viewable, detections: Detections | None, class_names: Sequence[str]
) -> tuple[Scan, Detections | None, tuple[str, ...]]:
    """Split what a function of the viewer was given into scan, detections and class names.

    Raises:
        InputError: detections or class names beside an object that has its own.
    """
    if isinstance(scan, Scan):
        return scan, detections, tuple(class_names)
    if detections is not None or len(class_names):
        raise InputError(
            f"A {type(scan).__name__} has boxes and class names of its own, and others were given beside it: give it "
            "alone, or its scan with the other boxes."
        )
    return scan.scan, scan.detections, tuple(scan.class_names)


def class_color(label: int) -> tuple[float, float, float]:
    """Colour of a class, red, green, blue in 0-1: always the same for a label, grey for -1.

    The first 20 are easy to distinguish on light and on dark; later hues follow in steps of the golden section.
    """
    if label < 0:
        return 0.5, 0.5, 0.5
    if label < len(_CLASS_COLORS):
        red, green, blue = bytes.fromhex(_CLASS_COLORS[label][1:])
        return red / 255, green / 255, blue / 255
    return colorsys.hls_to_rgb(label * 0.618034 % 1, (0.45, 0.6)[label % 2], 0.7)


def has_colors(scan: Scan) -> bool:
    """Return True if the points differ in colour; those of files without colour do not."""
    return len(scan.colors) > 1 and bool(np.ptp(scan.colors, axis=0).max() > 0.02)


def height_colors(height: Float[np.ndarray, " m"]) -> Float[np.ndarray, "m 3"]:
    """Colours of heights from 0 to 1, dark blue to yellow; heights beyond have the colour of the end."""
    from matplotlib import colormaps  # takes .2 s, for scans without colours alone

    return colormaps["cividis"](0.15 + 0.8 * np.clip(height, 0, 1))[:, :3]


def height_limits(points: Float[np.ndarray, "m 3"]) -> tuple[float, float]:
    """Lowest and highest z (m) except for a few stray points; 0 and 1 without points."""
    if not len(points):
        return 0.0, 1.0
    low, high = np.percentile(points[:, 2], [1, 99])
    return float(low), float(max(high, low + 1e-6))


def display_colors(scan: Scan) -> Float[np.ndarray, "m 3"]:
    """Colours of the scan, 0-1; colours by height if it has none."""
    if has_colors(scan):
        return scan.colors
    low, high = height_limits(scan.points)
    return height_colors((scan.points[:, 2] - low) / (high - low))


def ceiling_cut(points: Float[np.ndarray, "m 3"]) -> float | None:
    """Height (m) above which points would hide the room from above; None where there is no ceiling."""
    if not len(points):
        return None
    low, high = np.percentile(points[:, 2], [0.2, 99.8])
    if (points[:, 2] > high - 0.05 * (high - low)).mean() < 0.08 or high - low < 2:
        return None
    return float(high - _CEILING)


def below_ceiling(points: Float[np.ndarray, "m 3"]) -> Bool[np.ndarray, " m"]:
    """Mask of the points below the ceiling; all of them if there is none."""
    cut = ceiling_cut(points)
    return np.ones(len(points), bool) if cut is None else points[:, 2] < cut


@dataclass(frozen=True)
class Content:
    """Checked content of a picture."""

    scan: Scan  # with finite points only, thinned; its boxes are not used
    num_points: int  # before thinning
    detections: Detections  # with finite numbers, by descending score
    truth: GroundTruth | None  # annotated boxes that have a class; None if the scan is not annotated
    class_names: tuple[str, ...]
    notes: tuple[str, ...]  # sentences on what is not shown


def make_content(
    scan: Scan, detections: Detections | None, class_names: Sequence[str], truth: GroundTruth | None, max_points: int
) -> Content:
    """Check what is to be shown, and leave out what cannot be.

    Boxes are in the scan's frame; true ones with label -1 are left out. A scan of more than `max_points` is thinned
    evenly along its order.

    Raises:
        ValueError: a label has no class name, colours and points or boxes and labels differ in number, or `max_points`
            is not positive.
    """
    if max_points < 1:
        raise ValueError(f"max_points is {max_points}; expected at least 1.")
    if len(scan.points) != len(scan.colors):
        raise ValueError(f"scan {scan.name} has {len(scan.points)} points but {len(scan.colors)} colours.")
    found = detections
    if found is None:
        found = Detections(np.zeros((0, 7), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    if not len(found.boxes) == len(found.scores) == len(found.labels):
        raise ValueError(
            f"detections have {len(found.boxes)} boxes, {len(found.scores)} scores and {len(found.labels)} labels; "
            "expected as many of each."
        )
    if truth is not None and len(truth.boxes) != len(truth.labels):
        raise ValueError(f"ground truth has {len(truth.boxes)} boxes but {len(truth.labels)} labels.")
    notes = []
    rows = np.flatnonzero(np.isfinite(scan.points).all(axis=1) & np.isfinite(scan.colors).all(axis=1))
    if len(rows) < len(scan.points):
        notes.append(f"{len(scan.points) - len(rows):,} points with NaN or infinite values are not shown.")
    if len(rows) > max_points:
        notes.append(f"{max_points:,} of {len(rows):,} points are shown, thinned evenly.")
        rows = rows[_evenly(len(rows), max_points)]
    usable = np.flatnonzero(np.isfinite(found.boxes).all(axis=1) & np.isfinite(found.scores))
    lost = len(found) - len(usable)
    found = _rows(found, usable[np.argsort(-found.scores[usable], kind="stable")])
    if truth is not None:
        finite = np.isfinite(truth.boxes).all(axis=1)
        lost += int((~finite).sum())
        kept = finite & (truth.labels >= 0)
        truth = GroundTruth(truth.boxes[kept], truth.labels[kept])
    if lost:
        notes.append(f"{lost:,} boxes with NaN or infinite numbers are not shown.")
    for labels in (found.labels, *([] if truth is None else [truth.labels])):
        if len(labels) and not (0 <= labels.min() and labels.max() < len(class_names)):
            raise ValueError(
                f"labels run from {labels.min()} to {labels.max()}; expected 0 to {len(class_names) - 1}, for "
                f"{len(class_names)} class names."
            )
    thinned = replace(scan, points=scan.points[rows], colors=np.clip(scan.colors[rows], 0, 1))
    return Content(thinned, len(scan.points), found, truth, tuple(class_names), tuple(notes))


def above_score(shown: Content, score: float) -> Content:
    """Leave out detections below a score."""
    return replace(shown, detections=_rows(shown.detections, shown.detections.scores >= score))


def thinned(scan: Scan, max_points: int) -> Scan:
    """Keep at most `max_points` points of a scan, evenly along their order."""
    if len(scan.points) <= max_points or len(scan.points) != len(scan.colors):
        return scan
    rows = _evenly(len(scan.points), max_points)
    return replace(scan, points=scan.points[rows], colors=scan.colors[rows])


def opened(shown: Content) -> Content:
    """Leave out the walls between the room and the eye of the oblique view, which looks from low x and y."""
    points = shown.scan.points
    if not len(points):
        return shown
    low = np.percentile(points, 1, axis=0)
    seen = (points[:, 2] < low[2] + _SKIRTING) | (points[:, :2] > low[:2] + _WALL).all(axis=1)
    return replace(shown, scan=replace(shown.scan, points=points[seen], colors=shown.scan.colors[seen]))


def _rows(found: Detections, rows: np.ndarray) -> Detections:
    return Detections(found.boxes[rows], found.scores[rows], found.labels[rows])


def view_limits(shown: Content) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """Lowest and highest x, y, z (m) to frame: the points except for a few strays, and the boxes nearby; float64."""
    points = shown.scan.points
    boxes = [shown.detections.boxes] + ([] if shown.truth is None else [shown.truth.boxes])
    corners = box_corners(np.concatenate(boxes).astype(np.float64)).reshape(-1, 3)
    if not len(points):
        return (corners.min(axis=0), corners.max(axis=0)) if len(corners) else (np.zeros(3), np.ones(3))
    low, high = np.percentile(points.astype(np.float64), _BULK, axis=0)
    if len(corners):
        reach = np.maximum(high - low, _SMALLEST_ROOM)
        low = np.maximum(np.minimum(low, corners.min(axis=0)), low - reach / 4)
        high = np.minimum(np.maximum(high, corners.max(axis=0)), high + reach / 4)
    middle, half = (low + high) / 2, np.maximum(high - low, _SMALLEST_ROOM / 2) / 2
    return middle - half, middle + half


def point_spacing(points: Float[np.ndarray, "m 3"]) -> float:
    """Distance (m) between neighbouring points that 80 % of a sample do not exceed; 0.05 for fewer than two points."""
    if len(points) < 2:
        return 0.05
    probes = points[_evenly(len(points), min(len(points), _SPACING_PROBES))]
    distances, _ = cKDTree(points, compact_nodes=False, balanced_tree=False).query(probes, k=min(5, len(points)))
    # The mean over four neighbours: the nearest alone is close by chance, or a duplicate.
    return float(max(np.percentile(distances[:, 1:].mean(axis=1), 80), 1e-4))


@dataclass(frozen=True)
class Hits:
    """Matches of detections with ground truth."""

    truth: Int[np.ndarray, "t n"]  # row of the box that each detection hits, by IoU threshold; -1 for none
    iou: Float[np.ndarray, " n"]  # largest IoU of each detection with a ground-truth box of its class


def find_hits(shown: Content) -> Hits:
    """Match detections with ground truth as evaluation does, each class by descending score.

    A match depends on detections of higher score only, so it stays the same when lower scores are hidden.
    """
    found, truth = shown.detections, shown.truth
    hit = np.full((len(IOU_THRESHOLDS), len(found)), -1)
    if truth is None or not len(found) or not len(truth.labels):
        return Hits(hit, np.zeros(len(found), np.float32))
    rotated = bool(found.boxes[:, 6].any() or truth.boxes[:, 6].any())
    best, target = best_overlaps(Pool.of([found]), Pool.of([truth]), rotated=rotated)
    for row, threshold in enumerate(IOU_THRESHOLDS):
        is_hit, _ = match(best, target, threshold)
        hit[row, is_hit] = target[is_hit]
    return Hits(hit, best)


def _evenly(count: int, kept: int) -> Int[np.ndarray, " k"]:
    """One random row of each of `kept` runs of equal length; a fixed step would show stripes in depth images."""
    edges = np.arange(kept + 1) * count // kept
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])

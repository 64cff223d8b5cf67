"""A scan with its boxes, sources of scans, and checks of their numbers."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from h2a2_jax.errors import InputError

NOT_FINITE = "points with NaN or infinite values"  # a kind of note (`Scan.notes`)


@dataclass(frozen=True, eq=False)
class Scan:
    """Points with colours, and the boxes in the same frame.

    Attributes:
        name: the scan's id, unique in its source.
        points: x, y, z in metres, z up.
        colors: red, green, blue in 0-1.
        boxes: gravity centre x, y, z, sizes dx, dy, dz (m), yaw (rad, counter-clockwise about z; 0 if axis-aligned).
        labels: class of each box; -1 = ignore.
        transform: homogeneous matrix from the frame of the input file to the frame of `points` and `boxes`.
        notes: counts by kind of what loading left out or repaired, as in {"points with NaN or infinite values": 3}.
    """

    name: str
    points: Float32[np.ndarray, "m 3"]
    colors: Float32[np.ndarray, "m 3"]
    boxes: Float32[np.ndarray, "g 7"]
    labels: Int32[np.ndarray, " g"]
    transform: Float32[np.ndarray, "4 4"] = field(default_factory=lambda: np.eye(4, dtype=np.float32))
    notes: Mapping[str, int] = field(default_factory=dict)


class ScanError(InputError):
    """One scan, named by `scan`, cannot be used (unreadable, empty); the others of its source may be fine."""

    def __init__(self, scan: str, message: str):
        super().__init__(message)
        self.scan = scan

    def __reduce__(self) -> tuple[type["ScanError"], tuple[str, str]]:
        # An exception keeps only its message, from which another process cannot make it again.
        return type(self), (self.scan, str(self))


class UnusableScan(Exception):
    """Reason why a scan cannot be used: the rest of a sentence that begins with the scan's name."""


@contextlib.contextmanager
def scan_errors(name: str, noun: str = "Scan") -> Iterator[None]:
    """Turn an `UnusableScan` into the `ScanError` of a scan; `noun` is the dataset's word for a scan."""
    try:
        yield
    except UnusableScan as error:
        raise ScanError(name, f"{noun} {name} {error}") from error


@runtime_checkable
class ScanSource(Protocol):
    """Named scans; `__getitem__` may raise `ScanError`."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the scans, in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Scan:
        """Load one scan."""


def load_or_skip(source: ScanSource, skipped: dict[str, str], indices: Iterable[int] | None = None) -> Iterator[Scan]:
    """Yield the scans of some indices (None: all), skipping those that cannot be loaded.

    Args:
        source: source of the scans.
        skipped: filled with scan name -> reason for each skipped scan.
        indices: indices of the scans, in order; None: all.
    """
    for index in range(len(source)) if indices is None else indices:
        try:
            scan = source[index]
        except ScanError as error:
            skipped[error.scan] = str(error)
        else:
            yield scan


def points_in_box(points: Float[np.ndarray, "m 3"], box: Float[np.ndarray, " 7"]) -> Bool[np.ndarray, " m"]:
    """Mark the points in or on one box.

    Args:
        points: x, y, z (m).
        box: centre, sizes, yaw, in the frame of the points.
    """
    offset = points - box[:3]
    cos, sin = np.cos(box[6]), np.sin(box[6])
    along = offset[:, 0] * cos + offset[:, 1] * sin
    across = offset[:, 1] * cos - offset[:, 0] * sin
    half = box[3:6] / 2
    return (np.abs(along) <= half[0]) & (np.abs(across) <= half[1]) & (np.abs(offset[:, 2]) <= half[2])


def validate_scan(scan: Scan, num_classes: int | None = None) -> list[str]:
    """List the faults of a scan, one sentence each.

    Args:
        scan: the scan to check.
        num_classes: if given, labels must be below it.
    """
    points, colors, boxes, labels = scan.points, scan.colors, scan.boxes, scan.labels
    finite = np.isfinite(boxes).all()
    problems = {
        "it has no points": len(points) == 0,
        f"it has {len(points)} points but {len(colors)} colours": len(points) != len(colors),
        f"it has {len(boxes)} boxes but {len(labels)} labels": len(boxes) != len(labels),
        "some coordinates are NaN or infinite": not np.isfinite(points).all(),
        "some colours lie outside 0-1": not ((colors >= 0) & (colors <= 1)).all(),  # nor is NaN inside
        "some boxes are NaN or infinite": not finite,
        "some boxes have a size that is not positive": finite and (boxes[:, 3:6] <= 0).any(),
        "some labels are outside the classes": (labels < -1).any()
        or (num_classes is not None and (labels >= num_classes).any()),
    }
    return [f"Scan {scan.name}: {problem}." for problem, found in problems.items() if found]


ENCLOSED = "boxes with yaw, replaced by the axis-aligned ones that enclose them"
"""Kind of a note (`Scan.notes`) of boxes whose dataset knows no yaw."""


def enclosing_boxes(boxes: Float[np.ndarray, "n 7"]) -> Float[np.ndarray, "n 7"]:
    """Enclose turned boxes by axis-aligned ones of the same centres and heights, yaw 0, in the type of the boxes."""
    cos, sin = np.abs(np.cos(boxes[:, 6])), np.abs(np.sin(boxes[:, 6]))
    result = boxes.copy()
    result[:, 3] = boxes[:, 3] * cos + boxes[:, 4] * sin
    result[:, 4] = boxes[:, 3] * sin + boxes[:, 4] * cos
    result[:, 6] = 0
    return result


def colors_from_bytes(colors: np.ndarray) -> np.ndarray:
    """Convert colours 0-255 (uint8) to float32 0-1."""
    return colors / np.float32(255)


MAX_REACH = 250.0
"""Largest distance of a point from the z axis and from the ground (m), and largest |number| of a box.

Voxels of 1 cm hold +-317 m; augmentation turns about z, stretches and shifts.
"""
FAR_POINTS = f"points beyond {MAX_REACH:g} m"
_STRAY_SHARE = 0.01


def within_reach(name: str, points: Float[np.ndarray, "m 3"]) -> Bool[np.ndarray, " m"]:
    """Mark the points (m, finite) within reach; a few stray ones are left out, many mean that the unit is another.

    Raises:
        ScanError: more than 1 % of the points lie beyond `MAX_REACH`.
    """
    with np.errstate(over="ignore"):
        near = (np.hypot(points[:, 0], points[:, 1]) <= MAX_REACH) & (np.abs(points[:, 2]) <= MAX_REACH)
    far = len(points) - int(near.sum())
    if far > _STRAY_SHARE * len(points):
        raise ScanError(
            name,
            f"Scan {name} has {far} of {len(points)} points beyond {MAX_REACH:g} m from the origin (up to "
            f"{float(np.abs(points).max()):.4g} m): check its unit (metres are expected) or centre it.",
        )
    return near


UNUSABLE = (
    "boxes with NaN or infinite values",
    "boxes with a size that is not positive",
    f"boxes beyond {MAX_REACH:g} m",
)
"""Kinds of notes of boxes that are left out."""


def usable_boxes(boxes: Float[np.ndarray, "g 7"]) -> tuple[Bool[np.ndarray, " g"], dict[str, int]]:
    """Mark the boxes that can be learnt from, and count the others by kind; NaN and infinity may occur."""
    finite = np.isfinite(boxes).all(axis=1)
    with np.errstate(invalid="ignore"):
        positive = (boxes[:, 3:6] > 0).all(axis=1)
        near = (np.abs(boxes[:, :6]) <= MAX_REACH).all(axis=1)
    kinds = zip(UNUSABLE, (~finite, finite & ~positive, finite & positive & ~near), strict=True)
    return finite & positive & near, {kind: int(which.sum()) for kind, which in kinds if which.any()}


_FULL_TURN = 6.3  # rad


def beyond_a_turn(yaws: Float[np.ndarray, " g"]) -> str | None:
    """Return a sentence on yaws (rad) of more than a full turn, as degrees are; None if there are none."""
    far = np.abs(yaws)[(np.abs(yaws) > _FULL_TURN) & np.isfinite(yaws)]
    if not len(far):
        return None
    return f"{len(far)} boxes have a yaw of more than a full turn, up to {far.max():g}: give radians, not degrees."


def is_hidden(name: str) -> bool:
    """Return True for a name that archives and file managers add to folders, such as "._a.ply" and "__MACOSX"."""
    return name.startswith(".") or name == "__MACOSX"


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names for a sentence."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")

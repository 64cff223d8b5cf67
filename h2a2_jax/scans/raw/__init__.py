"""Benchmarks as people download them: the protocol of a raw dataset, and helpers of all readers."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from h2a2_jax.errors import InputError, quoted, reason_of
from h2a2_jax.scans.formats.ply import read_ply_columns
from h2a2_jax.scans.scan import NOT_FINITE, Scan, UnusableScan
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.untrusted import check_regular, read_bytes

FAR = 1000.0  # m; a larger coordinate is a mistake: the rooms of the benchmarks measure tens of metres
TOO_FAR = "points more than 1 km from the origin"
NO_CLASS = "objects of no class of the dataset"
NO_POINTS = "objects without points"
NO_BOX = "objects without a usable box"


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path that can be printed; bytes of its name that are no UTF-8 appear as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_file(path: Path) -> bytes:
    """Read one file of a scan; raise `UnusableScan` if it is missing or cannot be read."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        raise missing_file(path) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UnusableScan(
            f"cannot be read from {shown(path)} ({reason_of(error)}): check the file and its permissions."
        ) from None


def missing_file(path: Path) -> UnusableScan:
    """Return the error of a scan of which a file is missing."""
    return UnusableScan(f"lacks the file {shown(path)}, which is missing: download the scan again, or leave it out.")


def read_vertices(path: Path) -> tuple[Float[np.ndarray, "m 3"], UInt8[np.ndarray, "m 3"]]:
    """Read the vertices (in the unit of the file) of a PLY mesh and their colours 0-255.

    Raises:
        UnusableScan: the file is missing, damaged, cut off anywhere, or has no coordinates or colours.
    """
    again = "download the file again"
    try:
        # The faces are not used, but a file cut off in them is an unfinished download.
        check_regular(path)
        columns = read_ply_columns(path, complete=True)
    except FileNotFoundError:
        raise missing_file(path) from None
    except InputError as error:
        raise UnusableScan(f"has an unreadable PLY file: {shown(str(error))}") from None
    except OSError as error:
        raise UnusableScan(f"has an unreadable PLY file ({shown(str(error))}): {again}.") from None
    if missing := [field for field in ("x", "y", "z", "red", "green", "blue") if field not in columns]:
        raise UnusableScan(
            f"has no vertices of x, y, z, red, green, blue in {shown(path)}, for it lacks "
            f"{', '.join(missing)}: {again}."
        )
    points = np.stack([columns[axis] for axis in "xyz"], axis=1).astype(np.float64)
    colors = np.stack([columns[channel] for channel in ("red", "green", "blue")], axis=1)
    if colors.dtype != np.uint8:
        raise UnusableScan(f"has colours of type {colors.dtype} in {shown(path)}, but uchar is expected: {again}.")
    return points, colors


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file; empty if it holds anything but an object.

    Raises:
        UnusableScan: the file is missing, cannot be read or is no JSON.
    """
    try:
        content = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise UnusableScan(f"has an invalid JSON file {shown(path)} ({quoted(error)}): download it again.") from None
    return content if isinstance(content, dict) else {}


def check_folder(root: Path, layout: str) -> None:
    """Refuse a root that is no folder; `layout` is the expected content, the end of a sentence."""
    if not os.path.isdir(root):
        raise InputError(f"There is no folder {shown(root)}: it should hold {layout}.")


def usable_points(points: Float[np.ndarray, "m 3"], notes: Counter[str]) -> Bool[np.ndarray, " m"]:
    """Mark the points (m) whose coordinates can be true, and count the others in `notes`."""
    if np.abs(points).max(initial=0) <= FAR:  # not so if one of them is NaN
        return np.ones(len(points), bool)
    finite = np.isfinite(points).all(axis=1)
    near = np.abs(np.where(np.isfinite(points), points, 0)).max(axis=1, initial=0) <= FAR
    notes[NOT_FINITE] += int((~finite).sum())
    notes[TOO_FAR] += int((finite & ~near).sum())
    return finite & near


def instance_boxes(
    points: Float[np.ndarray, "m 3"], instances: Int[np.ndarray, " m"], count: int
) -> tuple[Float[np.ndarray, "n 7"], Bool[np.ndarray, " n"]]:
    """Enclose the points (m) of each instance by an axis-aligned box.

    `instances` has the instance of each point in [0, count), -1 for none.

    Returns:
        Centre, sizes and yaw 0 of each instance, and a mask of the instances with points (the boxes of others are 0).
    """
    boxes = np.zeros((count, 7), points.dtype)
    order = np.argsort(instances, kind="stable")
    starts = np.searchsorted(instances[order], np.arange(count + 1))
    filled = starts[1:] > starts[:-1]
    if filled.any():
        # Points of no instance (-1) come first and lie before the first start.
        ordered = points[order]
        low = np.minimum.reduceat(ordered, starts[:-1][filled])
        high = np.maximum.reduceat(ordered, starts[:-1][filled])
        boxes[filled, :3] = (low + high) / 2
        boxes[filled, 3:6] = high - low
    return boxes, filled


def counted(notes: Counter[str]) -> dict[str, int]:
    """Keep the kinds that occurred, sorted."""
    return {kind: number for kind, number in sorted(notes.items()) if number}


@runtime_checkable
class RawDataset(Protocol):
    """A benchmark as people download it.

    Opening one reads what all scans share and raises `InputError` if the folder is not laid out as expected.
    Instances can be pickled and travel to other processes without parsing anything again.
    """

    @property
    def spec(self) -> DatasetSpec:
        """Classes and protocol."""

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the scans of "train" and of "val", in order; unique across both."""

    @property
    def notes(self) -> Mapping[str, int]:
        """Counts by kind of what opening left out; `Scan.notes` has those of a scan."""

    def load(self, name: str) -> Scan:
        """Parse one scan; raise `ScanError` if its files are missing or cannot be used (others may be fine)."""


PUBLISHED: Mapping[str, Mapping[str, int]] = {
    "scannet": {"train": 1201, "val": 312},
    "sunrgbd": {"train": 5285, "val": 5050},
    "s3dis": {"train": 204, "val": 68},
    "arkitscenes": {"train": 4498, "val": 549},
}
"""Number of scans by dataset and split that the authors state; those of S3DIS are for Area 5 as validation."""

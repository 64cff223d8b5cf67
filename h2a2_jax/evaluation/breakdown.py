"""Bins of boxes: by size, and by distance.

Size is the volume, in bounds that are the same for all datasets: small is below 0.1 m^3 (a bin, a picture), large
from 0.5 m^3 on (a desk, a bed), so that figures of datasets and of splits compare. Distance is horizontal, from the
sensor for a dataset of single views (its frame begins there), else from the middle of the scan: the median of its
points' x and y.
"""

import dataclasses
import itertools
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

DistanceFrom = Literal["sensor", "centre"]


@dataclasses.dataclass(frozen=True)
class Bins:
    """Ranges of a quantity of boxes.

    Attributes:
        names: Of the bins, by rising quantity.
        bounds: Between them, one fewer; a value on a bound is in the upper bin.
        unit: Of the bounds.
    """

    names: tuple[str, ...]
    bounds: tuple[float, ...]
    unit: str

    def of(self, values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Number of the bin of each value."""
        return np.digitize(values, self.bounds)

    def describe(self) -> tuple[str, ...]:
        """Name and range of each, as in "medium (0.1 to 0.5 m3)"."""
        low, unit = self.bounds, self.unit
        ranges = [f"below {low[0]:g} {unit}", *(f"{a:g} to {b:g} {unit}" for a, b in itertools.pairwise(low))]
        ranges.append(f"from {low[-1]:g} {unit}")
        return tuple(f"{name} ({values})" for name, values in zip(self.names, ranges, strict=True))


SIZES = Bins(("small", "medium", "large"), (0.1, 0.5), "m3")
"""Of volumes."""

DISTANCES = {
    "sensor": Bins(("near", "middle", "far"), (2.0, 4.0), "m"),
    "centre": Bins(("near", "middle", "far"), (1.5, 3.0), "m"),
}
"""Of horizontal distances, by what they are measured from."""


def volumes(boxes: Float[np.ndarray, "n 7"]) -> Float[np.ndarray, " n"]:
    """Volume (m^3) of each box."""
    return boxes[:, 3:6].astype(np.float64).prod(axis=1)


def distances(boxes: Float[np.ndarray, "n 7"], origins: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    """Horizontal distance (m) of each box's centre from an x, y."""
    return np.linalg.norm(boxes[:, :2].astype(np.float64) - origins, axis=1)


def distance_from(dataset: str) -> DistanceFrom:
    """What distances in scans of a dataset are measured from: SUN RGB-D's frames have their camera at the origin."""
    return "sensor" if dataset == "sunrgbd" else "centre"


def scan_origin(points: Float[np.ndarray, "m 3"], measured_from: DistanceFrom) -> Float[np.ndarray, " 2"]:
    """The x, y that distances in a scan are measured from; 0, 0 for a scan without points."""
    if measured_from == "sensor" or not len(points):
        return np.zeros(2)
    return np.median(points[:, :2], axis=0).astype(np.float64)

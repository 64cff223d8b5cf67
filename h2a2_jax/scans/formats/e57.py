"""Points of E57 files (ASTM E2807): all scans of a file in its own frame, in metres, z up."""

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats import RawCloud, Thinning

_BLOCK = 1 << 20  # points
_INVALID = -np.inf  # in place of x
_CARTESIAN = ("cartesianX", "cartesianY", "cartesianZ")
_SPHERICAL = ("sphericalRange", "sphericalAzimuth", "sphericalElevation")
_COLORS = ("colorRed", "colorGreen", "colorBlue")


def read_e57(path: Path, thinning: Thinning) -> RawCloud:
    """Read the points of all scans, turned and moved by the scans' poses, and colours, as bytes, if there are any.

    Points that the scanner calls invalid are left out and counted. The limits of colours are those of the file.
    """
    with path.open("rb") as file:
        header, size = file.read(48), path.stat().st_size
    if header[:8] != b"ASTM-E57" or len(header) < 48:
        raise InputError(f"{path} is no E57 file or is cut off in its header: export it again.")
    if (length := struct.unpack_from("<Q", header, 16)[0]) > size:
        raise InputError(f"{path} is cut off: its header says {length} bytes, but it has {size}; copy it again.")
    try:
        from pye57 import libe57
    except ImportError as error:
        raise InputError(f"{path} is an E57 file: install the extra, pip install 'h2a2_jax[e57]'.") from error
    image = libe57.ImageFile(str(path), "r")
    try:
        nodes = image.root()["data3D"]
        scans = [_Scan(path, libe57, image, nodes[i]) for i in range(len(nodes))]
        limits = next((scan.limits for scan in scans if scan.limits), None)
        blocks = (block for scan in scans for block in scan.blocks(limits))
        count = sum(scan.count for scan in scans)
        rows = thinning.choose(itertools.chain([np.zeros((0, 6))], blocks), count)
    finally:
        image.close()
    if len(rows) < thinning.kept(count):
        raise InputError(f"{path} is cut off: points are missing that its header counts; copy it again.")
    said = []
    if invalid := sum(scan.invalid for scan in scans):
        said.append(f"has {invalid:,} points that the scanner calls invalid, which are left out")
        rows = rows[rows[:, 0] != _INVALID]
    if limits is None:
        return RawCloud(rows[:, :3], None, tuple(said), "z", "m")
    if without := sum(scan.limits is None for scan in scans):
        said.append(f"has {without} of {len(scans)} scans without colours, whose points are taken as grey")
    colors, more = _bytes(rows[:, 3:], *limits)
    return RawCloud(rows[:, :3], colors, (*said, *more), "z", "m")


class _Scan:
    """One scan; `limits` are those of its colours, None without colours, `invalid` the points left out so far."""

    def __init__(self, path: Path, libe57: Any, image: Any, node: Any):
        self._libe57, self._image, self._points = libe57, image, node["points"]
        self.count, self.invalid = self._points.childCount(), 0
        prototype = libe57.StructureNode(self._points.prototype())
        names = {prototype.get(i).elementName() for i in range(prototype.childCount())}
        self._axes = next((axes for axes in (_CARTESIAN, _SPHERICAL) if names.issuperset(axes)), _CARTESIAN)
        if not names.issuperset(self._axes):
            raise InputError(f"{path} has a scan without coordinates: export it again.")
        self._state = [name for name in ("cartesianInvalidState", "sphericalInvalidState") if name in names][:1]
        self.limits = _color_limits(node, prototype["colorRed"]) if names.issuperset(_COLORS) else None
        self._rotation, self._shift = _pose(node)

    def blocks(self, limits: tuple[float, float] | None) -> Iterator[Float[np.ndarray, "n 6"]]:
        """Read x, y, z and colours, brought to `limits`, block by block; x of an invalid point is `_INVALID`."""
        names = [*self._axes, *(_COLORS if self.limits else ()), *self._state]
        size = max(1, min(_BLOCK, self.count))
        arrays, buffers = {name: np.empty(size) for name in names}, self._libe57.VectorSourceDestBuffer()
        for name, array in arrays.items():
            buffers.append(self._libe57.SourceDestBuffer(self._image, name, array, size, True, True))
        from pye57.utils import convert_spherical_to_cartesian

        reader = self._points.reader(buffers)
        while read := reader.read():
            points = np.stack([arrays[name][:read] for name in self._axes], axis=1)
            if self._axes == _SPHERICAL:
                points = convert_spherical_to_cartesian(points)
            points = points @ self._rotation.T + self._shift
            if self._state:
                is_invalid = arrays[self._state[0]][:read] != 0
                points[is_invalid, 0] = _INVALID
                self.invalid += int(is_invalid.sum())
            colors = np.full((read, 3), np.mean(limits or 0))
            if self.limits and limits:
                own = np.stack([arrays[name][:read] for name in _COLORS], axis=1)
                colors = np.interp(own, self.limits, limits) if self.limits != limits else own
            yield np.concatenate([points, colors], axis=1)
        reader.close()


def _color_limits(node: Any, prototype: Any) -> tuple[float, float]:
    """Smallest and largest number of red; those of the scan, or of the type."""
    if node.isDefined("colorLimits"):
        found = node["colorLimits"]
        limits = float(found["colorRedMinimum"].value()), float(found["colorRedMaximum"].value())
    else:
        limits = float(prototype.minimum()), float(prototype.maximum())
    return limits if limits[0] < limits[1] <= 65535 else (0.0, 255.0)


def _pose(node: Any) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, " 3"]]:
    from scipy.spatial.transform import Rotation

    rotation, shift = np.eye(3), np.zeros(3)
    if node.isDefined("pose"):
        pose = node["pose"]
        if pose.isDefined("rotation"):
            rotation = Rotation.from_quat([pose["rotation"][name].value() for name in "xyzw"]).as_matrix()
        if pose.isDefined("translation"):
            shift = np.array([pose["translation"][name].value() for name in "xyz"], np.float64)
    return rotation, shift


def _bytes(colors: Float[np.ndarray, "n 3"], low: float, high: float) -> tuple[UInt8[np.ndarray, "n 3"], list[str]]:
    """Colours in 0-255, and what was assumed where the numbers do not fit to their limits."""
    highest, said = float(colors.max(initial=0)), []
    # Some programs write bytes under the limits of 16 bits, or the reverse.
    fitting = 255.0 if 1 < highest <= 255 else 65535.0
    if highest > high or (high > 255 and fitting == 255):
        said.append(f"has colours up to {highest:g} under limits of {low:g} to {high:g}: taken as 0-{fitting:g}")
        low, high = 0.0, fitting
    return np.rint(255 * np.clip((colors - low) / (high - low), 0, 1)).astype(np.uint8), said

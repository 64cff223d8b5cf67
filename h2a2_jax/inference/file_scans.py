"""From a file of points to a scan in the frame that a detector expects, with hints where it looks like another one.

A detector expects metres and z up. Where the origin lies does not matter to it: its input is the colour of voxels, and
convolutions see the differences of their places only (a shift by other than multiples of the coarsest voxel changes
which points share one, no more). So no floor is moved to the height that a dataset has it at; a scan far from the
origin is shifted near it by whole voxels of every level. What does matter is which way is up, the unit, and, to heads
whose boxes are axis-aligned, that walls run along x and y: `PredictRequest.align`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Float

from h2a2_jax.errors import InputError
from h2a2_jax.inference.files import InputFile, PredictRequest, printable
from h2a2_jax.inputs.alignment import estimate_gravity, estimate_walls, surface_normals
from h2a2_jax.inputs.cloud_scan import NO_COLORS, PlacedCloud, place_cloud
from h2a2_jax.inputs.examine import spread
from h2a2_jax.inputs.guess import guess_unit, guess_up
from h2a2_jax.inputs.point_cloud import COLOR_RANGES, PointCloud, read_point_cloud
from h2a2_jax.inputs.scan import NOT_FINITE, Scan, ScanError
from h2a2_jax.inputs.scan_folder import upright_matrix
from h2a2_jax.inputs.specs import DatasetSpec

_MEASURED = 200_000  # points that the spread is measured on
_TILTED = math.radians(5)
_TURNED = math.radians(5)

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class FileScan:
    """One file, ready for the detector.

    Attributes:
        file: it was read from.
        scan: in metres, z up, aligned if that was asked for.
        matrix: from the file's frame and unit to that of the scan, float64: `scan.transform` in full.
        remarks: sentences on what was assumed and what may be wrong, with the flag that mends it.
    """

    file: InputFile
    scan: Scan
    matrix: Float[np.ndarray, "4 4"]
    remarks: tuple[str, ...]


def load_file(file: InputFile, request: PredictRequest, spec: DatasetSpec) -> FileScan:
    """Reads one file, brings it to metres with z up, and aligns it.

    Args:
        file: to read.
        request: its frame, unit, colours and alignment.
        spec: of the dataset whose head is to predict.

    Raises:
        InputError: it cannot be read or used; one sentence, with the flags that may mend it.
    """
    if file.path.exists() and not file.path.is_file() and not file.path.is_dir():
        raise InputError(f"{printable(file.path)} is no regular file: give a point cloud.")
    cloud = read_point_cloud(file.path, request.most_points)
    up, unit, remarks = _frame(cloud, request)
    hint = f"say which with --colors ({', '.join(COLOR_RANGES)})"
    try:
        placed = place_cloud(file.name, cloud, upright_matrix(up, unit), request.colors, colors_hint=hint)
    except ScanError as error:
        hints = [f"It {remark}." for remark in remarks if "add --" in remark]
        raise InputError(" ".join([str(error), *hints])) from error
    if NO_COLORS in placed.scan.notes:
        remarks.append("has no colours and is taken as grey, unlike what the model was trained on")
    elif request.colors == "0-255" and cloud.colors is not None and cloud.colors.max(initial=0) <= 1:
        remarks.append("looks as if colours reach to 1, not 255: add --colors=0-1")
    remarks += cloud.assumed
    for kind, count in placed.scan.notes.items():
        if kind != NO_COLORS:
            remarks.append(f"{count:,} {kind}{' are left out' * (kind == NOT_FINITE)}")
    placed, more = align(placed, request, spec)
    return FileScan(file, placed.scan, placed.matrix, tuple([*remarks, *more]))


def _frame(cloud: PointCloud, request: PredictRequest) -> tuple[str, str, list[str]]:
    """Up axis and unit, as was said or as guessed, and what looks otherwise."""
    said_up, said_unit = (value if value != "auto" else "" for value in (request.up, request.unit))
    up, unit = said_up or "z", said_unit or "m"
    if not len(cloud.points):
        return up, unit, []
    axes = spread(cloud.points[:: max(1, len(cloud.points) // _MEASURED)])
    looks, wrong, remarks = [], [], []
    guesses = (("up", guess_up(up, [axes])), ("unit", guess_unit(unit, [axes])))
    for flag, guess in guesses:
        words = f"{guess.guess} points up" if flag == "up" else f"the unit is {guess.guess}"
        if (said_up if flag == "up" else said_unit) == "":
            if guess.guess is None:
                remarks.append(f"does not tell its {flag}: {guess.declared} is assumed; say it with --{flag}")
            else:
                remarks.append(f"{words}, it seems ({guess.evidence})")
            if flag == "up":
                up = guess.guess or up
            else:
                unit = guess.guess or unit
        elif guess.differs:
            looks.append(words if guess.certain else f"{words} (perhaps)")
            wrong.append(f"--{flag}={guess.guess}")
    if wrong:
        remarks.append(f"looks as if {' and '.join(looks)}: add {' '.join(wrong)}")
    return up, unit, remarks


def align(placed: PlacedCloud, request: PredictRequest, spec: DatasetSpec) -> tuple[PlacedCloud, list[str]]:
    """Turns a scan as `PredictRequest.align` says, and says what was done or would be worth doing.

    Args:
        placed: metres, one axis said to point up turned to z.
        request: which alignments.
        spec: of the dataset whose head is to predict.

    Returns:
        The turned scan; remarks.
    """
    normals = surface_normals(placed.scan.points)
    gravity = estimate_gravity(normals)
    rotation, remarks = np.eye(3), []
    tilt = f"{math.degrees(gravity.tilt):.1f} degrees"
    levels = request.align in ("gravity", "both")
    is_tilted = not levels and gravity.sure and gravity.tilt > _TILTED
    if levels:
        if gravity.sure:
            rotation = gravity.rotation
            remarks.append(f"was tilted by {tilt} and is turned upright")
        else:
            remarks.append("does not show which way is up (too few floors and walls) and is left as it is")
    elif is_tilted:
        # Level, its walls can be told better: both at once saves a round.
        is_turned = request.align == "manhattan" or not spec.has_yaw
        remarks.append(f"looks tilted by {tilt}: add --align={'both' if is_turned else 'gravity'}")
    walls = estimate_walls(normals @ rotation.T)
    angle = f"{math.degrees(walls.angle):.1f} degrees"
    if request.align in ("manhattan", "both"):
        if walls.sure:
            rotation = walls.rotation @ rotation
            remarks.append(f"has its walls at {angle} to x and y and is turned along them")
        else:
            remarks.append("shows no direction of its walls and is not turned along them")
    elif walls.sure and not spec.has_yaw and abs(walls.angle) > _TURNED and not is_tilted:
        both = "both" if request.align == "gravity" else "manhattan"
        remarks.append(
            f"has its walls at {angle} to x and y, and boxes of {spec.name} are axis-aligned: add --align={both}"
        )
    if np.array_equal(rotation, np.eye(3)):
        return placed, remarks
    motion = np.eye(4)
    motion[:3, :3] = rotation
    matrix = motion @ placed.matrix
    points = (placed.scan.points @ rotation.T).astype(np.float32)
    return PlacedCloud(replace(placed.scan, points=points, transform=matrix.astype(np.float32)), matrix), remarks


class Pending(Generic[Item]):
    """The result of a function in a thread of its own, which does not keep the program from ending."""

    def __init__(self, function: Callable[[], Item]):
        self._outcome: list[Any] = []
        self._error: list[Exception] = []
        self._thread = Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], Item]) -> None:
        try:
            self._outcome.append(function())
        except Exception as error:
            self._error.append(error)

    def result(self) -> Item:
        """Waits for it; raises what the function raised."""
        self._thread.join()
        if self._error:
            raise self._error[0]
        return self._outcome[0]


def read_ahead(functions: Sequence[Callable[[], Item]]) -> Iterator[Pending[Item]]:
    """The results of functions in order; each begins while its predecessor's result is worked on, no earlier."""
    following = Pending(functions[0]) if functions else None
    for i in range(len(functions)):
        current = following
        assert current is not None
        current._thread.join()
        following = Pending(functions[i + 1]) if i + 1 < len(functions) else None
        yield current

"""The frame, and the head, that a detector is given a scan in.

A detector expects metres, z up, and floors where its dataset has them. The up axis and the unit are what the file or
the user says, else what the points show (`file_frame`); the floor is found and brought to the dataset's height
(`frame.place_as_dataset`). The place of the origin along x and y does not matter: a scan far from it is shifted near
it by whole voxels of every level. Heads whose boxes are axis-aligned need walls along x and y: `Frame.align`.

Of a detector with several heads, some for views of a camera and some for rooms, the scan shows which one predicts.
Every decision is a remark, with the flag or the argument that settles it; boxes are given in the frame of the file.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.errors import InputError
from h2a2_jax.scans.file_frame import decide_frame
from h2a2_jax.scans.formats.point_cloud import COLOR_RANGES, ColorRange, PointCloud
from h2a2_jax.scans.frame import (
    UNITS,
    UPRIGHT,
    Floor,
    PlacedCloud,
    camera_direction,
    checked_floor,
    moved,
    place_as_dataset,
    place_cloud,
    upright_matrix,
)
from h2a2_jax.scans.label_space import UNION
from h2a2_jax.scans.scan import Scan, ScanError
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.scans.surfaces import estimate_gravity, estimate_walls, surface_normals

Align = Literal["none", "gravity", "manhattan", "both"]
ALIGNMENTS: tuple[Align, ...] = ("none", "gravity", "manhattan", "both")
AUTO = "auto"
"""Name in place of a dataset's, for the head that a scan shows to be right."""

_ADVISING = 2_000
"""Normals measured where a scan is not to be turned."""
_TILTED = _TURNED = math.radians(5)


def spell_flag(name: str, value: str) -> str:
    """Spell a flag of the command line and its value."""
    return f"--{name}={value}"


@dataclass(frozen=True)
class Frame:
    """The frame of the points as the user says, and whose head predicts.

    Attributes:
        up: axis that points up: x, y, z or -x, -y, -z; "auto": as the points or their file say or show, else z.
        unit: unit of the points: m, cm, mm, ft, in; "auto": as the points or their file say or show, else m.
        colors: range of the colours.
        floor: height of the floor (m, along the axis that points up); "auto": as found, "keep": heights are left alone.
        align: "gravity" turns a tilted scan upright first, "manhattan" turns its walls along x and y, "both", "none".
        dataset: dataset whose head predicts; "auto": that of single views for a view of a camera at the origin, that of
            rooms for other scans.
        spell: spells an argument and its value for remarks, as "--up=y".
    """

    up: str = "auto"
    unit: str = "auto"
    colors: ColorRange = "auto"
    floor: Floor = "auto"
    align: Align = "none"
    dataset: str = AUTO
    spell: Callable[[str, str], str] = spell_flag

    @classmethod
    def of(
        cls,
        spell: Callable[[str, str], str],
        datasets: Sequence[str] | None,
        color_argument: str = "colors",
        **values: Any,
    ) -> "Frame":
        """Make a frame of values that may be wrong.

        Args:
            spell: as of the class.
            datasets: names of those of the detector; None before it is known.
            color_argument: name of `colors` in the error.
            **values: the other attributes.

        Raises:
            InputError: a value is none of those known.
        """
        frame = {f.name: values.get(f.name, f.default) for f in fields(cls)}

        def name_of(argument: str) -> str:
            return spell(argument, "").partition("=")[0]

        known = {
            "up": (*UPRIGHT, AUTO),
            "unit": (*UNITS, AUTO),
            "colors": COLOR_RANGES,
            "align": ALIGNMENTS,
            **({} if datasets is None else {"dataset": (*datasets, AUTO)}),
        }
        for argument, expected in known.items():
            if frame[argument] not in expected:
                name = name_of(color_argument if argument == "colors" else argument)
                raise InputError(f"{name} is {frame[argument]!r}; expected is one of {', '.join(expected)}.")
        return cls(**frame | {"spell": spell, "floor": checked_floor(frame["floor"], name_of("floor"))})


@dataclass(frozen=True, eq=False)
class PlacedScan:
    """A scan ready for a detector.

    Attributes:
        scan: the scan in the frame of the dataset.
        matrix: transform from the frame and unit of the input to that of the scan; `scan.transform` in float64.
        rows: number of each point among those of the input, from 0; None: all of them are there.
        spec: dataset whose head predicts.
        remarks: parts of sentences on decisions and on likely mistakes, with the argument that corrects them.
    """

    scan: Scan
    matrix: Float[np.ndarray, "4 4"]
    rows: Int[np.ndarray, " m"] | None
    spec: DatasetSpec
    remarks: tuple[str, ...]


def place_scan(
    name: str, cloud: PointCloud, frame: Frame, specs: Sequence[DatasetSpec], colors_hint: str = ""
) -> PlacedScan:
    """Bring a point cloud into the frame of the dataset whose head predicts.

    `colors_hint` is the remedy for colours in another range, as in "say --colors".

    Raises:
        ScanError: no point is usable, most are too far away, or the colours are in another range.
    """

    def flag(name: str) -> str:
        return frame.spell(name, "{}")

    up, unit, remarks = decide_frame(cloud, frame.up, frame.unit, frame.spell("{}", "{}"))
    try:
        placed = place_cloud(name, cloud, upright_matrix(up, unit), frame.colors, colors_hint=colors_hint)
    except ScanError as error:
        hints = [f"It {remark}." for remark in remarks if "add " in remark]
        raise ScanError(name, " ".join([str(error), *hints])) from error
    spec, chosen = choose_head(placed, frame, specs)
    placed, turning = align(placed, frame.align, spec, f"add {flag('align')}")
    placed, placing = place_as_dataset(placed, spec, frame.floor, flag("floor"))
    return PlacedScan(placed.scan, placed.matrix, placed.rows, spec, (*remarks, *chosen, *turning, *placing))


def choose_head(placed: PlacedCloud, frame: Frame, specs: Sequence[DatasetSpec]) -> tuple[DatasetSpec, list[str]]:
    """Choose the dataset whose head predicts a scan (m, z up), with a remark where there was a choice."""
    named = [spec for spec in specs if spec.name == frame.dataset]
    trained = [spec for spec in specs if spec.name != UNION]
    if named or len(specs) == 1:
        return (named or trained)[0], []
    of_views = [spec for spec in trained if spec.faces_y]
    of_rooms = [spec for spec in trained if not spec.faces_y]
    if not of_views or not of_rooms:
        spec, taken = trained[0], "is predicted by the detector's first head"
    elif camera_direction(placed.scan.points) is not None:
        spec, taken = of_views[0], "is taken for a single view from its origin"
    else:
        spec, taken = of_rooms[0], "is taken for a room"
    others = " or ".join(frame.spell("dataset", other.name) for other in specs if other is not spec)
    return spec, [f"{taken} (head of {spec.name}); {others} chooses another"]


def align(
    placed: PlacedCloud, how: Align, spec: DatasetSpec, advice: str = "add --align={}"
) -> tuple[PlacedCloud, list[str]]:
    """Turn a scan in metres, z up, as `Frame.align` says, with remarks on what was done and would help.

    `advice` is the form in which a remark names what would help.
    """
    # A remark needs the angles to a degree only, and is made of every file.
    normals = surface_normals(placed.scan.points, *[_ADVISING] * (how == "none"))
    gravity = estimate_gravity(normals)
    rotation, remarks = np.eye(3), []
    tilt = f"{math.degrees(gravity.tilt):.1f} degrees"
    levels = how in ("gravity", "both")
    is_tilted = not levels and gravity.sure and gravity.tilt > _TILTED
    if levels and gravity.sure:
        rotation = gravity.rotation
        remarks.append(f"was tilted by {tilt} and is turned upright")
    elif levels:
        remarks.append("does not show which way is up (too few floors and walls) and is left as it is")
    elif is_tilted:
        # Walls are measured better on a level scan: advising both at once saves a round.
        is_turned = how == "manhattan" or not spec.has_yaw
        remarks.append(f"looks tilted by {tilt}: {advice.format('both' if is_turned else 'gravity')}")
    walls = estimate_walls(normals @ rotation.T)
    angle = f"{math.degrees(walls.angle):.1f} degrees"
    turns = how in ("manhattan", "both")
    if turns and walls.sure:
        rotation = walls.rotation @ rotation
        remarks.append(f"has its walls at {angle} to x and y and is turned along them")
    elif turns:
        remarks.append("shows no direction of its walls and is not turned along them")
    elif walls.sure and not spec.has_yaw and abs(walls.angle) > _TURNED and not is_tilted:
        remedy = advice.format("both" if levels else "manhattan")
        remarks.append(f"has its walls at {angle} to x and y, and boxes of {spec.name} are axis-aligned: {remedy}")
    if np.array_equal(rotation, np.eye(3)):
        return placed, remarks
    return moved(placed, rotation), remarks

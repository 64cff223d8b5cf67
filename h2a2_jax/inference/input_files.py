"""Files of points to predict: find them, and read each as a scan in the frame that a detector expects.

A detector expects metres, z up, and floors where its dataset has them. The up axis and the unit are what the file or
the user says, else what the points show (`file_frame`); the floor is found and brought to the dataset's height
(`frame.place_as_dataset`). The place of the origin along x and y does not matter: a scan far from it is shifted near it
by whole voxels of every level. Heads whose boxes are axis-aligned need walls along x and y: `PredictRequest.align`.
Every decision is a remark, with the flag that settles it; boxes are given in the frame of the file.
"""

import glob
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
from jaxtyping import Float

from h2a2_jax.errors import InputError
from h2a2_jax.scans.file_frame import decide_frame
from h2a2_jax.scans.formats.columns import parse_columns
from h2a2_jax.scans.formats.folders import describe_unread, parts_of_meshes
from h2a2_jax.scans.formats.point_cloud import COLOR_RANGES, SUFFIXES, ColorRange, read_point_cloud
from h2a2_jax.scans.formats.text import is_table
from h2a2_jax.scans.frame import (
    NO_COLORS,
    UNITS,
    UPRIGHT,
    Floor,
    PlacedCloud,
    checked_floor,
    moved,
    place_as_dataset,
    place_cloud,
    upright_matrix,
)
from h2a2_jax.scans.scan import NOT_FINITE, Scan, ScanError, is_hidden
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.scans.surfaces import estimate_gravity, estimate_walls, surface_normals

Align = Literal["none", "gravity", "manhattan", "both"]
ALIGNMENTS: tuple[Align, ...] = ("none", "gravity", "manhattan", "both")
FORMATS = ("json", "csv", "ply", "html", "png", "glb", "dxf", "rrd")
MOST_POINTS = 500_000
"""Points read of a larger file: as many as large scans of rooms have, and memory stays below 2 GB at full width."""

OWN_COMMENT = "boxes of h2a2_jax"
"""Text in the first bytes of every PLY file, page and picture that a prediction writes."""

_TEXTS = (".txt", ".csv", ".asc", ".pts", ".xyz", ".xyzrgb", ".xyzn")
_ADVISING = 2_000
"""Normals measured where a scan is not to be turned."""
_TILTED = _TURNED = math.radians(5)


@dataclass(frozen=True)
class PredictRequest:
    """The files to predict, and the results to write.

    Attributes:
        inputs: files, folders (searched to the bottom), patterns such as "scans/*.ply".
        output: folder of the results; None: "boxes" in the run's folder.
        dataset: dataset whose head predicts; None: the first one of the model.
        up: axis of the files that points up: x, y, z or -x, -y, -z; "auto": as each says or shows, else z.
        unit: unit of the files: m, cm, mm, ft, in; "auto": as each says or shows, else m.
        colors: range of the files' colours.
        align: "gravity" turns a tilted scan upright first, "manhattan" turns its walls along x and y, "both", "none".
        score: lowest score of a box.
        formats: some of `FORMATS`: boxes by scan ("json"), all boxes as a table ("csv"), points with labels and box
            frames ("ply"), a page ("html") and a picture ("png") of each scan.
        show: True to open a window for each scan.
        step: step of the checkpoint; None: the last.
        most_points: points that are read of a larger file.
        columns: meaning of the columns of text tables, .npy, .npz and .bin, as in "x,y,z,_,r,g,b"; None: by names or
            values.
        floor: height of the floor in the files (m, along the axis that points up); "auto": as found, "keep": heights
            are left alone.
    """

    inputs: tuple[str, ...]
    output: Path | None = None
    dataset: str | None = None
    up: str = "auto"
    unit: str = "auto"
    colors: ColorRange = "auto"
    align: Align = "none"
    score: float = 0.3
    formats: tuple[str, ...] = ("json", "csv", "ply", "html")
    show: bool = False
    step: int | None = None
    most_points: int = MOST_POINTS
    columns: str | None = None
    floor: Floor = "auto"

    def __post_init__(self) -> None:
        """Raise InputError if a field has none of its known values."""
        parse_columns(self.columns)
        checked_floor(self.floor, "--floor")
        for flag, value, known in (
            ("up", self.up, (*UPRIGHT, "auto")),
            ("unit", self.unit, (*UNITS, "auto")),
            ("colors", self.colors, COLOR_RANGES),
            ("align", self.align, ALIGNMENTS),
            *(("formats", name, FORMATS) for name in self.formats),
        ):
            if value not in known:
                raise InputError(f"--{flag} is {value!r}; expected is one of {', '.join(known)}.")
        if self.inputs and not self.formats and not self.show:
            names = ", ".join(FORMATS)
            raise InputError(f"--formats is empty, nothing would be written; expected are some of {names}.")
        if not 0 <= self.score <= 1:
            raise InputError(f"--score is {self.score:g}; expected is a number from 0 to 1.")
        if self.most_points < 1:
            raise InputError(f"At most {self.most_points} points of a file are asked for; expected is at least 1.")


@dataclass(frozen=True)
class InputFile:
    """A file of points, and the unique name of its scan and results: its path below the input that it was found by."""

    path: Path
    name: str


@dataclass(frozen=True)
class FoundInputs:
    """Files of points, and files that were passed over.

    Attributes:
        files: files of points in order of their paths, input by input.
        problems: by path, why a folder could not be searched.
        passed_over: text files without a line of numbers, such as a README.
        results: PLY files of an earlier prediction, which are passed over unless they are named one by one.
        unread: files of other kinds, but for parts of meshes, such as textures, and names that begin with a dot.
    """

    files: tuple[InputFile, ...]
    problems: dict[str, str]
    passed_over: tuple[Path, ...] = ()
    results: tuple[Path, ...] = ()
    unread: tuple[Path, ...] = ()


def printable(text: object) -> str:
    """A path, or a sentence with one, as any terminal and UTF-8 file takes it: "?" for other bytes and line breaks."""
    encoded = str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\ufffd", "?")
    return "".join(letter if letter.isprintable() else "?" for letter in encoded)


def find_inputs(inputs: Sequence[str], output: Path | None = None) -> FoundInputs:
    """Find the files of points of some inputs.

    Folders are searched to the bottom, through links but each once; names that begin with a dot are passed over, and
    so are __MACOSX and `output`, the folder of the results.

    Raises:
        InputError: an input is neither file nor folder, or matches nothing; or there is no file of points.
    """
    if not inputs:
        raise InputError("No input is given: give files, folders or patterns with --input=FILE|FOLDER|GLOB.")
    aside = None if output is None else os.path.realpath(output)
    found: dict[str, tuple[Path, PurePath]] = {}
    problems, passed_over, results, unread = dict[str, str](), list[Path](), list[Path](), dict[str, Path]()
    for text in inputs:
        named_alone = os.path.lexists(text) and not Path(text).is_dir()
        candidates, searched = list[tuple[Path, PurePath]](), set[Path]()
        for path, name in _expand(text, len(inputs)):
            if not path.is_dir():
                candidates.append((path, name))
            elif aside is not None and os.path.realpath(path) == aside:
                folder = printable(path)
                raise InputError(f"{folder} is the folder of the input and of the output: choose another --output.")
            else:
                below = list(_files_below(path, name, aside, problems))
                candidates += below
                searched |= {file for file, _ in below}
        parts = set() if named_alone else parts_of_meshes([file for file, _ in candidates])
        for file, place in candidates:
            if file in parts:
                continue
            if not named_alone and file.suffix.lower() not in SUFFIXES:
                unread.setdefault(os.path.abspath(file), file)
            elif file in searched and file.suffix.lower() in _TEXTS and not _has_numbers(file):
                passed_over.append(file)
            elif not named_alone and _is_result_ply(file):
                results.append(file)
            else:
                found.setdefault(os.path.abspath(file), (file, place))
    if not found and not problems:
        named = printable(", ".join(inputs))
        if results:
            raise InputError(f"{named} holds results of predictions only: give other point clouds.")
        others = "".join(f" {printable(line)}" for line in describe_unread(unread.values()))
        raise InputError(f"There is no point cloud in {named}: files with {', '.join(SUFFIXES)} are read.{others}")
    names = _unique_names([place for _, place in found.values()])
    files = tuple(InputFile(path, name) for (path, _), name in zip(found.values(), names, strict=True))
    return FoundInputs(files, problems, tuple(passed_over), tuple(results), tuple(unread.values()))


def _expand(text: str, number: int) -> Iterator[tuple[Path, PurePath]]:
    """Files and folders of one of a number of inputs, each with the beginning of its results' names."""
    path = Path(text)
    if not text or "\0" in text:
        raise InputError(f"--input has the entry {printable(text)!r}; expected are files, folders or patterns.")
    if os.path.lexists(path):
        if not path.is_dir() and path.exists() and not path.is_file():
            raise InputError(f"{printable(path)} is neither a file nor a folder: give point clouds.")
        yield path, PurePath() if path.is_dir() else PurePath(path.name)
        return
    if not glob.has_magic(text):
        comma = " (a comma separates two; in a pattern, ? stands for one that is part of a name)" if number > 1 else ""
        raise InputError(f"There is no file or folder {printable(text)}: check the path given with --input{comma}.")
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    try:
        # glob.glob would follow links in circles for **.
        matches = sorted(fixed.glob(str(path.relative_to(fixed))))
    except (ValueError, NotImplementedError, OSError) as error:
        raise InputError(f"{printable(text)} is no pattern ({printable(error)}): check --input.") from error
    matches = [each for each in matches if not any(map(is_hidden, each.relative_to(fixed).parts))]
    # A folder that a pattern matches is not searched where the pattern names files in it as well.
    matches = [match for match in matches if not match.is_dir()] or matches
    if not matches:
        raise InputError(f"Nothing matches {printable(text)}: check the pattern given with --input.")
    for match in matches:
        yield match, PurePath(os.path.relpath(match, fixed))


def _files_below(
    folder: Path, name: PurePath, aside: str | None, problems: dict[str, str]
) -> Iterator[tuple[Path, PurePath]]:
    """Files in a folder and below, each with the beginning of its results' names."""
    seen: set[tuple[int, int]] = set()

    def note_problem(error: OSError) -> None:
        where = printable(error.filename or folder)
        problems[where] = f"{where} cannot be looked into: {error.strerror or error}."

    for place, folders, files in os.walk(folder, onerror=note_problem, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen or os.path.realpath(place) == aside:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(each for each in folders if not is_hidden(each))
        for path in (Path(place, file) for file in sorted(files) if not is_hidden(file)):
            yield path, name / os.path.relpath(path, folder)


def _is_result_ply(path: Path) -> bool:
    """Return True for a PLY file that a prediction wrote."""
    if path.suffix.lower() != ".ply" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return f"comment {OWN_COMMENT}\n".encode() in file.read(400)
    except OSError:
        return False


def _has_numbers(path: Path) -> bool:
    """Return True if a text has a line of three numbers near its beginning, or cannot be read."""
    if not path.is_file():
        return True
    return path.stat().st_size == 0 or is_table(path)  # an empty one is an error when it is read


def _unique_names(places: Sequence[PurePath]) -> list[str]:
    """A name for each path: without its suffix if that makes it unique, whatever the case of letters."""
    plain = [_plain_name(place.with_suffix("")) for place in places]
    counts = Counter(name.casefold() for name in plain)
    taken, names = {"predictions"}, []  # predictions.json holds the boxes of all scans
    for place, short in zip(places, plain, strict=True):
        is_unique = counts[short.casefold()] == 1 and short.casefold() not in taken
        base = short if is_unique else _plain_name(place)
        name, number = base, 2
        while name.casefold() in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def _plain_name(place: PurePath) -> str:
    parts = printable(place.as_posix()).replace("?", "_").split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "scan"


@dataclass(frozen=True, eq=False)
class FileScan:
    """One file, ready for the detector.

    Attributes:
        file: path of the file and name of its scan.
        scan: the scan in metres, z up, aligned if the request says so.
        matrix: transform from the file's frame and unit to that of the scan; `scan.transform` in float64.
        remarks: parts of sentences on assumptions and on likely mistakes, with the flag that corrects them.
        seconds: time that reading and aligning took.
    """

    file: InputFile
    scan: Scan
    matrix: Float[np.ndarray, "4 4"]
    remarks: tuple[str, ...]
    seconds: float


def load_file(file: InputFile, request: PredictRequest, spec: DatasetSpec) -> FileScan:
    """Read one file, bring it to metres with z up, and align it for the head of a dataset.

    Raises:
        InputError: the file cannot be read or used; one sentence, with the flags that may help.
    """
    started = time.perf_counter()
    if file.path.exists() and not file.path.is_file() and not file.path.is_dir():
        raise InputError(f"{printable(file.path)} is no regular file: give a point cloud.")
    cloud = read_point_cloud(file.path, request.most_points, request.columns, request.colors)
    up, unit, remarks = decide_frame(cloud, request.up, request.unit)
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
    notes = [(kind, count) for kind, count in placed.scan.notes.items() if kind != NO_COLORS]
    remarks += [f"{count:,} {kind}{' are left out' * (kind == NOT_FINITE)}" for kind, count in notes]
    placed, more = align(placed, request.align, spec)
    placed, placing = place_as_dataset(placed, spec, request.floor, "--floor={}")
    remarks += [*more, *placing]
    return FileScan(file, placed.scan, placed.matrix, tuple(remarks), time.perf_counter() - started)


def align(
    placed: PlacedCloud, how: Align, spec: DatasetSpec, advice: str = "add --align={}"
) -> tuple[PlacedCloud, list[str]]:
    """Turn a scan in metres, z up, as `PredictRequest.align` says, with remarks on what was done and would help.

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

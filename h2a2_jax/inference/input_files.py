"""Files of points to predict: what was asked for, and scans read from them.

From a file of points to a scan in the frame that a detector expects, with hints where it looks like another one.

A detector expects metres and z up. Where the origin lies does not matter to it: its input is the colour of voxels, and
convolutions see the differences of their places only (a shift by other than multiples of the coarsest voxel changes
which points share one, no more). So no floor is moved to the height that a dataset has it at; a scan far from the
origin is shifted near it by whole voxels of every level. What does matter is which way is up, the unit, and, to heads
whose boxes are axis-aligned, that walls run along x and y: `PredictRequest.align`.
"""

import glob
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from threading import Thread
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Float

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.point_cloud import COLOR_RANGES, SUFFIXES, ColorRange, PointCloud, read_point_cloud
from h2a2_jax.scans.frame import (
    NO_COLORS,
    UNITS,
    UPRIGHT,
    PlacedCloud,
    estimate_gravity,
    estimate_walls,
    guess_unit,
    guess_up,
    place_cloud,
    spread,
    surface_normals,
    upright_matrix,
)
from h2a2_jax.scans.scan import NOT_FINITE, Scan, ScanError
from h2a2_jax.scans.specs import DatasetSpec

Align = Literal["none", "gravity", "manhattan", "both"]
ALIGNMENTS: tuple[Align, ...] = ("none", "gravity", "manhattan", "both")
FORMATS = ("json", "csv", "ply", "html", "png")
MOST_POINTS = 500_000
"""Points read of a larger file: as many as large scans of rooms have, and memory stays below 2 GB at full width."""

_TEXTS = (".txt", ".csv", ".asc", ".pts", ".xyz")
_RESERVED = ("predictions",)  # predictions.json holds the boxes of all
OWN_COMMENT = "boxes of h2a2_jax"
"""In the first bytes of every PLY file, page and picture that a prediction writes."""


@dataclass(frozen=True)
class PredictRequest:
    """What is to be predicted, and what is made of it.

    Attributes:
        inputs: files, folders (with all below), patterns such as "scans/*.ply".
        output: folder of the results; None: "boxes" in the run's folder.
        dataset: whose head predicts; None: the first one of the model.
        up: axis of the files that points up: x, y, z or -x, -y, -z; "auto" guesses.
        unit: of the files: m, cm, mm; "auto" guesses.
        colors: range of the files' colours.
        align: "gravity" turns a tilted scan upright first, "manhattan" turns its walls along x and y, "both", "none".
        score: lowest score of a box.
        formats: of `FORMATS`: boxes a scan ("json"), all boxes as a table ("csv"), points with labels and box frames
            ("ply"), a page ("html") and a picture ("png") a scan.
        show: whether to open a window for each scan.
        step: of the checkpoint; None: the last.
        most_points: of a larger file, this many points are read.
    """

    inputs: tuple[str, ...]
    output: Path | None = None
    dataset: str | None = None
    up: str = "z"
    unit: str = "m"
    colors: ColorRange = "auto"
    align: Align = "none"
    score: float = 0.3
    formats: tuple[str, ...] = ("json", "csv", "ply", "html")
    show: bool = False
    step: int | None = None
    most_points: int = MOST_POINTS

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            InputError: one sentence on the first field that is none of its values.
        """
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
            raise InputError(
                f"--formats is empty, nothing would be written; expected are some of {', '.join(FORMATS)}."
            )
        if not 0 <= self.score <= 1:
            raise InputError(f"--score is {self.score:g}; expected is a number from 0 to 1.")
        if self.most_points < 1:
            raise InputError(f"At most {self.most_points} points of a file are asked for; expected is at least 1.")


@dataclass(frozen=True)
class InputFile:
    """One file of points.

    Attributes:
        path: where it is.
        name: of its scan and its results, its path below what was asked for, unique.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class FoundInputs:
    """What was found.

    Attributes:
        files: in order of their paths, input by input.
        problems: by path, why something could not be looked into.
        passed_over: text files without a line of numbers, such as a README.
        results: PLY files of an earlier prediction, which are passed over unless they are named one by one.
    """

    files: tuple[InputFile, ...]
    problems: dict[str, str]
    passed_over: tuple[Path, ...] = ()
    results: tuple[Path, ...] = ()


def printable(text: object) -> str:
    """A path, or a sentence with one, as any terminal and UTF-8 file takes it: "?" for other bytes and line breaks."""
    encoded = str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\ufffd", "?")
    return "".join(letter if letter.isprintable() else "?" for letter in encoded)


def find_inputs(inputs: Sequence[str], output: Path | None = None) -> FoundInputs:
    """The files of points that are meant.

    Folders are searched to the bottom, through links but none twice; names that begin with a dot are passed over, and
    so is the folder of the results.

    Args:
        inputs: see `PredictRequest`.
        output: folder of the results.

    Raises:
        InputError: an input is neither file nor folder, or matches nothing; or no file of points is there.
    """
    if not inputs:
        raise InputError("No input is given: give files, folders or patterns with --input=FILE|FOLDER|GLOB.")
    aside = None if output is None else os.path.realpath(output)
    found: dict[str, tuple[Path, PurePath]] = {}
    search = _Search(aside, {}, [], [])
    for text in inputs:
        named_alone = os.path.lexists(text)
        for path, below in _expand(text, len(inputs)):
            if path.is_dir():
                if aside is not None and os.path.realpath(path) == aside:
                    raise InputError(
                        f"{printable(path)} is the folder of the input and of the output: choose another --output."
                    )
                files = search.below(path, below)
            elif not named_alone and _is_result(path):
                search.results.append(path)
                continue
            else:
                files = iter([(path, below)])
            for file, place in files:
                found.setdefault(os.path.abspath(file), (file, place))
    if not found and not search.problems and search.results:
        raise InputError(f"{printable(', '.join(inputs))} holds results of predictions only: give other point clouds.")
    if not found and not search.problems:
        raise InputError(
            f"There is no point cloud in {printable(', '.join(inputs))}: files with {', '.join(SUFFIXES)} are read."
        )
    names = _names([place for _, place in found.values()])
    named = tuple(InputFile(path, name) for (path, _), name in zip(found.values(), names, strict=True))
    return FoundInputs(named, search.problems, tuple(search.passed_over), tuple(search.results))


def _expand(text: str, of: int) -> Iterator[tuple[Path, PurePath]]:
    """Files and folders of one input of so many, each with the start of its results' names."""
    path = Path(text)
    if not text or "\0" in text:
        raise InputError(f"--input has the entry {printable(text)!r}; expected are files, folders or patterns.")
    try:
        exists = os.path.lexists(path)
    except (OSError, ValueError):
        exists = False
    if exists:
        if not path.is_dir() and path.exists() and not path.is_file():
            raise InputError(f"{printable(path)} is neither a file nor a folder: give point clouds.")
        yield path, PurePath() if path.is_dir() else PurePath(path.name)
        return
    if not glob.has_magic(text):
        comma = " (a comma separates two; in a pattern, ? stands for one that is part of a name)" if of > 1 else ""
        raise InputError(f"There is no file or folder {printable(text)}: check the path given with --input{comma}.")
    fixed = Path(*_until_magic(path.parts))
    try:
        # Not glob.glob, whose ** goes round with links.
        matches = sorted(fixed.glob(str(path.relative_to(fixed))))
    except (ValueError, NotImplementedError, OSError) as error:
        raise InputError(f"{printable(text)} is no pattern ({printable(error)}): check --input.") from error
    matches = [each for each in matches if not any(part.startswith(".") for part in each.relative_to(fixed).parts)]
    # A folder that a pattern matches is not searched where the pattern names files in it as well.
    files = [match for match in matches if not match.is_dir()]
    matches = files or matches
    if not matches:
        raise InputError(f"Nothing matches {printable(text)}: check the pattern given with --input.")
    for match in matches:
        if match.is_dir() or match.suffix.lower() in SUFFIXES:
            yield match, PurePath(os.path.relpath(match, fixed))


def _until_magic(parts: Sequence[str]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


@dataclass
class _Search:
    aside: str | None
    problems: dict[str, str]
    passed_over: list[Path]
    results: list[Path]

    def below(self, folder: Path, name: PurePath) -> Iterator[tuple[Path, PurePath]]:
        """Files of points in a folder and below."""
        seen: set[tuple[int, int]] = set()

        def problem(error: OSError) -> None:
            where = printable(error.filename or folder)
            self.problems[where] = f"{where} cannot be looked into: {error.strerror or error}."

        for place, folders, files in os.walk(folder, onerror=problem, followlinks=True):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen or os.path.realpath(place) == self.aside:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            for file in sorted(files):
                path = Path(place, file)
                if file.startswith(".") or path.suffix.lower() not in SUFFIXES:
                    continue
                if path.suffix.lower() in _TEXTS and not _has_numbers(path):
                    self.passed_over.append(path)
                    continue
                if _is_result(path):
                    self.results.append(path)
                    continue
                yield path, name / os.path.relpath(path, folder)


def _is_result(path: Path) -> bool:
    """Whether it is a PLY file that a prediction wrote."""
    if path.suffix.lower() != ".ply" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return f"comment {OWN_COMMENT}\n".encode() in file.read(400)
    except OSError:
        return False


def _has_numbers(path: Path) -> bool:
    """Whether a text has a line of three numbers near its beginning; what cannot be read may have."""
    if not path.is_file():
        return True
    try:
        with path.open("rb") as file:
            lines = [file.readline(4096) for _ in range(64)]
    except OSError:
        return True
    if not any(lines) or b"\0" in b"".join(lines):
        return True  # empty or damaged, which is told when it is read
    for line in lines:
        try:
            if len([float(word) for word in line.replace(b",", b" ").replace(b";", b" ").split()]) >= 3:
                return True
        except ValueError:
            pass
    return False


def _names(places: Sequence[PurePath]) -> list[str]:
    """A name for each path: without its suffix if that makes it unique, whatever the case of letters."""
    plain = [_plain(place.with_suffix("").as_posix()) for place in places]
    counts = Counter(name.casefold() for name in plain)
    taken: set[str] = set()
    names = []
    for place, short in zip(places, plain, strict=True):
        unique = counts[short.casefold()] == 1 and short.casefold() not in (*taken, *_RESERVED)
        base = short if unique else _plain(place.as_posix())
        name, number = base, 2
        while name.casefold() in taken or name.casefold() in _RESERVED:
            name, number = f"{base}-{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def _plain(name: str) -> str:
    parts = printable(name).replace("?", "_").split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "scan"


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

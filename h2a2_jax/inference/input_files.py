"""Files of points to predict: find them, and read each as a scan in the frame that a detector expects (`placement`)."""

import glob
import hashlib
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from h2a2_jax.errors import InputError
from h2a2_jax.host import available_memory
from h2a2_jax.inference.box_table import CSV_COLUMNS
from h2a2_jax.inference.placement import AUTO, Align, Frame, PlacedScan, place_scan, spell_flag
from h2a2_jax.inference.tiles import TILED_ABOVE, Tiling, checked_tiling
from h2a2_jax.scans.formats.columns import parse_columns
from h2a2_jax.scans.formats.folders import describe_unread, parts_of_meshes
from h2a2_jax.scans.formats.point_cloud import COLOR_RANGES, SUFFIXES, ColorRange, read_point_cloud
from h2a2_jax.scans.formats.text import is_table
from h2a2_jax.scans.frame import NO_COLORS, Floor
from h2a2_jax.scans.scan import NOT_FINITE, is_hidden
from h2a2_jax.scans.specs import DatasetSpec

FORMATS = ("json", "csv", "ply", "html", "png", "glb", "dxf", "rrd")
BYTES_A_POINT = 200
"""Memory that a point takes while it is read, placed and written; files of more points than fit are thinned."""

OWN_COMMENT = "boxes of h2a2_jax"
"""Text in the first bytes of every PLY file, page and picture that a prediction writes."""

_TEXTS = (".txt", ".csv", ".asc", ".pts", ".xyz", ".xyzrgb", ".xyzn")
_LONGEST = 180
"""Bytes of a part of a name: file systems take 255, and endings and the names of unfinished files are longer."""

_RESERVED = ("predictions", "index", "boxes", "thumbnails")
"""Names, without ending, of the files and folders beside the results of scans."""

_RESULT_ENDING = re.compile(rf"\.(?=({'|'.join((*FORMATS, 'jsonl', 'jpg'))})$)", re.IGNORECASE)
"""Dot of the endings of results, which no folder may have: the results of another scan could have its name."""


@dataclass(frozen=True)
class PredictRequest:
    """The files to predict, and the results to write.

    Attributes:
        inputs: files, folders (searched to the bottom), patterns such as "scans/*.ply".
        output: folder of the results; None: "boxes" in the run's folder.
        dataset, up, unit, colors, align, floor: as of `placement.Frame`.
        score: lowest score of a box.
        formats: some of `FORMATS`: boxes by scan ("json"), all boxes as a table ("csv"), points with labels and box
            frames ("ply"), a page ("html") and a picture ("png") of each scan; "glb", "dxf" and "rrd" for other
            programs.
        show: True to open a window for each scan.
        step: step of the checkpoint; None: the last.
        columns: meaning of the columns of text tables, .npy, .npz and .bin, as in "x,y,z,_,r,g,b"; None: by names or
            values.
        classes: classes of the boxes; empty: all.
        agnostic_nms: True leaves one box where boxes of several classes overlap, the best one.
        names: names of classes in the results, by those of the detector.
        tile: how large scans are cut.
        overwrite: True predicts all files, whatever an earlier prediction did in the output; its other files stay.
    """

    inputs: tuple[str, ...]
    output: Path | None = None
    dataset: str = AUTO
    up: str = "auto"
    unit: str = "auto"
    colors: ColorRange = "auto"
    align: Align = "none"
    score: float = 0.3
    formats: tuple[str, ...] = ("json", "csv", "ply", "html")
    show: bool = False
    step: int | None = None
    columns: str | None = None
    floor: Floor = "auto"
    classes: tuple[str, ...] = ()
    agnostic_nms: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    tile: Tiling = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raise InputError if a field has none of its known values."""
        parse_columns(self.columns)
        self.frame_among(None)
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise InputError(f"--formats is {unknown[0]!r}; expected is one of {', '.join(FORMATS)}.")
        checked_tiling(self.tile, "--tile")
        if self.inputs and not self.formats and not self.show:
            names = ", ".join(FORMATS)
            raise InputError(f"--formats is empty, nothing would be written; expected are some of {names}.")
        if not 0 <= self.score <= 1:
            raise InputError(f"--score is {self.score:g}; expected is a number from 0 to 1.")

    def frame_among(self, datasets: Sequence[str] | None) -> Frame:
        """Return the frame of the files; raise InputError for another dataset than those of a detector, if given."""
        values = {name: getattr(self, name) for name in ("up", "unit", "colors", "floor", "align", "dataset")}
        return Frame.of(spell_flag, datasets, **values)


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
        results: files of an earlier prediction, which are passed over unless they are named one by one.
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
            elif not named_alone and _is_result(file):
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
        raise InputError(f"There is no file or folder {printable(text)}: check the path{comma}.")
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
        raise InputError(f"Nothing matches {printable(text)}: check the pattern.")
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


def _is_result(path: Path) -> bool:
    """Return True for a file that a prediction wrote."""
    if path.suffix.lower() not in (".ply", ".glb", ".csv") or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(400)
        return OWN_COMMENT.encode() in start or start.startswith(",".join(CSV_COLUMNS[:5]).encode())
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
    taken, names = set(_RESERVED), list[str]()
    for place, short in zip(places, plain, strict=True):
        is_unique = counts[short.casefold()] == 1 and short.casefold() not in taken
        names.append(free_name(short if is_unique else _plain_name(place), taken))
        taken.add(names[-1].casefold())
    return names


def free_name(base: str, taken: Collection[str]) -> str:
    """Return a name, with a number behind it if it is among those taken, which are casefolded."""
    name, number = base, 2
    while name.casefold() in taken:
        name, number = f"{base}-{number}", number + 1
    return name


def is_usable_name(name: str) -> bool:
    """Return True for a name whose results lie in the folder of the results, beside those that show all scans."""
    parts = name.split("/")
    return not {"", ".", ".."} & set(parts) and printable(name) == name and name.casefold() not in _RESERVED


def _plain_name(place: PurePath) -> str:
    parts = printable(place.as_posix()).replace("?", "_").split("/")
    parts = [_bounded(part) for part in parts if part not in ("", ".", "..")] or ["scan"]
    return "/".join([*(_RESULT_ENDING.sub("_", part) for part in parts[:-1]), parts[-1]])


def _bounded(part: str) -> str:
    """Cut a part of a name that is too long for a file system, and tell it from others that begin alike."""
    whole = part.encode()
    if len(whole) <= _LONGEST:
        return part
    return f"{whole[: _LONGEST - 9].decode(errors='ignore')}-{hashlib.sha256(whole).hexdigest()[:8]}"


@dataclass(frozen=True, eq=False)
class FileScan:
    """One file, ready for the detector.

    Attributes:
        file: path of the file and name of its scan.
        placed: the scan in the frame of the dataset whose head predicts.
        remarks: parts of sentences on assumptions and on likely mistakes, with the flag that corrects them.
        seconds: time that reading and placing took.
    """

    file: InputFile
    placed: PlacedScan
    remarks: tuple[str, ...]
    seconds: float


def load_file(file: InputFile, request: PredictRequest, specs: Sequence[DatasetSpec]) -> FileScan:
    """Read one file and bring it into the frame of the dataset whose head predicts.

    Raises:
        InputError: the file cannot be read or used; one sentence, with the flags that may help.
    """
    started = time.perf_counter()
    if file.path.exists() and not file.path.is_file() and not file.path.is_dir():
        raise InputError(f"{printable(file.path)} is no regular file: give a point cloud.")
    most = max(available_memory() // BYTES_A_POINT, TILED_ABOVE)
    cloud = read_point_cloud(file.path, most, request.columns, request.colors)
    placed = place_scan(
        file.name, cloud, request.frame_among(None), specs, f"say which with --colors ({', '.join(COLOR_RANGES)})"
    )
    notes, remarks = placed.scan.notes, list[str]()
    if NO_COLORS in notes:
        remarks.append("has no colours and is taken as grey, unlike what the model was trained on")
    elif request.colors == "0-255" and cloud.colors is not None and cloud.colors.max(initial=0) <= 1:
        remarks.append("looks as if colours reach to 1, not 255: add --colors=0-1")
    remarks += cloud.assumed
    remarks += [
        f"{count:,} {kind}{' are left out' * (kind == NOT_FINITE)}"
        for kind, count in notes.items()
        if kind != NO_COLORS
    ]
    return FileScan(file, placed, (*remarks, *placed.remarks), time.perf_counter() - started)

"""Which files a prediction is asked for, and what their results are called."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from h2a2_jax.errors import InputError
from h2a2_jax.inputs.point_cloud import COLOR_RANGES, REFUSED, SUFFIXES, ColorRange
from h2a2_jax.inputs.scan_folder import UNITS, UPRIGHT

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
        if match.is_dir() or match.suffix.lower() in (*SUFFIXES, *REFUSED):
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
                if file.startswith(".") or path.suffix.lower() not in (*SUFFIXES, *REFUSED):
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

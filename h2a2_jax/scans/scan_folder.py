"""A user's own scans: a folder of point clouds in any usual format, and one file of boxes.

    myscans/  boxes.json  kitchen.ply  office/desk.pcd ...

Schema of boxes.json, version 1; what is in brackets may be left out:

    {
      "version": 1,
      ["up": "z",]                      axis of the files that points up: x, y, z or -x, -y, -z
      ["unit": "m",]                    of the files and the boxes: m, cm, mm, ft, in
      ["colors": "auto",]               of the files: 0-1, 0-255, 0-4095, ..., none (do not use them), auto (by values)
      ["columns": "x,y,z,_,r,g,b",]     of text tables, .npy, .npz, .bin, _ not used; without it, by names or values
      "scans": [
        {
          "file": "kitchen.ply",        in this folder or one below; the scan is called "kitchen"
          ["split": "train",]           train or val; without it train
          ["boxes": [
            {
              "center": [x, y, z],      of the box, in the frame and unit of the file
              "size": [dx, dy, dz],     full sizes along the axes of the file, before the box is turned
              ["yaw": 0.0,]             radians, counter-clockwise about the axis that points up, seen from above;
                                        or "yaw_degrees", the same in degrees
              "class": "chair"
            }
          ]]
        }
      ]
    }

A box as `h2a2_jax.inference.results` writes it is accepted too: "name" stands for "class", and other keys are ignored
unless they look like a misspelt one of the above, or turn the box in a way of their own ("heading", "rotation_y",
"quaternion"), which is refused by name. A box that does not stand upright in its file is refused. Classes are
compared without case, blanks, hyphens and underscores. If no scan is in the split "val", the training scans are used
for validation too, with a sentence in `ScanFolder.warnings`.
"""

import difflib
import functools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, cast

import numpy as np

from h2a2_jax.errors import InputError, quoted, reason_of
from h2a2_jax.scans.formats.columns import parse_columns
from h2a2_jax.scans.formats.folders import parts_of_meshes
from h2a2_jax.scans.formats.point_cloud import COLOR_RANGES, SUFFIXES, ColorRange, PointCloud, read_point_cloud
from h2a2_jax.scans.frame import MOVED, UNITS, UPRIGHT, place_as_dataset, place_cloud, respelt, upright_matrix
from h2a2_jax.scans.scan import (
    ENCLOSED,
    Scan,
    ScanError,
    beyond_a_turn,
    enclosing_boxes,
    is_hidden,
    some,
    usable_boxes,
)
from h2a2_jax.scans.specs import DatasetSpec, class_label, foreign_boxes
from h2a2_jax.untrusted import read_bytes

BOXES_FILE = "boxes.json"
BOXES_VERSION = 1
_BOX_KEYS = {"center", "size", "yaw", "class", "name"}
_MEANINGS = {
    "center": "[x, y, z] of the middle of the box",
    "size": "full [dx, dy, dz] along the axes of the file, before the box is turned",
}
_CLOSE = 0.7
_DEGREES = ("yaw_degrees", "yaw_deg")
_TURNS = re.compile(
    r"\b([xyz]?(rot|angle)|yaw|heading|orient|theta|phi$|psi$|euler|quat|pitch|roll|tilt|azimuth|bearing|direction"
    r"|facing|deg(rees)?$|rad(ians)?$|transform|matri|[rq] ?[wxyz]$|r ?vec$|pose$)"
)
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass(frozen=True)
class BoxEntry:
    """One box of boxes.json, in the frame and unit of the file."""

    box: tuple[float, ...]
    label: str


@dataclass(frozen=True)
class ScanEntry:
    """One scan of boxes.json."""

    file: str
    split: Literal["train", "val"]
    boxes: tuple[BoxEntry, ...]

    @property
    def name(self) -> str:
        """Path of the file in the folder, without suffix."""
        return Path(self.file).with_suffix("").as_posix()


@dataclass(frozen=True)
class FolderDescription:
    """The content of boxes.json, with its defaults filled in."""

    up: str
    unit: str
    colors: ColorRange
    scans: tuple[ScanEntry, ...]
    columns: str | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in alphabetical order."""
        return tuple(sorted({box.label for scan in self.scans for box in scan.boxes}))

    @property
    def yaw_problem(self) -> str | None:
        """Sentence on yaws that are no radians; None if they can be."""
        return beyond_a_turn(np.array([box.box[6] for scan in self.scans for box in scan.boxes], np.float64))


def is_scan_folder(root: str | Path) -> bool:
    """Return True if a folder holds a file of boxes for a user's own scans."""
    return os.path.isfile(Path(root) / BOXES_FILE)


def folder_classes(root: str | Path) -> tuple[str, ...]:
    """Return the names of the classes in the folder's boxes.json, in alphabetical order; see `read_folder`."""
    return read_folder(root).classes


def read_folder(root: str | Path) -> FolderDescription:
    """Read and check boxes.json.

    Raises:
        InputError: the file is missing or not of the schema, or names a scan twice or a file outside the folder.
    """
    path = Path(root) / BOXES_FILE
    if not os.path.lexists(path):
        raise InputError(f"There is no file {path}: a folder of scans needs one that says where the boxes are.")
    try:
        document = json.loads(read_bytes(path, growth=24), object_pairs_hook=_unique)  # of empty lists
        return _description(document, Path(root))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}; check the file.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON file ({quoted(error)}): repair or write it again.") from error
    except _Wrong as error:
        raise InputError(f"{path}: {error}{'.' * (str(error)[-1] not in '.?')}") from error


def point_cloud_files(root: str | Path) -> list[str]:
    """List the files of points in a folder and below, as boxes.json would name them, sorted; without hidden ones."""
    files = {path for path in Path(root).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()}
    places = (path.relative_to(root) for path in files - parts_of_meshes(files))
    return sorted(place.as_posix() for place in places if not any(map(is_hidden, place.parts)))


class ScanFolder:
    """The scans of one split of a user's folder.

    `__getitem__` raises `ScanError` for a scan that is missing, cannot be read or has no usable point. The scans are in
    the order of boxes.json; `warnings` are sentences on the source as a whole.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "val"],
        spec: DatasetSpec,
        *,
        description: FolderDescription | None = None,
    ):
        """Read boxes.json; points are read scan by scan.

        A split val without a scan is the split train. A `description` stands for the content of boxes.json.
        """
        self.spec, self._root, self._description = spec, Path(root), description or read_folder(root)
        self.warnings: list[str] = []
        entries = [entry for entry in self._description.scans if entry.split == split]
        if not entries and split == "val":
            entries = list(self._description.scans)
            self.warnings.append(
                f'No scan of {self._root / BOXES_FILE} has "split": "val": the training scans are used for validation '
                "too, and the scores say how well they were learnt by heart."
            )
        if not entries:
            raise InputError(
                f'No scan of {self._root / BOXES_FILE} is in the split {split}: give some "split": "train".'
            )
        self._entries, self.names = tuple(entries), [entry.name for entry in entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Scan:
        """Load one scan in metres, z up, as the dataset's scans lie (`place_as_dataset`), colours in 0-1 or grey."""
        return self.convert(index, self.read(index))

    def read(self, index: int) -> PointCloud:
        """Read the points of one scan in the frame of its file; raise `ScanError` if it is missing or damaged."""
        entry = self._entries[index]
        try:
            described = self._description
            path = self._root / entry.file
            cloud = read_point_cloud(path, columns=described.columns, color_range=described.colors)
        except InputError as error:
            raise ScanError(entry.name, _in_boxes_file(f"Scan {entry.name}: {error}")) from error
        return replace(cloud, assumed=tuple(map(_in_boxes_file, cloud.assumed)))

    def convert(self, index: int, cloud: PointCloud, remarks: list[str] | None = None) -> Scan:
        """Make one scan of its points as `read` returns them; raises `ScanError` like `place_cloud`.

        `remarks` are added to by parts of sentences on its place.
        """
        entry, described = self._entries[index], self._description
        hint = f'say "colors" in {BOXES_FILE} ({", ".join(COLOR_RANGES)})'
        matrix = upright_matrix(described.up, described.unit)
        placed = place_cloud(entry.name, cloud, matrix, described.colors, colors_hint=hint)
        notes = Counter(placed.scan.notes)
        boxes, labels = _boxes(entry, placed.matrix, UNITS[described.unit], self.spec, notes)
        scan = replace(placed.scan, boxes=boxes, labels=labels)
        as_dataset, said = place_as_dataset(replace(placed, scan=scan), self.spec)
        if as_dataset.scan is not scan:
            notes[MOVED] += 1
        if remarks is not None:
            remarks += said
        return replace(as_dataset.scan, notes=dict(notes))


def _in_boxes_file(text: str) -> str:
    """Respell the flags of a sentence as keys of boxes.json."""
    return respelt(text, f'"colors" of {BOXES_FILE}', ' "{}"', f'"columns" of {BOXES_FILE}')


def _boxes(
    entry: ScanEntry, matrix: np.ndarray, metres: float, spec: DatasetSpec, notes: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.array([class_label(box.label, spec) for box in entry.boxes], np.int32)
    boxes = np.array([box.box for box in entry.boxes], np.float64).reshape(-1, 7)
    for box, label in zip(entry.boxes, labels, strict=True):
        if label < 0:
            notes[foreign_boxes(box.label, spec)] += 1
    with np.errstate(over="ignore", invalid="ignore"):
        boxes[:, :3] = boxes[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
        boxes[:, 3:6] = boxes[:, 3:6] @ (np.abs(matrix[:3, :3]) > metres / 2).T * metres
        known = labels >= 0
        boxes, labels = boxes[known], labels[known]
        usable, left_out = usable_boxes(boxes)
        notes.update(left_out)
        boxes, labels = boxes[usable], labels[usable]
    if not spec.has_yaw:
        turned = np.abs(np.cos(boxes[:, 6]) * np.sin(boxes[:, 6])) > 1e-4  # one turned by 90 degrees stays itself
        if turned.any():
            notes[ENCLOSED] += int(turned.sum())
        boxes = enclosing_boxes(boxes)
    return boxes.astype(np.float32), labels


class _Wrong(Exception):
    """A deviation from the schema."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, whose keys may be given once each: of two, one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _Wrong(f"an object ({some(list(found), 6)}) has the key {twice!r} more than once; give it once")
    return found


def _description(document: Any, root: Path) -> FolderDescription:
    _check_keys(document, "the document", ("version", "up", "unit", "colors", "columns", "scans"), ("version", "scans"))
    if document["version"] != BOXES_VERSION:
        raise _Wrong(f"its version is {document['version']!r}, this program reads version {BOXES_VERSION}")
    up = _one_of(document, "up", "z", UPRIGHT)
    unit = _one_of(document, "unit", "m", UNITS)
    colors = cast(ColorRange, _one_of(document, "colors", "auto", COLOR_RANGES))
    columns = document.get("columns")
    try:
        parse_columns(columns)
    except InputError as error:
        raise _Wrong(f'its "columns" are wrong: {error}') from error
    if not isinstance(document["scans"], list) or not document["scans"]:
        raise _Wrong("its scans are no list of at least one")
    scans = tuple(_scan_entry(scan, i, root) for i, scan in enumerate(document["scans"]))
    if twice := [name for name, count in Counter(scan.name for scan in scans).items() if count > 1]:
        raise _Wrong(f"scan {', '.join(twice[:3])} is there more than once; names of files without suffix must differ")
    return FolderDescription(up, unit, colors, scans, columns)


def _scan_entry(scan: Any, position: int, root: Path) -> ScanEntry:
    where = f"scan {position + 1}"
    _check_keys(scan, where, ("file", "split", "boxes"), ("file",))
    file = scan["file"]
    if not isinstance(file, str) or not file or "\0" in file:
        raise _Wrong(f"the file of {where} is {file!r}; expected is a path in the folder")
    try:
        if "\\" in file and not (root / file).exists():
            file = PureWindowsPath(file).as_posix()
        file = Path(file).as_posix()  # ./a.ply and a.ply are one scan
        inside = (root / file).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):
        inside = False
    if not inside or Path(file).is_absolute() or PureWindowsPath(file).is_absolute() or ".." in Path(file).parts:
        raise _Wrong(f"the file {file!r} lies outside the folder; copy it there and give its path in the folder")
    split = _one_of(scan, "split", "train", ("train", "val"))
    boxes = scan.get("boxes", [])
    if not isinstance(boxes, list):
        raise _Wrong(f"the boxes of {file} are no list")
    entries = tuple(_box_entry(box, f"box {i + 1} of {file}") for i, box in enumerate(boxes))
    return ScanEntry(file, cast(Literal["train", "val"], split), entries)


def _box_entry(box: Any, where: str) -> BoxEntry:
    if not isinstance(box, dict):
        raise _Wrong(f'{where} is {_cut(box)}; expected is {{"center": ..., "size": ..., "class": ...}}')
    # Programs add keys of their own, such as a score; one spelt almost like one of these is a mistake.
    named = {"class", "name"} if box.keys() & {"class", "name"} else set()
    missing = sorted(_BOX_KEYS - box.keys() - named)
    for key in box.keys() - _BOX_KEYS:
        if close := difflib.get_close_matches(key.lower(), missing, 1, _CLOSE):
            raise _Wrong(f"{where} has the unknown key {key!r}; did you mean {close[0]!r}?")
    if box.get("upright", True) is not True:
        raise _Wrong(f"{where} does not stand upright in its file; turn the file upright and predict its boxes again")
    keys = f"; its keys are {some(list(box), 12) or 'none'}"
    numbers: list[float] = []
    for key in ("center", "size"):
        values = box.get(key)
        if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
            expected = f"expected are three numbers, {_MEANINGS[key]}"
            raise _Wrong(f"the {key} of {where} is {_cut(values)}; {expected}{'' if key in box else keys}")
        numbers += map(_real, values)
    label = box.get("class", box.get("name"))
    if not isinstance(label, str):
        raise _Wrong(f"the class of {where} is {_cut(label)}; expected is a name{'' if named else keys}")
    return BoxEntry((*numbers, _yaw(box, where)), label)


def _yaw(box: dict[str, Any], where: str) -> float:
    """Read the yaw (rad) of a box; keys of other programs that turn it, by angles of any kind, are refused."""
    given = [key for key in ("yaw", *_DEGREES) if key in box]
    if len(given) > 1:
        raise _Wrong(f"{where} has {given[0]!r} and {given[1]!r}; give one of them")
    value = box[given[0]] if given else 0.0
    if not _is_number(value):
        raise _Wrong(f"the yaw of {where} is {_cut(value)}; expected is a number (radians)")
    yaw = _real(value)
    if given and given[0] in _DEGREES and math.isfinite(yaw):
        yaw = math.radians(math.remainder(yaw, 360))
    for key, turn in _turns(box):
        if key not in given and turn != value:
            raise _Wrong(
                f"{where} has the key {key!r}, which seems to turn it, in a unit and a sense that are not known; give "
                '"yaw" (radians, counter-clockwise about the axis that points up, seen from above) or "yaw_degrees", '
                f"and leave {key!r} out"
            )
    return yaw


def _cut(value: Any) -> str:
    """Show a value of the file in a sentence, by its beginning if it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _turns(box: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a box whose names speak of a turn, also in objects below, and their values, but for zeros."""
    for key, value in box.items():
        if _speaks_of_a_turn(key):
            if not _is_nothing(value):
                yield f"{above}{key}", value
        elif isinstance(value, dict):
            yield from _turns(value, f"{above}{key}.")


@functools.lru_cache(maxsize=1024)
def _speaks_of_a_turn(key: str) -> bool:
    return bool(_TURNS.search(" ".join(_WORDS.findall(key)).lower()))


def _is_nothing(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_nothing, value.values() if isinstance(value, dict) else value))
    return value is None or value is False or value == "" or (_is_number(value) and value == 0)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _real(value: int | float | None) -> float:
    """Convert a number of JSON; programs write null for NaN."""
    try:
        return math.nan if value is None else float(value)
    except OverflowError:
        return math.inf


def _one_of(document: dict[str, Any], key: str, default: str, known: Collection[str]) -> str:
    value = document.get(key, default)
    if not isinstance(value, str) or value not in known:
        raise _Wrong(f'"{key}" is {_cut(value)}; expected is one of {", ".join(known)}')
    return value


def _check_keys(entry: Any, where: str, known: Sequence[str], needed: Sequence[str]) -> None:
    if not isinstance(entry, dict):
        raise _Wrong(f"{where} is {type(entry).__name__}; expected is an object with {', '.join(known)}")
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise _Wrong(f"{where} has the unknown key {key!r}; {hint}")
    for key in needed:
        if key not in entry:
            raise _Wrong(f"{where} has no {key!r}")

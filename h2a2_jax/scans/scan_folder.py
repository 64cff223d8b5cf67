"""A user's own scans: a folder of point clouds in any usual format, and one file of boxes.

    myscans/  boxes.json  kitchen.ply  office/desk.pcd ...

Schema of boxes.json, version 1; what is in brackets may be left out:

    {
      "version": 1,
      ["up": "z",]                      axis of the files that points up: x, y, z or -x, -y, -z
      ["unit": "m",]                    of the files and the boxes: m, cm, mm
      ["colors": "auto",]               of the files: 0-1, 0-255, none (do not use them), auto (by type and range)
      "scans": [
        {
          "file": "kitchen.ply",        in this folder or one below; the scan is called "kitchen"
          ["split": "train",]           train or val; without it train
          ["boxes": [
            {
              "center": [x, y, z],      of the box, in the frame and unit of the file
              "size": [dx, dy, dz],     full sizes along the axes of the file, before the box is turned
              ["yaw": 0.0,]             radians, counter-clockwise about the axis that points up, seen from above
              "class": "chair"
            }
          ]]
        }
      ]
    }

A box as `h2a2_jax.inference.results` writes it is accepted too: "name" stands for "class", and other keys are ignored
unless they look like a misspelt one of the above. A box that does not stand upright in its file is refused. Classes are
compared without case, blanks, hyphens and underscores. If no scan is in the split "val", the training scans are used
for validation too, with a sentence in `ScanFolder.warnings`.
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.folders import is_hidden, parts_of_meshes
from h2a2_jax.scans.formats.point_cloud import COLOR_RANGES, SUFFIXES, ColorRange, PointCloud, read_point_cloud
from h2a2_jax.scans.frame import UNITS, UPRIGHT, place_cloud, upright_matrix
from h2a2_jax.scans.scan import Scan, ScanError, enclosing_boxes, usable_boxes
from h2a2_jax.scans.specs import DatasetSpec

BOXES_FILE = "boxes.json"
BOXES_VERSION = 1
_BOX_KEYS = {"center", "size", "yaw", "class", "name"}
_CLOSE = 0.7
_OTHER_SPELLINGS = {"showercurtain": "showercurtrain"}


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


def is_scan_folder(root: str | Path) -> bool:
    """Return True if a folder holds a file of boxes for a user's own scans."""
    return (Path(root) / BOXES_FILE).is_file()


def folder_classes(root: str | Path) -> tuple[str, ...]:
    """Return the names of the classes in the folder's boxes.json, in alphabetical order; see `read_folder`."""
    return tuple(sorted({box.label for scan in read_folder(root).scans for box in scan.boxes}))


def read_folder(root: str | Path) -> FolderDescription:
    """Read and check boxes.json.

    Raises:
        InputError: the file is missing or not of the schema, or names a scan twice or a file outside the folder.
    """
    path = Path(root) / BOXES_FILE
    if not path.is_file():
        raise InputError(f"There is no file {path}: a folder of scans needs one that says where the boxes are.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is no JSON file ({error}): repair or write it again.") from error
    try:
        return _description(document, Path(root))
    except _Wrong as error:
        raise InputError(f"{path}: {error}.") from error


def point_cloud_files(root: str | Path) -> list[str]:
    """List the files of points in a folder and below, as boxes.json would name them, sorted."""
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
        """Load one scan in metres, z up, colours in 0-1 (grey .5 without colours), near the origin (`place_cloud`)."""
        return self.convert(index, self.read(index))

    def read(self, index: int) -> PointCloud:
        """Read the points of one scan in the frame of its file; raise `ScanError` if it is missing or damaged."""
        entry = self._entries[index]
        try:
            return read_point_cloud(self._root / entry.file)
        except InputError as error:
            raise ScanError(entry.name, f"Scan {entry.name}: {error}") from error

    def convert(self, index: int, cloud: PointCloud) -> Scan:
        """Make one scan of its points as `read` returns them; raises `ScanError` like `place_cloud`."""
        entry, described = self._entries[index], self._description
        hint = f'say "colors" in {BOXES_FILE} ({", ".join(COLOR_RANGES)})'
        matrix = upright_matrix(described.up, described.unit)
        placed = place_cloud(entry.name, cloud, matrix, described.colors, colors_hint=hint)
        notes = Counter(placed.scan.notes)
        boxes, labels = _boxes(entry, placed.matrix, UNITS[described.unit], self.spec, notes)
        return replace(placed.scan, boxes=boxes, labels=labels, notes=dict(notes))


def _boxes(
    entry: ScanEntry, matrix: np.ndarray, metres: float, spec: DatasetSpec, notes: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    labels = np.array([class_label(box.label, spec) for box in entry.boxes], np.int32)
    boxes = np.array([box.box for box in entry.boxes], np.float64).reshape(-1, 7)
    for box, label in zip(entry.boxes, labels, strict=True):
        if label < 0:
            notes[f"boxes of the class {box.label!r}, which {spec.name} does not have"] += 1
    with np.errstate(over="ignore", invalid="ignore"):
        boxes[:, :3] = boxes[:, :3] @ matrix[:3, :3].T + matrix[:3, 3]
        boxes[:, 3:6] = boxes[:, 3:6] @ (np.abs(matrix[:3, :3]) > metres / 2).T * metres
        known = labels >= 0
        boxes, labels = boxes[known], labels[known]
        usable, left_out = usable_boxes(boxes)
        notes.update(left_out)
        boxes, labels = boxes[usable], labels[usable]
    if not spec.has_yaw:
        turned = np.abs(np.cos(boxes[:, 6]) * np.sin(boxes[:, 6])) > 1e-6  # one turned by 90 degrees stays itself
        if turned.any():
            notes["boxes with yaw, replaced by the axis-aligned ones that enclose them"] += int(turned.sum())
        boxes = enclosing_boxes(boxes)
    return boxes.astype(np.float32), labels


def class_label(name: str, spec: DatasetSpec) -> int:
    """Return the label of a class by its plain name (`plain_name`); -1 if the spec has no such class."""
    plain = plain_name(name)
    plain = _OTHER_SPELLINGS.get(plain, plain)
    return next((label for label, known in enumerate(spec.classes) if plain_name(known) == plain), -1)


def plain_name(name: str) -> str:
    """Return a class name without case, blanks, hyphens and underscores."""
    return re.sub(r"[\s_-]", "", name.lower())


class _Wrong(Exception):
    """A deviation from the schema."""


def _description(document: Any, root: Path) -> FolderDescription:
    _check_keys(document, "the document", ("version", "up", "unit", "colors", "scans"), ("version", "scans"))
    if document["version"] != BOXES_VERSION:
        raise _Wrong(f"its version is {document['version']!r}, this program reads version {BOXES_VERSION}")
    up = _one_of(document, "up", "z", UPRIGHT)
    unit = _one_of(document, "unit", "m", UNITS)
    colors = cast(ColorRange, _one_of(document, "colors", "auto", COLOR_RANGES))
    if not isinstance(document["scans"], list) or not document["scans"]:
        raise _Wrong("its scans are no list of at least one")
    scans = tuple(_scan_entry(scan, i, root) for i, scan in enumerate(document["scans"]))
    if twice := [name for name, count in Counter(scan.name for scan in scans).items() if count > 1]:
        raise _Wrong(f"scan {', '.join(twice[:3])} is there more than once; names of files without suffix must differ")
    return FolderDescription(up, unit, colors, scans)


def _scan_entry(scan: Any, position: int, root: Path) -> ScanEntry:
    where = f"scan {position + 1}"
    _check_keys(scan, where, ("file", "split", "boxes"), ("file",))
    file = scan["file"]
    if not isinstance(file, str) or not file or "\0" in file:
        raise _Wrong(f"the file of {where} is {file!r}; expected is a path in the folder")
    try:
        inside = (root / file).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        inside = False
    if not inside or Path(file).is_absolute() or ".." in Path(file).parts:
        raise _Wrong(f"the file {file!r} lies outside the folder; copy it there and give its path in the folder")
    split = _one_of(scan, "split", "train", ("train", "val"))
    boxes = scan.get("boxes", [])
    if not isinstance(boxes, list):
        raise _Wrong(f"the boxes of {file} are no list")
    entries = tuple(_box_entry(box, f"box {i + 1} of {file}") for i, box in enumerate(boxes))
    return ScanEntry(file, cast(Literal["train", "val"], split), entries)


def _box_entry(box: Any, where: str) -> BoxEntry:
    if not isinstance(box, dict):
        raise _Wrong(f'{where} is {box!r}; expected is {{"center": ..., "size": ..., "class": ...}}')
    # Programs add keys of their own, such as a score; one spelt almost like one of these is a mistake.
    named = {"class", "name"} if box.keys() & {"class", "name"} else set()
    missing = sorted(_BOX_KEYS - box.keys() - named)
    for key in box.keys() - _BOX_KEYS:
        if close := difflib.get_close_matches(key.lower(), missing, 1, _CLOSE):
            raise _Wrong(f"{where} has the unknown key {key!r}; did you mean {close[0]!r}?")
    if box.get("upright", True) is not True:
        raise _Wrong(f"{where} does not stand upright in its file; turn the file upright and predict its boxes again")
    numbers: list[float] = []
    for key in ("center", "size"):
        values = box.get(key)
        if not isinstance(values, list) or len(values) != 3 or not all(map(_is_number, values)):
            raise _Wrong(f"the {key} of {where} is {values!r}; expected are three numbers")
        numbers += map(_real, values)
    yaw = box.get("yaw", 0.0)
    if not _is_number(yaw):
        raise _Wrong(f"the yaw of {where} is {yaw!r}; expected is a number (radians)")
    label = box.get("class", box.get("name"))
    if not isinstance(label, str):
        raise _Wrong(f"the class of {where} is {label!r}; expected is a name")
    return BoxEntry((*numbers, _real(yaw)), label)


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
        raise _Wrong(f'"{key}" is {value!r}; expected is one of {", ".join(known)}')
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

"""S3DIS as Stanford serves it (Armeni et al., CVPR 2016, Stanford3dDataset_v1.2_Aligned_Version).

    Area_1/office_2/Annotations/  chair_1.txt  wall_3.txt ...   ...   Area_6/

A text file holds one object, a line a point: x y z (m) r g b (0-255). The published files contain a few broken
lines; those are repaired where their meaning is plain and left out otherwise, and both are counted.
"""

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
from jaxtyping import Float

from h2a2_jax.errors import InputError
from h2a2_jax.scans import raw
from h2a2_jax.scans.raw import shown
from h2a2_jax.scans.scan import Scan, ScanError, UnusableScan, is_hidden, scan_errors
from h2a2_jax.scans.specs import S3DIS

REPAIRED = "lines repaired"
DROPPED = "lines that could not be read"

_AREAS = range(1, 7)
_LAYOUT = "Area_1/ to Area_6/ with <room>/Annotations/<class>_<number>.txt"
_ARCHIVES = ("Stanford3dDataset_v1.2_Aligned_Version", "Stanford3dDataset_v1.2")
_OTHER_CLASSES = ("ceiling", "floor", "wall", "beam", "column", "window", "door", "clutter")
_COLUMNS = 6
_BLOCK = 2000  # lines that are parsed at once again if a file has a broken one
_NUMBER = re.compile(rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf)", re.IGNORECASE)
_FOREIGN = re.compile(rb"[^0-9eE.+\-\s]+")
_DIGIT = re.compile(rb"\d")
_PLAIN = b"0123456789eE.+- \t\r\n"


class S3dis:
    """Rooms of S3DIS; a `RawDataset`.

    A room is named by area and folder, such as "Area_1_office_2". Its smallest coordinates become its origin,
    `Scan.transform` is the shift. `notes` says how many of the six areas are missing.
    """

    def __init__(self, root: str | Path, val_area: int = 5):
        """List the rooms: those of `val_area` are the "val" split, the others "train".

        The root is the folder with the areas, or the one the archive was unpacked in.
        """
        self._root = Path(root)
        raw.check_folder(self._root, _LAYOUT)
        if val_area not in _AREAS:
            raise InputError(f"There is no area {val_area} of S3DIS for validation: use 1 to 6; 5 is usual.")
        unpacked = [self._root / archive for archive in _ARCHIVES if (self._root / archive).is_dir()]
        if unpacked and not (self._root / f"Area_{val_area}").is_dir():
            self._root = unpacked[0]
        rooms = {area: _rooms(self._root / f"Area_{area}") for area in _AREAS}
        missing = [f"Area_{area}" for area in _AREAS if not rooms[area]]
        others = [f"Area_{area}_{room}" for area in _AREAS for room in rooms[area] if area != val_area]
        if not rooms[val_area] or not others:
            raise InputError(
                f"There are no rooms in {', '.join(missing)} of {shown(self._root)}: an S3DIS folder holds {_LAYOUT}."
            )
        self.spec = S3DIS
        self.splits = {"train": tuple(others), "val": tuple(f"Area_{val_area}_{room}" for room in rooms[val_area])}
        self.notes = {"areas missing": len(missing)} if missing else {}

    def load(self, name: str) -> Scan:
        """Parse one room: the points of all objects, by file name, and the boxes of the objects of the five classes."""
        if not any(name in names for names in self.splits.values()):
            raise ScanError(name, f"There is no room {name} in {shown(self._root)}: names look like Area_1_office_2.")
        with scan_errors(name):
            notes: Counter[str] = Counter()
            area, room = name[:6], name[7:]
            folder = self._root / area / room / "Annotations"
            files = sorted(path for path in folder.glob("*.txt") if not is_hidden(path.name))
            if not folder.is_dir():
                raise UnusableScan(f"has no folder {shown(folder)} with text files, it is missing: unpack it again.")
            if not files:
                raise UnusableScan(
                    f"has no files <class>_<number>.txt in {shown(folder)}, they are missing: unpack that room again."
                )
            objects = [_read_object(path, notes) for path in files]
            instances = np.repeat(np.arange(len(files)), [len(rows) for rows in objects])
            rows = np.concatenate(objects)
            usable = raw.usable_points(rows[:, :3], notes)
            if not np.abs(rows[:, 3:] - 127.5).max(initial=0) <= 127.5:  # so if one of them is NaN
                in_range = (np.abs(rows[:, 3:] - 127.5) <= 127.5).all(axis=1)
                notes["points with colours outside 0-255"] += int((usable & ~in_range).sum())
                usable &= in_range
            if not usable.any():
                raise UnusableScan(f"has no usable point in {shown(folder)}: unpack that room again.")
            if not usable.all():
                rows, instances = rows[usable], instances[usable]
            origin = rows[:, :3].min(axis=0)
            points = rows[:, :3] - origin
            boxes, filled = raw.instance_boxes(points, instances, len(files))
            labels = np.array([_label(path, notes) for path in files], np.int32)
            sized = (boxes[:, 3:6] > 0).all(axis=1)
            notes[raw.NO_POINTS] += int((~filled).sum())
            notes[raw.NO_BOX] += int(((labels >= 0) & filled & ~sized).sum())
            kept = (labels >= 0) & filled & sized
            transform = np.eye(4, dtype=np.float32)
            transform[:3, 3] = -origin
            return Scan(
                name,
                points.astype(np.float32),
                rows[:, 3:].astype(np.float32) / np.float32(255),
                boxes[kept].astype(np.float32),
                labels[kept],
                transform,
                raw.counted(notes),
            )


def _rooms(area: Path) -> list[str]:
    """List the names of the folders in an area, sorted."""
    if not area.is_dir():
        return []
    rooms = sorted(path for path in area.iterdir() if path.is_dir() and not is_hidden(path.name))
    for room in rooms:
        try:
            room.name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{shown(area)} holds the folder {shown(room.name)}, whose name is no UTF-8: give the room a name of "
                "plain letters."
            ) from None
    return [room.name for room in rooms]


def _label(path: Path, notes: Counter[str]) -> int:
    """Return the label of an object by its file's name; -1 for one of no class, which is counted."""
    word = path.stem.rpartition("_")[0] or path.stem
    if word in S3DIS.classes:
        return S3DIS.classes.index(word)
    notes[raw.NO_CLASS] += 1
    notes["objects of an unknown name, taken as clutter"] += word not in _OTHER_CLASSES
    return -1


def _read_object(path: Path, notes: Counter[str]) -> Float[np.ndarray, "m 6"]:
    """Read the rows of one file; broken lines are repaired or left out, and counted."""
    content = raw.read_file(path)
    if not content.strip():
        return np.zeros((0, _COLUMNS))
    if (rows := _parse(content)) is not None:
        return rows
    lines = [line for line in content.splitlines() if line.strip()]
    blocks = []
    for start in range(0, len(lines), _BLOCK):
        block = lines[start : start + _BLOCK]
        if (rows := _parse(b"\n".join(block))) is None:
            read = [_read_line(line) for line in block]
            notes[DROPPED] += sum(numbers is None for numbers, _ in read)
            notes[REPAIRED] += sum(numbers is not None and not whole for numbers, whole in read)
            rows = np.array([numbers for numbers, _ in read if numbers is not None]).reshape(-1, _COLUMNS)
        blocks.append(rows)
    rows = np.concatenate(blocks)
    if not len(rows):
        raise UnusableScan(f"has no line of six numbers (x y z r g b) in {shown(path)}: unpack that room again.")
    return rows


def _parse(content: bytes) -> Float[np.ndarray, "m 6"] | None:
    """Parse text in which every line that is not blank has six plain numbers; None for any other text."""
    # NumPy takes other bytes for a blank too; such a repair should be counted.
    if content.translate(None, _PLAIN):
        return None
    try:
        rows = np.loadtxt(io.BytesIO(content), comments=None, ndmin=2)
    except ValueError:
        return None
    return rows if rows.shape[1] == _COLUMNS else None


def _read_line(line: bytes) -> tuple[list[float] | None, bool]:
    """Read the six numbers of a line.

    Foreign bytes, such as the NUL between two numbers of a published file, stand for a blank; where that makes too
    many numbers, for nothing. The numbers are None if they are not plain; True follows if no repair was needed.
    """
    for repair in (None, b" ", b""):
        words = line.split()
        if repair is not None:
            words = [word for word in _FOREIGN.sub(repair, line).split() if _DIGIT.search(word)]
        if len(words) == _COLUMNS and all(_NUMBER.fullmatch(word) for word in words):
            return [float(word) for word in words], repair is None
    return None, False

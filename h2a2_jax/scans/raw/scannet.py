"""ScanNet v2 as its download script leaves it (Dai et al., CVPR 2017, http://www.scan-net.org).

    scans/scene0000_00/  scene0000_00_vh_clean_2.ply  scene0000_00_vh_clean_2.0.010000.segs.json
                         scene0000_00.aggregation.json  scene0000_00.txt
    scannetv2-labels.combined.tsv  scannetv2_train.txt  scannetv2_val.txt

An object is a group of segments, a segment a set of vertices of the mesh. Its box is axis-aligned and encloses
its vertices after the scan's own alignment with the walls. Where objects share a segment, the last one in the
file has it.
"""

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.errors import InputError, quoted, reason_of
from h2a2_jax.scans import raw
from h2a2_jax.scans.raw import shown
from h2a2_jax.scans.scan import Scan, ScanError, UnusableScan, scan_errors
from h2a2_jax.scans.specs import SCANNET
from h2a2_jax.untrusted import read_bytes

NYU40_IDS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
"""NYU40 id of each class of the detection protocol, in the order of the labels."""

_LABELS = "scannetv2-labels.combined.tsv"
_LAYOUT = f"scans/<scan>/, {_LABELS}, scannetv2_train.txt and scannetv2_val.txt"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_ALIGNMENT = re.compile(r"^\s*axisAlignment\s*=(.*)$", re.MULTILINE)


class _Group(NamedTuple):
    """One annotated object: its name and its segments."""

    label: str
    segments: np.ndarray


class ScanNet:
    """Scans of ScanNet v2; a `RawDataset`.

    Points and boxes are in the frame aligned with the walls, `Scan.transform` is the alignment. The scans of a split
    are in the order of the official lists; opening leaves nothing out.
    """

    def __init__(self, root: str | Path):
        """Read the lists of scans and the table of labels.

        The two lists may also lie in `meta_data` or `Tasks/Benchmark` of the root, the folder with `scans`.
        """
        self._root = Path(root)
        raw.check_folder(self._root, _LAYOUT)
        if not (self._root / "scans").is_dir():
            raise InputError(f"There is no folder scans in {shown(root)}: a ScanNet folder holds {_LAYOUT}.")
        self._label_of = _read_labels(self._root / _LABELS)
        self.spec, self.notes = SCANNET, dict[str, int]()
        self.splits = {split: _read_split(self._root, split) for split in ("train", "val")}
        if both := sorted(set(self.splits["train"]) & set(self.splits["val"])):
            raise InputError(
                f"{len(both)} scans such as {both[0]} are in scannetv2_train.txt and in scannetv2_val.txt: "
                "fetch both lists again."
            )

    def load(self, name: str) -> Scan:
        """Parse one scan: all vertices with colours, and the boxes of the objects of the 18 classes, by object id."""
        if not any(name in names for names in self.splits.values()):
            raise ScanError(name, f"There is no scan {name} in the lists of {shown(self._root)}: check its name.")
        with scan_errors(name):
            folder = self._root / "scans" / name
            if not folder.is_dir():
                raise UnusableScan(f"has no folder {shown(folder)}: download it, or take it off the list.")
            notes: Counter[str] = Counter()
            mesh = folder / f"{name}_vh_clean_2.ply"
            alignment = _read_alignment(folder / f"{name}.txt", notes)
            vertices, colors = raw.read_vertices(mesh)
            segments = _read_segments(folder / f"{name}_vh_clean_2.0.010000.segs.json", len(vertices))
            groups = _read_groups(folder / f"{name}.aggregation.json", notes)
            usable = raw.usable_points(vertices, notes)
            if not usable.any():
                raise UnusableScan(f"has no usable vertex in {shown(mesh)}: download it again.")
            vertices, colors, segments = vertices[usable], colors[usable], segments[usable]
            points = vertices @ alignment[:3, :3].T + alignment[:3, 3]
            boxes, labels = self._boxes(points, segments, groups, notes)
            return Scan(
                name,
                points.astype(np.float32),
                colors.astype(np.float32) / np.float32(255),
                boxes,
                labels,
                alignment.astype(np.float32),
                raw.counted(notes),
            )

    def _boxes(
        self,
        points: Float[np.ndarray, "m 3"],
        segments: Int[np.ndarray, " m"],
        groups: dict[int, _Group],
        notes: Counter[str],
    ) -> tuple[np.ndarray, np.ndarray]:
        known, segment_of = np.unique(segments, return_inverse=True)
        owner = np.full(len(known), -1)
        for number, group in enumerate(groups.values()):
            place = np.minimum(np.searchsorted(known, group.segments), len(known) - 1)
            owner[place[known[place] == group.segments]] = number
        boxes, filled = raw.instance_boxes(points, owner[segment_of], len(groups))
        labels = np.array([self._label_of.get(group.label, -2) for group in groups.values()], np.int32)
        sized = (boxes[:, 3:6] > 0).all(axis=1)
        notes["objects whose name is not in the table of labels"] += int((labels == -2).sum())
        notes[raw.NO_CLASS] += int((labels == -1).sum())
        notes[raw.NO_POINTS] += int(((labels >= 0) & ~filled).sum())
        notes[raw.NO_BOX] += int(((labels >= 0) & filled & ~sized).sum())
        kept = (labels >= 0) & filled & sized
        by_id = np.argsort(np.array(list(groups), np.int64), kind="stable")
        rows = by_id[kept[by_id]]
        return boxes[rows].astype(np.float32), labels[rows]


def _read_text(path: Path, what: str) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"There is no file {shown(path)}: {what}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{shown(path)} cannot be read as text ({reason_of(error)}): {what}.") from None


def _read_labels(path: Path) -> dict[str, int]:
    """Read the label of each raw category; -1 for one of no class."""
    text = _read_text(path, "fetch it with ScanNet's download script, option --label_map")
    rows = csv.DictReader(io.StringIO(text), delimiter="\t")
    columns = rows.fieldnames or ()
    if missing := [column for column in ("raw_category", "nyu40id") if column not in columns]:
        raise InputError(
            f"{shown(path)} has no column {' and no column '.join(missing)} (it has "
            f"{quoted(', '.join(columns)) or 'none'}): "
            "fetch it again with ScanNet's download script, option --label_map."
        )
    # A category without a number (an unfinished line) is of no class.
    numbers = {row["raw_category"]: row["nyu40id"] for row in rows if row["raw_category"]}
    label_of = {str(number): label for label, number in enumerate(NYU40_IDS)}
    return {category: label_of.get((number or "").strip(), -1) for category, number in numbers.items()}


def _read_split(root: Path, split: str) -> tuple[str, ...]:
    file = f"scannetv2_{split}.txt"
    places = (root / place / file for place in ("", "meta_data", "Tasks/Benchmark"))
    path = next(filter(Path.is_file, places), root / file)
    fetch = (
        "fetch scannetv2_train.txt and scannetv2_val.txt from "
        f"https://github.com/ScanNet/ScanNet/tree/master/Tasks/Benchmark into {shown(root)}"
    )
    names = tuple(_read_text(path, fetch).split())
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise InputError(f"{shown(path)} lists {twice} twice: {fetch}.")
    wrong = next((name for name in names if not _NAME.fullmatch(name)), None)
    if wrong or not names:
        what = f"{quoted(repr(wrong), 100)}, which is no name of a scan" if wrong else "no scan"
        raise InputError(f"{shown(path)} lists {what}: {fetch}.")
    return names


def _read_alignment(path: Path, notes: Counter[str]) -> Float[np.ndarray, "4 4"]:
    found = _ALIGNMENT.search(raw.read_file(path).decode("utf-8", "replace"))
    if not found:
        notes["alignment missing, identity taken"] += 1
        return np.eye(4)
    try:
        matrix = np.array([float(number) for number in found[1].split()]).reshape(4, 4)
    except ValueError:
        raise UnusableScan(
            f"has {len(found[1].split())} entries after axisAlignment in {shown(path)}, but a matrix has "
            "16 numbers: download the file again."
        ) from None
    rotation = matrix[:3, :3]
    rigid = np.isfinite(matrix).all() and np.abs(rotation @ rotation.T - np.eye(3)).max() < 0.05
    if not rigid or np.linalg.det(rotation) < 0 or np.abs(matrix[3] - (0, 0, 0, 1)).max() > 1e-6:
        raise UnusableScan(
            f"has an axisAlignment in {shown(path)} that is no rotation and translation: download the file again."
        )
    return matrix


def _read_segments(path: Path, vertices: int) -> Int[np.ndarray, " m"]:
    segments = _integers(raw.read_object(path).get("segIndices"))
    if segments is None or len(segments) != vertices:
        found = "no list segIndices" if segments is None else f"{len(segments)} segment numbers"
        raise UnusableScan(
            f"has {found} in {shown(path)}, but {vertices} vertices in its PLY file: download both again."
        )
    return segments


def _read_groups(path: Path, notes: Counter[str]) -> dict[int, _Group]:
    """Read objects by id, in the order in which they claim their segments."""
    groups: dict[int, _Group] = {}
    content = raw.read_object(path).get("segGroups")
    for entry in content if isinstance(content, list) else [None]:
        entry = entry if isinstance(entry, dict) else {}
        number, label = entry.get("objectId"), entry.get("label")
        segments = _integers(entry.get("segments"))
        if type(number) is not int or not isinstance(label, str) or segments is None or abs(number) >= 2**63:
            raise UnusableScan(
                f"has objects in {shown(path)} without objectId, label or segments, which a list "
                "segGroups holds for each: download it again."
            )
        notes["objects replaced by a later one of the same id"] += number in groups
        groups[number] = _Group(label, segments)
    return groups


def _integers(values: object) -> Int[np.ndarray, " n"] | None:
    """Return a flat array if `values` is a list of integers."""
    try:
        array = np.array(values if isinstance(values, list) else None)
    except (ValueError, OverflowError):
        return None
    fits = array.ndim == 1 and (not array.size or array.dtype == np.int64)
    return array.astype(np.int64) if fits else None

"""ARKitScenes' 3D object detection set as its script downloads it (Baruch et al., NeurIPS Datasets 2021).

    3dod/Training/40753679/    40753679_3dod_mesh.ply  40753679_3dod_annotation.json  ...
    3dod/Validation/41069021/  ...

A mesh is what the tablet made of its LiDAR and camera, in metres, z up. An annotation is a JSON object with `skipped`
and `data`, a list of objects with `label` and `segments.obbAligned`: `centroid` (3 numbers, m), `axesLengths` (3, m)
and `normalizedAxes` (9). The nine numbers are a matrix R by rows, and row i is the direction of the box's axis i: the
corners of a box are centroid + R^T (+-axesLengths / 2), as in `compute_box_3d` of the authors' repository
(github.com/apple/ARKitScenes, threedod/benchmark_scripts/utils/box_utils.py). The third axis is vertical, so that a box
has one angle, the yaw of its first axis: atan2(R[0, 1], R[0, 0]), counter-clockwise.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int32

from h2a2_jax.errors import InputError
from h2a2_jax.scans import raw
from h2a2_jax.scans.raw import shown
from h2a2_jax.scans.scan import Scan, ScanError, UnusableScan, is_hidden, scan_errors
from h2a2_jax.scans.specs import ARKITSCENES, class_label

SKIPPED = "scans that the annotators skipped"
TILTED = "boxes that do not stand upright"

_FOLDERS = {"train": "Training", "val": "Validation"}
_LAYOUT = "3dod/Training/ and 3dod/Validation/ with <scan>/<scan>_3dod_mesh.ply and <scan>_3dod_annotation.json"
_SKIPPED = re.compile(rb'"skipped"\s*:\s*true')
_MOST_TILTED = 0.05  # of the sine of the angle between the third axis and the vertical: 3 degrees
_NUMBERS = {"centroid": 3, "axesLengths": 3, "normalizedAxes": 9}


class ArkitScenes:
    """Scans of ARKitScenes; a `RawDataset`.

    Scans that the annotators skipped are in neither split, and counted in `notes`. A scan without boxes stays.
    """

    def __init__(self, root: str | Path):
        """List the scans; the root is the folder with `Training` and `Validation`, or the one with `3dod`."""
        root = Path(root)
        raw.check_folder(root, _LAYOUT)
        self._root = root / "3dod" if (root / "3dod").is_dir() else root
        if missing := [folder for folder in _FOLDERS.values() if not (self._root / folder).is_dir()]:
            raise InputError(
                f"There is no folder {' and no folder '.join(missing)} in {shown(self._root)}: an ARKitScenes folder "
                f"holds {_LAYOUT}."
            )
        self.spec = ARKITSCENES
        found = {split: self._list(folder) for split, folder in _FOLDERS.items()}
        self.splits = {split: tuple(name for name, skipped in scans if not skipped) for split, scans in found.items()}
        if both := sorted(set(self.splits["train"]) & set(self.splits["val"])):
            raise InputError(
                f"{len(both)} scans such as {both[0]} are in Training and in Validation of {shown(self._root)}: "
                "download both again."
            )
        self.notes = raw.counted(Counter({SKIPPED: sum(skipped for scans in found.values() for _, skipped in scans)}))

    def load(self, name: str) -> Scan:
        """Parse one scan: all vertices with colours, and the boxes of the 17 classes in the order of the file."""
        split = next((split for split, names in self.splits.items() if name in names), None)
        if split is None:
            raise ScanError(name, f"There is no scan {name} in {shown(self._root)}: check its name.")
        with scan_errors(name):
            folder = self._root / _FOLDERS[split] / name
            notes: Counter[str] = Counter()
            mesh = folder / f"{name}_3dod_mesh.ply"
            boxes, labels = _read_boxes(folder / f"{name}_3dod_annotation.json", notes)
            vertices, colors = raw.read_vertices(mesh)
            usable = raw.usable_points(vertices, notes)
            if not usable.any():
                raise UnusableScan(f"has no usable vertex in {shown(mesh)}: download it again.")
            points, colors = vertices[usable].astype(np.float32), colors[usable].astype(np.float32) / np.float32(255)
            return Scan(name, points, colors, boxes, labels, notes=raw.counted(notes))

    def _list(self, folder: str) -> list[tuple[str, bool]]:
        """List the scans of a folder, each with True if it was skipped."""
        names = sorted(path.name for path in (self._root / folder).iterdir() if path.is_dir())
        return [(name, self._is_skipped(folder, name)) for name in names if not is_hidden(name)]

    def _is_skipped(self, folder: str, name: str) -> bool:
        path = self._root / folder / name / f"{name}_3dod_annotation.json"
        try:
            # Few are: parsing the files of all of the 5,047 scans would take a while.
            return bool(_SKIPPED.search(raw.read_file(path))) and raw.read_object(path).get("skipped") is True
        except UnusableScan:
            return False  # `load` gives the reason


def _read_boxes(path: Path, notes: Counter[str]) -> tuple[Float32[np.ndarray, "g 7"], Int32[np.ndarray, " g"]]:
    """Read the boxes of the classes of the dataset, and count those that are left out in `notes`."""
    objects = raw.read_object(path).get("data")
    if not isinstance(objects, list):
        raise UnusableScan(f"has no list data in {shown(path)}, which holds its boxes: download it again.")
    boxes, labels = [], []
    for entry in objects:
        if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
            raise UnusableScan(f"has an object without a label in {shown(path)}: download it again.")
        label = class_label(entry["label"].replace("/", "_"), ARKITSCENES)
        if label < 0:
            notes[raw.NO_CLASS] += 1
            continue
        centroid, lengths, axes = _numbers_of(entry, path)
        matrix = axes.reshape(3, 3)
        values = np.concatenate([centroid, lengths, [np.arctan2(matrix[0, 1], matrix[0, 0])]])
        near = np.abs(values[:6]).max() <= raw.FAR  # not so if one of them is NaN
        if not near or not np.isfinite(axes).all() or (lengths <= 0).any():
            notes[raw.NO_BOX] += 1
        elif np.abs(matrix @ matrix.T - np.eye(3)).max() > 0.05 or np.hypot(*matrix[2, :2]) > _MOST_TILTED:
            notes[TILTED] += 1
        else:
            boxes.append(values)
            labels.append(label)
    return np.array(boxes, np.float32).reshape(-1, 7), np.array(labels, np.int32)


def _numbers_of(entry: dict[str, Any], path: Path) -> list[Float[np.ndarray, " n"]]:
    """Return the centroid, the lengths and the axes of an object."""
    segments = entry.get("segments")
    box = segments.get("obbAligned") if isinstance(segments, dict) else None
    found = []
    for key, count in _NUMBERS.items():
        values = box.get(key) if isinstance(box, dict) else None
        is_list = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
        try:
            numbers = np.array(values if is_list else [], np.float64)
        except OverflowError:
            numbers = np.full(count, np.inf)
        if len(numbers) != count:
            raise UnusableScan(
                f"has a {entry['label']} without segments.obbAligned.{key} of {count} numbers in {shown(path)}: "
                "download it again."
            )
        found.append(numbers)
    return found

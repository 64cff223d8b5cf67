"""Scans of folders prepared by mmdetection3d or UniDet3D, in either of mmdetection3d's two annotation formats.

    scannet/  scannet_infos_train.pkl  scannet_infos_val.pkl  points/scene0000_00.bin ...
    sunrgbd/  sunrgbd_infos_train.pkl  sunrgbd_infos_val.pkl  points/000017.bin ...
    s3dis/    s3dis_infos_Area_1.pkl ... s3dis_infos_Area_6.pkl  points/Area_1_office_2.bin ...
              (or s3dis_sp_infos_Area_1.pkl ..., as UniDet3D calls them)
    arkitscenes/     arkitscenes_offline_train_infos.pkl  arkitscenes_offline_val_infos.pkl
                     offline_prepared_data/40753679_point.bin ...   (or arkitscenes_offline_infos_train.pkl ...)
    multiscan/bins/  multiscan_infos_train.pkl  multiscan_infos_val.pkl  points/scene_00000_00.bin ...
    3rscan/          3rscan_infos_train.pkl  3rscan_infos_val.pkl  points/0958220d-e2c2-2de1-9710-c37018da1883.bin ...
    scannetpp/bins/  scannetpp_infos_train.pkl  scannetpp_infos_val.pkl  points/0a5c013435.bin ...

A `.bin` holds float32 rows x, y, z (m), r, g, b. Version 2 annotations are {metainfo, data_list}; version 1 are a
list with `annos`. In both a box is its gravity centre, its sizes and (SUN RGB-D, ARKitScenes) its yaw,
counter-clockwise. Version 1 files written before mmdetection3d 1.0 carry the opposite yaw and nothing tells them apart:
write those again. Datasets without yaw take the axis-aligned boxes that enclose turned ones.

Classes go by their names, where a file has them (`metainfo["categories"]` or `["classes"]`, `annos["name"]`), else by
their numbers, in the order of the dataset. In the last four folders, as UniDet3D writes them, a number is no position
in that order. Their files must be of version 2, name all classes in `metainfo["categories"]`, and have boxes of as many
numbers as boxes of their dataset have.

Of the paths in an info file, with either slash, only the name of the file counts, which lies in `points/` or
`offline_prepared_data/`.

The command lays out single scans and their annotations as such a folder:

    python -m h2a2_jax.scans.mmdet3d --scan scene0000_00.bin --infos scannet_infos.pkl \
        --dataset scannet --output data/scannet

The train and the validation info files name the same scans: good for trying things out, not for measuring.
"""

import argparse
import os
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats.colors import GREY, scale_in_dataset
from h2a2_jax.scans.frame import NO_COLORS
from h2a2_jax.scans.scan import (
    ENCLOSED,
    FAR_POINTS,
    NOT_FINITE,
    Scan,
    UnusableScan,
    beyond_a_turn,
    enclosing_boxes,
    scan_errors,
    some,
    usable_boxes,
    within_reach,
)
from h2a2_jax.scans.specs import ALL_SPECS, DatasetSpec, class_label, dataset_spec, foreign_boxes, plain_name
from h2a2_jax.untrusted import read_bytes
from h2a2_jax.untrusted.restricted_pickle import load_plain_pickle

_COLUMNS = 6
_ROW_BYTES = 4 * _COLUMNS
_LONGEST_STEM = 251  # bytes that file systems take, without ".bin"
_NO_CLASS = "boxes of no class of the dataset"
_OTHER_NUMBER = "boxes whose class has another number in the dataset, taken by its name"
_NO_YAW = "boxes of six numbers, yaw 0 taken"
_NO_ALIGNMENT = "scans without an alignment, taken as aligned"
_STRICT = ("arkitscenes", "multiscan", "3rscan", "scannetpp")
"""Datasets whose files are written by UniDet3D alone, so that anything else in them is a mistake."""


class Mmdet3dFolder:
    """Scans of one prepared folder.

    The order is that of the info files. `__getitem__` raises `ScanError` for a scan that cannot be used. `classes` are
    the names that the boxes have in the info files; `warnings` are sentences on the source as a whole.
    """

    def __init__(self, root: str | Path, info_file: str | Sequence[str], spec: DatasetSpec):
        """Read the annotations and check that every scan's file is there.

        `info_file` is the name of the info file in the folder, or several in order (S3DIS areas).
        """
        self.spec = spec
        self._points = Path(root) / points_folder(spec)
        files = (info_file,) if isinstance(info_file, str) else tuple(info_file)
        if not os.path.isdir(self._points):
            raise InputError(
                f"There is no folder {self._points}: a prepared {spec.name} folder holds {', '.join(files)} "
                f"and {self._points.name}/<scan>.bin."
            )
        entries = [entry for file in files for entry in _read_infos(Path(root) / file, spec)]
        self.classes = tuple(sorted({name for entry in entries for name in entry.classes if name is not None}))
        self.warnings = []
        if any(entry.is_numbered for entry in entries):
            self.warnings.append(
                f"The info files do not name the classes of all boxes: numbers are taken in the order of {spec.name} "
                f"(0 {spec.classes[0]}, 1 {spec.classes[1]}, ...)."
            )
        self._infos = [_scan_info(entry, spec) for entry in entries]
        if not self._infos:
            raise InputError(f"{', '.join(files)} in {root} name no scan: prepare the folder again.")
        if twice := [name for name, count in Counter(info.name for info in self._infos).items() if count > 1]:
            raise InputError(
                f"{', '.join(files)} in {root} name {len(twice)} scans more than once ({some(twice)}): "
                "prepare the folder again."
            )
        self.names = [info.name for info in self._infos]
        if missing := [info.name for info in self._infos if not os.path.isfile(self._path(info.name))]:
            raise InputError(
                f"{len(missing)} of the {len(self._infos)} scans named in {', '.join(files)} have no .bin file in "
                f"{self._points} ({some(missing)}): finish preparing the folder."
            )

    def __len__(self) -> int:
        return len(self._infos)

    def __getitem__(self, index: int) -> Scan:
        """Load one scan, in the frame of its boxes.

        Points with a NaN or infinite coordinate or colour are dropped and counted in `Scan.notes`.
        """
        info = self._infos[index]
        with scan_errors(info.name):
            rows = self._read(info.name)
            notes = dict(info.notes)
            finite = np.isfinite(rows).all(axis=1)
            if not finite.all():
                notes[NOT_FINITE] = int((~finite).sum())
                rows = rows[finite]
            if len(rows) == 0:
                raise UnusableScan(f"has no usable point: {self._path(info.name)} is empty.")
            colors = self._unit_colors(info.name, rows[:, 3:], notes)
            with np.errstate(over="ignore"):  # beyond float32 is beyond reach too
                points = rows[:, :3] @ info.transform[:3, :3].T + info.transform[:3, 3]
            near = within_reach(info.name, np.nan_to_num(points, nan=np.inf))
            if not near.all():
                notes[FAR_POINTS] = int((~near).sum())
                points, colors = points[near], colors[near]
            return replace(info, points=points, colors=colors, notes=notes)

    def _unit_colors(self, name: str, values: Float32[np.ndarray, "m 3"], notes: dict[str, int]) -> np.ndarray:
        """Scale colours to 0-1 by the dataset's scale, or by their own with a note."""
        usual = self.spec.color_scale
        full = scale_in_dataset(values, usual)
        if full is None:
            raise UnusableScan(
                f"has colours from {values.min():g} to {values.max():g}, but {self.spec.name} files hold 0 to "
                f"{usual:g}: rescale them{self._other_type(name)}."
            )
        if not values.any():
            notes[NO_COLORS] = 1
            return np.full_like(values, GREY)
        if full != usual:
            notes[f"scans with colours of 0 to {full:g}, where {self.spec.name} has 0 to {usual:g}"] = 1
        if clipped := int(((values < 0) | (values > full)).sum()):
            notes["colour values outside their range, clipped"] = clipped
        return np.clip(values / np.float32(full), 0, 1)

    def _path(self, name: str) -> Path:
        return self._points / f"{name}.bin"

    def _read(self, name: str) -> np.ndarray:
        path = self._path(name)
        try:
            content = read_bytes(path, growth=3)
        except OSError as error:
            raise UnusableScan(f"cannot be read from {path}: {error.strerror}; check the file.") from error
        if len(content) % _ROW_BYTES:
            raise UnusableScan(
                f"is cut off: {path} has {len(content)} bytes, which is no multiple of the {_ROW_BYTES} "
                "of a point (x, y, z, r, g, b in float32); copy it again."
            )
        return np.frombuffer(content, "<f4").reshape(-1, _COLUMNS).astype(np.float32)

    def _other_type(self, name: str) -> str:
        """Return a hint if the file would make sense in float64."""
        if self._path(name).stat().st_size % (2 * _ROW_BYTES):
            return ""
        values = np.fromfile(self._path(name), "<f8")
        plausible = np.isfinite(values).all() and np.abs(values).max() < 1e4 and np.abs(values).max() > 1e-4
        return ", or, for it looks like float64, write it in float32" if plausible else ""


POINTS_FOLDERS = ("points", "offline_prepared_data")
"""Folders that point clouds lie in; the second is that of ARKitScenes."""

_INFO_FILES: Mapping[str, tuple[str, ...]] = {
    "s3dis": ("s3dis_infos_Area_{area}.pkl", "s3dis_sp_infos_Area_{area}.pkl"),
    "arkitscenes": ("arkitscenes_offline_{split}_infos.pkl", "arkitscenes_offline_infos_{split}.pkl"),
}
"""Names of the info files of a dataset, the usual ones first; those of others are <dataset>_infos_<split>.pkl."""


def points_folder(spec: DatasetSpec) -> str:
    """Return the name of the folder that the point clouds of a dataset lie in."""
    return POINTS_FOLDERS[spec.name == "arkitscenes"]


def preparer(spec: DatasetSpec) -> str:
    """Return the name of the program that prepares the folders of a dataset, for sentences."""
    return "UniDet3D" if spec.name in _STRICT else "mmdetection3d"


def default_info_files(
    spec: DatasetSpec, split: Literal["train", "val"], root: str | Path | None = None
) -> tuple[str, ...]:
    """Return the names of the info files of a split: of those that a dataset may have, the ones in `root`, if any.

    Area 5 is the validation area of S3DIS.
    """
    areas = (0,) if spec.name != "s3dis" else (1, 2, 3, 4, 6) if split == "train" else (5,)
    usual, *others = [
        tuple(pattern.format(split=split, area=area) for area in areas) for pattern in _info_patterns(spec)
    ]
    if root is None or (Path(root) / usual[0]).is_file():
        return usual
    return next((files for files in others if (Path(root) / files[0]).is_file()), usual)


def is_info_file(name: str, spec: DatasetSpec) -> bool:
    """Return True for a file that is called as the info files of a dataset are, of any split."""
    return name.endswith(".pkl") and any(
        name.startswith(pattern.partition("{")[0].rstrip("_")) for pattern in _info_patterns(spec)
    )


def _info_patterns(spec: DatasetSpec) -> tuple[str, ...]:
    return _INFO_FILES.get(spec.name, (f"{spec.name}_infos_{{split}}.pkl",))


class _Entry(NamedTuple):
    """One scan of an info file: boxes, and of the class of each its number (-1: none) and its name (None: unknown).

    `unknown` are the numbers that the categories of the file do not have, -1 aside.
    """

    name: str
    boxes: Float[np.ndarray, "n 7"]
    has_yaw: bool
    labels: np.ndarray
    classes: Sequence[str | None]
    alignment: Float32[np.ndarray, "4 4"] | None
    unknown: tuple[int, ...] = ()

    @property
    def is_numbered(self) -> bool:
        """True if some box has the number of a class alone."""
        return any(name is None and label >= 0 for name, label in zip(self.classes, self.labels, strict=True))


def _read_infos(path: Path, spec: DatasetSpec) -> list[_Entry]:
    """Read an info file of version 1 or 2 in its order."""
    content = load_plain_pickle(path)
    if spec.name in _STRICT and isinstance(content, list):
        raise InputError(
            f"{path} is of version 1, but info files of {spec.name} are of version 2 (metainfo and data_list): prepare "
            "the folder again."
        )
    try:
        if isinstance(content, Mapping) and "data_list" in content:
            _refuse_mixture(content["data_list"], "pts_path", 2)
            names = _class_names(content.get("metainfo") or {})
            entries = [_read_v2(entry, names) for entry in content["data_list"]]
        elif isinstance(content, list):
            _refuse_mixture(content, "lidar_points", 1)
            entries = [_read_v1(entry) for entry in content]
        else:
            raise TypeError("neither {metainfo, data_list} nor a list")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"it has no {quoted(error)}" if isinstance(error, KeyError) else quoted(error)
        raise InputError(
            f"{path} is no mmdetection3d info file of version 1 or 2 ({what}): prepare the folder again."
        ) from error
    if spec.name in _STRICT and (problem := _not_of_dataset(content.get("metainfo") or {}, entries, spec)):
        raise InputError(
            f"{path} is no info file of {spec.name}: {problem}; prepare the folder again, or name its dataset."
        )
    boxes = np.concatenate([np.zeros((0, 7)), *(entry.boxes for entry in entries)])
    if problem := beyond_a_turn(boxes[usable_boxes(boxes)[0], 6]):
        raise InputError(f"{path}: {problem}")
    return entries


def _not_of_dataset(metainfo: Mapping[str, Any], entries: Sequence[_Entry], spec: DatasetSpec) -> str | None:
    """Return what is not as UniDet3D writes files of a dataset; None if nothing is."""
    stated = metainfo.get("dataset")
    for other in ALL_SPECS if isinstance(stated, str) else ():
        if other.name != spec.name and plain_name(str(stated)).removesuffix("offline") == other.name:
            return f"its metainfo calls its dataset {stated}"
    named = {class_label(name, spec) for name in _class_names(metainfo).values()}
    if not named:
        return 'it has no metainfo["categories"], which says what the numbers of its labels mean'
    if missing := [name for label, name in enumerate(spec.classes) if label not in named]:
        return f"its categories lack {len(missing)} of the {spec.num_classes} classes ({some(missing)})"
    for entry in entries:
        if entry.unknown:
            return f"scan {entry.name} has the label {entry.unknown[0]}, which its categories do not have"
        if len(entry.boxes) and entry.has_yaw != spec.has_yaw:
            found, expected, why = (7, 6, "no yaw") if entry.has_yaw else (6, 7, "a yaw")
            return (
                f"boxes of scan {entry.name} have {found} numbers, {expected} expected: those of {spec.name} have {why}"
            )
    return None


def _refuse_mixture(entries: Iterable[Any], key: str, version: int) -> None:
    if other := [i for i, entry in enumerate(entries) if key in entry]:
        raise ValueError(f"it is of version {version}, but {len(other)} entries, the first at {other[0]}, are not")


def _class_names(metainfo: Mapping[str, Any]) -> dict[int, str]:
    """Read what the numbers of classes mean in a file of version 2: {name: number}, or a list of names in order."""
    keys = [key for key in ("categories", "classes", "CLASSES") if metainfo.get(key) is not None and len(metainfo[key])]
    tables = [_class_table(metainfo[key]) for key in keys]
    if other := [key for key, table in zip(keys, tables, strict=True) if table != tables[0]]:
        raise ValueError(f"its {keys[0]} and its {other[0]} number the classes differently")
    return tables[0] if tables else {}


def _class_table(stored: Any) -> dict[int, str]:
    if isinstance(stored, str):
        raise ValueError(f"its classes are {stored[:100]!r}, expected is a list")
    if isinstance(stored, Mapping):
        pairs = [(key, value) if isinstance(value, str) else (value, key) for key, value in stored.items()]
    else:
        pairs = [(c["id"], c["name"]) if isinstance(c, Mapping) else (i, c) for i, c in enumerate(stored)]
    if not all(isinstance(name, str) for _, name in pairs):
        raise ValueError(f"its classes are {str(stored)[:100]}")
    return {int(number): str(name) for number, name in pairs}


def _read_v2(entry: Mapping[str, Any], names: Mapping[int, str]) -> _Entry:
    instances = entry.get("instances") or []
    given = [next((i[key] for key in ("name", "category") if isinstance(i.get(key), str)), None) for i in instances]
    points = entry["lidar_points"]
    name = _safe_name(points["lidar_path"], points.get("num_pts_feats"))
    numbers = (i["bbox_label_3d"] if called is None else -1 for i, called in zip(instances, given, strict=True))
    labels = _labels(name, numbers)
    # The file says what its numbers mean: they are numbers of the file, not of the dataset.
    classes = [names.get(int(n)) if called is None else str(called) for n, called in zip(labels, given, strict=True)]
    boxes = [instance["bbox_3d"] for instance in instances]
    read = _entry(name, boxes, np.full_like(labels, -1) if names else labels, classes, entry.get("axis_align_matrix"))
    return read._replace(unknown=tuple(n for n in labels.tolist() if n >= 0 and n not in names))


def _read_v1(entry: Mapping[str, Any]) -> _Entry:
    annos = entry.get("annos") or {}
    name = _safe_name(entry["pts_path"], entry.get("point_cloud", {}).get("num_features"))
    alignment = annos.get("axis_align_matrix", entry.get("axis_align_matrix"))
    # Without boxes their keys may be absent.
    empty = int(annos.get("gt_num", 0)) == 0 and not any(str(key).startswith("gt_b") for key in annos)
    boxes = [] if empty else annos["gt_boxes_upright_depth"]
    if int(annos.get("gt_num", len(boxes))) != len(boxes):
        raise ValueError(f"scan {name} says gt_num {annos['gt_num']}, but has {len(boxes)} boxes")
    given = None if empty else annos.get("name", annos.get("gt_names"))
    numbered = "class" in annos and not any(isinstance(c, str | bytes) for c in annos["class"])
    if given is None and not numbered:
        given = annos.get("class")
    if np.any(annos.get("rotation_y", 0)) and any(len(box) == 6 for box in boxes):
        raise ValueError(f"boxes of scan {name} have six numbers, and yaws apart as rotation_y: give seven")
    if given is None:
        labels = _labels(name, [] if empty else annos["class"])
        return _entry(name, boxes, labels, [None] * len(labels), alignment)
    if not all(isinstance(c, str | bytes) for c in given):
        raise ValueError(f"scan {name} has names of boxes that are no text")
    classes = [c.decode() if isinstance(c, bytes) else str(c) for c in given]
    labels = _labels(name, annos["class"]) if numbered else np.full(len(classes), -1)
    return _entry(name, boxes, labels, classes, alignment)


def _labels(name: str, given: Iterable[Any]) -> np.ndarray:
    """Make an array of the numbers of classes in a scan; -1 for those below 0."""
    numbers = np.array(list(given), np.float64).reshape(-1)
    if (numbers != np.rint(numbers)).any():
        raise ValueError(f"scan {name} has a label that is no whole number")
    return np.clip(numbers, -1, 1 << 30).astype(np.int64)


def _safe_name(stored_path: Any, columns: Any) -> str:
    """Return the name of a scan after checking that its path stays in a folder and its file has six columns."""
    if not isinstance(stored_path, str) or "\0" in stored_path or not _stem(stored_path):
        raise ValueError(f"the path of a scan is {quoted(repr(stored_path), 100)}")
    if len(os.fsencode(_stem(stored_path))) > _LONGEST_STEM:
        raise ValueError(f"the path of a scan has {len(stored_path):,} letters: {quoted(repr(stored_path), 100)}")
    if ".." in PurePosixPath(stored_path.replace("\\", "/")).parts:
        raise ValueError(f"the path {quoted(repr(stored_path), 100)} leaves the folder")
    if columns is not None and columns != _COLUMNS:
        raise ValueError(f"scan {_stem(stored_path)} has {columns} numbers per point, {_COLUMNS} expected")
    return _stem(stored_path)


def _stem(stored_path: str) -> str:
    """Return the name of a file without suffix; its path may be one of Windows."""
    return PurePosixPath(stored_path.replace("\\", "/")).stem


def _entry(
    name: str, boxes: Iterable[Any], labels: np.ndarray, classes: Sequence[str | None], alignment: Any
) -> _Entry:
    rows = [np.asarray(box, np.float64).reshape(-1) for box in boxes]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"boxes of scan {name} have {' and '.join(map(str, sorted({len(row) for row in rows})))} numbers"
        )
    array = np.array(rows)
    array = array.reshape(len(array), -1) if array.size else np.zeros((0, 7))
    if array.shape[1] not in (6, 7):
        raise ValueError(
            f"boxes of scan {name} have {array.shape[1]} numbers, 6 or 7 expected: centre, sizes and, if turned, yaw"
        )
    if not len(array) == len(labels) == len(classes):
        count = f"{len(classes)} names" if len(labels) == len(array) else f"{len(labels)} labels"
        raise ValueError(f"scan {name} has {len(array)} boxes but {count}")
    padded = np.pad(array, ((0, 0), (0, 7 - array.shape[1])))  # yaw 0
    return _Entry(name, padded, array.shape[1] == 7, labels, classes, _alignment(name, alignment))


def _scan_info(entry: _Entry, spec: DatasetSpec) -> Scan:
    """Make a scan without points, with the boxes of the classes of the dataset."""
    known_names = {name: class_label(name, spec) for name in set(entry.classes) if name is not None}
    labels = np.where(entry.labels < spec.num_classes, entry.labels, -1).astype(np.int32)
    notes: Counter[str] = Counter()
    for row, name in enumerate(entry.classes):
        if name is None:
            notes[_NO_CLASS] += labels[row] < 0
            continue
        if known_names[name] < 0:
            notes[foreign_boxes(name, spec)] += 1
        elif entry.labels[row] not in (-1, known_names[name]):
            notes[_OTHER_NUMBER] += 1
        labels[row] = known_names[name]
    with np.errstate(over="ignore"):
        boxes, labels = entry.boxes[labels >= 0].astype(np.float32), labels[labels >= 0]
    usable, left_out = usable_boxes(boxes)
    boxes, labels = boxes[usable], labels[usable]
    if not spec.has_yaw:
        notes[ENCLOSED] += int((np.abs(np.sin(boxes[:, 6])) > 1e-6).sum())
        boxes = enclosing_boxes(boxes)
    elif not entry.has_yaw:
        notes[_NO_YAW] += len(boxes)
    if entry.alignment is None and spec.name == "scannet":  # whose points are stored before they are aligned
        notes[_NO_ALIGNMENT] = 1
    none = np.zeros((0, 3), np.float32)
    matrix = np.eye(4, dtype=np.float32) if entry.alignment is None else entry.alignment
    counts = {kind: int(count) for kind, count in notes.items() if count} | left_out
    return Scan(entry.name, none, none, boxes, labels, matrix, counts)


def _alignment(name: str, alignment: Any) -> Float32[np.ndarray, "4 4"] | None:
    if alignment is None:
        return None
    matrix = np.array(alignment, np.float32)
    if matrix.shape not in ((4, 4), (16,)):
        raise ValueError(f"the alignment of scan {name} has the shape {matrix.shape}, (4, 4) expected")
    matrix = matrix.reshape(4, 4)
    square = matrix[:3, :3] @ matrix[:3, :3].T
    if not np.isfinite(matrix).all() or np.abs(square - np.eye(3)).max() > 0.01 or (matrix[3] != [0, 0, 0, 1]).any():
        raise ValueError(f"the alignment of scan {name} is no rotation and shift")
    return matrix


def lay_out(scans: Sequence[Path], infos: Path, spec: DatasetSpec, output: Path) -> list[Path]:
    """Copy `.bin` files, write the info files that name them, and return those of training and of validation.

    Files of the same names in the folder `output` are replaced.
    """
    if absent := [scan for scan in scans if not scan.is_file()]:
        raise InputError(f"There is no file {absent[0]}: give the .bin file of a scan.")
    content = load_plain_pickle(infos)
    if not isinstance(content, dict) or "data_list" not in content:
        raise InputError(f"{infos} is no version 2 info file: it should hold a dictionary with data_list.")
    try:
        entries = {_stem(entry["lidar_points"]["lidar_path"]): entry for entry in content["data_list"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{infos} is no version 2 info file: an entry of data_list lacks lidar_points with lidar_path."
        ) from error
    if missing := [scan.stem for scan in scans if scan.stem not in entries]:
        raise InputError(f"{infos} does not annotate {', '.join(missing)}: give the info file that does.")
    points = output / points_folder(spec)
    points.mkdir(parents=True, exist_ok=True)
    for scan in scans:
        shutil.copyfile(scan, points / scan.name)
    train, *other_areas = default_info_files(spec, "train")
    (val,) = default_info_files(spec, "val")
    for file in (train, val, *other_areas):
        chosen = [] if file in other_areas else [entries[scan.stem] for scan in scans]
        (output / file).write_bytes(pickle.dumps({**content, "data_list": chosen}))
    return [output / train, output / val]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description="Lay out scans as a prepared mmdetection3d folder.")
    parser.add_argument("--scan", type=Path, nargs="+", required=True, help=".bin files: x, y, z, r, g, b in float32")
    parser.add_argument("--infos", type=Path, required=True, help="version 2 info file that annotates them")
    parser.add_argument("--dataset", choices=[spec.name for spec in ALL_SPECS], required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    options = parser.parse_args(arguments)
    try:
        written = lay_out(options.scan, options.infos, dataset_spec(options.dataset), options.output)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Wrote {len(options.scan)} scans and {', '.join(path.name for path in written)} to {options.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

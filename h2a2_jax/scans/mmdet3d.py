"""Scans of folders prepared by mmdetection3d, in either of its two annotation formats.

    scannet/  scannet_infos_train.pkl  scannet_infos_val.pkl  points/scene0000_00.bin ...
    sunrgbd/  sunrgbd_infos_train.pkl  sunrgbd_infos_val.pkl  points/000017.bin ...
    s3dis/    s3dis_infos_Area_1.pkl ... s3dis_infos_Area_6.pkl  points/Area_1_office_2.bin ...

A `.bin` holds float32 rows x, y, z (m), r, g, b. Version 2 annotations are {metainfo, data_list}; version 1 are a
list with `annos`. In both a box is its gravity centre, its sizes and (SUN RGB-D) its yaw, counter-clockwise.
Version 1 files written before mmdetection3d 1.0 carry the opposite yaw and nothing tells them apart: write
those again.

Of the paths in an info file only the name of the file counts, which lies in `points/`.

The command lays out single scans and their annotations as such a folder:

    python -m h2a2_jax.scans.mmdet3d --scan scene0000_00.bin --infos scannet_infos.pkl \
        --dataset scannet --output data/scannet

The train and the validation info files name the same scans: good for trying things out, not for measuring.
"""

import argparse
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from h2a2_jax.errors import InputError
from h2a2_jax.restricted_pickle import load_plain_pickle
from h2a2_jax.scans.formats.colors import GREY, scale_in_dataset
from h2a2_jax.scans.frame import NO_COLORS
from h2a2_jax.scans.scan import (
    FAR_POINTS,
    NOT_FINITE,
    Scan,
    UnusableScan,
    scan_errors,
    some,
    usable_boxes,
    within_reach,
)
from h2a2_jax.scans.specs import SPECS, DatasetSpec, dataset_spec

_COLUMNS = 6
_ROW_BYTES = 4 * _COLUMNS
_NO_CLASS = "boxes of no class of the dataset"
_NO_ALIGNMENT = "scans without an alignment, taken as aligned"


class Mmdet3dFolder:
    """Scans of one prepared folder.

    The order is that of the info files. `__getitem__` raises `ScanError` for a scan that cannot be used.
    """

    def __init__(self, root: str | Path, info_file: str | Sequence[str], spec: DatasetSpec):
        """Read the annotations and check that every scan's file is there.

        `info_file` is the name of the info file in the folder, or several in order (S3DIS areas).
        """
        self.spec = spec
        self._points = Path(root) / "points"
        files = (info_file,) if isinstance(info_file, str) else tuple(info_file)
        if not self._points.is_dir():
            raise InputError(
                f"There is no folder {self._points}: a prepared {spec.name} folder holds {', '.join(files)} "
                "and points/<scan>.bin."
            )
        self._infos = [info for file in files for info in _read_infos(Path(root) / file, spec)]
        if not self._infos:
            raise InputError(f"{', '.join(files)} in {root} name no scan: prepare the folder again.")
        if twice := [name for name, count in Counter(info.name for info in self._infos).items() if count > 1]:
            raise InputError(
                f"{', '.join(files)} in {root} name {len(twice)} scans more than once ({some(twice)}): "
                "prepare the folder again."
            )
        self.names = [info.name for info in self._infos]
        if missing := [info.name for info in self._infos if not self._path(info.name).is_file()]:
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
            content = path.read_bytes()
        except OSError as error:
            raise UnusableScan(f"cannot be read from {path}: {error.strerror}.") from error
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


def default_info_files(spec: DatasetSpec, split: Literal["train", "val"]) -> tuple[str, ...]:
    """Return the names of the info files of a split; Area 5 is the validation area of S3DIS."""
    if spec.name == "s3dis":
        areas = (1, 2, 3, 4, 6) if split == "train" else (5,)
        return tuple(f"s3dis_infos_Area_{area}.pkl" for area in areas)
    return (f"{spec.name}_infos_{split}.pkl",)


def _read_infos(path: Path, spec: DatasetSpec) -> list[Scan]:
    """Read an info file of version 1 or 2: scans without points, in the file's order, with objects of the classes."""
    content = load_plain_pickle(path)
    try:
        if isinstance(content, Mapping) and "data_list" in content:
            categories = content.get("metainfo", {}).get("categories")
            _refuse_mixture(content["data_list"], "pts_path", 2)
            return [_read_v2(entry, categories, spec) for entry in content["data_list"]]
        if not isinstance(content, list):
            raise TypeError("neither {metainfo, data_list} nor a list")
        _refuse_mixture(content, "lidar_points", 1)
        return [_read_v1(entry, spec) for entry in content]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{path} is no mmdetection3d info file of version 1 or 2 ({what}): prepare the folder again."
        ) from error


def _refuse_mixture(entries: Iterable[Any], key: str, version: int) -> None:
    if other := [i for i, entry in enumerate(entries) if key in entry]:
        raise ValueError(f"it is of version {version}, but {len(other)} entries, the first at {other[0]}, are not")


def _read_v2(entry: Mapping[str, Any], categories: Mapping[str, int] | None, spec: DatasetSpec) -> Scan:
    instances = entry.get("instances", [])
    labels = [instance["bbox_label_3d"] for instance in instances]
    if categories:
        # The file says what its label numbers mean; trust the names, not the order.
        to_label = {int(value): spec.classes.index(key) for key, value in categories.items() if key in spec.classes}
        labels = [to_label.get(label, -1) for label in labels]
    boxes = [instance["bbox_3d"] for instance in instances]
    points = entry["lidar_points"]
    name = _safe_name(points["lidar_path"], points.get("num_pts_feats"))
    return _scan_info(name, boxes, labels, entry.get("axis_align_matrix"), spec)


def _read_v1(entry: Mapping[str, Any], spec: DatasetSpec) -> Scan:
    annos = entry.get("annos", {})
    empty = int(annos.get("gt_num", 0)) == 0  # then the keys of the boxes are absent
    boxes = [] if empty else annos["gt_boxes_upright_depth"]
    labels = [] if empty else annos["class"]
    name = _safe_name(entry["pts_path"], entry.get("point_cloud", {}).get("num_features"))
    return _scan_info(name, boxes, labels, annos.get("axis_align_matrix"), spec)


def _safe_name(stored_path: Any, columns: Any) -> str:
    """Return the name of a scan after checking that its path stays in a folder and its file has six columns."""
    if not isinstance(stored_path, str) or "\0" in stored_path or not Path(stored_path).stem:
        raise ValueError(f"the path of a scan is {stored_path!r}")
    if ".." in PurePosixPath(stored_path.replace("\\", "/")).parts:
        raise ValueError(f"the path {stored_path!r} leaves the folder")
    if columns is not None and columns != _COLUMNS:
        raise ValueError(f"scan {Path(stored_path).stem} has {columns} numbers per point, {_COLUMNS} expected")
    return Path(stored_path).stem


def _scan_info(name: str, boxes: Iterable[Any], labels: Iterable[Any], alignment: Any, spec: DatasetSpec) -> Scan:
    with np.errstate(over="ignore"):
        box_array = np.array(list(boxes), np.float32)
    box_array = box_array.reshape(len(box_array), -1) if box_array.size else np.zeros((0, 7), np.float32)
    if box_array.shape[1] not in (6, 7):
        raise ValueError(f"boxes of scan {name} have {box_array.shape[1]} numbers, 6 or 7 expected")
    box_array = np.pad(box_array, ((0, 0), (0, 7 - box_array.shape[1])))  # yaw 0
    if not spec.has_yaw:
        box_array[:, 6] = 0
    given = np.array(list(labels), np.float64).reshape(-1)
    label_array = np.nan_to_num(np.clip(given, -1, spec.num_classes), nan=0.5).astype(np.int32)
    if len(label_array) != len(box_array):
        raise ValueError(f"scan {name} has {len(box_array)} boxes but {len(label_array)} labels")
    if (given != np.rint(given)).any():
        raise ValueError(f"scan {name} has a label that is no whole number")
    known = (label_array >= 0) & (label_array < spec.num_classes)
    usable, notes = usable_boxes(box_array)
    if not known.all():
        _, notes = usable_boxes(box_array[known])
        notes[_NO_CLASS] = int((~known).sum())
    kept = usable & known
    if alignment is None and spec.name == "scannet":  # whose points are stored before they are aligned
        notes[_NO_ALIGNMENT] = 1
    none = np.zeros((0, 3), np.float32)
    return Scan(name, none, none, box_array[kept], label_array[kept], _alignment(name, alignment), notes)


def _alignment(name: str, alignment: Any) -> Float32[np.ndarray, "4 4"]:
    if alignment is None:
        return np.eye(4, dtype=np.float32)
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
        entries = {Path(entry["lidar_points"]["lidar_path"]).stem: entry for entry in content["data_list"]}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{infos} is no version 2 info file: an entry of data_list lacks lidar_points with lidar_path."
        ) from error
    if missing := [scan.stem for scan in scans if scan.stem not in entries]:
        raise InputError(f"{infos} does not annotate {', '.join(missing)}: give the info file that does.")
    (output / "points").mkdir(parents=True, exist_ok=True)
    for scan in scans:
        shutil.copyfile(scan, output / "points" / scan.name)
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
    parser.add_argument("--dataset", choices=[spec.name for spec in SPECS], required=True)
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

"""Scans from folders prepared by mmdetection3d, in either of its two annotation formats.

    scannet/  scannet_infos_train.pkl  scannet_infos_val.pkl  points/scene0000_00.bin ...
    sunrgbd/  sunrgbd_infos_train.pkl  sunrgbd_infos_val.pkl  points/000017.bin ...
    s3dis/    s3dis_infos_Area_1.pkl ... s3dis_infos_Area_6.pkl  points/Area_1_office_2.bin ...

A `.bin` holds float32 rows x, y, z (m), r, g, b. Version 2 annotations are {metainfo, data_list}; version 1 are a
list with `annos`. In both a box is its gravity centre, its sizes and (SUN RGB-D) its yaw, counter-clockwise.
Version 1 files written before mmdetection3d 1.0 carry the opposite yaw and nothing tells them apart: write
those again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32

from h2a2_jax.errors import InputError
from h2a2_jax.inputs.scan import Scan, ScanError
from h2a2_jax.inputs.specs import DatasetSpec
from h2a2_jax.inputs.unpickle import load_plain_pickle

_COLUMNS = 6
_ROW_BYTES = 4 * _COLUMNS


@dataclass(frozen=True, eq=False)
class ScanInfo:
    """Annotation of one scan as the info file has it.

    Attributes:
        name: file name of the points without `.bin`.
        boxes: one row per kept object; yaw 0 where the file has six columns.
        labels: class of each box in the dataset's own order.
        alignment: matrix that brings the stored points into the frame of the boxes.
        ignored: number of objects left out: label outside the classes, or a size that is not positive.
    """

    name: str
    boxes: Float32[np.ndarray, "g 7"]
    labels: Int32[np.ndarray, " g"]
    alignment: Float32[np.ndarray, "4 4"]
    ignored: int


@dataclass
class SourceReport:
    """What a source left out so far, by scan name.

    Attributes:
        dropped_points: points with a NaN or infinite coordinate or colour, in the scans loaded so far.
        ignored_objects: annotated objects without a usable label or size.
    """

    dropped_points: dict[str, int] = field(default_factory=dict)
    ignored_objects: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """One sentence for a log."""
        points, objects = sum(self.dropped_points.values()), sum(self.ignored_objects.values())
        return (
            f"Left out {points} points with NaN or infinite values in {len(self.dropped_points)} scans and "
            f"{objects} objects without a usable class or size in {len(self.ignored_objects)} scans."
        )


class Mmdet3dFolder:
    """Scans of one prepared folder.

    `__getitem__` raises `ScanError` for a scan that cannot be read or has no usable point.
    """

    def __init__(
        self,
        root: str | Path,
        info_file: str | Sequence[str],
        spec: DatasetSpec,
        *,
        points_folder: str = "points",
    ):
        """Reads the annotations and checks that every scan's file is there.

        Args:
            root: the prepared folder.
            info_file: name of the info file in it, or several (S3DIS areas), taken one after the other.
            spec: the dataset the folder holds.
            points_folder: name of the folder of `.bin` files in `root`.

        Raises:
            InputError: a folder or file is missing, or an info file cannot be understood.
        """
        self.spec = spec
        self._points = Path(root) / points_folder
        files = (info_file,) if isinstance(info_file, str) else tuple(info_file)
        if not self._points.is_dir():
            raise InputError(
                f"There is no folder {self._points}: a prepared {spec.name} folder holds {', '.join(files)} "
                f"and {points_folder}/<scan>.bin."
            )
        self._infos = [info for file in files for info in read_infos(Path(root) / file, spec)]
        if not self._infos:
            raise InputError(f"{', '.join(files)} in {root} name no scan: prepare the folder again.")
        self._report = SourceReport(ignored_objects={i.name: i.ignored for i in self._infos if i.ignored})
        missing = [info.name for info in self._infos if not self._path(info.name).is_file()]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise InputError(
                f"{len(missing)} of the {len(self._infos)} scans named in {', '.join(files)} have no .bin file in "
                f"{self._points} ({shown}): finish preparing the folder."
            )

    @property
    def names(self) -> list[str]:
        """Names of the scans, in the order of the info files."""
        return [info.name for info in self._infos]

    def __len__(self) -> int:
        """Number of scans."""
        return len(self._infos)

    def __getitem__(self, index: int) -> Scan:
        """Loads one scan, in the frame of its boxes.

        Points with a NaN or infinite coordinate or colour are dropped and counted in `report`.

        Raises:
            ScanError: the file is cut off, holds no usable point, or its colours are in another range.
        """
        info = self._infos[index]
        rows = self._read(info.name)
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            self._report.dropped_points[info.name] = int((~finite).sum())
            rows = rows[finite]
        if len(rows) == 0:
            raise ScanError(info.name, f"Scan {info.name} has no usable point: {self._path(info.name)} is empty.")
        colors = rows[:, 3:] / np.float32(self.spec.color_scale)
        if colors.min() < 0 or colors.max() > 1:
            raise ScanError(
                info.name,
                f"Scan {info.name} has colours from {rows[:, 3:].min():g} to {rows[:, 3:].max():g}, but "
                f"{self.spec.name} files hold 0 to {self.spec.color_scale:g}: rescale them.",
            )
        points = rows[:, :3] @ info.alignment[:3, :3].T + info.alignment[:3, 3]
        return Scan(info.name, points, colors, info.boxes, info.labels, info.alignment)

    def report(self) -> SourceReport:
        """Returns what was left out so far."""
        return self._report

    def _path(self, name: str) -> Path:
        return self._points / f"{name}.bin"

    def _read(self, name: str) -> np.ndarray:
        path = self._path(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ScanError(name, f"Scan {name} cannot be read from {path}: {error.strerror}.") from error
        if len(content) % _ROW_BYTES:
            raise ScanError(
                name,
                f"Scan {name} is cut off: {path} has {len(content)} bytes, which is no multiple of the {_ROW_BYTES} "
                "of a point (x, y, z, r, g, b in float32); copy it again.",
            )
        return np.frombuffer(content, "<f4").reshape(-1, _COLUMNS).astype(np.float32)


def default_info_files(spec: DatasetSpec, split: Literal["train", "val"]) -> tuple[str, ...]:
    """Names of the info files mmdetection3d writes for a split; Area 5 is the validation area of S3DIS."""
    if spec.name == "s3dis":
        areas = (1, 2, 3, 4, 6) if split == "train" else (5,)
        return tuple(f"s3dis_infos_Area_{area}.pkl" for area in areas)
    return (f"{spec.name}_infos_{split}.pkl",)


def read_infos(path: Path, spec: DatasetSpec) -> list[ScanInfo]:
    """Reads an info file of version 1 or 2.

    Args:
        path: the `.pkl`.
        spec: the dataset; objects of other classes are left out.

    Returns:
        One entry per scan, in the file's order.

    Raises:
        InputError: the file is missing, holds more than plain data, or has neither of the two layouts.
    """
    content = load_plain_pickle(path)
    try:
        if isinstance(content, Mapping) and "data_list" in content:
            categories = content.get("metainfo", {}).get("categories")
            infos = [_read_v2(entry, categories, spec) for entry in content["data_list"]]
        elif isinstance(content, list):
            infos = [_read_v1(entry, spec) for entry in content]
        else:
            raise TypeError("neither {metainfo, data_list} nor a list")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is no mmdetection3d info file of version 1 or 2 ({type(error).__name__}: {error}): "
            "prepare the folder again."
        ) from error
    return infos


def scan_name(stored_path: str) -> str:
    """Name of the scan whose points an info file stores at `stored_path`."""
    return Path(stored_path).stem


def _read_v2(entry: Mapping[str, Any], categories: Mapping[str, int] | None, spec: DatasetSpec) -> ScanInfo:
    instances = entry.get("instances", [])
    labels = [int(instance["bbox_label_3d"]) for instance in instances]
    if categories:
        # The file says what its label numbers mean; trust the names, not the order.
        to_label = {int(value): spec.classes.index(key) for key, value in categories.items() if key in spec.classes}
        labels = [to_label.get(label, -1) for label in labels]
    boxes = [instance["bbox_3d"] for instance in instances]
    name = scan_name(entry["lidar_points"]["lidar_path"])
    return _scan_info(name, boxes, labels, entry.get("axis_align_matrix"), spec)


def _read_v1(entry: Mapping[str, Any], spec: DatasetSpec) -> ScanInfo:
    annos = entry.get("annos", {})
    empty = int(annos.get("gt_num", 0)) == 0  # then the keys of the boxes are absent
    boxes = [] if empty else annos["gt_boxes_upright_depth"]
    labels = [] if empty else annos["class"]
    return _scan_info(scan_name(entry["pts_path"]), boxes, labels, annos.get("axis_align_matrix"), spec)


def _scan_info(name: str, boxes: Iterable[Any], labels: Iterable[Any], alignment: Any, spec: DatasetSpec) -> ScanInfo:
    box_array = np.array(list(boxes), np.float32)
    box_array = box_array.reshape(len(box_array), -1) if box_array.size else np.zeros((0, 7), np.float32)
    if box_array.shape[1] not in (6, 7):
        raise ValueError(f"boxes of scan {name} have {box_array.shape[1]} numbers, 6 or 7 expected")
    if not spec.has_yaw:
        box_array = box_array[:, :6]
    yaw = np.zeros((len(box_array), 7 - box_array.shape[1]), np.float32)
    box_array = np.concatenate([box_array, yaw], axis=1)
    label_array = np.array(list(labels), np.int32).reshape(-1)
    if len(label_array) != len(box_array):
        raise ValueError(f"scan {name} has {len(box_array)} boxes but {len(label_array)} labels")
    matrix = np.eye(4, dtype=np.float32) if alignment is None else np.array(alignment, np.float32).reshape(4, 4)
    usable = (label_array >= 0) & (label_array < spec.num_classes)
    usable &= np.isfinite(box_array).all(axis=1) & (box_array[:, 3:6] > 0).all(axis=1)
    return ScanInfo(name, box_array[usable], label_array[usable], matrix, int((~usable).sum()))

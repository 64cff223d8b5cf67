"""SUN RGB-D's metadata from MATLAB files: cameras, image paths, boxes and splits."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from h2a2_jax.errors import InputError
from h2a2_jax.inputs.raw.files import FAR, NO_BOX, NO_CLASS, counted, shown
from h2a2_jax.inputs.raw.matlab import load_mat
from h2a2_jax.inputs.specs import SUNRGBD

_FIELDS = ("sequenceName", "Rtilt", "K", "depthpath", "rgbpath", "groundtruth3DBB")
_OBJECT_FIELDS = ("coeffs", "centroid", "classname", "orientation")
_PREFIX = "/n/fs/sun3d/data"  # where the authors kept the data: 16 characters
_NO_YAW = "objects with orientation 0, yaw 0 taken"


@dataclass(frozen=True, eq=False)
class SunFrames:
    """The metadata of all frames in few arrays, so that sending them to another process costs little.

    Objects of frame i are the rows offsets[i]:offsets[i + 1]. Values that could not be read are NaN.

    Attributes:
        depth_paths: depth image of each frame as the metadata has it.
        color_paths: colour image likewise.
        intrinsics: focal lengths and principal point, pixels.
        tilts: rotation that brings the camera upright.
        boxes: centre, sizes, yaw of the objects of the ten classes.
        labels: their classes.
        offsets: first object of each frame, and the end.
        notes: objects left out, by frame.
    """

    depth_paths: tuple[str, ...]
    color_paths: tuple[str, ...]
    intrinsics: Float[np.ndarray, "n 3 3"]
    tilts: Float[np.ndarray, "n 3 3"]
    boxes: Float32[np.ndarray, "g 7"]
    labels: Int32[np.ndarray, " g"]
    offsets: Int[np.ndarray, " n_and_1"]
    notes: tuple[dict[str, int], ...]


def relative_path(stored: str) -> str:
    """A path of the metadata below the user's root, with "/" between its parts and none around them."""
    parts = stored.split("/")
    if "SUNRGBD" in parts:
        parts = parts[parts.index("SUNRGBD") :]
    elif stored.startswith(_PREFIX + "/"):
        parts = stored[len(_PREFIX) :].split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _text(value: Any) -> str:
    """The text in an array of one string, in a cell or not; empty if there is none."""
    array = np.asarray(value)
    if array.dtype == object and array.size == 1:
        array = np.asarray(array.item())
    return str(array.ravel()[0]) if array.dtype.kind == "U" and array.size else ""


def _numbers(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of numbers of that shape (whether row or column), NaN if it is something else."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.size != np.prod(shape):
        return np.full(shape, np.nan)
    return array.astype(np.float64).reshape(shape)


def _require_fields(path: Path, array: np.ndarray, fields: Iterable[str]) -> None:
    missing = [field for field in fields if field not in (array.dtype.names or ())]
    if missing:
        raise InputError(f"{shown(path)} has frames without the field {', '.join(missing)}: download it again.")


def read_frames(path: Path) -> tuple[list[str], SunFrames]:
    """Reads what a metadata file says of every frame.

    Args:
        path: SUNRGBDMeta3DBB_v2.mat or SUNRGBDMeta.mat.

    Returns:
        The folder of each frame, relative to the user's root, and the rest.

    Raises:
        InputError: the file is unreadable or lacks a field.
    """
    (meta,) = load_mat(path, ("SUNRGBDMeta",))
    _require_fields(path, meta, _FIELDS)
    records = meta.ravel()
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    offsets, notes = [0], []
    for truth in records["groundtruth3DBB"]:
        if truth.size:
            _require_fields(path, truth, _OBJECT_FIELDS)
        count: Counter[str] = Counter()
        for record in truth.ravel() if truth.size else ():
            _read_object(record, boxes, labels, count)
        offsets.append(len(labels))
        notes.append(counted(count))
    frames = SunFrames(
        tuple(map(_text, records["depthpath"])),
        tuple(map(_text, records["rgbpath"])),
        np.array([_numbers(value, (3, 3)) for value in records["K"]]).reshape(-1, 3, 3),
        np.array([_numbers(value, (3, 3)) for value in records["Rtilt"]]).reshape(-1, 3, 3),
        np.array(boxes, np.float32).reshape(-1, 7),
        np.array(labels, np.int32),
        np.array(offsets),
        tuple(notes),
    )
    return [relative_path(_text(value)) for value in records["sequenceName"]], frames


def _read_object(record: Any, boxes: list[np.ndarray], labels: list[int], notes: Counter[str]) -> None:
    """Appends the box and label of an object, or counts why not."""
    name = _text(record["classname"]).strip()
    if name not in SUNRGBD.classes:
        notes[NO_CLASS] += 1
        return
    # The first coefficient belongs to the second axis of the box.
    sizes = 2 * np.abs(_numbers(record["coeffs"], (3,)))[[1, 0, 2]]
    facing = np.asarray(record["orientation"])
    toward = _numbers(facing.ravel()[:2] if facing.dtype.kind in "fiu" else None, (2,))
    box = np.concatenate([_numbers(record["centroid"], (3,)), sizes, [np.arctan2(toward[1], toward[0])]])
    if not (np.abs(box) <= FAR).all() or (sizes <= 0).any():  # so if one of them is NaN
        notes[NO_BOX] += 1
        return
    notes[_NO_YAW] += not toward.any()
    boxes.append(box)
    labels.append(SUNRGBD.classes.index(name))


def read_splits(path: Path, sequences: list[str]) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """Reads the official split.

    Args:
        path: allsplit.mat.
        sequences: the folder of each frame of the metadata.

    Returns:
        Names of the frames of "train" and "val", and counts of what the two files do not agree on.

    Raises:
        InputError: the file is unreadable, its lists overlap, or one names no frame of the metadata.
    """
    lists = dict(zip(("train", "val"), load_mat(path, ("alltrain", "alltest")), strict=True))
    listed = {split: {relative_path(_text(cell)) for cell in cells.ravel()} for split, cells in lists.items()}
    both = sorted(listed["train"] & listed["val"])
    if both:
        raise InputError(
            f"{shown(path)} lists {len(both)} frames such as {both[0]} for training and for testing: download it again."
        )
    splits = {
        split: tuple(f"{index:06d}" for index, sequence in enumerate(sequences, 1) if sequence in folders)
        for split, folders in listed.items()
    }
    empty = [split for split, names in splits.items() if not names]
    if empty:
        raise InputError(
            f"None of the frames that {shown(path)} lists for {empty[0]} is in the metadata: take both files from the "
            "same SUNRGBDtoolbox.zip."
        )
    wanted = listed["train"] | listed["val"]
    return splits, counted(
        Counter(
            {
                "entries of the split lists given twice": sum(map(np.size, lists.values())) - len(wanted),
                "frames of the split lists without metadata": len(wanted - set(sequences)),
                "frames of the metadata in no split": sum(sequence not in wanted for sequence in sequences),
            }
        )
    )

"""SUN RGB-D as its website serves it, without MATLAB (Song et al., CVPR 2015, https://rgbd.cs.princeton.edu).

    SUNRGBD/  kv1/ kv2/ realsense/ xtion/  with depth PNGs and colour JPEGs
    SUNRGBDMeta3DBB_v2.mat (or SUNRGBDMeta.mat)  allsplit.mat

The two .mat files may also lie where SUNRGBDtoolbox.zip puts them. A frame is named by its number in the metadata,
from 1: "000017". A depth image becomes points of an upright camera: x to the right, y forward, z up, the camera at
the origin, metres.
"""

import io
import math
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Int32, Int64, UInt16
from PIL import Image
from scipy.io import loadmat, whosmat

from h2a2_jax.errors import InputError, reason_of
from h2a2_jax.scans.raw import FAR, NO_BOX, NO_CLASS, check_folder, counted, shown
from h2a2_jax.scans.scan import Scan, ScanError, UnusableScan, scan_errors
from h2a2_jax.scans.specs import SUNRGBD
from h2a2_jax.untrusted import check_growth, check_regular, read_bytes

_FIELDS = ("sequenceName", "Rtilt", "K", "depthpath", "rgbpath", "groundtruth3DBB")
_OBJECT_FIELDS = ("coeffs", "centroid", "classname", "orientation")
_MAT_HEADER = 128  # bytes of a MATLAB file before its variables
_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _CLASSES = 2, (1, 2, 4, *range(6, 16))  # classes of arrays: cells, structs, text, numbers
_DEEPEST_CELL = 20
_PREFIX = "/n/fs/sun3d/data"  # where the authors kept the data: 16 characters
_NO_YAW = "objects with orientation 0, yaw 0 taken"


@dataclass(frozen=True, eq=False)
class SunFrames:
    """The metadata of all frames in few arrays, so that sending them to another process costs little.

    Objects of frame i are the rows offsets[i]:offsets[i + 1]. Values that could not be read are NaN.

    Attributes:
        depth_paths: depth image of each frame as the metadata has it; `color_paths` are those of the colour images.
        intrinsics: focal lengths and principal point, pixels.
        tilts: rotation that brings the camera upright.
        boxes: centre, sizes, yaw of the objects of the ten classes.
        labels: class of each box.
        offsets: first object of each frame, and the end.
        notes: counts by kind of the objects left out, by frame.
    """

    depth_paths: tuple[str, ...]
    color_paths: tuple[str, ...]
    intrinsics: Float[np.ndarray, "n 3 3"]
    tilts: Float[np.ndarray, "n 3 3"]
    boxes: Float32[np.ndarray, "g 7"]
    labels: Int32[np.ndarray, " g"]
    offsets: Int[np.ndarray, " n_and_1"]
    notes: tuple[dict[str, int], ...]


def load_mat(path: Path, kinds: Mapping[str, str]) -> list[np.ndarray]:
    """Read variables of a MATLAB file of version 5.

    The file is checked to be one that MATLAB or SciPy wrote, complete and of the expected variables, before SciPy's
    reader gets it: that reader trusts a file and can end the process on other bytes.

    `kinds` has the MATLAB class of each variable by name, such as "struct". The values come in that order, structs and
    cells as SciPy nests them.
    """
    try:
        content = read_bytes(path)
        if content[:10] == b"MATLAB 7.3":
            raise InputError(
                f"{shown(path)} is a MATLAB file of version 7.3, but the original has version 5: download it again."
            )
        _check_complete(content)
        found = {name: kind for name, _, kind in whosmat(io.BytesIO(content))}
        if missing := [name for name in kinds if name not in found]:
            raise InputError(f"{shown(path)} holds no variable {' and no '.join(missing)}: download it again.")
        for name, kind in kinds.items():
            if found[name] != kind:
                raise InputError(f"{shown(path)} holds a {found[name]} {name}, no {kind}: download it again.")
        variables = loadmat(io.BytesIO(content), variable_names=list(kinds))
        return [variables[name] for name in kinds]
    except InputError:
        raise
    except Exception as error:  # damaged bytes bring about every kind of exception in SciPy's reader
        raise InputError(f"{shown(path)} is no readable MATLAB file ({reason_of(error)}): download it again.") from None


def _check_complete(content: bytes) -> None:
    """Raise ValueError or zlib.error unless the header is of version 5 and all variables are whole.

    Raise OSError if they are packed more than measured values can be, or take more memory than is free.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise ValueError("its header is not that of version 5")
    place, unpacked = _MAT_HEADER, 0
    while place < len(content):
        if place + 8 > len(content):
            raise ValueError("it is cut off")
        kind, size = struct.unpack_from(f"{order}II", content, place)
        place += 8 + size
        if place > len(content):
            raise ValueError("it is cut off")
        if kind not in (_MATRIX, _COMPRESSED):
            raise ValueError(f"it holds an element of the kind {kind}")
        variable = memoryview(content)[place - size : place]
        if kind == _COMPRESSED:  # as in the originals; has a checksum, which SciPy compares too late
            stream, inflater = bytes(variable), zlib.decompressobj()
            while stream and not inflater.eof:
                unpacked += len(inflater.decompress(stream, 1 << 22))
                check_growth(len(content), unpacked, "it")
                stream = inflater.unconsumed_tail
            inflater.flush()  # what the limit of the last call kept back
            if not inflater.eof:
                raise ValueError("it is cut off")
            variable = memoryview(zlib.decompress(variable))
            if len(variable) < 8 or struct.unpack_from(f"{order}II", variable) != (_MATRIX, len(variable) - 8):
                raise ValueError("it holds a compressed element that is no matrix")
            variable = variable[8:]
        _check_matrix(variable, order)


def _check_matrix(matrix: memoryview, order: str) -> None:
    """Raise ValueError for more cells than a matrix has bytes, or cells in many others: SciPy trusts both."""
    tag = struct.Struct(f"{order}II").unpack_from
    waiting = [(matrix, 0)]
    while waiting:
        matrix, depth = waiting.pop()
        if not len(matrix):
            continue  # an empty cell
        if depth > _DEEPEST_CELL or len(matrix) < 32:
            raise ValueError("its cells are nested too deeply, or cut off")
        place, head = 0, list[memoryview]()
        kind = struct.unpack_from(f"{order}I", matrix, 8)[0] & 255
        if kind not in _CLASSES:
            raise ValueError(f"it holds an array of the class {kind}")
        if kind > _STRUCT:
            continue  # numbers or text, whose shape SciPy compares with their bytes
        for _ in range(3 + 2 * (kind == _STRUCT)):  # flags, shape, name; length of a field's name, names
            found, size = tag(matrix, place)
            small = found >> 16  # the content of up to four bytes takes the place of the size
            head.append(matrix[place + 4 : place + 4 + small] if small else matrix[place + 8 : place + 8 + size])
            place += 8 if small else 8 + (size + 7) // 8 * 8
        shape = struct.unpack(f"{order}{len(head[1]) // 4}i", head[1][: len(head[1]) // 4 * 4])
        fields = 1
        if kind == _STRUCT:
            (longest,) = struct.unpack(f"{order}i", head[3])
            fields = len(head[4]) // longest if longest > 0 else 0
        if any(length < 0 for length in shape) or math.prod(shape) * max(fields, 1) > (len(matrix) - place) // 8:
            raise ValueError(f"it states {math.prod(shape) * fields} cells in {len(matrix)} bytes")
        for _ in range(math.prod(shape) * fields):
            found, size = tag(matrix, place)
            if found != _MATRIX or place + 8 + size > len(matrix):
                raise ValueError("it has a cell that is no matrix")
            waiting.append((matrix[place + 8 : place + 8 + size], depth + 1))
            place += 8 + size


def _relative_path(stored: str) -> str:
    """Return a path of the metadata below the user's root, with "/" between its parts and none around them."""
    parts = stored.split("/")
    if "SUNRGBD" in parts:
        parts = parts[parts.index("SUNRGBD") :]
    elif stored.startswith(_PREFIX + "/"):
        parts = stored[len(_PREFIX) :].split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _text(value: Any) -> str:
    """Return the text of an array of one string, in a cell or not; empty if there is none."""
    array = np.asarray(value)
    if array.dtype == object and array.size == 1:
        array = np.asarray(array.item())
    return str(array.ravel()[0]) if array.dtype.kind == "U" and array.size else ""


def _numbers(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of numbers in that shape (from a row or a column), NaN if it is something else."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.size != np.prod(shape):
        return np.full(shape, np.nan)
    return array.astype(np.float64).reshape(shape)


def _require_fields(path: Path, array: np.ndarray, fields: Iterable[str]) -> None:
    if missing := [field for field in fields if field not in (array.dtype.names or ())]:
        raise InputError(f"{shown(path)} has frames without the field {', '.join(missing)}: download it again.")


def _read_frames(path: Path) -> tuple[list[str], SunFrames]:
    """Read the metadata of every frame: its folder, relative to the user's root, and the rest."""
    (meta,) = load_mat(path, {"SUNRGBDMeta": "struct"})
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
    return [_relative_path(_text(value)) for value in records["sequenceName"]], frames


def _read_object(record: Any, boxes: list[np.ndarray], labels: list[int], notes: Counter[str]) -> None:
    """Append the box and label of an object, or count why it has none."""
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


def _read_splits(path: Path, sequences: list[str]) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """Read names of the frames of "train" and "val", and counts of what the split and the metadata do not share."""
    lists = dict(zip(("train", "val"), load_mat(path, {"alltrain": "cell", "alltest": "cell"}), strict=True))
    listed = {split: {_relative_path(_text(cell)) for cell in cells.ravel()} for split, cells in lists.items()}
    if both := sorted(listed["train"] & listed["val"]):
        raise InputError(
            f"{shown(path)} lists {len(both)} frames such as {both[0]} for training and for testing: download it again."
        )
    splits = {
        split: tuple(f"{index:06d}" for index, sequence in enumerate(sequences, 1) if sequence in folders)
        for split, folders in listed.items()
    }
    if empty := [split for split, names in splits.items() if not names]:
        raise InputError(
            f"None of the frames that {shown(path)} lists for {empty[0]} is in the metadata: take both files from the "
            "same SUNRGBDtoolbox.zip."
        )
    wanted = listed["train"] | listed["val"]
    notes = {
        "entries of the split lists given twice": sum(map(np.size, lists.values())) - len(wanted),
        "frames of the split lists without metadata": len(wanted - set(sequences)),
        "frames of the metadata in no split": sum(sequence not in wanted for sequence in sequences),
    }
    return splits, counted(Counter(notes))


POINTS = 50_000  # drawn from a frame at preparation, as in the published experiments
MAX_DEPTH = 8.0  # m; larger ones are clamped to this
_FILES = {"v2": "SUNRGBDMeta3DBB_v2.mat", "v1": "SUNRGBDMeta.mat"}
_LAYOUT = "SUNRGBD/ with the frames, {} and allsplit.mat (of SUNRGBDtoolbox.zip)"


def decode_depth(values: UInt16[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Convert the pixels of a depth PNG, millimetres with the 16 bits rotated left by three, to metres.

    The depth is that along the optical axis, at most `MAX_DEPTH`; 0 where nothing was measured.
    """
    millimetres = (values >> 3) | (values << 13)
    return np.minimum(millimetres.astype(np.float32) / np.float32(1000), np.float32(MAX_DEPTH))


def back_project(
    u: Int64[np.ndarray, " m"],
    v: Int64[np.ndarray, " m"],
    depth: Float32[np.ndarray, " m"],
    intrinsics: Float[np.ndarray, "3 3"],
    tilt: Float[np.ndarray, "3 3"],
) -> Float32[np.ndarray, "m 3"]:
    """Turn pixels with depth (m) into points of an upright camera: x to the right, y forward, z up (m).

    Columns `u` and rows `v` count from 1, as the intrinsics (pixels) do; `tilt` brings the camera upright.
    """
    distance = depth.astype(np.float64)
    right = (u - intrinsics[0, 2]) * distance / intrinsics[0, 0]
    down = (v - intrinsics[1, 2]) * distance / intrinsics[1, 1]
    return (np.stack([right, distance, -down], axis=1) @ tilt.T).astype(np.float32)


class SunRgbd:
    """Frames of SUN RGB-D; a `RawDataset`.

    A frame is named by its number with six digits, such as "000017"; "val" is the official test split. The metadata is
    parsed once, at opening; copies in other processes receive the result. `notes` counts the frames that only the
    metadata or only the split knows.
    """

    def __init__(self, root: str | Path, annotations: str = "v2"):
        """Read the metadata and the split; the root is the folder with `SUNRGBD`.

        The annotations are "v2", the corrected boxes, or "v1", those of VoteNet's experiments.
        """
        self._root = Path(root)
        if annotations not in _FILES:
            raise InputError(f"There are no SUN RGB-D annotations {annotations!r}: use 'v2' or 'v1'.")
        layout = _LAYOUT.format(_FILES[annotations])
        check_folder(self._root, layout)
        if not (self._root / "SUNRGBD").is_dir():
            raise InputError(f"There is no folder SUNRGBD in {shown(self._root)}: a SUN RGB-D folder holds {layout}.")
        sequences, self._frames = _read_frames(_find(self._root, _FILES[annotations], "Metadata"))
        self.spec = SUNRGBD
        self.splits, self.notes = _read_splits(_find(self._root, "allsplit.mat", "traintestSUNRGBD"), sequences)

    def load(self, name: str) -> Scan:
        """Parse one frame, in the frame of reference of the annotations.

        A scan has `POINTS` points, the same in every run (all of them if the image has fewer), and the boxes of the
        objects of the ten classes.
        """
        frames = self._frames
        frame = int(name) - 1 if name.isascii() and name.isdigit() else -1
        if not 0 <= frame < len(frames.depth_paths):
            raise ScanError(name, f"There is no frame {name}: they run from 000001 to {len(frames.depth_paths):06d}.")
        with scan_errors(name, "Frame"):
            intrinsics, tilt = frames.intrinsics[frame], frames.tilts[frame]
            if not np.isfinite(intrinsics).all() or min(intrinsics[0, 0], intrinsics[1, 1]) < 1:
                raise UnusableScan(
                    f"has focal lengths {intrinsics[0, 0]:g} and {intrinsics[1, 1]:g} in the metadata (K), but "
                    "they are hundreds of pixels: download the metadata again."
                )
            if not np.isfinite(tilt).all() or np.abs(tilt @ tilt.T - np.eye(3)).max() > 0.05:
                raise UnusableScan("has an Rtilt in the metadata that is no rotation: download the metadata again.")
            depth_path = self._path(frames.depth_paths[frame])
            color_path = self._path(frames.color_paths[frame])
            pixels = _read_image(depth_path, ("I;16", "I;16B"), "a depth image is a grey PNG of 16 bits")
            depth = decode_depth(pixels.astype(np.uint16))
            colors = _read_image(color_path, ("RGB",), "a colour image has mode RGB")
            if colors.shape[:2] != depth.shape:
                raise UnusableScan(
                    f"has a depth image of {_size(depth)} pixels but a colour image of {_size(colors)} "
                    f"({shown(color_path)}): unpack SUNRGBD.zip again."
                )
            measured = np.flatnonzero(depth)
            if not len(measured):
                raise UnusableScan(f"has no depth at all in {shown(depth_path)}: leave the frame out.")
            if len(measured) > POINTS:
                rng = np.random.default_rng(zlib.crc32(name.encode()))
                measured = rng.choice(measured, POINTS, replace=False)
            rows, columns = np.divmod(measured, depth.shape[1])
            points = back_project(columns + 1, rows + 1, depth[rows, columns], intrinsics, tilt)
            objects = slice(frames.offsets[frame], frames.offsets[frame + 1])
            return Scan(
                name,
                points,
                colors[rows, columns].astype(np.float32) / np.float32(255),
                frames.boxes[objects],
                frames.labels[objects],
                notes=frames.notes[frame],
            )

    def _path(self, stored: str) -> Path:
        relative = _relative_path(stored)
        if not relative or ".." in relative.split("/"):
            raise UnusableScan(
                f"has the path {stored!r} in the metadata, which does not stay inside "
                f"{shown(self._root)}: it is not read; download the metadata again."
            )
        return self._root / relative


def _find(root: Path, file: str, folder: str) -> Path:
    places = [root, root / folder, root / "SUNRGBDtoolbox" / folder]
    path = next((place / file for place in places if (place / file).is_file()), None)
    if path is None:
        own = file == _FILES["v2"]  # a download of its own
        raise InputError(
            f"There is no {file} in {shown(root)} (or in its SUNRGBDtoolbox/{folder}): fetch "
            f"{'it' if own else 'SUNRGBDtoolbox.zip'} from https://rgbd.cs.princeton.edu and put it there"
            f"{'' if own else ', unpacked'}."
        )
    return path


def _read_image(path: Path, modes: tuple[str, ...], expected: str) -> np.ndarray:
    try:
        check_regular(path)
        with Image.open(path) as image:
            check_growth(path.stat().st_size, 4 * image.width * image.height, "it")
            if image.mode in modes:
                return np.asarray(image)
            mode = image.mode
    except FileNotFoundError:
        raise UnusableScan(f"lacks the image {shown(path)}, which is missing: unpack SUNRGBD.zip again.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnusableScan(
            f"has an unreadable image {shown(path)} ({reason_of(error)}): unpack SUNRGBD.zip again."
        ) from None
    raise UnusableScan(f"has an image of mode {mode} at {shown(path)}, but {expected}: unpack SUNRGBD.zip again.")


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"

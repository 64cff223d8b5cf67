"""Scans for the benchmarks: a file, a procedural room, or changed scans of a source."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from h2a2_jax import Boxes
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import Scan, ScanSource
from h2a2_jax.scans.specs import dataset_spec
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource

_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float": "f4", "double": "f8", "float32": "f4", "float64": "f8",
}  # fmt: skip


class ChangedScans:
    """Source whose scans are changed when they are read.

    Args:
        source: source of the scans.
        change: function that is applied to each scan.
    """

    def __init__(self, source: ScanSource, change: Callable[[Scan], Scan]):
        self.source, self.change = source, change

    @property
    def names(self) -> Sequence[str]:
        """Names of the scans, in order."""
        return self.source.names

    def __len__(self) -> int:
        """Number of scans."""
        return len(self.source)

    def __getitem__(self, index: int) -> Scan:
        """Read and change one scan."""
        return self.change(self.source[index])


def detections_of(boxes: Boxes) -> Detections:
    """Boxes of a detector as detections in the frame of its input, which has z up and is in metres."""
    rows = np.concatenate([boxes.centers, boxes.sizes, boxes.yaws[:, None]], axis=1).astype(np.float32)
    return Detections(rows, boxes.scores.astype(np.float32), boxes.labels.astype(np.int32))


def load_points(path: Path | None) -> tuple[str, Float32[np.ndarray, "m 3"]]:
    """Load the name and the points (metres) of a scan.

    Args:
        path: a .bin of float32 rows of six numbers (x, y, z, colour), a .ply with vertices x, y, z (first element of
            the file), or None for a procedural room of the size of ScanNet's.

    Raises:
        InputError: the file is none of these.
        FileNotFoundError: there is no such file.
    """
    if path is None:
        scan = SyntheticSource(dataset_spec("scannet"), "val", 1)[0]
        return scan.name, scan.points
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a .bin of float32 rows of six numbers or a .ply.")
    if path.suffix == ".bin":
        values = np.fromfile(path, np.float32)
        if values.size == 0 or values.size % 6:
            raise InputError(f"{path} holds {values.size} numbers; expected rows of six float32 (x, y, z, colour).")
        return path.name, values.reshape(-1, 6)[:, :3]
    if path.suffix == ".ply":
        return path.name, _ply_points(path)
    raise InputError(f"{path} ends in {path.suffix!r}; give a .bin of float32 rows of six numbers or a .ply.")


def _ply_points(path: Path) -> Float32[np.ndarray, "m 3"]:
    with path.open("rb") as file:
        header: list[list[str]] = []
        while not header or header[-1] != ["end_header"]:
            line = file.readline()
            if not line or len(header) > 200:
                raise InputError(f"{path} has no PLY header that ends with 'end_header'.")
            header.append(line.decode("ascii", "replace").split())
        body = file.read()
    elements = [i for i, line in enumerate(header) if line[:1] == ["element"]]
    if not elements or header[elements[0]][1] != "vertex":
        raise InputError(f"{path}: the first element of the PLY is not 'vertex'.")
    end = elements[1] if len(elements) > 1 else len(header)
    properties = [line for line in header[elements[0] : end] if line[:1] == ["property"]]
    names, count = [line[-1] for line in properties], int(header[elements[0]][2])
    if not {"x", "y", "z"} <= set(names) or any(line[1] not in _PLY_TYPES for line in properties):
        raise InputError(f"{path}: vertices need x, y, z and no lists, found {', '.join(names)}.")
    form = next((line[1] for line in header if line[:1] == ["format"]), "")
    if form == "ascii":
        rows = np.array(body.split()[: count * len(names)], np.float64).reshape(count, len(names))
        columns = [rows[:, names.index(axis)] for axis in "xyz"]
    else:
        order = ">" if form == "binary_big_endian" else "<"
        record = np.dtype([(line[-1], order + _PLY_TYPES[line[1]]) for line in properties])
        vertices = np.frombuffer(body, record, count)
        columns = [vertices[axis] for axis in "xyz"]
    return np.stack(columns, 1).astype(np.float32)

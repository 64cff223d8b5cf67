"""Points of LAS files (ASPRS, versions 1.0 to 1.4, point formats 0 to 10), uncompressed."""

import struct
from pathlib import Path

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.thinning import Thinning

_HEADER = 227  # bytes up to version 1.2; later ones have more
_COUNT_14 = 247  # where version 1.4 has its 64-bit count
_COLOR_PLACES = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30, 10: 30}
_LEAST = (20, 28, 26, 34, 57, 63, 30, 36, 38, 59, 67)  # bytes of a record by point format
_COMPRESSED = 0x80  # LASzip marks the point format
LAZ = "is compressed LAS: turn it into .las (`laszip -i a.laz -o a.las`, or CloudCompare's export) or .ply"
"""What is wrong with a .laz file, and what to do."""


def read_las(path: Path, thinning: Thinning | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Coordinates, float64, and colours if the file has some.

    Args:
        path: a `.las` file.
        thinning: which points; all without one.

    Returns:
        [n, 3] points; [n, 3] colours, uint16 as the format has them, or uint8 where no number exceeds 255.

    Raises:
        InputError: the file is no LAS, is compressed, or is shorter than its header says.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        header = file.read(_COUNT_14 + 8)
        if header[:4] != b"LASF" or len(header) < _HEADER:
            raise InputError(f"{path} is no LAS file or is cut off in its header: export it again.")
        start = struct.unpack_from("<I", header, 96)[0]
        form, width, count = struct.unpack_from("<BHI", header, 104)
        if form & _COMPRESSED:
            raise InputError(f"{path} {LAZ}.")
        if form >= len(_LEAST) or width < _LEAST[form]:
            raise InputError(f"{path} has LAS point format {form} of {width} bytes; formats 0 to 10 are read.")
        if tuple(header[24:26]) >= (1, 4) and len(header) >= _COUNT_14 + 8:
            count = struct.unpack_from("<Q", header, _COUNT_14)[0] or count
        left = path.stat().st_size - start
        if count * width > left:
            raise InputError(
                f"{path} is cut off: its header says {count} points, which take {count * width} bytes, but "
                f"{max(left, 0)} bytes follow; copy it again."
            )
        color = _COLOR_PLACES.get(form)
        names, formats, offsets = ["x", "y", "z"], ["<i4"] * 3, [0, 4, 8]
        if color is not None:
            names, formats = [*names, "rgb"], [*formats, "(3,)<u2"]
            offsets = [*offsets, color]
        record = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": width})
        file.seek(start)
        rows = (thinning or Thinning()).read(file, record, count)
    scale, offset = np.frombuffer(header, "<f8", 3, 131), np.frombuffer(header, "<f8", 3, 155)
    points = np.stack([rows[name] for name in "xyz"], axis=1) * scale + offset
    if color is None:
        return points, None
    colors = rows["rgb"]
    # Many programs write bytes into the 16 bits.
    return points, colors.astype(np.uint8) if colors.max(initial=0) <= 255 else np.ascontiguousarray(colors)

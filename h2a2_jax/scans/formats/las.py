"""Points of LAS and LAZ files (ASPRS, versions 1.0 to 1.4, point formats 0 to 10)."""

import io
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.scans.formats import RawCloud, Thinning
from h2a2_jax.scans.formats.columns import unread_colors

_HEADER = 227  # bytes up to version 1.2; later ones have more
_RECORD_HEADER = 54  # bytes of a variable length record before its data


def read_las(path: Path, thinning: Thinning) -> RawCloud:
    """Read coordinates, float64, and colours if the file has some, of the points that `thinning` chooses.

    The colours are uint16 as the format has them; many programs write bytes into them (`colors`).
    """
    import laspy  # three quarters of a second, which only these files should take

    with path.open("rb") as file:
        header, size = file.read(_HEADER), path.stat().st_size
        # Laspy would trust the header's numbers of bytes and of records.
        if header[:4] != b"LASF" or len(header) < _HEADER:
            raise InputError(f"{path} is no LAS file or is cut off in its header: export it again.")
        start, records = struct.unpack_from("<II", header, 96)
        if start > size or records * _RECORD_HEADER > start:
            raise InputError(
                f"{path} is cut off: its header says that points begin after {start} bytes and {records} records, but "
                f"the file has {size} bytes; copy it again."
            )
        file.seek(0)
        try:
            # One thread: the threads of the parallel decompressor do not survive a fork.
            reader = laspy.LasReader(file, closefd=False, laz_backend=laspy.LazBackend.Lazrs, read_evlrs=False)
        except Exception as error:  # laspy has no base class of the errors of damaged headers
            raise InputError(
                f"{path} is no LAS file or its header is damaged ({quoted(error)}): export it again."
            ) from error
        header = reader.header
        count, width, left = header.point_count, header.point_format.size, size - file.tell()
        if not header.are_points_compressed and count * width > left:
            raise InputError(
                f"{path} is cut off: its header says {count} points, which take {count * width} bytes, but "
                f"{max(left, 0)} bytes follow; copy it again."
            )
        if header.are_points_compressed:
            _check_chunks(path, file, header)
        names = ["X", "Y", "Z"]
        if "red" in header.point_format.dimension_names:
            names += ["red", "green", "blue"]

        def read(number: int) -> np.ndarray:
            rows = reader.read_points(number).array
            return np.stack([rows[name] for name in names], axis=1, dtype=np.int32, casting="safe")

        try:
            rows = thinning.collect(read, count)
        except Exception as error:  # of lazrs, which has no base class of its errors
            raise InputError(f"{path} is cut off or damaged ({quoted(error)}): copy it again.") from error
    points = rows[:, :3] * header.scales + header.offsets
    if len(names) == 3:
        return RawCloud(points, assumed=unread_colors(header.point_format.dimension_names), up="z")
    return RawCloud(points, rows[:, 3:].astype(np.uint16), up="z")


def _check_chunks(path: Path, file: BinaryIO, header: Any) -> None:
    """Refuse a damaged table of chunks: lazrs ends the process when it cannot allocate what the table asks for."""
    import lazrs

    start, size = file.tell(), path.stat().st_size

    def number(form: str, place: int) -> int:
        file.seek(min(max(place, 0), size))
        content = file.read(struct.calcsize(form))
        return struct.unpack(form, content)[0] if len(content) == struct.calcsize(form) else -1

    table = number("<q", start)
    if table == -1:  # then the last bytes of the file say where it is
        table = number("<q", size - 8)
    chunks = number("<I", table + 4)
    file.seek(start, io.SEEK_SET)
    items = [vlr for vlr in header.vlrs if type(vlr).__name__ == "LasZipVlr"]
    width = lazrs.LazVlr(items[0].record_data).item_size() if items else 0
    if not 0 <= table <= size - 8 or not 0 <= chunks <= size // 8:
        raise InputError(f"{path} is cut off or damaged: it lacks a table of its compressed chunks; copy it again.")
    if width != header.point_format.size:
        raise InputError(
            f"{path} is damaged: its points have {header.point_format.size} bytes by its header and {width} by its "
            "compressed chunks; write it again."
        )

"""Compiled functions on the host's maps: the search of neighbours, and pairs cut into tiles (`native/maps.cc`).

They are part of the optional extension. Their results are those of numpy, which computes them where there is no
extension, or where `H2A2_NATIVE=0` turns it off.
"""

import ctypes
import functools
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

_MOST_THREADS = 4
_THREADED = 1 << 18
"""Entries of a table from which on several threads fill it: fewer take less than a thread takes to start."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they are not there or turned off."""
    file = extension()
    if file is None:
        return None
    try:
        return declare(ctypes.CDLL(str(file)))
    except (OSError, AttributeError):  # of another machine, or of another version; `native_call` says so
        return None


def extension() -> Path | None:
    """File of the compiled extension; None where it was not built, or where `H2A2_NATIVE=0` turns it off."""
    if os.environ.get("H2A2_NATIVE", "1") == "0":
        return None
    files = [file for file in Path(__file__).parent.glob("_native*") if file.suffix in (".so", ".pyd")]
    return min(files, default=None)


def declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """A loaded library whose functions know their arguments.

    Raises:
        AttributeError: the library lacks one.
    """
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.h2a2_search.argtypes = [p, p, n, p, p, p, i, i, i, i, p]
    loaded.h2a2_pad.argtypes = [p, i, n, n, n, i, p]
    loaded.h2a2_cut.argtypes = [p, i, n, p, i, i, n, n, n, n, i, p, p, p, p]
    loaded.h2a2_search.restype = loaded.h2a2_pad.restype = None
    loaded.h2a2_cut.restype = ctypes.c_int64
    return loaded


def search(
    loaded: ctypes.CDLL,
    keys: Int[np.ndarray, " n"],
    centres: Int[np.ndarray, " m"],
    moves: Int[np.ndarray, " v"],
    runs: Sequence[Sequence[int]],
    mirrored: bool,
) -> Int[np.ndarray, "v m"]:
    """Row of the key centre + move for each move and centre, int32, -1 where there is none.

    Args:
        loaded: the library.
        keys: int64, sorted.
        centres: int64, sorted; the keys themselves if `mirrored`.
        moves: int64, differences of keys.
        runs: moves to search, by run of adjacent keys, ascending within a run.
        mirrored: if True, the runs hold one of each two opposite moves, without the centre; they give the others too.
    """
    ends = np.append(keys, np.iinfo(np.int64).max)
    slices = np.array([j for run in runs for j in run], np.int32)
    steps, bounds = moves[slices], np.cumsum([len(run) for run in runs], dtype=np.int32)
    rows = np.empty((len(moves), len(centres)), np.int32)
    arrays = [_address(array) for array in (steps, slices, bounds)]
    sizes = len(runs), len(moves), mirrored, _threads(rows.size)
    loaded.h2a2_search(_address(ends), _address(centres), len(centres), *arrays, *sizes, _address(rows))
    return rows


def pad(
    loaded: ctypes.CDLL, rows: Int[np.ndarray, "v n"], in_capacity: int, out_capacity: int
) -> Int[np.ndarray, "v m"]:
    """Rows of a table padded to the capacity, int32, with `in_capacity` where there is none."""
    neighbors = np.empty((len(rows), out_capacity), np.int32)
    sizes = *rows.shape, in_capacity, out_capacity, _threads(neighbors.size)
    loaded.h2a2_pad(_address(rows), *sizes, _address(neighbors))
    return neighbors


def cut(
    loaded: ctypes.CDLL,
    rows: Int[np.ndarray, "v n"],
    offsets: int,
    bounds: Int[np.ndarray, " scans"],
    capacities: tuple[int, int],
    tiles: tuple[int, int],
    mirrored: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Lists of the pairs of a table in tiles, as `kernel_map.cut_pairs` makes them.

    Args:
        loaded: the library.
        rows: table of neighbours, int32.
        offsets: number of offsets to cut, from the first on.
        bounds: int64, first output row of each scan, and the number of all.
        capacities: numbers of input and of output rows, padding included.
        tiles: number of tiles, and of pairs in a tile.
        mirrored: if True, tiles of the centre follow.

    Returns:
        in_rows, out_rows, offset and scan of `PairTiles`, and the number of tiles in use.
    """
    in_rows, out_rows = np.empty(tiles, np.int32), np.empty(tiles, np.int32)
    offset, scan = np.empty(tiles[0], np.int32), np.empty(tiles[0], np.int32)
    lists = [_address(array) for array in (in_rows, out_rows, offset, scan)]
    sizes = len(bounds) - 1, mirrored, *capacities, tiles[1], tiles[0], _threads(offsets * rows.shape[1])
    count = loaded.h2a2_cut(_address(rows), offsets, rows.shape[1], _address(bounds), *sizes, *lists)
    return in_rows, out_rows, offset, scan, count


def _address(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def _threads(entries: int) -> int:
    # The workers of a loader are as many as there are cores: each has one thread.
    return 1 if entries < _THREADED or multiprocessing.parent_process() else _cores()


@functools.cache
def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return min(_MOST_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)

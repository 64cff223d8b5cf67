"""Ranges of rows of one scan each, of a static number: what kernels and chunks on accelerators work on."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from h2a2_jax.sparse.pool import scan_bounds


class RowRanges(NamedTuple):
    """Ranges of rows of one scan each.

    Attributes:
        start: int32 [T], first row.
        end: int32 [T], row past the last one; at most `start` for an empty range.
        scan: int32 [T], scan; the number of scans for rows of padding.
    """

    start: Array
    end: Array
    scan: Array


def ranges_of_scans(scan: Int[Array, " n"], num_scans: int, length: int) -> RowRanges:
    """Ranges of at most `length` rows that cover all rows, padding included.

    Args:
        scan: scan of each row, ascending; num_scans on padding.
        num_scans: number of scans.
        length: most rows of a range.
    """
    n = len(scan)
    bounds = jnp.append(scan_bounds(scan, num_scans), n)
    counts = -(-jnp.diff(bounds) // length)
    last = jnp.cumsum(counts)
    index = jnp.arange(-(-n // length) + num_scans, dtype=jnp.int32)
    owner = jnp.minimum((last[None] <= index[:, None]).sum(1), num_scans)
    start = bounds[owner] + (index - (last - counts)[owner]) * length
    ranges = start, jnp.minimum(start + length, bounds[owner + 1]), owner
    return RowRanges(*(part.astype(jnp.int32) for part in ranges))

"""Neighbours in half the bytes, for the way from the host to an accelerator.

Rows are sorted, so the neighbours of a few consecutive sites at one offset lie close together: 16 bits hold their
distance from the first of them. The device unpacks a table in one pass, and XLA shares the result among all
convolutions of a program that read the map.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.neighbors import NeighborTable
from h2a2_jax.typing import Leaf, static_field

_SITES = 64
"""Consecutive sites that share a first row."""
_NONE = np.iinfo(np.uint16).max


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedNeighbors:
    """Neighbours of a kernel map; `jnp.asarray` makes the int32 table [V, N] of them.

    Attributes:
        first: int32 [V, N / 64], lowest row among the neighbours of 64 sites.
        steps: uint16 [V, N], distance of each neighbour from it, 65535 where there is none.
        missing: row that stands for a missing neighbour, the number of input rows (static).
    """

    first: Leaf
    steps: Leaf
    missing: int = static_field()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the table."""
        return self.steps.shape

    def __jax_array__(self) -> Int[Array, "*d v n"]:
        """The table."""
        first = jnp.repeat(jnp.asarray(self.first), _SITES, axis=-1)[..., : self.shape[-1]]
        steps = jnp.asarray(self.steps)
        return jnp.where(steps == _NONE, self.missing, first + steps.astype(jnp.int32))

    def __str__(self) -> str:
        return str(self.steps)


def fits_packing(table: NeighborTable) -> bool:
    """Return True if 16 bits hold the neighbours of a table."""
    return bool((_spread(table.rows, table.rows >= 0)[1] < _NONE).all())


def pack_neighbors(kernel_map: KernelMap) -> KernelMap:
    """The same map with its neighbours in 16 bits; on the host (numpy arrays).

    Raises:
        ValueError: 16 bits do not hold them (`fits_packing`).
    """
    rows, missing = np.asarray(kernel_map.neighbors), kernel_map.in_capacity
    found = rows < missing
    first, spread = _spread(rows, found)
    if (spread >= _NONE).any():
        raise ValueError(
            f"neighbours of {_SITES} consecutive sites lie {spread.max():,} rows apart, expected less than {_NONE:,}; "
            "leave this map unpacked."
        )
    steps = rows - np.repeat(first, _SITES, axis=1)[:, : rows.shape[1]]
    packed: Any = PackedNeighbors(first, np.where(found, steps, _NONE).astype(np.uint16), missing)
    return replace(kernel_map, neighbors=packed)


def _spread(rows: Int[np.ndarray, "v n"], found: Any) -> tuple[Int[np.ndarray, "v m"], Int[np.ndarray, "v m"]]:
    """Lowest of the found rows of 64 sites, and the distance of the highest from it."""
    starts = np.arange(0, rows.shape[1], _SITES)
    if not len(starts):
        return np.zeros((len(rows), 0), np.int32), np.zeros((len(rows), 0), np.int32)
    low = np.minimum.reduceat(np.where(found, rows, np.iinfo(np.int32).max), starts, axis=1)
    high = np.maximum.reduceat(np.where(found, rows, -1), starts, axis=1)
    return np.where(high < 0, 0, low).astype(np.int32), np.where(high < 0, 0, high - low)

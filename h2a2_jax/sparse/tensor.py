"""Sparse tensors: features on padded active sites."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.grid import SiteSet
from h2a2_jax.typing import AnyArray, Leaf, static_field


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sites:
    """Padded active sites.

    Attributes:
        coords: int32 [N, 4], rows (scan, x, y, z) in finest voxels, in lexicographic order; padding rows, all at the
            end, carry scan = num_scans.
        n: int32 [], number of valid rows.
        stride: distance of neighbouring sites in finest voxels (static).
        num_scans: scans in the batch (static).
    """

    coords: Leaf
    n: Leaf
    stride: int = static_field()
    num_scans: int = static_field()

    @property
    def capacity(self) -> int:
        """Rows, padding included."""
        return self.coords.shape[0]

    @property
    def scan(self) -> Int[AnyArray, " N"]:
        """Scan index of each row; num_scans on padding."""
        return self.coords[:, 0]

    @property
    def valid(self) -> Bool[Array, " N"]:
        """Which rows are sites."""
        return jnp.arange(self.capacity) < self.n


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseTensor:
    """Features on active sites; rows of padding hold zeros.

    Attributes:
        features: float [N, C].
        sites: where the rows are.
    """

    features: Leaf
    sites: Sites

    def with_features(self, features: Float[Array, "N C"]) -> "SparseTensor":
        """The same sites with other features; the caller keeps padding rows at zero."""
        return replace(self, features=features)


def pad_sites(sites: SiteSet, capacity: int) -> Sites:
    """A host set as padded arrays (numpy).

    Raises:
        InputError: more sites than `capacity`.
    """
    n = len(sites)
    if n > capacity:
        raise InputError(
            f"{n} sites of stride {sites.stride} do not fit a capacity of {capacity}; take a larger bucket."
        )
    coords = np.zeros((capacity, 4), np.int32)
    coords[:n] = sites.coords
    coords[n:, 0] = sites.num_scans
    return Sites(coords, np.asarray(n, np.int32), sites.stride, sites.num_scans)


def pad_rows(rows: AnyArray, capacity: int) -> np.ndarray:
    """Rows [n, ...] padded with zeros to [capacity, ...] (numpy)."""
    rows = np.asarray(rows)
    out = np.zeros((capacity, *rows.shape[1:]), rows.dtype)
    out[: len(rows)] = rows
    return out

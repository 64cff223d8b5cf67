"""Active sites: voxelisation, sets of sites on the host, and the padded sites and tensors of a device.

A site is four integers (scan, x, y, z) in units of the finest voxel, at every level: a set of stride s holds multiples
of s (negative coordinates occur). On the host a set is kept as sorted, unique int64 keys (`SiteSet`), z fastest:
sorting and binary search on one machine word make maps cheap to build. `pad_sites` makes arrays of a fixed number of
rows from a set (`Sites`), and features on them are a `SparseTensor`.

Coordinates depend on points alone, never on features, so all sets of a network are made before it runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.errors import InputError
from h2a2_jax.typing import AnyArray, Leaf, static_field

_BITS = 16
_BIAS = 1 << (_BITS - 1)
_FIELD = (1 << _BITS) - 1
MAX_COORDINATE = _BIAS - 1024
"""Largest |coordinate| of a given site; the rest of the 16-bit field is room for the offsets of kernels."""
MAX_DERIVED = _BIAS - 512
"""Largest |coordinate| of a site that was floored to a coarser grid or generated."""
MAX_REACH = 2 * (_BIAS - MAX_DERIVED) - 1
"""Largest offset of a kernel, in voxels. What leaves a field then still meets no site at its other end."""
MAX_SCANS = 1 << (_BITS - 2)
"""Largest number of scans of a batch."""

Size3 = int | tuple[int, int] | tuple[int, int, int]
"""A size of a kernel: one number for a cube, (x, y) in 2-D, (x, y, z)."""


def size3(size: Size3) -> tuple[int, int, int]:
    """Expand a size to three numbers along x, y, z; a size of two numbers, along x and y, is 1 along z."""
    if isinstance(size, int):
        return size, size, size
    return (size[0], size[1], 1) if len(size) == 2 else size


def voxel_coordinates(points: Float[np.ndarray, "m 3"], voxel_size: float) -> Int[np.ndarray, "m 3"]:
    """Voxel of each point: floor(p / voxel_size), divided in float32.

    Division, not multiplication by the reciprocal, and in float32: a point on a voxel's face otherwise falls on the
    other side of it.

    Args:
        points: positions in metres.
        voxel_size: edge of a voxel in metres.

    Returns:
        int32 coordinates [m, 3].

    Raises:
        InputError: a coordinate is not finite or lies outside the +-31,743 voxels that a site key can hold, or
            `voxel_size` is not above 0.
    """
    if not voxel_size > 0:
        raise InputError(f"voxel_size is {voxel_size}; expected metres above 0.")
    finite = np.isfinite(points).all(1)
    if not finite.all():
        raise InputError(
            f"{int((~finite).sum())} of {len(points)} points are NaN or infinite; remove them before voxelisation."
        )
    with np.errstate(over="ignore"):  # beyond float32 is beyond the range too
        scaled = np.floor(np.asarray(points, np.float32) / np.float32(voxel_size))
    if len(scaled) and np.abs(scaled).max() >= MAX_COORDINATE:
        raise InputError(
            f"a point lies {float(np.abs(points).max()):.1f} m from the origin; voxels of {voxel_size} m reach "
            f"{MAX_COORDINATE * voxel_size:.1f} m: centre the scan, check its unit (metres), or use larger voxels."
        )
    return scaled.astype(np.int32)


# ---------------------------------------------------------------- keys


def pack_keys(coords: Int[np.ndarray, "n 4"], limit: int = MAX_DERIVED) -> Int[np.ndarray, " n"]:
    """int64 keys of (scan, x, y, z) rows; their order is the lexicographic order of the rows.

    Args:
        coords: rows (scan, x, y, z).
        limit: largest |coordinate| allowed; `MAX_COORDINATE` for sites that were not made from others.

    Raises:
        InputError: a coordinate or a scan index is out of range.
    """
    c = coords.astype(np.int64)
    if len(c):
        _check_reach(int(np.abs(c[:, 1:]).max()), limit)
        if c[:, 0].min() < 0 or c[:, 0].max() >= MAX_SCANS:
            raise InputError(f"scan indices must lie in 0..{MAX_SCANS - 1}, given up to {int(c[:, 0].max())}.")
    c[:, 1:] += _BIAS
    return (c[:, 0] << 3 * _BITS) | (c[:, 1] << 2 * _BITS) | (c[:, 2] << _BITS) | c[:, 3]


def _check_reach(reach: int, limit: int) -> None:
    if reach > limit:
        raise InputError(
            f"site coordinates reach {reach}, a key holds +-{limit}; centre the scan or use larger voxels."
        )


def _reach(keys: Int[np.ndarray, " n"]) -> int:
    """Largest |coordinate|."""
    return max(int(np.abs(((keys >> shift) & _FIELD) - _BIAS).max(initial=0)) for shift in (2 * _BITS, _BITS, 0))


def unpack_keys(keys: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n 4"]:
    """(scan, x, y, z) rows, int32, of int64 keys."""
    fields = [keys >> 3 * _BITS] + [((keys >> shift) & _FIELD) - _BIAS for shift in (2 * _BITS, _BITS, 0)]
    return np.stack(fields, -1).astype(np.int32)


def key_offsets(offsets: Int[np.ndarray, "v 3"]) -> Int[np.ndarray, " v"]:
    """Differences of keys for moves (dx, dy, dz) in voxels: key + difference is the key of the moved site."""
    o = offsets.astype(np.int64)
    return (o[:, 0] << 2 * _BITS) + (o[:, 1] << _BITS) + o[:, 2]


def sorted_unique(keys: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Sorted distinct keys (by sort and difference: np.unique hashes and is many times slower)."""
    keys = np.sort(keys)
    return keys[_starts(keys)]


def _starts(ordered: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """True where a run of equal values starts."""
    return np.concatenate([np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1]])


# ---------------------------------------------------------------- offsets of kernels


def kernel_offsets(kernel_size: Size3, dilation: int = 1) -> Int[np.ndarray, "v 3"]:
    """Integer offsets of a kernel's slices, x fastest: slice k = ix + Kx * iy + Kx * Ky * iz.

    Odd sizes are centred (-K//2 .. K//2), even sizes start at zero (0 .. K-1).
    """
    axes = [np.arange(k) - (k // 2 if k % 2 else 0) for k in size3(kernel_size)]
    z, y, x = np.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
    return (np.stack([x.ravel(), y.ravel(), z.ravel()], -1) * dilation).astype(np.int64)


def voxel_offsets(kernel_size: Size3, dilation: int, stride: int) -> Int[np.ndarray, "v 3"]:
    """Offsets of a kernel's slices in finest voxels, for sites of the given stride.

    Raises:
        InputError: the kernel reaches farther than a key has room for, `MAX_REACH` voxels.
    """
    reach = max(k // 2 if k % 2 else k - 1 for k in size3(kernel_size)) * abs(dilation) * stride
    if reach > MAX_REACH:
        raise InputError(
            f"a kernel of size {kernel_size} and dilation {dilation} on sites of stride {stride} reaches {reach} "
            f"voxels, a map holds at most {MAX_REACH}; use a smaller kernel, dilation or stride."
        )
    return kernel_offsets(kernel_size, dilation) * stride


# ---------------------------------------------------------------- sets on the host


@dataclass(frozen=True)
class SiteSet:
    """A set of sites on the host.

    Attributes:
        keys: int64 [n], sorted and unique.
        stride: distance of neighbouring sites, in finest voxels.
        num_scans: number of scans in the batch; the scan indices of keys are below it.
    """

    keys: np.ndarray
    stride: int
    num_scans: int

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def coords(self) -> Int[np.ndarray, "n 4"]:
        """(scan, x, y, z) rows in lexicographic order, int32."""
        return unpack_keys(self.keys)

    @property
    def scan(self) -> Int[np.ndarray, " n"]:
        """Scan index of each site, int32."""
        return (self.keys >> 3 * _BITS).astype(np.int32)

    def lookup(self, coords: Int[np.ndarray, "m 4"]) -> Int[np.ndarray, " m"]:
        """Row of each given site, int32, -1 where it is not in the set."""
        return find_keys(self.keys, pack_keys(coords))


def find_keys(keys: Int[np.ndarray, " n"], queries: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """Row of each query in the sorted keys, int32, -1 where it is missing."""
    if not len(keys):
        return np.full(len(queries), -1, np.int32)
    rows = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[rows] == queries, rows, -1).astype(np.int32)


def site_set(coords: Int[np.ndarray, "n d"], *, stride: int = 1, num_scans: int | None = None) -> SiteSet:
    """The set of the given sites, in any order, duplicates merged.

    Args:
        coords: rows (scan, x, y, z), or (scan, x, y) in 2-D, where z is 0.
        stride: stride of the set; coordinates are multiples of it.
        num_scans: number of scans in the batch; default one more than the largest scan index.

    Raises:
        InputError: a coordinate or a scan index is out of range.
    """
    if coords.shape[1] == 3:
        coords = np.concatenate([coords, np.zeros_like(coords[:, :1])], 1)
    most = int(coords[:, 0].max()) + 1 if len(coords) else 1
    scans = most if num_scans is None else num_scans
    if len(coords) and most > scans:
        raise InputError(f"scan index {most - 1} is none of a batch of {scans} scans; count scans from 0.")
    return SiteSet(sorted_unique(pack_keys(coords, MAX_COORDINATE)), stride, scans)


@dataclass(frozen=True)
class Voxelization:
    """Sites of a batch of point clouds, and the point that each takes its features from.

    Attributes:
        sites: occupied voxels, stride 1.
        first_point: int64 [n], first point of each voxel, as a row of the concatenated point clouds.
    """

    sites: SiteSet
    first_point: np.ndarray


def voxelize(clouds: Sequence[np.ndarray], voxel_size: float) -> Voxelization:
    """Voxelise one point cloud per scan; the first point of a voxel represents it.

    Args:
        clouds: one float32 array [m_i, 3] per scan, in metres; empty ones are allowed.
        voxel_size: edge of a voxel in metres.

    Raises:
        InputError: as `voxel_coordinates`; or one array is given in place of a list of arrays.
    """
    if isinstance(clouds, np.ndarray) and clouds.ndim < 3:
        raise InputError(f"an array {list(clouds.shape)} was given; expected is a list with an array [m, 3] a scan.")
    coords = [voxel_coordinates(points, voxel_size) for points in clouds]
    rows = np.concatenate([np.empty((0, 3), np.int32), *coords])
    scan = np.repeat(np.arange(len(clouds)), [len(c) for c in coords])
    if len(clouds) > MAX_SCANS:
        raise InputError(f"a batch of {len(clouds)} scans was given, a key holds {MAX_SCANS}; use smaller ones.")
    keys, first = _distinct_voxels(scan, rows)
    return Voxelization(SiteSet(keys, 1, len(clouds)), first)


def _distinct_voxels(
    scan: Int[np.ndarray, " n"], rows: Int[np.ndarray, "n 3"]
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Sorted distinct keys of (scan, x, y, z), and the first row with each."""
    low = rows.min(0, initial=0)
    bits = [int(extent).bit_length() for extent in (rows.max(0, initial=0) - low)]
    x_bits, y_bits, z_bits = bits
    place_bits = len(rows).bit_length()
    scan_bits = int(scan[-1] if len(scan) else 0).bit_length()
    if scan_bits + sum(bits) + place_bits > 63:
        keys = pack_keys(np.concatenate([scan[:, None], rows], 1))
        order = np.argsort(keys, kind="stable")
        starts = _starts(keys[order])
        return keys[order][starts], order[starts]
    # Voxel and row fit one word: sorting that is several times faster than an argsort of the voxels.
    word = scan.astype(np.int64)
    for axis, width in enumerate(bits):
        word <<= width
        word += rows[:, axis]
        word -= low[axis]
    word <<= place_bits
    word += np.arange(len(rows))
    word.sort()
    voxel = word >> place_bits
    starts = _starts(voxel)
    voxel, first = voxel[starts], word[starts] & ((1 << place_bits) - 1)
    z = voxel & ((1 << z_bits) - 1)
    y = (voxel >> z_bits) & ((1 << y_bits) - 1)
    x = (voxel >> (z_bits + y_bits)) & ((1 << x_bits) - 1)
    move = low.astype(np.int64) + _BIAS
    keys = (voxel >> sum(bits)) << 3 * _BITS
    keys += ((x + move[0]) << 2 * _BITS) + ((y + move[1]) << _BITS) + (z + move[2])
    return keys, first


def downsample(sites: SiteSet, factor: int) -> SiteSet:
    """Sites of the coarser grid: unique(floor(c / s) * s) with s = sites.stride * factor, true floor.

    Raises:
        InputError: a coarse site lies outside +-`MAX_DERIVED`.
    """
    stride = sites.stride * factor
    if stride & (stride - 1) == 0 and MAX_DERIVED % stride == 0:
        # The bias is a multiple of every power of two: clear the low bits of each field.
        low = _FIELD & ~(stride - 1)
        mask = (-1 << 3 * _BITS) | (low << 2 * _BITS) | (low << _BITS) | low
        keys = sites.keys & np.int64(mask)
    else:
        coords = sites.coords
        coords[:, 1:] = np.floor_divide(coords[:, 1:], stride) * stride
        keys = pack_keys(coords)
    return SiteSet(sorted_unique(keys), stride, sites.num_scans)


def generate(sites: SiteSet, kernel_size: Size3, factor: int = 2) -> SiteSet:
    """Sites of a generative transposed convolution: every site plus every offset of the finer stride.

    Raises:
        ValueError: the stride of the sites is not a multiple of `factor`.
        InputError: a generated site may lie outside +-`MAX_DERIVED`.
    """
    if sites.stride % factor:
        raise ValueError(f"sites of stride {sites.stride} have no finer grid at 1/{factor} of it.")
    stride = sites.stride // factor
    offsets = voxel_offsets(kernel_size, 1, stride)
    _check_reach(_reach(sites.keys) + int(np.abs(offsets).max(initial=0)), MAX_DERIVED)
    moves = key_offsets(offsets)
    return SiteSet(sorted_unique((sites.keys[None, :] + moves[:, None]).ravel()), stride, sites.num_scans)


def unite(a: SiteSet, b: SiteSet) -> SiteSet:
    """Union of two site sets of one stride.

    Raises:
        ValueError: the strides differ.
    """
    if a.stride != b.stride:
        raise ValueError(f"a union needs one stride, given {a.stride} and {b.stride}.")
    keys = sorted_unique(np.concatenate([a.keys, b.keys]))
    return SiteSet(keys, a.stride, max(a.num_scans, b.num_scans))


# ---------------------------------------------------------------- padded sites


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sites:
    """Padded active sites.

    Attributes:
        coords: int32 [N, 4], rows (scan, x, y, z) in finest voxels, in lexicographic order; padding rows, all at the
            end, have scan = num_scans.
        n: int32 [], number of valid rows.
        stride: distance of neighbouring sites in finest voxels (static).
        num_scans: number of scans in the batch (static).
    """

    coords: Leaf
    n: Leaf
    stride: int = static_field()
    num_scans: int = static_field()

    @property
    def capacity(self) -> int:
        """Number of rows, padding included."""
        return self.coords.shape[0]

    @property
    def scan(self) -> Int[AnyArray, " N"]:
        """Scan index of each row; num_scans on padding."""
        return self.coords[:, 0]

    @property
    def valid(self) -> Bool[Array, " N"]:
        """True for the rows that are sites."""
        return jnp.arange(self.capacity) < self.n


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseTensor:
    """Features on active sites; rows of padding hold zeros.

    Attributes:
        features: float [N, C], one row per site.
        sites: padded sites of the rows.
    """

    features: Leaf
    sites: Sites

    def with_features(self, features: Float[Array, "N C"]) -> "SparseTensor":
        """Other features on the same sites; the caller keeps padding rows at zero."""
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

"""Active sites: voxelisation, sets of sites on the host, and the padded sites and tensors of a device.

A site is a scan and integers (x, y, z) in units of the finest voxel, at every level: a set of stride s holds multiples
of s (negative coordinates occur). Sites in 2-D have z = 0, sites in 4-D a fourth coordinate. On the host a set is kept
as sorted, unique int64 keys (`SiteSet`), the last axis fastest: sorting and binary search on one machine word make maps
cheap to build. `pad_sites` makes arrays of a fixed number of rows from a set (`Sites`), and features on them are a
`SparseTensor`.

Every set has an identity: the operations that made it, as text ("voxels/2", "generate(voxels/4, 3, 2)"). It is static
under jit and the same for every scan, so that two tensors on different sites are told apart without a look at their
coordinates, and nothing is compiled anew.

Coordinates depend on points alone, never on features, so all sets of a network are made before it runs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, SupportsIndex, TypeAlias
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.errors import InputError
from h2a2_jax.typing import AnyArray, Leaf, static_field

PerAxis: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
"""One integer for all axes, or one for each: (x, y) in 2-D, (x, y, z), (x, y, z, t) in 4-D."""


class Reach(NamedTuple):
    """Limits of coordinates, in voxels.

    Attributes:
        given: largest |coordinate| of a given site; the rest of a key's field is room for the offsets of kernels.
        derived: largest |coordinate| of a site that was floored to a coarser grid or generated.
        kernel: largest offset of a kernel. A site moved by it out of its field still meets no site at the other end.
    """

    given: int
    derived: int
    kernel: int


@dataclass(frozen=True)
class KeyFields:
    """Fields of a site's int64 key: the scan, then one field an axis, the last axis lowest.

    Attributes:
        axes: number of axes, 3 or 4.
        bits: width of the field of an axis.
    """

    axes: int
    bits: int

    @property
    def bias(self) -> int:
        """Number added to a coordinate, so that fields are not negative."""
        return 1 << (self.bits - 1)

    @property
    def mask(self) -> int:
        """Ones on the width of a field."""
        return (1 << self.bits) - 1

    @property
    def shifts(self) -> tuple[int, ...]:
        """Place of each axis's field in the key."""
        return tuple(self.bits * i for i in reversed(range(self.axes)))

    @property
    def scan_shift(self) -> int:
        """Place of the scan's field in the key."""
        return self.bits * self.axes

    @property
    def reach(self) -> Reach:
        """Limits of coordinates: +-31,743 voxels in 3-D, +-1,983 in 4-D."""
        room = 1 << (self.bits - 6)
        return Reach(self.bias - room, self.bias - room // 2, room - 1)


_KEYS = {3: KeyFields(3, 16), 4: KeyFields(4, 12)}
MAX_COORDINATE = _KEYS[3].reach.given
"""Largest |coordinate| of a given site in 2-D and 3-D."""
MAX_REACH = _KEYS[3].reach.kernel
"""Largest offset of a kernel in 2-D and 3-D."""
MAX_SCANS = 1 << 14
"""Largest number of scans of a batch."""


def key_fields(axes: int) -> KeyFields:
    """Fields of the keys of sites with 3 or 4 axes."""
    return _KEYS[axes]


def per_axis(value: Any, axes: int = 3, *, name: str = "size", least: int = 1) -> tuple[int, ...]:
    """One integer for each axis; two numbers for three axes are those of x and y in 2-D.

    Args:
        value: an integer, or a sequence of integers.
        axes: number of axes.
        name: name of the value for an error message.
        least: smallest number allowed.

    Raises:
        ValueError: other numbers, or not one per axis.
    """
    if type(value) is int and value >= least:  # the usual case, many times a batch
        return (value,) * axes
    many = isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim > 0)
    numbers = list(value) if many else [value] * axes
    if len(numbers) == 2 and axes == 3:
        numbers.append(least)
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in numbers)
    if len(numbers) != axes or not whole or not all(n >= least for n in numbers):
        raise ValueError(
            f"{name} is {value!r}; expected one integer from {least} on, or one for each of the {axes} axes of the "
            "sites" + (" (x, y in 2-D)." if axes == 3 else ".")
        )
    return tuple(int(n) for n in numbers)


def check_count(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """An integer in a range.

    Raises:
        ValueError: it is none, or out of the range.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        span = f"from {least} on" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected an integer {span}.")
    return int(value)


def host_array(what: str, values: Any) -> np.ndarray:
    """An array of the host, of values that are one.

    Raises:
        InputError: rows have different lengths, or some values are masked.
    """
    if np.ma.is_masked(values):
        raise InputError(f"{what} are partly masked; give the rows that count alone, as a plain array.")
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InputError(f"{what} are no array: rows have different lengths; give as many numbers in each.") from error


def device_array(what: str, values: Any) -> Array:
    """An array of JAX, of values that are numbers.

    Raises:
        ValueError: they are not.
    """
    try:
        return jnp.asarray(values)
    except (TypeError, ValueError) as error:
        given = getattr(values, "dtype", type(values).__name__)
        raise ValueError(f"{what} are of type {given}; expected is an array of numbers.") from error


def check_voxel_size(voxel_size: float | Sequence[float], columns: int) -> np.ndarray:
    """Edges of a voxel, float32 [] or [columns].

    Raises:
        InputError: they are not above 0, or not one number per axis.
    """
    if isinstance(voxel_size, jax.core.Tracer):
        raise InputError("voxel_size is an argument of a function under jit; expected is a number, which is static.")
    size = np.asarray(voxel_size)
    if size.dtype.kind not in "fiu" or size.shape not in ((), (columns,)) or not ((size > 0) & np.isfinite(size)).all():
        raise InputError(
            f"voxel_size is {voxel_size!r}; expected metres above 0: one number, or one for each of the {columns} "
            "columns of the points."
        )
    return size.astype(np.float32)


def axes_of(size: PerAxis) -> int:
    """Number of axes of the sites that a size is meant for: 4 for four numbers, else 3."""
    return 4 if np.ndim(size) and len(size) == 4 else 3  # type: ignore[arg-type]


def shorten(numbers: Sequence[int]) -> int | tuple[int, ...]:
    """One number where all axes have the same, else a tuple."""
    return int(numbers[0]) if len(set(numbers)) == 1 else tuple(int(n) for n in numbers)


def voxel_coordinates(points: Float[np.ndarray, "m d"], voxel_size: float | Sequence[float]) -> Int[np.ndarray, "m d"]:
    """Voxel of each point: floor(p / voxel_size), divided in float32.

    Division, not multiplication by the reciprocal, and in float32: a point on a voxel's face otherwise falls on the
    other side of it.

    Args:
        points: positions in metres.
        voxel_size: edge of a voxel in metres, or its edges along the axes.

    Returns:
        int32 coordinates [m, d].

    Raises:
        InputError: the points have other columns or are no numbers, a coordinate is not finite or lies outside the
            +-31,743 voxels that a site key can hold, or `voxel_size` is not above 0 or not one number per axis.
        ValueError: the points are tracers of jit.
    """
    if isinstance(points, jax.core.Tracer):
        raise ValueError("voxel_coordinates was given points inside jit; use sparse.voxelize_points there.")
    points = host_array("points", points)
    _check_cloud(points, (2, 3, 4))
    size = check_voxel_size(voxel_size, points.shape[1])
    finite = np.isfinite(points).all(1)
    if not finite.all():
        raise InputError(
            f"{int((~finite).sum())} of {len(points)} points are NaN or infinite; remove them before voxelisation."
        )
    with np.errstate(over="ignore"):  # beyond float32 is beyond the range too
        scaled = np.floor(np.asarray(points, np.float32) / size)
    limit = key_fields(4 if points.shape[1] == 4 else 3).reach.given
    if len(scaled) and np.abs(scaled).max() >= limit:
        raise InputError(
            f"a point lies {float(np.abs(points).max()):.1f} m from the origin; voxels of {voxel_size} m reach "
            f"{limit * float(size.min()):.1f} m: centre the scan, check its unit (metres), or use larger voxels."
        )
    return scaled.astype(np.int32)


def _check_cloud(cloud: np.ndarray, columns: tuple[int, ...]) -> None:
    if cloud.ndim != 2 or cloud.shape[1] not in columns or cloud.dtype.kind not in "fiu":
        raise InputError(
            f"a cloud has the shape {list(cloud.shape)} and the type {cloud.dtype}; expected are numbers "
            f"[m, {' or '.join(map(str, columns))}], positions alone: cut colours and intensities off"
            + (", or ask for axes=4." if cloud.ndim == 2 and cloud.shape[1] == 4 else ".")
        )


# ---------------------------------------------------------------- keys


def pack_keys(coords: Int[np.ndarray, "n d"], limit: int | None = None) -> Int[np.ndarray, " n"]:
    """int64 keys of (scan, x, y, z) rows; their order is the lexicographic order of the rows.

    Args:
        coords: rows (scan, x, y, z), or (scan, x, y, z, t).
        limit: largest |coordinate| allowed; by default that of derived sites.

    Raises:
        InputError: a coordinate or a scan index is out of range.
    """
    c = coords.astype(np.int64)
    fields = key_fields(c.shape[1] - 1)
    if len(c):
        # Not by the absolute values: that of the least int64 is negative.
        reach = max(int(c[:, 1:].max()), -int(c[:, 1:].min()))
        _check_reach(reach, fields.reach.derived if limit is None else limit)
        low, high = int(c[:, 0].min()), int(c[:, 0].max())
        if low < 0 or high >= MAX_SCANS:
            raise InputError(f"scan indices must lie in 0..{MAX_SCANS - 1}, given {low} to {high}.")
    keys = c[:, 0]
    for axis in range(fields.axes):
        keys = (keys << fields.bits) + (c[:, 1 + axis] + fields.bias)
    return keys


def _check_reach(reach: int, limit: int) -> None:
    if reach > limit:
        raise InputError(
            f"site coordinates reach {reach}, a key holds +-{limit}; centre the scan or use larger voxels."
        )


def unpack_keys(keys: Int[np.ndarray, " n"], axes: int = 3) -> Int[np.ndarray, "n d"]:
    """(scan, x, y, z) rows, int32, of int64 keys; (scan, x, y, z, t) of keys with four axes."""
    fields = key_fields(axes)
    coords = np.empty((len(keys), 1 + axes), np.int32)
    coords[:, 0] = keys >> fields.scan_shift
    for axis, shift in enumerate(fields.shifts):
        coords[:, 1 + axis] = ((keys >> shift) & fields.mask) - fields.bias
    return coords


def key_offsets(offsets: Int[np.ndarray, "v d"]) -> Int[np.ndarray, " v"]:
    """Differences of keys for moves in voxels: key + difference is the key of the moved site."""
    shifts = key_fields(offsets.shape[1]).shifts
    return sum((offsets[:, i].astype(np.int64) << shift) for i, shift in enumerate(shifts))  # type: ignore[return-value]


def sorted_unique(keys: Int[np.ndarray, " n"], *, runs: bool = False) -> Int[np.ndarray, " m"]:
    """Sorted distinct keys (by sort and difference: np.unique hashes and is many times slower).

    Args:
        keys: in any order.
        runs: if True, the keys are a few sorted lists, one after the other, or nearly sorted; a stable sort merges them
            in a quarter of the time.
    """
    keys = np.sort(keys, kind="stable" if runs else None)
    return keys[_starts(keys)]


def _starts(ordered: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """True where a run of equal values starts."""
    return np.concatenate([np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1]])


# ---------------------------------------------------------------- offsets of kernels


def kernel_offsets(kernel_size: PerAxis, dilation: PerAxis = 1, axes: int | None = None) -> Int[np.ndarray, "v d"]:
    """Integer offsets of a kernel's slices, x fastest: slice k = ix + Kx * iy + Kx * Ky * iz.

    Odd sizes are centred (-K//2 .. K//2), even sizes start at zero (0 .. K-1).

    Args:
        kernel_size: size of the kernel.
        dilation: distance of neighbouring slices.
        axes: number of axes, 3 or 4; by default 4 for a size of four numbers, else 3.

    Returns:
        int64 offsets [V, 3], [V, 4] with four axes, in strides of the sites.

    Raises:
        ValueError: a size or a dilation is not one positive integer per axis, or the axes are neither 3 nor 4.
    """
    axes = axes_of(kernel_size) if axes is None else axes
    if axes not in _KEYS:
        raise ValueError(f"axes is {axes!r}; expected 3, also in 2-D, or 4.")
    sizes = per_axis(kernel_size, axes, name="kernel_size")
    ranges = [np.arange(k, dtype=np.int64) - (k // 2 if k % 2 else 0) for k in sizes]
    grids = np.meshgrid(*reversed(ranges), indexing="ij")
    return np.stack([grid.ravel() for grid in reversed(grids)], -1) * np.array(
        per_axis(dilation, axes, name="dilation")
    )


def voxel_offsets(
    kernel_size: PerAxis, dilation: PerAxis, stride: PerAxis, axes: int = 3, *, padding: PerAxis | None = None
) -> Int[np.ndarray, "v d"]:
    """Offsets of a kernel's slices in finest voxels, for sites of the given stride.

    With `padding` slice i is at (i * dilation - padding) * stride, as in spconv and Torch.

    Raises:
        ValueError: a size or a dilation is not one positive integer per axis, or a padding is negative.
        InputError: the kernel reaches farther than a key has room for.
    """
    sizes = np.array(per_axis(kernel_size, axes, name="kernel_size"))
    spread = np.array(per_axis(dilation, axes, name="dilation"))
    strides = np.array(per_axis(stride, axes, name="stride"))
    first = -(sizes // 2) * (sizes % 2) * spread
    if padding is not None:
        first = -np.array(per_axis(padding, axes, name="padding", least=0))
    ends = np.stack([first, first + (sizes - 1) * spread]) * strides
    reach, most = int(np.abs(ends).max()), key_fields(axes).reach.kernel
    if reach > most:
        raise InputError(
            f"a kernel of size {kernel_size} and dilation {dilation}"
            + (f" with padding {padding}" if padding is not None else "")
            + f" on sites of stride {stride} reaches {reach} voxels, a map holds at most {most}; use a smaller kernel, "
            "dilation or stride."
        )
    offsets = kernel_offsets(kernel_size, dilation, axes)
    return (offsets - offsets.min(0) + first) * strides


# ---------------------------------------------------------------- identity


class Root:
    """A set that was not made from another one: where an identity begins.

    Attributes:
        name: name in identities.
    """

    def __init__(self, name: str):
        """Begin an identity with a name; each root is one of its own, whatever its name."""
        self.name = name


Lineage = Root | tuple
"""A root, or (text with a place {} for each parent, *parents), or (factors of a coarser grid, parent)."""


def render_identity(lineage: Lineage, numbers: Mapping[Root, int] | None = None) -> str:
    """Identity of a set as text; roots with a number above zero carry it."""
    if isinstance(lineage, Root):
        number = (numbers or {}).get(lineage, 0)
        return f"{lineage.name}#{number}" if number else lineage.name
    operation, *parents = lineage
    identities = [render_identity(parent, numbers) for parent in parents]
    return operation.format(*identities) if isinstance(operation, str) else coarser_identity(identities[0], operation)


def coarser_identity(identity: str, factors: tuple[int, ...]) -> str:
    """Identity of coarser sites; downsampling twice by 2 is downsampling by 4."""
    base, _, last = identity.rpartition("/")
    if base and last.replace("x", "").isdigit():
        before = [int(part) for part in last.split("x")]
        before = before * len(factors) if len(before) == 1 else before
        identity, factors = base, tuple(a * b for a, b in zip(before, factors, strict=True))
    return f"{identity}/{'x'.join(map(str, factors)) if len(set(factors)) > 1 else factors[0]}"


def generated_identity(identity: str, kernel_size: PerAxis, factor: PerAxis, axes: int) -> str:
    """Identity of the sites that a generative convolution makes."""
    sizes = (shorten(per_axis(value, axes)) for value in (kernel_size, factor))
    return "generate({}, {}, {})".format(identity, *sizes)


def roots_of(lineage: Lineage) -> list[Root]:
    """Roots of a lineage, in order."""
    return [lineage] if isinstance(lineage, Root) else [root for parent in lineage[1:] for root in roots_of(parent)]


# ---------------------------------------------------------------- sets on the host


@dataclass(frozen=True)
class SiteSet:
    """A set of sites on the host.

    Attributes:
        keys: int64 [n], sorted and unique.
        stride: distance of neighbouring sites, in finest voxels; one number, or one per axis.
        num_scans: number of scans in the batch; the scan indices of keys are below it.
        axes: number of coordinates of a site: 3, also in 2-D where z is 0, or 4.
        lineage: operations that made the set, for its identity.
    """

    keys: np.ndarray
    stride: int | tuple[int, ...]
    num_scans: int
    axes: int = 3
    lineage: Lineage = field(default_factory=lambda: Root("sites"), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def identity(self) -> str:
        """Operations that made the set, as text."""
        return render_identity(self.lineage)

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride along each axis."""
        return per_axis(self.stride, self.axes, name="stride")

    @property
    def coords(self) -> Int[np.ndarray, "n d"]:
        """(scan, x, y, z) rows in lexicographic order, int32; (scan, x, y, z, t) with four axes."""
        return unpack_keys(self.keys, self.axes)

    @property
    def scan(self) -> Int[np.ndarray, " n"]:
        """Scan index of each site, int32."""
        return (self.keys >> key_fields(self.axes).scan_shift).astype(np.int32)

    def lookup(self, coords: Int[np.ndarray, "m d"]) -> Int[np.ndarray, " m"]:
        """Row of each given site, int32, -1 where it is not in the set.

        Raises:
            InputError: the coordinates are no integers, or not one row per site.
        """
        rows = with_axes(host_array("coordinates", coords), self.axes)
        if not np.issubdtype(rows.dtype, np.integer):
            raise InputError(f"lookup was given coordinates of type {rows.dtype}; expected integers, in finest voxels.")
        reach = key_fields(self.axes).reach.derived
        inside = ((rows[:, 1:] <= reach) & (rows[:, 1:] >= -reach)).all(1)
        inside &= (rows[:, 0] >= 0) & (rows[:, 0] < MAX_SCANS)
        return np.where(inside, find_keys(self.keys, pack_keys(np.where(inside[:, None], rows, 0))), -1).astype(
            np.int32
        )


def find_keys(keys: Int[np.ndarray, " n"], queries: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """Row of each query in the sorted keys, int32, -1 where it is missing."""
    if not len(keys):
        return np.full(len(queries), -1, np.int32)
    rows = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[rows] == queries, rows, -1).astype(np.int32)


def with_axes(coords: Any, axes: int | None = None, *, rows: bool = True) -> Any:
    """Rows (scan, x, y, ...) with all their axes: rows of a 2-D site get z = 0.

    Args:
        coords: numpy or JAX array.
        axes: number of axes; None for any.
        rows: if False, the array may have any number of dimensions.

    Raises:
        InputError: rows of another length.
    """
    lengths = {None: (3, 4, 5), 3: (3, 4), 4: (5,)}
    if (coords.ndim != 2 if rows else coords.ndim < 1) or coords.shape[-1] not in lengths[axes]:
        raise InputError(
            f"coordinates have the shape {list(coords.shape)}; expected rows (scan, x, y, z), (scan, x, y) in 2-D or "
            "(scan, x, y, z, t) in 4-D."
        )
    if coords.shape[-1] > 3:
        return coords
    xp = np if isinstance(coords, np.ndarray) else jnp
    return xp.concatenate([coords, xp.zeros_like(coords[..., :1])], -1)


def site_set(coords: AnyArray, *, stride: PerAxis = 1, num_scans: int | None = None, name: str = "sites") -> SiteSet:
    """The set of the given sites, in any order, duplicates merged.

    Args:
        coords: whole numbers, rows (scan, x, y, z); (scan, x, y) in 2-D, where z is 0; (scan, x, y, z, t) in 4-D.
        stride: stride of the set; coordinates are multiples of it.
        num_scans: number of scans in the batch; default one more than the largest scan index.
        name: name of the set in the identities of what is made from it.

    Raises:
        InputError: a coordinate is not whole, no multiple of the stride or out of range, or a scan index is.
        ValueError: a stride is not one positive integer per axis, or the coordinates are tracers of jit.
    """
    if isinstance(coords, jax.core.Tracer):
        raise ValueError("site_set was given an array inside jit; use sparse.sites_from_coords there.")
    rows = with_axes(host_array("coordinates", coords))
    axes = rows.shape[1] - 1
    if not np.issubdtype(rows.dtype, np.integer):
        whole = np.isfinite(rows) & (rows == np.floor(rows)) if np.issubdtype(rows.dtype, np.floating) else False
        if not np.all(whole):
            raise InputError(
                f"coordinates of type {rows.dtype} hold {int((~np.asarray(whole)).sum())} values that are no whole "
                "numbers; give integers, or points in metres to sparse.voxelize."
            )
        rows = np.clip(rows, -(2.0**40), 2.0**40).astype(np.int64)
    elif rows.dtype == np.uint64:  # signed, the largest ones would be small
        rows = np.minimum(rows, 1 << 40).astype(np.int64)
    steps = per_axis(stride, axes, name="stride")
    if (rows[:, 1:] % steps).any():
        odd = rows[(rows[:, 1:] % steps).any(1)][0].tolist()
        raise InputError(
            f"site {odd} is none of a grid of stride {stride}: coordinates count finest voxels, multiply them by the "
            "stride, or leave the stride out."
        )
    most = int(rows[:, 0].max()) + 1 if len(rows) else 1
    scans = most if num_scans is None else check_count("num_scans", num_scans, least=0, most=MAX_SCANS)
    if len(rows) and most > scans:
        raise InputError(f"scan index {most - 1} is none of a batch of {scans} scans; count scans from 0.")
    keys = sorted_unique(pack_keys(rows, key_fields(axes).reach.given))
    return SiteSet(keys, shorten(steps), scans, axes, Root(name))


@dataclass(frozen=True)
class Voxelization:
    """Sites of a batch of point clouds, and the points that they come from.

    Attributes:
        sites: occupied voxels, stride 1.
        first_point: int64 [n], first point of each voxel, as a row of the concatenated point clouds.
        site_of_point: int32 [m], row of the site of each point of the concatenated point clouds; None if not asked for.
    """

    sites: SiteSet
    first_point: np.ndarray
    site_of_point: np.ndarray | None = None


def voxelize(
    clouds: Sequence[np.ndarray],
    voxel_size: float | Sequence[float],
    *,
    axes: int = 3,
    inverse: bool = False,
    name: str = "voxels",
) -> Voxelization:
    """Voxelise one point cloud per scan; the first point of a voxel represents it.

    Args:
        clouds: one array [m_i, 3] per scan, in metres; [m_i, 2] in 2-D, [m_i, 4] in 4-D; empty ones are allowed.
        voxel_size: edge of a voxel in metres, or its edges along the axes.
        axes: 3, also in 2-D, or 4.
        inverse: if True, the site of every point is returned too.
        name: name of the sites in the identities of what is made from them.

    Raises:
        InputError: as `voxel_coordinates`; a cloud has other columns; or one array is given in place of a list.
        ValueError: `axes` is neither 3 nor 4, or the points are tracers of jit.
    """
    if axes not in _KEYS:
        raise ValueError(f"axes is {axes!r}; expected 3, also for clouds in 2-D, or 4.")
    if len(getattr(clouds, "shape", ())) != 3 and not isinstance(clouds, Sequence):
        given = f"array {list(clouds.shape)}" if hasattr(clouds, "shape") else type(clouds).__name__
        raise InputError(f"one {given} was given; expected is a list with an array [m, 3] a scan.")
    if any(isinstance(cloud, jax.core.Tracer) for cloud in clouds):
        raise ValueError("voxelize was given points inside jit; use sparse.voxelize_points there.")
    clouds = [host_array("points", cloud) for cloud in clouds]
    for cloud in clouds:
        _check_cloud(cloud, (2, 3) if axes == 3 else (4,))
    if len(clouds) > MAX_SCANS:
        raise InputError(f"a batch of {len(clouds)} scans was given, a key holds {MAX_SCANS}; use smaller ones.")
    columns = {cloud.shape[1] for cloud in clouds} or {axes}
    if len(columns) > 1:
        raise InputError(f"clouds with {sorted(columns)} columns were given; expected is one dimension for all.")
    coords = [voxel_coordinates(points, voxel_size) for points in clouds]
    rows = np.concatenate([np.empty((0, *columns), np.int32), *coords])
    if columns == {2}:
        rows = np.concatenate([rows, np.zeros_like(rows[:, :1])], 1)
    scan = np.repeat(np.arange(len(clouds)), [len(c) for c in coords])
    keys, order, starts = _distinct_voxels(scan, rows)
    site_of_point = None
    if inverse:
        site_of_point = np.empty(len(rows), np.int32)
        site_of_point[order] = np.cumsum(starts, dtype=np.int32) - 1
    return Voxelization(SiteSet(keys, 1, len(clouds), axes, Root(name)), order[starts], site_of_point)


def _distinct_voxels(
    scan: Int[np.ndarray, " n"], rows: Int[np.ndarray, "n d"]
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Sorted distinct keys, the rows in the order of their keys, and True where a new key starts in that order."""
    low = rows.min(0, initial=0)
    bits = [int(extent).bit_length() for extent in (rows.max(0, initial=0) - low)]
    place_bits = len(rows).bit_length()
    scan_bits = int(scan[-1] if len(scan) else 0).bit_length()
    if scan_bits + sum(bits) + place_bits > 63:
        keys = pack_keys(np.concatenate([scan[:, None], rows], 1))
        order = np.argsort(keys, kind="stable")
        starts = _starts(keys[order])
        return keys[order][starts], order, starts
    # Voxel and row fit one word: sorting that is several times faster than an argsort of the voxels.
    word = scan.astype(np.int64)
    for axis, width in enumerate(bits):
        word <<= width
        word += rows[:, axis]
        word -= low[axis]
    word <<= place_bits
    word += np.arange(len(rows))
    word.sort()
    order = word & ((1 << place_bits) - 1)
    word >>= place_bits
    starts = _starts(word)
    voxel = word[starts]
    fields = key_fields(rows.shape[1])
    keys = (voxel >> sum(bits)) << fields.scan_shift
    below = 0
    for axis in reversed(range(len(bits))):
        place = (voxel >> below) & ((1 << bits[axis]) - 1)
        keys += (place + (int(low[axis]) + fields.bias)) << fields.shifts[axis]
        below += bits[axis]
    return keys, order, starts


def check_set(user: str, sites: Any) -> None:
    """Check that sites are a set of the host.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(sites, SiteSet):
        hint = "give voxels.sites" if isinstance(sites, Voxelization) else "see sparse.site_set"
        if isinstance(sites, Sites):
            hint = "inside jit use the functions on padded Sites"
        raise ValueError(f"{user} was given a {type(sites).__name__}; expected a SiteSet of the host: {hint}.")


def downsample(sites: SiteSet, factor: PerAxis) -> SiteSet:
    """Sites of the coarser grid: unique(floor(c / s) * s) with s = sites.stride * factor, true floor.

    Args:
        sites: sites of the finer grid.
        factor: ratio of the strides, one number or one per axis.

    Raises:
        ValueError: the factor is not one positive integer per axis.
        InputError: a coarse site is out of the range of a key.
    """
    check_set("downsample", sites)
    factors = per_axis(factor, sites.axes, name="factor")
    strides = [s * f for s, f in zip(sites.strides, factors, strict=True)]
    fields = key_fields(sites.axes)
    if all(s & (s - 1) == 0 and fields.reach.derived % s == 0 for s in strides):
        # The bias is a multiple of every power of two: clear the low bits of each field.
        mask = -1 << fields.scan_shift
        for stride, shift in zip(strides, fields.shifts, strict=True):
            mask |= (fields.mask & ~(stride - 1)) << shift
        keys = sites.keys & np.int64(mask)
    else:
        coords = sites.coords
        coords[:, 1:] = np.floor_divide(coords[:, 1:], strides) * strides
        keys = pack_keys(coords)
    lineage = (factors, sites.lineage)
    return SiteSet(sorted_unique(keys, runs=True), shorten(strides), sites.num_scans, sites.axes, lineage)


def generate(sites: SiteSet, kernel_size: PerAxis, factor: PerAxis = 2) -> SiteSet:
    """Sites of a generative transposed convolution: every site plus every offset of the finer stride.

    The table is `generative_neighbors(sites, outputs, kernel_size)`.

    Args:
        sites: sites of the coarser grid.
        kernel_size: size of the kernel.
        factor: ratio of the strides, one number or one per axis.

    Raises:
        ValueError: the stride of the sites is not a multiple of `factor`.
        InputError: a generated site may be out of the range of a key.
    """
    check_set("generate", sites)
    strides = finer_strides(sites.strides, factor)
    offsets = voxel_offsets(kernel_size, 1, strides, sites.axes)
    fields = key_fields(sites.axes)
    reach = max(
        int(np.abs(((sites.keys >> shift) & fields.mask) - fields.bias).max(initial=0)) for shift in fields.shifts
    )
    _check_reach(reach + int(np.abs(offsets).max(initial=0)), fields.reach.derived)
    keys = sorted_unique((sites.keys[None, :] + key_offsets(offsets)[:, None]).ravel(), runs=True)
    lineage = (generated_identity("{}", kernel_size, factor, sites.axes), sites.lineage)
    return SiteSet(keys, shorten(strides), sites.num_scans, sites.axes, lineage)


def finer_strides(strides: tuple[int, ...], factor: PerAxis) -> tuple[int, ...]:
    """Strides divided by a factor.

    Raises:
        ValueError: a stride is no multiple of the factor.
    """
    factors = per_axis(factor, len(strides), name="factor")
    if any(s % f for s, f in zip(strides, factors, strict=True)):
        raise ValueError(f"sites of stride {shorten(strides)} have no finer grid at 1/{factor} of it.")
    return tuple(s // f for s, f in zip(strides, factors, strict=True))


def unite(a: SiteSet, b: SiteSet) -> SiteSet:
    """Union of two site sets of one stride; it has the larger number of scans.

    Raises:
        ValueError: the strides or the numbers of axes differ, or an argument is no set.
    """
    for sites in (a, b):
        check_set("unite", sites)
    if (a.strides, a.axes) != (b.strides, b.axes):
        raise ValueError(
            f"a union needs one stride and one number of axes, given strides {a.stride} and {b.stride}, "
            f"{a.axes} and {b.axes} axes."
        )
    keys = sorted_unique(np.concatenate([a.keys, b.keys]), runs=True)
    return SiteSet(keys, a.stride, max(a.num_scans, b.num_scans), a.axes, ("unite({}, {})", a.lineage, b.lineage))


# ---------------------------------------------------------------- padded sites


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sites:
    """Padded active sites.

    Attributes:
        coords: int32 [N, 4], rows (scan, x, y, z) in finest voxels, in lexicographic order; padding rows, all at the
            end, have scan = num_scans. [N, 5] in 4-D.
        n: int32 [], number of valid rows.
        stride: distance of neighbouring sites in finest voxels, one number or one per axis (static).
        num_scans: number of scans in the batch (static).
        identity: operations that made the sites, the same for every scan (static). Tensors on sites of another
            identity are refused.
    """

    coords: Leaf
    n: Leaf
    stride: int | tuple[int, ...] = static_field()
    num_scans: int = static_field()
    identity: str = static_field(default="sites")

    @property
    def capacity(self) -> int:
        """Number of rows, padding included."""
        return self.coords.shape[0]

    @property
    def axes(self) -> int:
        """Number of coordinates of a site: 3, also in 2-D, or 4."""
        return self.coords.shape[-1] - 1

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride along each axis."""
        return per_axis(self.stride, self.axes, name="stride")

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
        """Tensor of other features [N, C'] on the same sites; the caller keeps padding rows at zero."""
        return replace(self, features=features)


check_values = jax.make_user_context(False)
"""Context in which coordinates are compared by value inside jit too, for programs under `checkify.checkify`.

    with sparse.check_values(True):
        error, y = checkify.checkify(jax.jit(model))(x, maps)
    error.throw()
"""


def check_same_sites(user: str, a: Sites, b: Sites) -> None:
    """Refuse two sets of sites that are not the same.

    Sets of one stride, capacity, number of scans and identity pass. Coordinates whose values are known, outside jit,
    are compared, and decide where identities differ. Inside jit they are compared within `check_values(True)`.

    Args:
        user: subject of the error message, as "add was given tensors".
        a: sites.
        b: sites that should be the same.

    Raises:
        ValueError: the sites differ.
    """
    for sites in (a, b):
        if not isinstance(sites, Sites):
            raise ValueError(
                f"{user} on a {type(sites).__name__}; expected padded Sites: pad a set with sparse.pad_sites, or the "
                "tables of a network with sparse.pad_tables."
            )
    static = [(s.stride, s.capacity, s.num_scans, s.axes) for s in (a, b)]
    if static[0] != static[1]:
        names = ("stride", "rows", "scans", "axes")
        differ = [f"{n} {p} and {q}" for n, p, q in zip(names, *static, strict=True) if p != q]
        raise ValueError(f"{user} on different sites: {a.identity!r} and {b.identity!r}, of {', '.join(differ)}.")
    if a.coords is b.coords:
        return
    if not any(isinstance(s.coords, jax.core.Tracer) for s in (a, b)):
        if not np.array_equal(a.coords, b.coords):
            raise ValueError(
                f"{user} on different sites: {a.identity!r} with {int(a.n)} and {b.identity!r} with {int(b.n)} rows "
                "hold other coordinates; unite them (unite=True, sparse.union_add), or build the map for these sites."
            )
        return
    if a.identity != b.identity:
        raise ValueError(
            f"{user} on different sites: {a.identity!r} and {b.identity!r}; unite them (unite=True, sparse.union_add), "
            "build the map for these sites, or, if they are equal, give both one identity."
        )
    if check_values.value:
        same = (jnp.asarray(a.coords) == jnp.asarray(b.coords)).all()
        checkify.check(same, f"{user} on sites {a.identity!r} with other coordinates.")


_uses: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()
"""Number of sets made by each operation in each trace."""


def number_identity(identity: str, *arrays: Any) -> str:
    """Tell apart sites made twice by one operation in a trace: the second is "...#1", and so on.

    The numbers begin anew in every trace, so that they are the same for every scan; a function under a jit of its own
    is such a trace, and wants another name for the sites that each call of it makes. Outside jit nothing is numbered:
    there coordinates are compared by value.

    Args:
        identity: operation and what it was applied to.
        arrays: arrays that decide the sites.
    """
    traces = [array._trace for array in jax.tree.leaves(arrays) if isinstance(array, jax.core.Tracer)]
    if not traces:
        return identity
    trace = traces[0]
    # The innermost program that is traced, past vmap and grad inside of it; outside jit vmap or grad themselves.
    while not hasattr(trace, "frame") and hasattr(trace.parent_trace, "parent_trace"):
        trace = trace.parent_trace
    count = _uses.setdefault(trace, Counter())
    count[identity] += 1
    return identity if count[identity] == 1 else f"{identity}#{count[identity] - 1}"


def pad_sites(sites: SiteSet, capacity: int, *, identity: str | None = None) -> Sites:
    """A host set as padded arrays (numpy).

    Args:
        sites: the set.
        capacity: number of rows.
        identity: identity of the sites; by default that of the set.

    Raises:
        InputError: more sites than `capacity`.
        ValueError: the sites are no set of the host, or the capacity is no integer from 0 on.
    """
    check_set("pad_sites", sites)
    n, capacity = len(sites), check_count("capacity", capacity, least=0)
    if n > capacity:
        raise InputError(
            f"{n} sites of stride {sites.stride} do not fit a capacity of {capacity}; take a larger bucket."
        )
    coords = np.zeros((capacity, 1 + sites.axes), np.int32)
    coords[:n] = sites.coords
    coords[n:, 0] = sites.num_scans
    return Sites(coords, np.asarray(n, np.int32), sites.stride, sites.num_scans, identity or sites.identity)


def pad_rows(rows: AnyArray, capacity: int) -> np.ndarray:
    """Rows [n, ...] padded with zeros to [capacity, ...] (numpy), in their type.

    Raises:
        InputError: more rows than `capacity`, or no rows.
        ValueError: the capacity is no integer from 0 on.
    """
    rows, capacity = host_array("rows", rows), check_count("capacity", capacity, least=0)
    if rows.ndim < 1 or rows.dtype.kind in "OSU":
        raise InputError(
            f"rows have the shape {list(rows.shape)} and the type {rows.dtype}; expected numbers [n, ...]."
        )
    if len(rows) > capacity:
        raise InputError(f"{len(rows)} rows do not fit a capacity of {capacity}; take a larger bucket.")
    out = np.zeros((capacity, *rows.shape[1:]), rows.dtype)
    out[: len(rows)] = rows
    return out

"""Points and voxels: features of points pooled in voxels, features of voxels at points.

The site of each point is its row in the sites: `voxelize(..., inverse=True).site_of_point` on the host,
`sites_of_points` inside jit. A row past the last, or below 0, is no site.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.in_jit import check_padded, find_rows, point_voxels
from h2a2_jax.sparse.linear import call_linear
from h2a2_jax.sparse.pool import first_maxima
from h2a2_jax.sparse.sites import Sites, SparseTensor, check_count, check_voxel_size, device_array
from h2a2_jax.sparse.tensors import check_tensor, take_rows
from h2a2_jax.sparse.xla_cpu import zeros_varying_as
from h2a2_jax.typing import AnyArray

Interpolation = Literal["trilinear", "nearest"]
"""Method of `interpolate`."""
_FAR = float(1 << 15)


def sites_of_points(
    points: Num[AnyArray, "m d"], scan: Int[AnyArray, " m"], voxel_size: float | Sequence[float], sites: Sites
) -> Int[Array, " m"]:
    """Row of the site whose voxel holds each point, inside jit too.

    Args:
        points: positions in metres; [m, 3], [m, 2] in 2-D, [m, 4] in 4-D.
        scan: scan of each point.
        voxel_size: edge of a finest voxel in metres, or its edges along the axes (static).
        sites: sites of any stride; a voxel is as long as their stride.

    Returns:
        int32 rows; the sites' capacity for a point that lies in none of their voxels, is not finite, or belongs to no
        scan in 0..num_scans-1.

    Raises:
        InputError: points have other columns, or `voxel_size` is not above 0 or not one number per axis.
        ValueError: scans are not one integer a point, or the sites are not padded ones.
    """
    points, scan = _check_points("sites_of_points", points, scan, sites)
    voxels, inside = point_voxels(points, voxel_size)
    strides = np.array(sites.strides[: points.shape[1]], np.int32)
    coords = jnp.concatenate([scan[:, None], voxels // strides * strides], 1)
    return jnp.where(inside, find_rows(sites, coords), sites.capacity)


def voxel_mean(
    features: Float[AnyArray, "m c"], site_of_point: Int[AnyArray, " m"], capacity: int
) -> Float[Array, "n c"]:
    """Mean of the features of the points in each voxel.

    Args:
        features: features of points; differentiable.
        site_of_point: row of each point's site; points of no site are left out.
        capacity: number N of rows of the sites.

    Returns:
        Rows of the sites in the type of the features; zero where no point is. Sums are float32 at least.

    Raises:
        ValueError: the features are no floats, or the sites are not one integer a point.
    """
    features, rows = _check_features("voxel_mean", features, site_of_point, capacity)
    sum_type = jnp.promote_types(features.dtype, jnp.float32)
    total = jax.ops.segment_sum(features.astype(sum_type), rows, capacity)
    count = jax.ops.segment_sum(jnp.ones(len(rows), sum_type), rows, capacity)
    return (total / jnp.maximum(count, 1)[:, None]).astype(features.dtype)


def voxel_max(
    features: Float[AnyArray, "m c"], site_of_point: Int[AnyArray, " m"], capacity: int
) -> Float[Array, "n c"]:
    """Maximum over the points in each voxel, channel by channel; NaN where one of them is NaN.

    The gradient goes to the first point that holds the maximum.

    Args:
        features: features of points; differentiable.
        site_of_point: row of each point's site; points of no site are left out.
        capacity: number N of rows of the sites.

    Returns:
        Rows of the sites; zero where no point is.

    Raises:
        ValueError: the features are no floats, or the sites are not one integer a point.
    """
    features, rows = _check_features("voxel_max", features, site_of_point, capacity)
    first = first_maxima(features, rows, capacity).at[rows].get(mode="fill", fill_value=-1)
    # A sum of one value a channel and of zeros: whole rows are added and, in the gradient, gathered.
    chosen = jnp.where(jnp.arange(len(rows))[:, None] == first, features, 0)
    return jax.ops.segment_sum(chosen, rows, capacity)


def to_points(x: SparseTensor, site_of_point: Int[AnyArray, " m"]) -> Num[Array, "m c"]:
    """Features of the site of each point; zero for a point of no site.

    Args:
        x: features [N, C] on sites; differentiable.
        site_of_point: row of each point's site (`sites_of_points`, `Voxelization.site_of_point`).

    Returns:
        [m, C] in the type of the features.

    Raises:
        ValueError: `x` is no sparse tensor, or the sites are no integers.
    """
    check_tensor("to_points", x)
    rows = _rows("to_points", site_of_point, x.sites.capacity)
    return take_rows(x.features, rows)


def interpolate(
    x: SparseTensor,
    points: Num[AnyArray, "m d"],
    scan: Int[AnyArray, " m"],
    voxel_size: float | Sequence[float],
    *,
    method: Interpolation = "trilinear",
) -> Float[Array, "m c"]:
    """Features at points, from the voxels around them.

    The centre of a site's voxel is at (coordinate + stride / 2) * voxel_size. "trilinear" weights the 2^d voxels around
    a point (4 in 2-D, 16 in 4-D) by the product of 1 - |distance of the centre| / stride over the axes; the weights of
    those that exist are divided by their sum. "nearest" takes the voxel that holds the point.

    Args:
        x: features [N, C] on sites of any stride; differentiable.
        points: positions in metres, [m, 3], [m, 2] in 2-D, [m, 4] in 4-D; differentiable by "trilinear".
        scan: scan of each point.
        voxel_size: edge of a finest voxel in metres, or its edges along the axes (static).
        method: "trilinear" or "nearest".

    Returns:
        [m, C] in the type of the features. Zero where none of these voxels exists, and for points of no scan in
        0..num_scans-1; NaN for a point of a scan that is not finite.

    Raises:
        InputError: points have other columns, or `voxel_size` is not above 0 or not one number per axis.
        ValueError: `x` is no sparse tensor of floats, scans are not one integer a point, or the method is none.
    """
    check_tensor("interpolate", x)
    points, scan = _check_points("interpolate", points, scan, x.sites)
    features = jnp.asarray(x.features)
    if method not in get_args(Interpolation) or not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(
            f"interpolate was given features of type {features.dtype} and method {method!r}; expected floats and one "
            f"of {', '.join(get_args(Interpolation))}."
        )
    finite = jnp.isfinite(points).all(1)
    points = jnp.where(finite[:, None], points, 0)
    if method == "nearest":
        y = to_points(x, sites_of_points(points, scan, voxel_size, x.sites))
    else:
        y = _interpolate_linearly(features, x.sites, points, scan, check_voxel_size(voxel_size, points.shape[1]))
    lost = ~finite & (scan >= 0) & (scan < x.sites.num_scans)
    return jnp.where(lost[:, None], jnp.nan, y)


def _interpolate_linearly(features: Array, sites: Sites, points: Array, scan: Array, size: np.ndarray) -> Array:
    dims = points.shape[1]
    strides = np.array(sites.strides[:dims])
    place = points / size / strides - 0.5  # of the point between centres, in strides
    lowest = jnp.floor(place)
    share = place - lowest
    corners = np.array(list(product((0, 1), repeat=dims)))[:, None]
    coords = (jnp.clip(lowest, -_FAR, _FAR).astype(jnp.int32) + corners) * strides.astype(np.int32)
    scans = jnp.broadcast_to(scan[:, None], (*coords.shape[:2], 1))
    rows = find_rows(sites, jnp.concatenate([scans, coords], 2))
    sum_type = jnp.promote_types(features.dtype, jnp.float32)
    weights = jnp.where(corners == 1, share, 1 - share).prod(2).astype(sum_type)
    return blend_corners(features, rows, weights, normalize=True)


def blend_corners(
    features: Float[Array, "n c"], rows: Int[Array, "k m"], weights: Float[Array, "k m"], *, normalize: bool
) -> Float[Array, "m c"]:
    """Weighted sum of the features of k corners, for each of m places.

    Args:
        features: rows of sites; differentiable.
        rows: row of each corner's site; from n on a corner without a site, which counts as zero.
        weights: weight of each corner, float32 at least; differentiable.
        normalize: if True, the weights of the corners with a site are divided by their sum.

    Returns:
        [m, C] in the type of the features; sums are in the type of the weights.
    """
    weights = jnp.where(rows < len(features), weights, 0)
    total = call_linear(
        _sum_corners, partial(_spread_corners, len(features)), features.astype(weights.dtype), rows, weights
    )
    if normalize:
        weight = weights.sum(0)[:, None]
        total /= jnp.where(weight > 0, weight, 1)
    return total.astype(features.dtype)


def _sum_corners(features: Array, rows: Array, weights: Array) -> Array:
    """Weighted sum of the features of the corners, [m, C]."""

    @jax.checkpoint  # the derivative by the weights gathers the features again
    def weigh(row: Array, weight: Array) -> Array:
        return weight[:, None] * take_rows(features, row)

    return sum(weigh(row, weight) for row, weight in zip(rows, weights, strict=True))


def _spread_corners(capacity: int, g: Array, rows: Array, weights: Array) -> Array:
    """Transpose of `_sum_corners`."""

    def add_corner(total: Array, corner: tuple[Array, Array]) -> tuple[Array, None]:
        row, weight = corner
        return total.at[row].add(weight[:, None] * g, mode="drop"), None

    start = zeros_varying_as((capacity, g.shape[1]), g.dtype, (g, rows, weights))
    return lax.scan(add_corner, start, (rows, weights))[0]


def _check_points(user: str, points: AnyArray, scan: AnyArray, sites: Sites) -> tuple[Array, Array]:
    """Points as floats and scans as int32, checked."""
    check_padded(user, sites)
    points, scan = device_array("points", points), device_array("scans", scan)
    columns = (2, 3) if sites.axes == 3 else (4,)
    if points.dtype == jnp.bool_:
        raise InputError(f"{user} was given points of type bool; expected positions in metres.")
    if points.ndim != 2 or points.shape[1] not in columns:
        raise InputError(
            f"{user} was given points {list(points.shape)}; expected [m, {' or '.join(map(str, columns))}], positions "
            f"in metres, for sites with {sites.axes} axes."
        )
    if scan.shape != points.shape[:1] or not jnp.issubdtype(scan.dtype, jnp.integer):
        raise ValueError(
            f"{user} was given scans {scan.dtype}{list(scan.shape)} for {len(points)} points; expected an integer each."
        )
    return points.astype(jnp.promote_types(points.dtype, jnp.float32)), scan.astype(jnp.int32)


def _check_features(user: str, features: AnyArray, site_of_point: AnyArray, capacity: int) -> tuple[Array, Array]:
    """Features and rows of sites, checked; the capacity for a point of no site."""
    features = device_array("features", features)
    rows = _rows(user, site_of_point, check_count("capacity", capacity))
    if features.ndim != 2 or rows.shape != features.shape[:1] or not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(
            f"{user} was given features {features.dtype}{list(features.shape)} and sites {list(rows.shape)}; expected "
            "floats [m, C] and [m]."
        )
    return features, rows


def _rows(user: str, site_of_point: AnyArray, capacity: int) -> Array:
    """Rows of sites as they are, the capacity for those below 0, which JAX would count from the end."""
    rows = device_array("sites of points", site_of_point)
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(f"{user} was given sites of type {rows.dtype}; expected rows, integers.")
    if rows.ndim != 1:
        raise ValueError(f"{user} was given sites of shape {list(rows.shape)}; expected [m], one a point.")
    return jnp.where(rows < 0, capacity, rows)

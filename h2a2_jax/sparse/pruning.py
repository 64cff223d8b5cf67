"""Scores that decide which sites of a finer level stay: interpolated from a coarser level, the highest kept.

FCAF3D (Rukhovich et al., ECCV 2022) prunes the levels of its neck this way: the scores of a level are interpolated at
the sites of the next finer one, and each scan keeps its sites of highest score (`prune`). Both functions run inside jit
and outside, with static shapes.
"""

from itertools import product

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from h2a2_jax.sparse.in_jit import check_padded, lower_bounds, strided_map
from h2a2_jax.sparse.points import blend_corners
from h2a2_jax.sparse.sites import Sites, SparseTensor, check_count, device_array
from h2a2_jax.sparse.tensors import check_tensor
from h2a2_jax.typing import AnyArray


def interpolate_sites(x: SparseTensor, sites: Sites, *, normalize: bool = False) -> Float[Array, "m c"]:
    """Interpolate features trilinearly at the coordinates of other sites.

    A coordinate c lies between the corners floor(c / s) * s and floor(c / s) * s + s along each axis, s the stride of
    the features' sites, with the weights 1 - f and f, f = c / s - floor(c / s). A corner without a site counts as zero.
    The grid points are the sites themselves, without the half voxel of `interpolate`.

    Args:
        x: features [N, C] on the coarser sites; differentiable.
        sites: padded sites of the same batch, as fine or finer: their stride divides that of `x`.
        normalize: if True, the weights of the corners with a site are divided by their sum, so that an absent corner
            does not pull the result towards zero; zero where no corner has a site.

    Returns:
        [M, C] in the type of the features, a row for each row of `sites`; zero on padding.

    Raises:
        ValueError: `x` is no sparse tensor of floats, the sites are not padded or of another batch, or the stride of
            `x` is no multiple of theirs.
    """
    check_tensor("interpolate_sites", x)
    check_padded("interpolate_sites", sites)
    if (sites.axes, sites.num_scans) != (x.sites.axes, x.sites.num_scans):
        raise ValueError(
            f"interpolate_sites was given features on {x.sites.num_scans} scans of {x.sites.axes} axes and sites of "
            f"{sites.num_scans} scans of {sites.axes} axes; expected are sites of the same batch."
        )
    if any(coarse % fine for coarse, fine in zip(x.sites.strides, sites.strides, strict=True)):
        raise ValueError(
            f"interpolate_sites was given features of stride {x.sites.stride} and sites of stride {sites.stride}; "
            "expected is a stride of the features that is a multiple of that of the sites: features on the coarser "
            "sites, and the finer sites."
        )
    features = jnp.asarray(x.features)
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(f"interpolate_sites was given features of type {features.dtype}; expected floats.")
    coords, strides = jnp.asarray(sites.coords), np.array(x.sites.strides, np.int32)
    place = coords[:, 1:] // strides
    lowest = jnp.concatenate([coords[:, :1], place * strides], 1)
    # Lowest corners repeat and are in no order; each only asks for its neighbours.
    corners = Sites(lowest, sites.n, x.sites.stride, sites.num_scans, sites.identity)
    rows = strided_map(x.sites, corners, 2).neighbors
    share = (coords[:, 1:] - place * strides).astype(jnp.promote_types(features.dtype, jnp.float32)) / strides
    upper = np.array([bits[::-1] for bits in product((0, 1), repeat=sites.axes)])[:, None] == 1  # x fastest
    weights = jnp.where(upper, share, 1 - share).prod(2)
    return blend_corners(features, rows, weights, normalize=normalize)


def keep_highest(scores: Float[AnyArray, " n"], sites: Sites, most: int) -> Bool[Array, " n"]:
    """Choose the sites of highest score in each scan; `prune` then keeps them.

    Args:
        scores: a score for each row of the sites, padding included; no gradient.
        sites: padded sites.
        most: number of sites that a scan keeps (static); a scan with fewer keeps all of them.

    Returns:
        bool [N], True for the rows to keep. Of equal scores the earlier row stays, NaN is lower than every number, and
        padding is never kept.

    Raises:
        ValueError: not one float for each row of the sites, the sites are not padded, or `most` is no integer from 0
            on.
    """
    check_padded("keep_highest", sites)
    most = check_count("most", most, least=0)
    scores = device_array("scores", scores)
    if scores.shape != (sites.capacity,) or not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(
            f"keep_highest was given scores {scores.dtype}{list(scores.shape)}; expected floats [{sites.capacity}], "
            "one for each row of the sites, padding included."
        )
    if sites.capacity <= most:
        return sites.valid
    scan, rows = jnp.asarray(sites.scan), jnp.arange(sites.capacity, dtype=jnp.int32)
    scores = lax.stop_gradient(scores)
    # The sort puts NaN behind all numbers, and leaves each scan where it is: rows are in order of scans.
    *_, ordered = lax.sort((scan, -scores, rows), num_keys=2, is_stable=True)
    first = lower_bounds((scan,), (jnp.arange(sites.num_scans + 1, dtype=jnp.int32),))
    rank = rows - first[jnp.minimum(scan, sites.num_scans)]
    kept = (rank < most) & (scan < sites.num_scans)
    return jnp.zeros(sites.capacity, bool).at[ordered].set(kept, unique_indices=True)

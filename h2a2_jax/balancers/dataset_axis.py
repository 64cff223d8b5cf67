"""Arrays with a leading axis of datasets, some on each device, dataset `k` as entry `k % local` of device `k // local`.

Functions that the gradient balancers share. A function with an axis name runs inside `jax.shard_map`; with None all
datasets are local.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

SMALLEST_NORM = 1e-12
"""A gradient of a smaller norm counts as zero."""


def check_datasets(grads: PyTree, present: Array, num_datasets: int, axis_name: str | None) -> None:
    """Check that every array has the local share of the datasets as its leading axis.

    Raises:
        ValueError: an array has another leading axis.
    """
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    leading = {leaf.shape[:1] for leaf in jax.tree.leaves(grads)} | {present.shape}
    if any(math.prod(shape) * devices != num_datasets for shape in leading):
        raise ValueError(
            f"gradients and `present` have leading axes {sorted(leading)} on each of {devices} devices, expected"
            f" {num_datasets} datasets in all; put a leading axis of {num_datasets} / {devices} on each array"
        )


def dataset_norms(grads: Float[Array, "local ..."]) -> Float[Array, " local"]:
    """Norm of the gradient of each dataset, in at least float32."""
    grads = grads.astype(jnp.promote_types(grads.dtype, jnp.float32)).reshape(grads.shape[0], -1)
    # Squares of gradients near 1e-20 vanish in float32 and those near 1e20 overflow.
    largest = jnp.max(jnp.abs(grads), axis=1, initial=0)
    return largest * jnp.sqrt(jnp.sum((grads / nonzero(largest)[:, None]) ** 2, axis=1))


def nonzero(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Replace 0 by 1, to divide by the result."""
    return jnp.where(scale == 0, 1, scale)


def per_dataset(values: Array, leaf: Float[Array, "local ..."]) -> Array:
    """Reshape and cast values [local] so that they multiply a gradient [local, ...]."""
    return values.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)


def keep_present(leaf: Float[Array, "local ..."], present: Bool[Array, " local"]) -> Float[Array, "local ..."]:
    """Zero the gradients of absent datasets, even NaN ones."""
    return where_present(present, leaf, 0)


def where_present(present: Bool[Array, " local"], leaf: Float[Array, "local ..."], other: Any) -> Array:
    """Entries of the datasets that are present, those of `other` for the rest."""
    return jnp.where(present.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, other)


def gather_datasets(
    own: Float[Array, "local columns"], num_datasets: int, axis_name: str | None
) -> Float[Array, "datasets columns"]:
    """Gather the rows of all devices."""
    if axis_name is None:
        return own
    # By psum: the result of an all_gather would not count as replicated.
    rows = jnp.zeros((num_datasets, own.shape[1]), own.dtype)
    rows = jax.lax.pcast(rows, axis_name, to="varying")
    start = jax.lax.axis_index(axis_name) * own.shape[0]
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(rows, own, start, axis=0), axis_name)


def local_rows(rows: Float[Array, "datasets ..."], local: int, axis_name: str | None) -> Float[Array, "local ..."]:
    """Rows of the datasets of this device."""
    if axis_name is None:
        return rows
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(axis_name) * local, local, axis=0)

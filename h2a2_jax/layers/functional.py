"""Functions of sparse tensors without parameters, for any module system."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from h2a2_jax.sparse import pool
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.sites import SparseTensor


def relu(x: SparseTensor) -> SparseTensor:
    """Apply ReLU to the features."""
    return x.with_features(jax.nn.relu(x.features))


def activate(x: SparseTensor, function: Callable[[Array], Array]) -> SparseTensor:
    """Apply any function to the features [N, C] row by row; padding rows stay zero even where it maps 0 elsewhere."""
    return x.with_features(jnp.where(x.sites.valid[:, None], function(x.features), 0))


def add(a: SparseTensor, b: SparseTensor) -> SparseTensor:
    """Add features [N, C] on the same sites.

    Raises:
        ValueError: the sites or the numbers of channels differ.
    """
    _check_sites(a, b)
    if a.features.shape != b.features.shape:
        raise ValueError(f"a sum needs the same channels, given {a.features.shape[1]} and {b.features.shape[1]}.")
    return a.with_features(a.features + b.features)


def concatenate(*tensors: SparseTensor) -> SparseTensor:
    """Concatenate the channels of several tensors on the same sites, as the skip connections of a U-Net do.

    Raises:
        ValueError: the sites differ.
    """
    _check_sites(*tensors)
    return tensors[0].with_features(jnp.concatenate([x.features for x in tensors], 1))


def max_pool(x: SparseTensor, kernel_map: KernelMap) -> SparseTensor:
    """Maximum over the active sites under each window of the map (`sparse.max_pool`)."""
    return replace(x, features=pool.max_pool(x.features, kernel_map), sites=kernel_map.outputs)


def average_pool(x: SparseTensor, kernel_map: KernelMap) -> SparseTensor:
    """Mean over the active sites under each window of the map (`sparse.average_pool`)."""
    return replace(x, features=pool.average_pool(x.features, kernel_map), sites=kernel_map.outputs)


def _check_sites(*tensors: SparseTensor) -> None:
    kinds = {(x.sites.stride, x.sites.capacity, x.sites.num_scans) for x in tensors}
    if len(kinds) > 1:
        raise ValueError(f"tensors on different sites cannot be joined: (stride, rows, scans) are {sorted(kinds)}.")

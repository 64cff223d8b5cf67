"""Functions of sparse tensors without parameters, for any module system."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from h2a2_jax.sparse import pool
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.sites import SparseTensor, check_same_sites
from h2a2_jax.sparse.tensors import broadcast, check_same_channels, check_tensor, unite_tensors
from h2a2_jax.typing import AnyArray


def relu(x: SparseTensor) -> SparseTensor:
    """Apply ReLU to the features [N, C]; they keep their type.

    Raises:
        ValueError: `x` is no sparse tensor.
    """
    check_tensor("relu", x)
    return x.with_features(jax.nn.relu(x.features))


def activate(x: SparseTensor, function: Callable[[Array], Array]) -> SparseTensor:
    """Apply any function to the features [N, C] row by row; padding rows stay zero even where it maps 0 elsewhere.

    Raises:
        ValueError: `x` is no sparse tensor.
    """
    check_tensor("activate", x)
    return x.with_features(jnp.where(x.sites.valid[:, None], function(x.features), 0))


def add(a: SparseTensor, b: SparseTensor, *, unite: bool = False) -> SparseTensor:
    """Add features [N, C] on the same sites.

    Args:
        a: features on sites.
        b: features on the same sites, with the same channels.
        unite: if True, tensors on different sites are added on the union of these, with zeros where one has no site.
            The union has the capacity of both together; `union_add` takes a smaller one, and counts what is left out.

    Raises:
        ValueError: the numbers of channels differ, or the sites do and `unite` is False, or an argument is none.
    """
    a, b = _join("add", (a, b), unite)
    check_same_channels(a, b)
    return a.with_features(a.features + b.features)


def concatenate(*tensors: SparseTensor, unite: bool = False) -> SparseTensor:
    """Concatenate the channels of several tensors on the same sites, as the skip connections of a U-Net do.

    Args:
        tensors: features on sites.
        unite: if True, tensors on different sites are first brought onto the union of these, as by `add`
            (`sparse.unite_tensors` takes a smaller capacity).

    Raises:
        ValueError: the sites differ and `unite` is False, or an argument is no sparse tensor.
    """
    joined = _join("concatenate", tensors, unite)
    return joined[0].with_features(jnp.concatenate([x.features for x in joined], 1))


def broadcast_add(x: SparseTensor, values: Float[AnyArray, "b c"]) -> SparseTensor:
    """Add the values of each scan to the features of all its sites.

    Args:
        x: features [N, C].
        values: [B, C], or [B, 1] for all channels alike.

    Raises:
        ValueError: not one row of values for each scan.
    """
    check_tensor("broadcast_add", x)
    return x.with_features((x.features + broadcast(values, x.sites)).astype(x.features.dtype))


def broadcast_multiply(x: SparseTensor, values: Float[AnyArray, "b c"]) -> SparseTensor:
    """Multiply the features of all sites of each scan by its values.

    Args:
        x: features [N, C].
        values: [B, C], or [B, 1] for all channels alike.

    Raises:
        ValueError: not one row of values for each scan.
    """
    check_tensor("broadcast_multiply", x)
    return x.with_features((x.features * broadcast(values, x.sites)).astype(x.features.dtype))


def max_pool(x: SparseTensor, kernel_map: KernelMap) -> SparseTensor:
    """Maximum over the active sites under each window of the map (`sparse.max_pool`).

    Args:
        x: features [N_in, C] on the map's input sites.
        kernel_map: map of any kind.

    Returns:
        Features [N_out, C] on the map's output sites.

    Raises:
        ValueError: the features are on other sites than the inputs of the map, or an argument is of another kind.
    """
    return _pool("max_pool", pool.max_pool, x, kernel_map)


def average_pool(x: SparseTensor, kernel_map: KernelMap) -> SparseTensor:
    """Mean over the active sites under each window of the map (`sparse.average_pool`).

    Args:
        x: features [N_in, C] on the map's input sites.
        kernel_map: map of any kind.

    Returns:
        Features [N_out, C] on the map's output sites.

    Raises:
        ValueError: the features are on other sites than the inputs of the map, or an argument is of another kind.
    """
    return _pool("average_pool", pool.average_pool, x, kernel_map)


def _pool(user: str, function: Callable[[Array, KernelMap], Array], x: SparseTensor, kmap: KernelMap) -> SparseTensor:
    check_tensor(user, x)
    pool.check_map(user, kmap)
    check_same_sites(f"{user} was given features and a map", x.sites, kmap.inputs)
    return SparseTensor(function(x.features, kmap), kmap.outputs)


def _join(user: str, tensors: Sequence[SparseTensor], unite: bool) -> Sequence[SparseTensor]:
    """Tensors on the same sites, united if asked for."""
    for x in tensors:
        check_tensor(user, x)
    try:
        for x in tensors[1:]:
            check_same_sites(f"{user} was given tensors", tensors[0].sites, x.sites)
    except ValueError:
        if not unite:
            raise
        return unite_tensors(*tensors)[0]
    return tensors

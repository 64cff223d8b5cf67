"""Pooling over the windows of a kernel map."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from h2a2_jax.sparse.kernel_map import KernelMap


@jax.custom_vjp
def max_pool(features: Float[Array, "n_in c"], kernel_map: KernelMap) -> Float[Array, "n_out c"]:
    """Maximum over the active sites under each window, channel by channel.

    The gradient goes to the first site that holds the maximum. Windows of one offset never share an input, so both
    directions are gathers.

    Args:
        features: rows of the input sites.
        kernel_map: of kind "pool".

    Returns:
        Rows of the output sites; padding rows are zero.
    """
    return _pool(features, kernel_map)[0]


def _pool(x: Array, kmap: KernelMap) -> tuple[Array, Array]:
    """Maxima and the first offset that holds each; by offset, for an argmax over an axis is many times slower."""
    neighbors = jnp.asarray(kmap.neighbors)
    best = x.at[neighbors[0]].get(mode="fill", fill_value=-jnp.inf)
    chosen = jnp.zeros(best.shape, jnp.int8)
    for k in range(1, kmap.kernel_volume):
        window = x.at[neighbors[k]].get(mode="fill", fill_value=-jnp.inf)
        chosen = jnp.where(window > best, jnp.int8(k), chosen)
        best = jnp.maximum(best, window)
    valid = (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None]
    return jnp.where(valid, best, 0), chosen


def _forward(x: Array, kmap: KernelMap) -> tuple[Array, tuple]:
    out, chosen = _pool(x, kmap)
    return out, (chosen, kmap)


def _backward(residuals: tuple, g: Array) -> tuple:
    chosen, kmap = residuals
    neighbors = jnp.asarray(kmap.neighbors)
    valid = (jnp.arange(kmap.out_capacity) < kmap.n_out)[:, None]
    g = jnp.where(valid, g, 0)
    dx = jnp.zeros((kmap.in_capacity, g.shape[1]), g.dtype)
    for k in range(kmap.kernel_volume):
        dx = dx.at[neighbors[k]].add(jnp.where(chosen == k, g, 0), mode="drop")
    return dx, jax.tree.map(lambda a: np.zeros(np.shape(a), jax.dtypes.float0), kmap)


max_pool.defvjp(_forward, _backward)

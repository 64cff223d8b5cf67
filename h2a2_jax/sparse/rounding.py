"""Rounding of float32 sums to the type in which features are kept."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.sparse.conv_parts import zeros_varying_as
from h2a2_jax.typing import AnyArray


def round_rows(sums: Float[Array, "n c"], dtype: Any, n: Int[AnyArray, ""]) -> Float[Array, "n c"]:
    """Sums [N, C] in a type of features, and no copy of them in their own.

    XLA takes a conversion into every computation that reads its result, and so would keep the float32 sums of a
    convolution for the backward pass where a program asks for bfloat16 ones: twice the memory in place of half. On CPU
    a choice that it cannot foresee stops that; accelerators would wait for the choice, and get a barrier.

    Args:
        sums: rows past the first n are zero.
        dtype: of the features; one not narrower than the sums is a plain conversion.
        n: number of rows that are sites.
    """
    if jnp.dtype(dtype).itemsize >= sums.dtype.itemsize:
        return sums.astype(dtype)
    if jax.default_backend() != "cpu":
        return lax.optimization_barrier(sums.astype(dtype))
    zeros = lambda rows: zeros_varying_as(rows.shape, dtype, (rows, n))  # noqa: E731
    return lax.cond(jnp.asarray(n) > 0, lambda rows: rows.astype(dtype), zeros, sums)

"""What a program keeps from the forward pass to the backward one: no more than it is asked to.

XLA shares equal values of both passes, orders them as it likes, and takes a conversion into every computation that
reads its result. So float32 copies of bfloat16 features would live on, and what is to be computed again would be
computed early and kept: its CPU compiler drops optimisation barriers before it decides. Here it cannot see through.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from h2a2_jax.sparse.conv_parts import is_float, known, zeros_varying_as
from h2a2_jax.typing import AnyArray


def round_rows(sums: Float[Array, "n c"], dtype: Any, n: Int[AnyArray, ""]) -> Float[Array, "n c"]:
    """Sums [N, C] in a type of features, and no copy of them in their own.

    On CPU a choice that XLA cannot foresee makes it store the rounded values; accelerators would wait for the choice,
    and get a barrier.

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


def after(cotangents: Any, values: Any) -> Any:
    """The same values, but nothing is computed from them before the cotangents are there, nor shared with what was.

    Args:
        cotangents: pytree of float arrays.
        values: pytree of arrays; integers are left as they are.
    """
    if jax.default_backend() != "cpu":
        return lax.optimization_barrier((cotangents, values))[1]
    here = known(cotangents)
    return jax.tree.map(lambda value: jnp.where(here, value, jnp.nan) if is_float(value) else value, values)

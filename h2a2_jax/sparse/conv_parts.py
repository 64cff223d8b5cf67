"""What the convolution algorithms share, residuals of the backward pass among it.

What a program keeps from the forward pass to the backward one: no more than it is asked to.

XLA shares equal values of both passes, orders them as it likes, and takes a conversion into every computation that
reads its result. So float32 copies of bfloat16 features would live on, and what is to be computed again would be
computed early and kept: its CPU compiler drops optimisation barriers before it decides. Here it cannot see through.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from h2a2_jax.typing import AnyArray

_NEVER = 0x7FA5_5A3C
"""Bits of a float32 NaN that no computation makes."""


@dataclass(frozen=True)
class ConvOptions:
    """How products are computed.

    Attributes:
        sum_type: in which products are summed.
        precision: of the products, as in `jax.lax.dot_general`.
        kernel_type: of the kernels as they were given, and of their gradient; products take them in the compute type.
    """

    sum_type: Any
    precision: Any
    kernel_type: Any

    def dot(self, a: Array, b: Array) -> Array:
        """Matrix product, summed in `sum_type`."""
        return jnp.matmul(a, b, precision=self.precision, preferred_element_type=self.sum_type)


def take_rows(rows: Array, index: Array) -> Array:
    """Rows by index; an index past the end gives zeros. Not differentiable where rows are narrower than float32.

    Those are read as bits: XLA's CPU compiler gathers bfloat16 as float32, from a float32 copy of all rows that it
    keeps from the forward pass to the backward one, and then multiplies in float32 too.
    """
    if rows.dtype.itemsize >= 4:
        return rows.at[index].get(mode="fill", fill_value=0)
    bits = lax.bitcast_convert_type(rows, jnp.uint16).at[index].get(mode="fill", fill_value=0)
    return lax.bitcast_convert_type(bits, rows.dtype)


def per_row(values: Num[Array, "b *c"], scan: Int[Array, " n"]) -> Num[Array, "n *c"]:
    """A value of each scan on its rows, zero on padding."""
    return values.at[scan].get(mode="fill", fill_value=0)


def zeros_varying_as(shape: tuple[int, ...], dtype: Any, like: tuple[Any, ...]) -> Array:
    """Zeros that vary over every mesh axis that one of `like` varies over: a loop under shard_map may add to them.

    A choice that never falls on the array's value passes its type on, and compiles to nothing. Nor are they there
    before the floats of `like` are: XLA's CPU compiler would fill the arrays of all loops of a program at its start.
    """
    zero = jnp.zeros((), dtype)
    for leaf in jax.tree.leaves(like):
        zero = zero + jnp.where(False, jnp.asarray(leaf).reshape(-1)[:1].sum().astype(dtype), 0)
    return jnp.broadcast_to(jnp.where(known(like), zero, jnp.array(-1, dtype)), shape)


def known(values: Any) -> Bool[Array, ""]:
    """True, once the floats among the leaves of a pytree are there; XLA's CPU compiler cannot tell that it is."""
    leaves = [leaf for leaf in jax.tree.leaves(values) if is_float(leaf) and leaf.size]
    if jax.default_backend() != "cpu" or not leaves:
        return jnp.array(True)
    entry = sum(leaf.reshape(-1)[0].astype(jnp.float32) for leaf in leaves)
    return lax.bitcast_convert_type(entry, jnp.uint32) != np.uint32(_NEVER)


def is_float(value: AnyArray) -> bool:
    """Whether an array is of numbers that gradients are taken of."""
    return jnp.issubdtype(jnp.result_type(value), jnp.inexact)


def set_masks(gamma: Array | None, scan_set: Array | None, sets: int, scan: Array) -> Any:
    """Function of the offset k: which kernel of the stack each row uses, [n, S] of 0 and 1; None if it is always 0."""
    if gamma is None or scan_set is None:
        return lambda k: None

    def masks(k: Array | int) -> Array:
        chosen = jnp.where(gamma[:, k] >= 0.5, 0, scan_set)
        return per_row(jax.nn.one_hot(chosen, sets), scan)

    return masks


def dot_by_set(rows: Array, w: Float[Array, "s a b"], by_set: Array | None, options: ConvOptions) -> Array:
    """Rows [n, a] times the kernel that each row uses, by masks [n, S] of `set_masks`; None: kernel 0 everywhere."""
    if by_set is None:
        return options.dot(rows, w[0])
    total = options.dot(rows * by_set[:, :1].astype(rows.dtype), w[0])
    for s in range(1, len(w)):
        total = total + options.dot(rows * by_set[:, s : s + 1].astype(rows.dtype), w[s])
    return total


def no_gradient(tree: Any) -> Any:
    """Cotangents of integer arguments."""
    return jax.tree.map(lambda a: np.zeros(np.shape(a), jax.dtypes.float0), tree)


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

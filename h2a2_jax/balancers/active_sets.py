"""Small quadratic problems solved exactly, by trying every set of active datasets at once.

A minimum over a simplex or a cone of K weights is a minimum without inequalities on one of its 2^K faces. With the few
datasets of a joint training all faces are solved together as one batch of small systems: inside jit, without a
tolerance of an iteration, and alike on every device.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

MOST_DATASETS = 12
"""Datasets up to which all sets are tried; 12 of them have 4096 sets."""


def subsets(size: int) -> np.ndarray:
    """All subsets of `size` datasets, bool [2^size, size], the empty set first.

    Raises:
        ValueError: there are more than `MOST_DATASETS` datasets.
    """
    if size > MOST_DATASETS:
        raise ValueError(
            f"{size} datasets have {2**size:,} sets to try, which is too many; use at most {MOST_DATASETS} datasets or"
            " a balancer without them, such as Aligned-MTL"
        )
    return (np.arange(2**size)[:, None] >> np.arange(size)) % 2 == 1


def tolerance(matrix: Float[Array, "k k"]) -> float:
    """Relative size below which a number counts as a rounding error of zero: 8 K eps."""
    return 8 * len(matrix) * float(jnp.finfo(matrix.dtype).eps)


def solve_on_subsets(
    matrix: Float[Array, "k k"], right: Float[Array, "sets k columns"], members: Bool[np.ndarray, "sets k"]
) -> tuple[Float[Array, "sets k columns"], Bool[Array, " sets"]]:
    """Solve the system of the rows and columns of each subset, by Gauss-Jordan elimination without pivoting.

    Args:
        matrix: symmetric, positive semi-definite.
        right: right-hand sides of each subset.
        members: the subsets.

    Returns:
        Solutions, zero outside a subset; and True for the subsets whose system is regular: each pivot, the square of a
        vector's distance from the span of the ones before, is above `tolerance` times its square.
    """
    size = len(matrix)
    inside = members[:, :, None] & members[:, None, :]
    # Outside a subset the identity, so that elimination leaves its rows alone.
    systems = jnp.where(inside, matrix, jnp.eye(size, dtype=matrix.dtype))
    table = jnp.concatenate([systems, jnp.where(members[:, :, None], right, 0)], axis=2)
    least = tolerance(matrix)
    diagonal = jnp.diagonal(systems, axis1=1, axis2=2)

    def eliminate(row: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        table, regular = carry
        pivot = table[:, row, row]
        found = pivot > least * diagonal[:, row]
        own = table[:, row] / jnp.where(found, pivot, 1)[:, None]
        table = (table - table[:, :, row, None] * own[:, None]).at[:, row].set(own)
        return table, regular & found

    table, regular = jax.lax.fori_loop(0, size, eliminate, (table, jnp.all(diagonal > 0, axis=1)))
    return jnp.where(members[:, :, None], table[:, :, size:], 0), regular


def normalize_gramian(gramian: Float[Array, "k k"], norm_eps: float) -> Float[Array, "k k"]:
    """Divide a Gramian by its trace; zero if the trace is below `norm_eps`."""
    trace = jnp.trace(gramian)
    return jnp.where(trace < norm_eps, 0, gramian / jnp.where(trace < norm_eps, 1, trace))


def pseudo_inverse(gramian: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Pseudo-inverse of a Gramian; eigenvalues up to K eps times the largest count as zero."""
    values, vectors = jnp.linalg.eigh(gramian)
    kept = values > values[-1] * len(values) * jnp.finfo(values.dtype).eps
    return (vectors * jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)) @ vectors.T


def everyone(gramian: Float[Array, "k k"], active: Bool[Array, " k"] | None) -> Bool[Array, " k"]:
    """The mask of active datasets, all of them for None."""
    return jnp.ones(len(gramian), bool) if active is None else active


def uniform_weights(gramian: Float[Array, "k k"], active: Bool[Array, " k"]) -> Float[Array, " k"]:
    """Weights of the mean over the active datasets, in the dtype of the Gramian."""
    return (active / jnp.maximum(jnp.sum(active), 1)).astype(gramian.dtype)

"""Workarounds for XLA: values that a program must compute late, keep in few bits, or compute twice.

XLA shares equal values of the forward and the backward pass, orders them as it likes, and fuses a conversion into every
computation that reads its result. Float32 copies of bfloat16 features then live on from one pass to the other, and
values that are to be computed a second time are computed early and kept. `jax.lax.optimization_barrier` prevents both
on accelerators; XLA's CPU compiler drops barriers before it decides. On CPUs the functions below therefore hide a
choice from the compiler: a comparison with the bits of a NaN that no computation makes.

All of them save memory, which `python -m benchmarks.detector --passes forward+backward` shows as "temporaries":

| function | without it, on CPUs | options of the benchmark |
|---|---|---|
| `take_rows` | a float32 copy of all bfloat16 rows is kept for the backward pass | `--dtype bfloat16` |
| `round_rows` | float32 sums are kept in place of their bfloat16 rows | `--dtype bfloat16` |
| `after` | transposed and transformed kernels of all layers exist from the start of the backward pass | |
| `zeros_varying_as` | the sums of all loops of a program are allocated at its start (three times the memory) | |
| `recompute` | values to be computed a second time are kept, as by `jax.checkpoint` | `--rematerialize both` |

Two barriers that XLA's CPU compiler does heed stand beside the products that they speed up, in `conv_cpu` (a transpose
in front of a matmul) and in `winograd` (one gather for six chains); `benchmarks/convolution.py` times both.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.typing import AnyArray

WITHOUT_YNNPACK: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Options of XLA's CPU compiler that give products to Eigen and not to YNNPACK."""
_NEVER = 0x7FA5_5A3C
"""Bits of a float32 NaN that no computation makes."""


def compiler_options() -> dict[str, str | bool] | None:
    """Options for `jax.jit` of programs of convolutions, which are top-level programs; None where there are none.

    On a CPU products go to Eigen, which is faster than YNNPACK for most of ours (`python -m
    benchmarks.compiler_options`).
    """
    known = jax.default_backend() == "cpu" and knows_option(*WITHOUT_YNNPACK)
    return dict(WITHOUT_YNNPACK) if known else None


@cache
def knows_option(name: str) -> bool:
    """Return True if this version of XLA has an option of this name."""
    try:
        jax.jit(lambda: 0, compiler_options={name: ""}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def is_float(value: AnyArray) -> bool:
    """Return True for an array of numbers that have gradients."""
    return jnp.issubdtype(jnp.result_type(value), jnp.inexact)


def is_computed(values: Any) -> Bool[Array, ""]:
    """True, but only once the floats among the leaves of a pytree are computed; the CPU compiler cannot foresee it."""
    leaves = [leaf for leaf in jax.tree.leaves(values) if is_float(leaf) and leaf.size]
    if not leaves:
        return jnp.array(True)

    def compare(*leaves: Array) -> Array:
        return lax.bitcast_convert_type(sum_of_first(leaves), jnp.uint32) != np.uint32(_NEVER)

    def know(*leaves: Array) -> Array:
        # True, and of the type that a comparison has under shard_map; it compiles to nothing.
        return (sum_of_first(leaves) == jnp.nan) | True

    return lax.platform_dependent(*leaves, cpu=compare, default=know)


def sum_of_first(arrays: Sequence[Array]) -> Float[Array, ""]:
    """Sum of the first entries of arrays."""
    firsts = [lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(()) for array in arrays]
    return reduce(add, [first.astype(jnp.float32) for first in firsts])


def after(cotangents: Any, values: Any) -> Any:
    """Values as they are, but used only once the cotangents are computed, and never shared with the forward pass.

    Args:
        cotangents: pytree of float arrays.
        values: pytree of arrays; integers pass through unguarded.
    """

    def compare(cotangents: Any, values: Any) -> Any:
        computed = is_computed(cotangents)
        return jax.tree.map(lambda value: jnp.where(computed, value, jnp.nan) if is_float(value) else value, values)

    def wait(cotangents: Any, values: Any) -> Any:
        return lax.optimization_barrier((cotangents, values))[1]

    return lax.platform_dependent(cotangents, values, cpu=compare, default=wait)


def zeros_varying_as(shape: tuple[int, ...], dtype: Any, like: Any, n: Int[AnyArray, ""] | None = None) -> Array:
    """Zeros for the sums of a loop: allocated late, and of the type that a loop under shard_map needs.

    Args:
        shape: of the array.
        dtype: of the array.
        like: pytree of arrays. The zeros vary over every mesh axis that one of these varies over, and do not exist
            before the floats among these do.
        n: a number of rows, at least 0. With it the zeros compile in less: the arrays are read behind a branch, and
            the computations that make them are not compiled again for one of their numbers.
    """
    leaves = jax.tree.leaves(like)
    floats = [leaf for leaf in leaves if is_float(leaf) and leaf.size]
    if n is None or not floats:
        zero = jnp.where(is_computed(like), jnp.zeros((), dtype), jnp.array(-1, dtype))
    else:
        # As bits: XLA's CPU compiler would hand a branch a float32 copy of bfloat16 rows.
        bits = [_bits_if_narrow(leaf) for leaf in floats]
        zero = lax.cond(n < 0, partial(_total, dtype), partial(_zero_of_total, dtype), bits)
    return jnp.broadcast_to(vary_alike([zero], leaves)[0], shape)


def _total(dtype: Any, arrays: Sequence[Array]) -> Array:
    return reduce(add, [array.sum(dtype=dtype) for array in arrays])  # calls into a library; a slice would be compiled


def _zero_of_total(dtype: Any, arrays: Sequence[Array]) -> Array:
    # Zero of the type of the total, under shard_map and explicit sharding; the total compiles to nothing.
    total = _total(dtype, arrays)
    return jnp.where(total == 0, 0, jnp.zeros_like(total))


def vary_alike(values: Sequence[Array], others: Sequence[Any] = ()) -> list[Array]:
    """Values that vary over every mesh axis that one of the values or the others varies over, under `jax.shard_map`.

    The transpose of the cast is a sum over devices: replicated kernels get the sum of the devices' gradients.
    """
    axes = frozenset[str]().union(*(_varying_axes(value) for value in (*values, *others)))
    missing = [tuple(sorted(axes - _varying_axes(value))) for value in values]
    return [lax.pcast(v, more, to="varying") if more else v for v, more in zip(values, missing, strict=True)]


def _varying_axes(value: Any) -> frozenset[str]:
    kind = jax.typeof(value)
    # The name of the attribute changed between versions of JAX.
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", ()))


def _bits_if_narrow(rows: Array) -> Array:
    return lax.bitcast_convert_type(rows, jnp.uint16) if rows.dtype.itemsize < 4 else rows


def take_rows(rows: Array, index: Array, fill: bool = True) -> Array:
    """Rows by index; an index past the end gives zeros. Not differentiable where rows are narrower than float32.

    Narrow rows are gathered as bits: XLA's CPU compiler gathers bfloat16 from a float32 copy of all rows, keeps that
    copy for the backward pass, and then multiplies in float32 too.

    Args:
        rows: [N, ...].
        index: int32, at least 0.
        fill: if False, an index past the end gives any row.
    """
    if not len(rows):  # XLA gathers nothing from an array without rows
        return jnp.zeros((*index.shape, *rows.shape[1:]), rows.dtype)
    bits = _bits_if_narrow(rows).at[index].get(mode="clip", wrap_negative_indices=False)
    if fill:
        inside = (index < len(rows)).reshape(*index.shape, *(1,) * (rows.ndim - 1))
        bits = jnp.where(inside, bits, jnp.zeros((), bits.dtype))
    return bits if bits.dtype == rows.dtype else lax.bitcast_convert_type(bits, rows.dtype)


def round_rows(sums: Float[Array, "n c"], dtype: Any, n: Int[AnyArray, ""]) -> Float[Array, "n c"]:
    """Round sums [N, C] to the type of features, without a copy in the wider type that lives on.

    A choice that the CPU compiler cannot foresee makes it store the rounded values. Accelerators would wait for the
    choice, and get a barrier.

    Args:
        sums: rows past the first n are zero.
        dtype: type of the features; one at least as wide as that of the sums is a plain conversion.
        n: number of rows that are sites.
    """
    if jnp.dtype(dtype).itemsize >= sums.dtype.itemsize:
        return sums.astype(dtype)

    def choose(sums: Array, n: Array) -> Array:
        zeros = lambda rows: zeros_varying_as(rows.shape, dtype, (rows, n))  # noqa: E731
        return lax.cond(n > 0, lambda rows: rows.astype(dtype), zeros, sums)

    def wait(sums: Array, n: Array) -> Array:
        return lax.optimization_barrier(sums.astype(dtype))

    return lax.platform_dependent(sums, jnp.asarray(n), cpu=choose, default=wait)


def recompute(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call function(*arguments); the backward pass keeps the arguments alone and computes the rest a second time.

    As `jax.checkpoint`, whose barriers XLA's CPU compiler drops. No forward-mode derivatives.

    Args:
        function: takes and returns pytrees of arrays; reads no traced value but its arguments.
        arguments: pytrees of arrays.
    """
    leaves, tree = jax.tree.flatten(arguments)
    outputs: list[Any] = []

    def flat(*leaves: Any) -> list[Any]:
        values, structure = jax.tree.flatten(function(*jax.tree.unflatten(tree, leaves)))
        outputs[:] = [structure]
        return values

    run = jax.custom_vjp(flat)

    def forward(*primals: Any) -> tuple[list[Any], list[Any]]:
        values = [primal.value for primal in primals]
        return flat(*values), values

    def backward(values: list[Any], cotangents: list[Any]) -> tuple[Any, ...]:
        # Outputs that nothing reads have symbolic zeros: they are not computed again.
        known = [i for i, c in enumerate(cotangents) if not isinstance(c, SymbolicZero) and c.dtype != float0]
        floats = [i for i, value in enumerate(values) if is_float(value)]
        given = [cotangents[i] for i in known]

        def again(*varied: Array) -> list[Any]:
            full = list(values)
            for i, value in zip(floats, after(given, list(varied)), strict=True):
                full[i] = value
            computed = flat(*full)
            return [computed[i] for i in known]

        gradients = dict(zip(floats, jax.vjp(again, *(values[i] for i in floats))[1](given), strict=True))
        return tuple(gradients.get(i) for i in range(len(values)))

    run.defvjp(forward, backward, symbolic_zeros=True)
    values = run(*leaves)
    return jax.tree.unflatten(outputs[0], values)


def recompute_if_narrow(function: Callable[..., Any], features: Any, *arguments: Any) -> Any:
    """Call a function that computes in float32, by `recompute` where a float32 copy of the features would be kept.

    Args:
        function: as for `recompute`.
        features: array, or a pytree that begins with one.
        arguments: pytrees of arrays.
    """
    if jax.tree.leaves(features)[0].dtype.itemsize >= 4:
        return function(features, *arguments)
    leaves, tree = jax.tree.flatten(arguments)
    # The gradient of replicated parameters is summed over the devices.
    floats = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
    for i, leaf in zip(floats, vary_alike([leaves[i] for i in floats], jax.tree.leaves(features)), strict=True):
        leaves[i] = leaf
    return recompute(function, features, *jax.tree.unflatten(tree, leaves))

"""Linear functions with a transpose of their own, in derivatives of every kind.

JAX transposes a loop of gathers into a loop that adds two whole arrays in every pass. A custom gradient
(`jax.custom_vjp`) is faster but has no forward mode, and `jax.custom_derivatives.linear_call` cannot be mapped over
(`jax.vmap`, on which `jax.jacfwd` and `jax.hessian` stand).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.dtypes import float0
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from h2a2_jax.sparse.xla_cpu import vary_alike

_linear_p = Primitive("linear")
"""Arguments x and residuals; parameters `function` and `transpose`, which take them."""


def call_linear(function: Callable[..., Array], transpose: Callable[..., Array], x: Array, *residuals: Any) -> Array:
    """Call function(x, *residuals), which is linear in x.

    Args:
        function: returns an array.
        transpose: maps (cotangent of the result, *residuals) to the cotangent of x.
        x: float array.
        residuals: pytrees of arrays; in those of floats the derivative is JAX's own.
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, residuals))
    x = vary_alike([x], leaves)[0]

    def flat(function: Callable[..., Array]) -> Callable[..., Array]:
        return lambda x, *leaves: function(x, *jax.tree.unflatten(tree, leaves))

    return _linear_p.bind(x, *leaves, function=flat(function), transpose=flat(transpose))


def _run(x: Array, *leaves: Any, function: Callable, transpose: Callable) -> Array:
    return function(x, *leaves)


def _abstract(x: Any, *leaves: Any, function: Callable, transpose: Callable) -> Any:
    return jax.make_jaxpr(function)(x, *leaves).out_avals[0]


def _jvp(primals: tuple, tangents: tuple, **functions: Callable) -> tuple:
    y, (x, *leaves) = _linear_p.bind(*primals, **functions), primals
    parts = [] if _is_zero(tangents[0]) else [_linear_p.bind(tangents[0], *leaves, **functions)]
    moved = {i: t for i, t in enumerate(tangents[1:]) if not _is_zero(t) and t.dtype != float0}

    def of_moved(*values: Array) -> Array:
        now = dict(zip(moved, values, strict=True))
        return functions["function"](x, *(now.get(i, leaf) for i, leaf in enumerate(leaves)))

    if moved:
        parts.append(jax.jvp(of_moved, [leaves[i] for i in moved], list(moved.values()))[1])
    return y, sum(parts[1:], parts[0]) if parts else ad.Zero(jax.typeof(y).to_tangent_aval())


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero


def _transpose(cotangent: Any, x: Any, *leaves: Any, function: Callable, transpose: Callable) -> list:
    if _is_zero(cotangent):
        return [ad.Zero(x.aval), *(None for _ in leaves)]
    dx = _linear_p.bind(cotangent, *leaves, function=transpose, transpose=function)
    return [dx, *(None for _ in leaves)]


def _batch(args: tuple, axes: tuple, *, function: Callable, transpose: Callable) -> tuple[Array, int]:
    size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
    x = batching.bdim_at_front(args[0], axes[0], size)
    function, transpose = (jax.vmap(f, (0, *axes[1:])) for f in (function, transpose))
    return _linear_p.bind(x, *args[1:], function=function, transpose=transpose), 0


_linear_p.def_impl(_run)
_linear_p.def_abstract_eval(_abstract)
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=False))
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch

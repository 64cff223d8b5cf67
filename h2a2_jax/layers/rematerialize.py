"""Blocks that keep nothing but their inputs for the backward pass, which computes them a second time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.dtypes import float0
from jaxtyping import Array

from h2a2_jax.layers.context import ForwardContext
from h2a2_jax.sparse.conv_parts import after, is_float


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), of which the backward pass keeps the arguments alone and computes the rest again.

    As `jax.checkpoint`, whose barriers XLA's CPU compiler drops. No forward-mode derivatives.

    Args:
        function: of pytrees of arrays; reads no traced value but its arguments.
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


def recomputed_if_narrow(function: Callable[..., Any], features: Any, *arguments: Any) -> Any:
    """function(features, *arguments) in float32, `recomputed` where that would keep a float32 copy of the features.

    Args:
        function: see `recomputed`.
        features: array, or pytree that begins with one.
        arguments: pytrees of arrays.
    """
    narrow = jax.tree.leaves(features)[0].dtype.itemsize < 4
    return recomputed(function, features, *arguments) if narrow else function(features, *arguments)


def rematerialized(block: nnx.Module, context: ForwardContext | None, *arguments: Any, **options: Any) -> Any:
    """block(*arguments, context=context, **options); `recomputed` where the context asks for it and trains.

    The block's batch statistics are updated and the context's tap sees what the block records, once, either way.

    Args:
        block: whose call takes pytrees of arrays and a `context`, and returns a pytree.
        context: of the pass.
        arguments: of the block.
        options: likewise, by name.
    """
    call: Callable[..., Any] = block  # type: ignore[assignment]
    if context is None or not (context.rematerialize and context.training):
        return call(*arguments, context=context, **options)
    graph, params, stats = nnx.split(block, nnx.Param, ...)  # type: ignore[misc]
    names: list[str] = []

    def run(params: nnx.State, stats: nnx.State, inner: ForwardContext, arguments: Sequence, options: dict) -> tuple:
        recorded: list[tuple[str, Any]] = []
        tap = None if context.tap is None else lambda name, value: recorded.append((name, value))
        own = nnx.merge(graph, params, stats, copy=True)
        out = own(*arguments, context=replace(inner, tap=tap), **options)
        names[:] = [name for name, _ in recorded]
        return out, [value for _, value in recorded], nnx.state(own, nnx.Not(nnx.Param))

    out, recorded, stats = recomputed(run, params, stats, replace(context, tap=None), arguments, options)
    nnx.update(block, stats)
    for name, value in zip(names, recorded, strict=True):
        context.record(name, value)
    return out

"""Sparse convolution as JAX primitives: derivatives of every mode and order, and the platform of the lowering.

Convolution is linear in its features, in its kernels and in gamma, so all of its derivatives are convolutions again.
Three primitives are closed under differentiation and transposition:

    conv       y            = sum_k x[neighbors[k]] @ W[k]
    tangent    dy           = conv(dx, W) + conv(x, dW) + the change by gamma, linear in dx, dW and dgamma
    backward   (gx, gW, gg) = transposed tangent of a cotangent g, in one pass over the map

`jax.custom_vjp` would close forward mode, `jax.custom_jvp` would split the one pass of the backward function in three.
A primitive is also lowered for each platform by itself: the algorithm "auto" is chosen there, not by the backend of the
machine that traces.

Arguments of all three are the features x, the kernels W, gamma if there is one, and the arrays of the kernel map.
`batch` holds the axes of the arguments for each `jax.vmap` around a primitive, outermost first.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from h2a2_jax.sparse.conv_parts import ConvOptions, Platform
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.native_call import lower_natively
from h2a2_jax.sparse.xla_cpu import vary_alike

Batch = tuple[tuple[int | None, ...], ...]


class ConvCall(NamedTuple):
    """Static part of a convolution.

    Attributes:
        forward: (x, w, gamma, kmap, options, platform) -> y, in the type of the sums.
        backward: (x, w, gamma, kmap, options, cotangent, platform) -> gradients of x, w and gamma.
        options: algorithm, types, precision and groups.
        has_gamma: True if gamma is among the arguments: a choice between two kernels, or weights of one.
        tree: structure of the kernel map.
    """

    forward: Callable
    backward: Callable
    options: ConvOptions
    has_gamma: bool
    tree: Any

    def unpack(self, args: Sequence[Any]) -> tuple[Any, Any, Any, KernelMap]:
        """x, w, gamma and the kernel map of the arguments of "conv"."""
        x, w, *rest = args
        gamma = rest.pop(0) if self.has_gamma else None
        return x, w, gamma, jax.tree.unflatten(self.tree, rest)


def convolve_by(
    forward: Callable,
    backward: Callable,
    x: Array,
    w: Array,
    gamma: Array | None,
    kmap: KernelMap,
    options: ConvOptions,
) -> Array:
    """Convolve by an algorithm's functions; differentiable in x, w and gamma, in any mode and order."""
    leaves, tree = jax.tree.flatten(kmap)
    args = [x, w, *([] if gamma is None else [gamma]), *leaves]
    call = ConvCall(forward, backward, options, gamma is not None, tree)
    floats = 2 if gamma is None else 3
    args[:floats] = vary_alike(args[:floats], leaves)
    return conv_p.bind(*args, call=call, batch=())


# ---------------------------------------------------------------- functions of the primitives


def _conv(*args: Any, call: ConvCall, platform: Platform) -> Array:
    x, w, gamma, kmap = call.unpack(args)
    return call.forward(x, w, gamma, kmap, call.options, platform)


def _tangent(*args: Any, call: ConvCall, dots: tuple[bool, ...], platform: Platform | None = None) -> Array:
    """Sum of the parts of a derivative; `dots` says of x, w and gamma which have a tangent, before the arguments."""
    del platform  # each part is a primitive, lowered for its platform
    count = sum(dots)
    changes, args = iter(args[:count]), args[count:]
    parts = []
    for i, dotted in enumerate(dots):
        if not dotted:
            continue
        if i < 2:
            parts.append(conv_p.bind(*args[:i], next(changes), *args[i + 1 :], call=call, batch=()))
        else:
            parts.append(conv_p.bind(args[0], _gain(args[1]), next(changes), *args[3:], call=call, batch=()))
    return sum(parts[1:], parts[0])


def _gain(w: Array) -> Array:
    """Kernel that gamma multiplies: the difference of two kernels to choose from, or the one that it weighs."""
    return w[..., :1, :, :, :] - w[..., 1:, :, :, :] if _is_choice(w) else w


def _is_choice(w: Array) -> bool:
    """True if gamma chooses between two kernels, and does not weigh one."""
    return w.shape[-4] == 2


def _backward(*args: Any, call: ConvCall, wants: tuple[bool, ...], platform: Platform) -> list[Array]:
    """Gradients of x, w and gamma, those that are wanted; the cotangent is the last argument."""
    *given, cotangent = args
    x, w, gamma, kmap = call.unpack(given)
    gradients = call.backward(x, w, gamma, kmap, call.options, cotangent, platform)
    return [gradient for gradient, wanted in zip(gradients, wants, strict=False) if wanted]


def _nested(function: Callable, batch: Batch) -> Callable:
    """Function of arrays with leading axes, one for each enclosing `jax.vmap`."""
    for axes in reversed(batch):
        function = jax.vmap(function, in_axes=axes)
    return function


# ---------------------------------------------------------------- shapes


def _types(call: ConvCall, batch: Batch, args: Sequence[Any]) -> Any:
    shape = [jax.ShapeDtypeStruct(a.shape[_levels(batch, i) :], a.dtype) for i, a in enumerate(args)]
    return call.unpack(shape)


def _levels(batch: Batch, i: int) -> int:
    """Number of batch axes of argument i."""
    return sum(axes[i] is not None for axes in batch)


@lru_cache(maxsize=4096)
def _typed(avals: tuple, batch: Batch, shapes: tuple[tuple[tuple[int, ...], Any], ...]) -> list:
    """Types of arrays of given shapes; they are batched and spread over a mesh as the arguments are."""

    def build(*args: Any) -> list[Array]:
        def zero(dtype: Any) -> Array:
            return sum((arg.sum().astype(dtype) for arg in args), jnp.zeros((), dtype))

        return [jnp.broadcast_to(zero(dtype), shape) for shape, dtype in shapes]

    return jax.make_jaxpr(_nested(build, batch))(*avals).out_avals


def _conv_type(*args: Any, call: ConvCall, batch: Batch, dots: tuple[bool, ...] = ()) -> Any:
    count = sum(dots)
    _, w, _, kmap = _types(call, tuple(axes[count:] for axes in batch), args[count:])
    return _typed(tuple(args), batch, (((kmap.out_capacity, w.shape[-1]), jnp.dtype(call.options.sum_type)),))[0]


def _backward_type(*args: Any, call: ConvCall, wants: tuple[bool, ...], batch: Batch) -> list:
    x, w, gamma, _ = _types(call, batch, args[:-1])
    wanted = [a for a, want in zip((x, w, gamma), wants, strict=False) if want]
    return _typed(tuple(args), batch, tuple((a.shape, jnp.dtype(a.dtype)) for a in wanted))


# ---------------------------------------------------------------- the primitives


class _Run(NamedTuple):
    """A primitive with its parameters, as a static argument."""

    primitive: Primitive
    params: tuple[tuple[str, Any], ...]


@partial(jax.jit, static_argnums=0)
def _run(run: _Run, *args: Any) -> Any:
    return run.primitive.bind(*args, **dict(run.params))


def _define(name: str, function: Callable, abstract: Callable, multiple: bool = False) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = multiple

    def on(platform: Platform) -> Callable:
        def lowered(*args: Any, batch: Batch, **params: Any) -> Any:
            return _nested(partial(function, platform=platform, **params), batch)(*args)

        return lowered

    def evaluate(*args: Any, **params: Any) -> Any:
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return on("cpu" if jax.default_backend() == "cpu" else "accelerator")(*map(jnp.asarray, args), **params)
        return _run(_Run(primitive, tuple(sorted(params.items()))), *args)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(on("accelerator"), multiple_results=multiple))
    here, anywhere = (mlir.lower_fun(on(cpu), multiple_results=multiple) for cpu in ("cpu", "any cpu"))
    mlir.register_lowering(primitive, lower_natively(here, anywhere), platform="cpu")

    def batched(args: Sequence[Any], dims: Sequence[int | None], *, batch: Batch, **params: Any) -> tuple:
        moved = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True)]
        axes = tuple(None if d is None else 0 for d in dims)
        out = primitive.bind(*moved, batch=(axes, *batch), **params)
        return out, ([0] * len(out) if multiple else 0)

    batching.primitive_batchers[primitive] = batched
    return primitive


conv_p = _define("sparse_conv", _conv, _conv_type)
tangent_p = _define("sparse_conv_tangent", _tangent, _conv_type)
backward_p = _define("sparse_conv_backward", _backward, _backward_type, multiple=True)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero)


def _floats(call: ConvCall) -> int:
    """Number of arguments that have derivatives: x, w and gamma if there is one."""
    return 3 if call.has_gamma else 2


def _conv_jvp(primals: Sequence, tangents: Sequence, *, call: ConvCall, batch: Batch) -> tuple:
    y = conv_p.bind(*primals, call=call, batch=batch)
    dots = tuple(not _is_zero(t) for t in tangents[: _floats(call)])
    if not any(dots):
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    changes = [t for t, dotted in zip(tangents, dots, strict=False) if dotted]
    inner = tuple((*(a for a, dotted in zip(axes, dots, strict=False) if dotted), *axes) for axes in batch)
    return y, tangent_p.bind(*changes, *primals, call=call, dots=dots, batch=inner)


def _tangent_jvp(primals: Sequence, tangents: Sequence, **params: Any) -> tuple:
    """Derivative of the sum of the parts, as JAX takes it."""
    batch = params.pop("batch")
    known = [i for i, t in enumerate(tangents) if not _is_zero(t)]

    def of_known(*values: Any) -> Array:
        args = list(primals)
        for i, value in zip(known, values, strict=True):
            args[i] = value
        return _nested(partial(_tangent, **params), batch)(*args)

    y = tangent_p.bind(*primals, batch=batch, **params)
    if not known:
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    return y, jax.jvp(of_known, [primals[i] for i in known], [tangents[i] for i in known])[1]


def _tangent_transpose(
    cotangent: Any, *args: Any, call: ConvCall, dots: tuple[bool, ...], batch: Batch
) -> list[Array | None]:
    count = sum(dots)
    nothing: list[Array | None] = [None] * len(args)
    if _is_zero(cotangent):
        return nothing
    given = args[count:]
    inner = tuple((*axes[count:], 0) for axes in batch)
    gradients = backward_p.bind(*given, cotangent, call=call, wants=dots, batch=inner)
    return [*(_sum_unbatched(g, batch, i) for i, g in enumerate(gradients)), *nothing[count:]]


def _sum_unbatched(gradient: Array, batch: Batch, i: int) -> Array:
    """Gradient of an argument, summed over the batch axes that the argument does not have."""
    axes = tuple(level for level, dims in enumerate(batch) if dims[i] is None)
    return gradient.sum(axes) if axes else gradient


def _conv_transpose(cotangent: Any, *args: Any, call: ConvCall, batch: Batch) -> list[Array | None]:
    """Transpose in the one argument that is linear."""
    out: list[Array | None] = [None] * len(args)
    if _is_zero(cotangent):
        return out
    (i,) = (i for i, arg in enumerate(args) if ad.is_undefined_primal(arg))
    filled = [_placeholder(arg) if ad.is_undefined_primal(arg) else arg for arg in args]
    out[i] = _gradient(i, filled, cotangent, call, tuple((*axes, 0) for axes in batch))
    return out


def _placeholder(arg: Any) -> Array:
    """Zeros in the place of an argument whose shape alone is read."""
    return jnp.zeros(arg.aval.shape, arg.aval.dtype)


def _gradient(i: int, args: Sequence[Any], cotangent: Array, call: ConvCall, batch: Batch) -> Array:
    """Gradient of argument i alone, summed over the batch axes that the argument does not have."""
    wants = tuple(j == i for j in range(_floats(call)))
    return _sum_unbatched(backward_p.bind(*args, cotangent, call=call, wants=wants, batch=batch)[0], batch, i)


def _backward_jvp(
    primals: Sequence, tangents: Sequence, *, call: ConvCall, wants: tuple[bool, ...], batch: Batch
) -> tuple[list, list]:
    """Change of each gradient: a gradient is linear in the arguments that it depends on.

    With a choice of two kernels, the gradients of x and w depend on gamma as on the weight of the difference.
    """
    out = backward_p.bind(*primals, call=call, wants=wants, batch=batch)
    changes: list = []
    for want in (i for i, wanted in enumerate(wants) if wanted):
        only = tuple(i == want for i in range(len(wants)))
        total: Any = None
        for i in (*range(_floats(call)), len(primals) - 1):
            if _is_zero(tangents[i]) or i == want:
                continue
            args = list(primals)
            args[i] = tangents[i]
            chosen = i == 2 and call.has_gamma and _is_choice(primals[1])
            if chosen:
                args[1] = _gain(primals[1])
            (part,) = backward_p.bind(*args, call=call, wants=only, batch=batch)
            if chosen and want == 1:
                part = jnp.concatenate([part, -part], part.ndim - 4)
            total = part if total is None else total + part
        like = out[len(changes)]
        changes.append(ad.Zero(jax.typeof(like).to_tangent_aval()) if total is None else total)
    return out, changes


def _backward_transpose(
    cotangents: Sequence, *args: Any, call: ConvCall, wants: tuple[bool, ...], batch: Batch
) -> list[Array | None]:
    """Transpose of one gradient in the one argument that is linear; <cotangent, gradient> is linear in both."""
    out: list[Array | None] = [None] * len(args)
    (cotangent,) = cotangents
    if _is_zero(cotangent):
        return out
    (want,) = (i for i, wanted in enumerate(wants) if wanted)
    (i,) = (i for i, arg in enumerate(args) if ad.is_undefined_primal(arg))
    filled = [_placeholder(arg) if ad.is_undefined_primal(arg) else arg for arg in args]
    chosen = want == 2 and _is_choice(filled[1])
    # The cotangent takes the place of the argument whose gradient it belongs to, at all batch axes.
    inner = tuple((*axes[:want], 0, *axes[want + 1 :]) for axes in batch)
    filled[want] = cotangent
    if chosen:
        filled[1] = _gain(filled[1])
    if i == len(args) - 1:
        linear = conv_p.bind(*filled[:-1], call=call, batch=tuple(axes[:-1] for axes in inner))
        out[i] = _sum_unbatched(linear, batch, i)
    else:
        only = tuple(j == i for j in range(len(wants)))
        (part,) = backward_p.bind(*filled, call=call, wants=only, batch=inner)
        if chosen and i == 1:
            part = jnp.concatenate([part, -part], part.ndim - 4)
        out[i] = _sum_unbatched(part, batch, i)
    return out


ad.primitive_jvps[conv_p] = _conv_jvp
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_jvps[backward_p] = _backward_jvp
ad.primitive_transposes[conv_p] = _conv_transpose
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[backward_p] = _backward_transpose

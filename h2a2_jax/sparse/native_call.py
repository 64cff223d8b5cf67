"""Compiled kernels behind `jax.ffi`, an optional extension: where they are, and how programs call them.

Where no compiler was found at installation, or where `H2A2_NATIVE=0` is set, everything runs on XLA alone.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

from h2a2_jax.sparse import native_maps
from h2a2_jax.sparse.xla_cpu import vary_alike

_log = logging.getLogger(__name__)
_TARGETS = ("h2a2_convolve", "h2a2_differentiate", "h2a2_max_pool", "h2a2_max_pool_gradient")
_HOW = (
    "with a C++ compiler (Debian and Ubuntu: apt install g++), `pip install --force-reinstall --no-deps h2a2_jax`, or "
    "`pip install -e .` in a clone, builds them"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, registered with XLA; None where they are not there or turned off.

    The first call says so once where they could be there.
    """
    file = native_maps.extension()
    if file is None:
        if os.environ.get("H2A2_NATIVE", "1") != "0":
            _log.warning("convolutions run on XLA alone; compiled kernels are faster: %s.", _HOW)
        return None
    try:
        loaded = ctypes.CDLL(str(file))
        for name in _TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    except (OSError, AttributeError, RuntimeError, ValueError) as error:
        _log.warning(
            "convolutions run on XLA alone: the compiled kernels in %s cannot be used here (%s); %s anew.",
            file.name,
            str(error).splitlines()[0],
            _HOW,
        )
        return None
    loaded.h2a2_form.restype = ctypes.c_char_p
    return loaded


def has_native() -> bool:
    """Return True where the compiled kernels can be used."""
    return library() is not None


def native_form() -> str | None:
    """Instruction set of the compiled kernels: "avx512", "avx2" or "portable"; None where there are none."""
    loaded = library()
    return None if loaded is None else loaded.h2a2_form().decode()


def choose_native_form(name: str) -> None:
    """Take the kernels of another instruction set from now on, for tests and benchmarks; the fastest is the default.

    Raises:
        ValueError: there are no kernels, or this machine cannot run these.
    """
    loaded = library()
    if loaded is None or not loaded.h2a2_choose_form(name.encode()):
        raise ValueError(f"native form {name!r} cannot run here; this machine takes {native_form()!r}.")


def call_native(
    name: str, results: Sequence[tuple[tuple[int, ...], Any]], arguments: Sequence[Array], **attributes: bool
) -> list[Array]:
    """Call a compiled kernel.

    Args:
        name: name of the kernel.
        results: shape and type of each result.
        arguments: arrays, as the kernel declares them.
        attributes: static arguments.
    """
    alike = vary_alike(arguments)

    def shaped(like: Array) -> list[Array]:
        # Types of results that vary over a mesh as the arguments do.
        return [jnp.broadcast_to(like.sum().astype(dtype), shape) for shape, dtype in results]

    types = jax.make_jaxpr(shaped)(alike[0]).out_avals
    return list(jax.ffi.ffi_call(name, types, vmap_method="sequential")(*alike, **attributes))


def lower_natively(native: Callable, portable: Callable) -> Callable:
    """Lowering rule for CPUs: a native rule, but a portable one for a program that is exported to any machine."""

    def lower(ctx: Any, *args: Any, **params: Any) -> Any:
        is_exported = ctx.module_context.lowering_parameters.for_export
        return (portable if is_exported else native)(ctx, *args, **params)

    return lower


_either_p = Primitive("either")
"""Arrays, by the parameter `native` on CPUs where the kernels are, else by `portable`; without derivatives."""
_either_p.multiple_results = True


def call_either(native: Callable[..., Any], portable: Callable[..., Any], *args: Any) -> Any:
    """Call one of two functions with equal results, by the platform that the program is lowered for.

    Args:
        native: function that calls compiled kernels.
        portable: the same in XLA. Neither is differentiated, and neither reads a traced value but its arguments.
        args: pytrees of arrays.

    Returns:
        A pytree of arrays.
    """
    if not has_native():
        return portable(*args)
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, args))
    shapes = jax.eval_shape(portable, *args)

    def flat(function: Callable[..., Any]) -> Callable[..., list[Array]]:
        return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

    out = _either_p.bind(*vary_alike(leaves), native=flat(native), portable=flat(portable))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(native: Callable, portable: Callable, *args: Array) -> list[Array]:
    return _either_p.bind(*args, native=native, portable=portable)


def _batch(args: tuple, axes: tuple, *, native: Callable, portable: Callable) -> tuple[list[Array], list[int]]:
    native, portable = (jax.vmap(function, axes) for function in (native, portable))
    out = _either_p.bind(*args, native=native, portable=portable)
    return out, [0] * len(out)


def _by(name: str) -> Callable:
    return mlir.lower_fun(lambda *args, **functions: functions[name](*args), multiple_results=True)


_either_p.def_impl(lambda *args, native, portable: _run(native, portable, *args))
_either_p.def_abstract_eval(lambda *args, native, portable: jax.make_jaxpr(portable)(*args).out_avals)
mlir.register_lowering(_either_p, _by("portable"))
mlir.register_lowering(_either_p, lower_natively(_by("native"), _by("portable")), platform="cpu")
batching.primitive_batchers[_either_p] = _batch

"""Convolution on CPUs by compiled kernels behind `jax.ffi` ("native"): faster than XLA's own code, and smaller.

The kernels read the neighbours of a map as they are, and blocks where it has them (`sparse/native`). They are an
optional extension: where no compiler was found at installation, or where `H2A2_NATIVE=0` is set, everything runs on XLA
alone.
"""

import ctypes
import functools
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from h2a2_jax.sparse.conv_parts import ConvOptions, Gradients, kernel_choice
from h2a2_jax.sparse.kernel_map import TILE, KernelMap
from h2a2_jax.sparse.xla_cpu import vary_alike, varying_type

_log = logging.getLogger(__name__)
_TARGETS = ("h2a2_convolve", "h2a2_differentiate")
_HOW = (
    "with a C++ compiler (Debian and Ubuntu: apt install g++), `pip install --force-reinstall --no-deps h2a2_jax`, or "
    "`pip install -e .` in a clone, builds them"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, registered with XLA; None where they are not there or turned off.

    The first call says so once where they could be there.
    """
    if os.environ.get("H2A2_NATIVE", "1") == "0":
        return None
    files = sorted(Path(__file__).parent.glob("_native*.so")) + sorted(Path(__file__).parent.glob("_native*.pyd"))
    if not files:
        _log.warning("convolutions run on XLA alone; compiled kernels are faster: %s.", _HOW)
        return None
    try:
        loaded = ctypes.CDLL(str(files[0]))
        for name in _TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    except (OSError, AttributeError, RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        _log.warning(
            "convolutions run on XLA alone: the compiled kernels in %s cannot be used here (%s); %s anew.",
            files[0].name,
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


def is_native(options: ConvOptions) -> bool:
    """Return True where the kernels compute what the options ask for: float32 sums, without groups."""
    return options.groups == 1 and jnp.dtype(options.sum_type) == jnp.float32


def native_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """Output rows of the algorithm "native"; see `conv_parts` for arguments and result."""
    del options
    shape = (kmap.out_capacity, w.shape[-1])
    arguments = [x, w, *_lists(kmap, kmap.out_scan, kernel_places(gamma, w, kmap))]
    return _call("h2a2_convolve", [shape], arguments, transposed=False, mirrored=False, inverse=False)[0]


def native_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "native"."""
    g = cotangent.astype(x.dtype)  # no map reads a padding row
    places = kernel_places(gamma, w, kmap)
    mirrored = kmap.kind == "submanifold" and kmap.kernel_volume % 2 == 1
    arguments = [g, w, *_lists(kmap, kmap.in_scan, places)]
    (dx,) = _call("h2a2_convolve", [x.shape], arguments, transposed=True, mirrored=mirrored, inverse=not mirrored)
    arguments = [x, g, w, *_lists(kmap, kmap.out_scan, places)]
    dw, dgamma = _call("h2a2_differentiate", [w.shape, places.shape], arguments, has_gamma=gamma is not None)
    return (
        dx.astype(x.dtype),
        dw.astype(options.kernel_type),
        None if gamma is None else dgamma.astype(gamma.dtype),
    )


def kernel_places(gamma: Array | None, w: Array, kmap: KernelMap) -> Int[Array, "b v"]:
    """Kernel of each (scan, offset), as an index into the stack flattened over (kernel, offset); one row for all."""
    offsets = jnp.arange(w.shape[1], dtype=jnp.int32)
    if gamma is None:
        return offsets[None]
    return kernel_choice(gamma) * w.shape[1] + offsets


def _lists(kmap: KernelMap, scan: Any, places: Array) -> list[Array]:
    """Neighbours, scan of each row, kernels of each scan, and blocks if the map has them."""
    blocks = kmap.blocks
    none = jnp.zeros((0, TILE, TILE, TILE, 1), jnp.int32)
    rows, scans, count = (none, jnp.zeros(0), jnp.zeros(())) if blocks is None else (blocks.rows, blocks.scan, blocks.count)
    lists = [kmap.neighbors, scan, places, rows, scans, jnp.reshape(jnp.asarray(count), (1,))]
    return [jnp.asarray(a).astype(jnp.int32) for a in lists]


def _call(name: str, shapes: list[tuple[int, ...]], arguments: list[Array], **attributes: bool) -> list[Array]:
    alike = vary_alike(arguments)
    results = [varying_type(shape, jnp.float32, alike[0]) for shape in shapes]
    return list(jax.ffi.ffi_call(name, results, vmap_method="sequential")(*alike, **attributes))

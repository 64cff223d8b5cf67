"""Convolution on CPUs by compiled kernels behind `jax.ffi` ("native"): faster than XLA's own code, and smaller.

The kernels read the neighbours of a map as they are, and blocks where it has them (`sparse/native`).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from h2a2_jax.sparse.conv_parts import ConvOptions, Gradients, kernel_choice
from h2a2_jax.sparse.kernel_map import TILE, KernelMap
from h2a2_jax.sparse.native_call import call_native


def is_native(options: ConvOptions) -> bool:
    """Return True where the kernels compute what the options ask for: float32 sums, without groups."""
    return options.groups == 1 and jnp.dtype(options.sum_type) == jnp.float32


def native_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """Output rows of the algorithm "native"; see `conv_parts` for arguments and result."""
    del options
    shape = (kmap.out_capacity, w.shape[-1])
    arguments = [x, w, *_lists(kmap, kmap.out_scan, kernel_places(gamma, w, kmap))]
    return call_native(
        "h2a2_convolve", [(shape, jnp.float32)], arguments, transposed=False, mirrored=False, inverse=False
    )[0]


def native_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "native"."""
    g = cotangent.astype(x.dtype)  # no map reads a padding row
    places = kernel_places(gamma, w, kmap)
    mirrored = kmap.kind == "submanifold" and kmap.kernel_volume % 2 == 1
    arguments = [g, w, *_lists(kmap, kmap.in_scan, places)]
    (dx,) = call_native(
        "h2a2_convolve", [(x.shape, jnp.float32)], arguments, transposed=True, mirrored=mirrored, inverse=not mirrored
    )
    arguments = [x, g, w, *_lists(kmap, kmap.out_scan, places)]
    results = [(w.shape, jnp.float32), (places.shape, jnp.float32)]
    dw, dgamma = call_native("h2a2_differentiate", results, arguments, has_gamma=gamma is not None)
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
    rows, scans, count = (
        (none, jnp.zeros(0), jnp.zeros(())) if blocks is None else (blocks.rows, blocks.scan, blocks.count)
    )
    lists = [kmap.neighbors, scan, places, rows, scans, jnp.reshape(jnp.asarray(count), (1,))]
    return [jnp.asarray(a).astype(jnp.int32) for a in lists]

"""Convolution on CPUs by compiled kernels behind `jax.ffi` ("native"): faster than XLA's own code, and smaller.

The kernels read the neighbours of a map as they are, and blocks where it has them (`sparse/native`).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from h2a2_jax.sparse.conv_parts import ConvOptions, Gradients, kernel_index
from h2a2_jax.sparse.kernel_map import TILE, KernelMap
from h2a2_jax.sparse.native_call import call_native


def is_native(options: ConvOptions) -> bool:
    """Return True where the kernels compute what the options ask for: float32 sums, without groups."""
    return options.groups == 1 and jnp.dtype(options.sum_type) == jnp.float32


def native_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """Output rows of the algorithm "native"; see `conv_parts` for arguments and result."""
    del options
    shape = (kmap.out_capacity, w.shape[-1])
    arguments = [x, w, *_lists(kmap, kmap.out_scan, _places(gamma, w, kmap))]
    return call_native(
        "h2a2_convolve", [(shape, jnp.float32)], arguments, transposed=False, mirrored=False, inverse=False
    )[0]


def native_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of the algorithm "native"."""
    g = cotangent.astype(x.dtype)  # no map reads a padding row
    places = _places(gamma, w, kmap)
    mirrored = kmap.is_mirror_image
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


def _places(gamma: Array | None, w: Array, kmap: KernelMap) -> Int[Array, "b v"]:
    """Kernel of each (scan, offset); one row for all scans without gamma, so that the kernels know that they share."""
    index = kernel_index(gamma, w, kmap)
    return index[:1] if gamma is None else index


def _lists(kmap: KernelMap, scan: Any, places: Array) -> list[Array]:
    """Neighbours, scan of each row, kernels of each scan, and blocks if the map has them."""
    blocks: list[Any]
    if kmap.blocks is None:
        blocks = [np.zeros((0, TILE, TILE, TILE, 1), np.int32), np.zeros(0, np.int32), np.zeros(1, np.int32)]
    else:
        blocks = [kmap.blocks.rows, kmap.blocks.scan, jnp.reshape(kmap.blocks.count, (1,))]
    return [jnp.asarray(part) for part in (kmap.neighbors, scan, places, *blocks)]

"""Kernels of other libraries as those of `SparseConv`, and back.

A kernel here is [V, Cin, Cout], slices x fastest. A slice multiplies the same neighbour in all the libraries, and an
inverse convolution reuses the pairs of the strided one slice by slice, so that one function serves submanifold,
strided, inverse and generative layers. Submanifold kernels of even size are the exception: spconv's reach from -K/2 to
K/2 - 1, maps here from 0 to K - 1.

    layer.kernel[...] = from_spconv(weight.detach().cpu().numpy())
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from h2a2_jax.layers.sparse_conv import size_per_axis
from h2a2_jax.sparse.sites import PerAxis
from h2a2_jax.typing import AnyArray

AxisOrder = Literal["zyx", "xyz"]
"""Order of the axes in the indices that a layer of spconv was fed: (batch, z, y, x), or (batch, x, y, z)."""


def from_spconv(weight: AnyArray, *, order: AxisOrder = "zyx") -> np.ndarray:
    """Kernel [V, Cin, Cout] of a weight [Cout, *K, Cin] of spconv 2.

    Args:
        weight: array of a SubMConv, SparseConv, SparseInverseConv or SparseConvTranspose in 2-D, 3-D or 4-D.
        order: order of the axes in the layer's indices, and so in *K.

    Returns:
        Kernel in the type of the weight (numpy).

    Raises:
        ValueError: the weight has another number of axes.
    """
    weight = np.asarray(weight)
    if weight.ndim not in (4, 5, 6):
        raise ValueError(f"a weight of spconv 2 is [Cout, *K, Cin] with K in 2 to 4 axes, given {list(weight.shape)}.")
    axes = list(range(1, weight.ndim - 1))
    slow_first = axes if order == "zyx" else axes[::-1]
    return weight.transpose(*slow_first, weight.ndim - 1, 0).reshape(-1, weight.shape[-1], weight.shape[0])


def to_spconv(kernel: AnyArray, kernel_size: PerAxis, *, order: AxisOrder = "zyx") -> np.ndarray:
    """Weight [Cout, *K, Cin] of spconv 2 of a kernel [V, Cin, Cout].

    Args:
        kernel: array.
        kernel_size: size of the kernel: one number in 3-D, or (x, y), (x, y, z), (x, y, z, t).
        order: order of the axes in the indices that the layer is fed.

    Raises:
        ValueError: the kernel is of another size.
    """
    kernel = np.asarray(kernel)
    size = size_per_axis(kernel_size)[: len(kernel_size) if isinstance(kernel_size, Sequence) else 3]
    _check_volume(kernel, size)
    grid = kernel.reshape(*size[::-1], *kernel.shape[1:])
    axes = list(range(len(size)))
    return grid.transpose(len(size) + 1, *(axes if order == "zyx" else axes[::-1]), len(size))


def from_minkowski(kernel: AnyArray) -> np.ndarray:
    """Kernel [V, Cin, Cout] of a kernel of MinkowskiEngine, which has the same layout, and [Cin, Cout] at V = 1."""
    kernel = np.asarray(kernel)
    return kernel[None] if kernel.ndim == 2 else kernel


def to_minkowski(kernel: AnyArray) -> np.ndarray:
    """Kernel of MinkowskiEngine of a kernel [V, Cin, Cout]: the same array, [Cin, Cout] at V = 1."""
    kernel = np.asarray(kernel)
    return kernel[0] if len(kernel) == 1 else kernel


def from_torchsparse(kernel: AnyArray, kernel_size: PerAxis) -> np.ndarray:
    """Kernel [V, Cin, Cout] of a kernel of TorchSparse.

    TorchSparse counts x fastest where the volume is odd, and z fastest where it is even.

    Args:
        kernel: array [V, Cin, Cout], or [Cin, Cout] at V = 1.
        kernel_size: size of the kernel, one number or (x, y, z).

    Raises:
        ValueError: the kernel is of another size.
    """
    kernel = from_minkowski(kernel)
    size = size_per_axis(kernel_size)
    _check_volume(kernel, size)
    return kernel if len(kernel) % 2 else _swap_ends(kernel, size)


def to_torchsparse(kernel: AnyArray, kernel_size: PerAxis) -> np.ndarray:
    """Kernel of TorchSparse of a kernel [V, Cin, Cout], as `from_torchsparse` takes it.

    Raises:
        ValueError: the kernel is of another size.
    """
    kernel = np.asarray(kernel)
    size = size_per_axis(kernel_size)
    _check_volume(kernel, size)
    return to_minkowski(kernel if len(kernel) % 2 else _swap_ends(kernel, size[::-1]))


def _swap_ends(kernel: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Slices counted with the first axis of `size` fastest, of slices counted with the last axis fastest."""
    return kernel.reshape(*size, *kernel.shape[1:]).transpose(2, 1, 0, 3, 4).reshape(kernel.shape)


def _check_volume(kernel: np.ndarray, size: tuple[int, ...]) -> None:
    if kernel.ndim != 3 or len(kernel) != math.prod(size):
        raise ValueError(f"a kernel of size {size} is [{math.prod(size)}, Cin, Cout], given {list(kernel.shape)}.")

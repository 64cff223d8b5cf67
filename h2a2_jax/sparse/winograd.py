"""Convolution of nearly dense submanifold maps by Winograd's F(4, 3)^3 on blocks of sites (Lavin and Gray 2016).

One-dimensional F(4, 3) computes 4 outputs of a kernel g of 3 taps from 6 inputs d with 6 products:

    y = A' [(G g) * (B' d)]

The matrices are those of Toom and Cook: both polynomials are evaluated at 5 points and at infinity and multiplied
there; the transpose of that scheme is a correlation.

In three dimensions a block's 6^3 inputs, transformed along each axis, meet the transformed kernel in 216 matrix
products in place of 27 * 64, and one more transform gives the block's 4^3 outputs. Empty places of a block are zeros.

The leading axis of a transformed block is a list of six arrays with separate transforms and products: that many
independent chains keep several threads at work.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from h2a2_jax.sparse.conv_parts import ConvOptions, Gradients, gain, kernel_masks
from h2a2_jax.sparse.kernel_map import BLOCK, TILE, KernelMap, SiteBlocks
from h2a2_jax.sparse.xla_cpu import take_rows, zeros_varying_as

POINTS = (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(4, 3), Fraction(-4, 3))
"""Points for F(4, 3): a tenth of the rounding error of the textbook's 0, +-1, +-2."""
_INNER = slice(1, 1 + BLOCK)
"""Outputs of a block among its inputs, along an axis."""

# ---------------------------------------------------------------- matrices


def winograd_matrices() -> tuple[Float[np.ndarray, "4 6"], Float[np.ndarray, "6 3"], Float[np.ndarray, "6 6"]]:
    """A', G and B' of F(4, 3), computed in exact fractions, in float64."""
    output: list[list] = [[p**i for i in range(BLOCK)] for p in POINTS]
    kernel: list[list] = []
    inputs: list[list] = []
    for p in POINTS:
        others = [q for q in POINTS if q != p]
        scale = math.prod(p - q for q in others)
        kernel.append([p**i / scale for i in range(3)])
        inputs.append([*_polynomial(others), 0])
    # The last row of each is that of the point at infinity.
    output.append([0, 0, 0, 1])
    kernel.append([0, 0, 1])
    inputs.append(_polynomial(POINTS))
    return np.array(output, float).T, np.array(kernel, float), np.array(inputs, float)


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients, lowest first, of the product of (x - root)."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


@cache
def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A', B', and G of all three axes at once [6, 36, 27], with its transpose in the order of the products."""
    output, kernel, inputs = winograd_matrices()
    cube = np.einsum("az,by,cx->abczyx", kernel, kernel, kernel).reshape(TILE, TILE * TILE, 27)
    return output, inputs, cube, cube.transpose(0, 2, 1)


# ---------------------------------------------------------------- convolution


def winograd_forward(x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions) -> Array:
    """Output rows of the algorithm "winograd", which needs `kmap.blocks`; see `conv_parts` for arguments and result."""
    blocks = _blocks_of(kmap)
    kernels = _transform_kernel(_select_kernel(w, gamma), options)

    def write_chunk(t: Array, out: Array) -> Array:
        cells = _gather(x, blocks.rows[t], options)
        return _scatter(out, blocks.rows[t], _apply(cells, kernels, _kernel_of(blocks, kernels[0], t), options))

    shape = x.shape[0], kernels[0].shape[-1]
    out = zeros_varying_as(shape, options.sum_type, (x, w, gamma, kmap.n_out))
    return lax.fori_loop(0, blocks.count, write_chunk, out)


def winograd_backward(
    x: Array, w: Array, gamma: Array | None, kmap: KernelMap, options: ConvOptions, cotangent: Array
) -> Gradients:
    """Gradients of x, by the mirrored kernel, of w, among the transforms, and of gamma."""
    blocks = _blocks_of(kmap)
    g = cotangent.astype(x.dtype)
    kernels = _select_kernel(w, gamma)
    mirrored = _transform_kernel(kernels[:, ::-1].swapaxes(2, 3), options)
    like = (x, w, gamma, g, kmap.n_out)

    def add_chunk(t: Array, carry: tuple) -> tuple:
        dx, parts = carry
        scan = _kernel_of(blocks, kernels, t)
        gradients = _gather(g, blocks.rows[t], options)
        dx = _scatter(dx, blocks.rows[t], _apply(gradients, mirrored, scan, options))
        inputs = _transform_input(_gather(x, blocks.rows[t], options))
        outputs = _transpose_output(gradients[_INNER, _INNER, _INNER])
        products = [options.einsum("tbc,tbd->tcd", v, u) for v, u in zip(inputs, outputs, strict=True)]
        return dx, [part.at[scan].add(product) for part, product in zip(parts, products, strict=True)]

    dx = zeros_varying_as(x.shape, options.sum_type, like)
    shape = (kernels.shape[0], TILE * TILE, *w.shape[2:])
    parts = [zeros_varying_as(shape, options.sum_type, like) for _ in range(TILE)]
    dx, parts = lax.fori_loop(0, blocks.count, add_chunk, (dx, parts))
    dw, dgamma = _split_gradient(_transpose_kernel(parts), w, gamma)
    return dx.astype(x.dtype), dw.astype(options.kernel_type), dgamma


def _blocks_of(kmap: KernelMap) -> SiteBlocks:
    assert kmap.blocks is not None
    return jax.tree.map(jnp.asarray, kmap.blocks)


def _select_kernel(w: Array, gamma: Array | None) -> Float[Array, "b v c d"]:
    """The kernel of each scan; one for all of them without gamma."""
    if gamma is None:
        return w
    each = gamma[:, :, None, None]
    return each.astype(w.dtype) * w[0] if len(w) == 1 else jnp.where(each >= 0.5, w[0], w[1])


def _split_gradient(
    dselected: Array, w: Array, gamma: Array | None
) -> tuple[Float[Array, "s v c d"], Float[Array, "b v"] | None]:
    """Gradients of the stack and of gamma from those of each scan's kernel: the reverse of `_select_kernel`."""
    if gamma is None:
        return dselected, None
    dgamma = jnp.einsum("bvcd,vcd->bv", dselected, gain(w).astype(dselected.dtype))
    masks = kernel_masks(gamma, w, dselected.dtype)[..., None, None]
    return jnp.stack([(masks[:, :, s] * dselected).sum(0) for s in range(len(w))]), dgamma.astype(gamma.dtype)


def _kernel_of(blocks: SiteBlocks, kernels: Array, t: Array) -> Array | int:
    """Kernel of chunk t, whose blocks are all of one scan."""
    return blocks.scan[t] if kernels.shape[0] > 1 else 0


def _gather(x: Array, rows: Array, options: ConvOptions) -> Float[Array, "z y x n c"]:
    # The barrier keeps XLA from gathering anew in each of the six chains.
    return lax.optimization_barrier(take_rows(x, rows).astype(options.sum_type))


def _scatter(out: Array, rows: Array, cells: Float[Array, "z y x n c"]) -> Array:
    """Write the outputs of a chunk's blocks; every site is in one block."""
    inner = rows[_INNER, _INNER, _INNER].reshape(-1)
    apart = jnp.where(inner < len(out), inner, len(out) + jnp.arange(inner.size, dtype=inner.dtype))
    return out.at[apart].set(cells.reshape(inner.size, -1), mode="drop", unique_indices=True)


def _apply(cells: Array, kernels: list[Array], scan: Array | int, options: ConvOptions) -> Float[Array, "z y x n d"]:
    """Transform the inputs of a chunk, multiply, transform back."""
    # Transformed values stay in the type of the sums: rounded to bfloat16, they would make the result ten times less
    # exact than that of the other algorithms.
    transformed = _transform_input(cells)
    return _transform_output([
        options.einsum("tbc,tcd->tbd", v, kernel[scan])
        for v, kernel in zip(transformed, kernels, strict=True)
    ])  # fmt: skip


# ---------------------------------------------------------------- transforms


def _transform_kernel(kernels: Float[Array, "b v c d"], options: ConvOptions) -> list[Float[Array, "b t c d"]]:
    _, _, cube, _ = _matrices()
    return [
        jnp.einsum("tv,bvcd->btcd", jnp.asarray(part, options.sum_type), kernels.astype(options.sum_type),
                   precision=lax.Precision.HIGHEST)
        for part in cube
    ]  # fmt: skip


def _transpose_kernel(parts: list[Float[Array, "b t c d"]]) -> Float[Array, "b v c d"]:
    _, _, _, cube = _matrices()
    total = jnp.zeros((), parts[0].dtype)
    for part, matrix in zip(parts, cube, strict=True):
        total = total + jnp.einsum(
            "vt,btcd->bvcd", jnp.asarray(matrix, part.dtype), part, precision=lax.Precision.HIGHEST
        )
    return total


def _transform_input(cells: Float[Array, "z y x n c"]) -> list[Float[Array, "t n c"]]:
    _, matrix, _, _ = _matrices()
    return _transform(matrix, list(cells))


def _transform_output(products: list[Float[Array, "t n d"]]) -> Float[Array, "z y x n d"]:
    matrix, _, _, _ = _matrices()
    planes = [p.reshape(TILE, TILE, *p.shape[1:]) for p in products]
    return jnp.stack(_combine(matrix, [_along(matrix, _along(matrix, p, 0), 1) for p in planes]))


def _transpose_output(cells: Float[Array, "z y x n d"]) -> list[Float[Array, "t n d"]]:
    matrix, _, _, _ = _matrices()
    return _transform(matrix.T, list(cells))


def _transform(matrix: np.ndarray, planes: list[Array]) -> list[Array]:
    """A matrix along all three axes, the first of them a list."""
    planes = [_along(matrix, _along(matrix, plane, 0), 1) for plane in _combine(matrix, planes)]
    return [plane.reshape(-1, *plane.shape[2:]) for plane in planes]


def _along(matrix: np.ndarray, values: Array, axis: int) -> Array:
    """A matrix along one axis of an array."""
    slices = [lax.index_in_dim(values, i, axis, keepdims=False) for i in range(values.shape[axis])]
    return jnp.stack(_combine(matrix, slices), axis)


def _combine(matrix: np.ndarray, parts: list[Array]) -> list[Array]:
    """Rows of a matrix over a list of arrays, by additions: most entries are zero, and small products are slow."""
    out = []
    for row in matrix:
        terms = [part * part.dtype.type(entry) for entry, part in zip(row, parts, strict=True) if entry]
        out.append(sum(terms[1:], terms[0]))
    return out

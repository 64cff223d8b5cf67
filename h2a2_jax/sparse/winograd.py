"""Block Winograd F(4,3)^3 for nearly dense submanifold maps.

Matrices of one-dimensional Winograd convolution F(m, r): y = A' [(G g) * (B' d)].

m outputs of a kernel of r taps from m + r - 1 inputs with as many products, by Toom and Cook: both polynomials are
evaluated at m + r - 2 points and at infinity, multiplied there, and the transpose of that scheme is a correlation.

Sparse convolution by Winograd's F(4, 3)^3 on blocks of sites, for nearly dense submanifold maps.

A block's 6^3 inputs, transformed along each axis, meet the transformed kernel in 216 matrix products in place of
27 * 64, and one more transform gives its 4^3 outputs (Lavin and Gray 2016, in three dimensions). Empty cells are zeros.

The leading axis of a transformed block is a list of six arrays, each with its own transforms and products: that many
independent chains keep several threads at work.
"""

from fractions import Fraction
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from h2a2_jax.sparse.conv_parts import ConvOptions, take_rows, zeros_varying_as
from h2a2_jax.sparse.kernel_map import BLOCK, TILE, KernelMap, SiteBlocks

POINTS = (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(4, 3), Fraction(-4, 3))
"""Points for F(4, 3): a tenth of the rounding error of the textbook's 0, +-1, +-2."""


class Transforms(NamedTuple):
    """Matrices of F(m, r), float64.

    Attributes:
        output: A', [m, m + r - 1].
        kernel: G, [m + r - 1, r].
        input: B', [m + r - 1, m + r - 1].
    """

    output: np.ndarray
    kernel: np.ndarray
    input: np.ndarray


def winograd_transforms(m: int = 4, r: int = 3, points: tuple[Fraction, ...] = POINTS) -> Transforms:
    """Matrices of F(m, r), computed in exact fractions.

    Raises:
        ValueError: not m + r - 2 distinct points.
    """
    if len(set(points)) != m + r - 2:
        raise ValueError(f"F({m}, {r}) needs {m + r - 2} distinct points, given {points}.")
    infinity = [[Fraction(int(i == n - 1)) for i in range(n)] for n in (m, r)]
    output = [[p**i for i in range(m)] for p in points] + [infinity[0]]
    kernel, inputs = [], []
    for p in points:
        others = [q for q in points if q != p]
        scale = Fraction(1)
        for q in others:
            scale *= p - q
        kernel.append([p**i / scale for i in range(r)])
        inputs.append([*_polynomial(others), Fraction(0)])
    kernel.append(infinity[1])
    inputs.append(_polynomial(points))
    return Transforms(_floats(output).T, _floats(kernel), _floats(inputs))


def _polynomial(roots: tuple[Fraction, ...] | list[Fraction]) -> list[Fraction]:
    """Coefficients, lowest first, of the product of (x - root)."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def _floats(rows: list[list[Fraction]]) -> np.ndarray:
    return np.array([[float(value) for value in row] for row in rows])


_INNER = slice(1, 1 + BLOCK)


def winograd_forward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions
) -> Array:
    """Arguments and result as in `convolve`, in the compute type; needs `kmap.blocks`."""
    blocks = _blocks_of(kmap)
    kernels = _selected(w, gamma, scan_set)
    return _convolve_blocks(x, _kernel_transform(kernels, options), blocks, (x, w, gamma, kmap.n_out), options)


def winograd_backward(
    x: Array, w: Array, gamma: Array | None, scan_set: Array | None, kmap: KernelMap, options: ConvOptions,
    cotangent: Array,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Gradients of x, by the mirrored kernel, of w, among the transforms, and of gamma."""
    blocks = _blocks_of(kmap)
    g = cotangent.astype(x.dtype)
    kernels = _selected(w, gamma, scan_set)
    mirrored = _kernel_transform(kernels[:, ::-1].swapaxes(2, 3), options)
    like = (x, w, gamma, g, kmap.n_out)

    def add_chunk(t: Array, carry: tuple) -> tuple:
        dx, parts = carry
        scan = _kernel_of(blocks, kernels, t)
        gradients = _gather(g, blocks.rows[t], options)
        dx = _scatter(dx, blocks.rows[t], _apply(gradients, mirrored, scan, options))
        inputs = _input_transform(_gather(x, blocks.rows[t], options))
        outputs = _output_transposed(gradients[_INNER, _INNER, _INNER])
        products = [_batched(options, "tbc,tbd->tcd", v, u) for v, u in zip(inputs, outputs, strict=True)]
        return dx, [part.at[scan].add(product) for part, product in zip(parts, products, strict=True)]

    dx = zeros_varying_as(x.shape, options.sum_type, like)
    shape = (kernels.shape[0], TILE * TILE, *w.shape[2:])
    parts = [zeros_varying_as(shape, options.sum_type, like) for _ in range(TILE)]
    dx, parts = lax.fori_loop(0, blocks.count, add_chunk, (dx, parts))
    dselected = _kernel_transposed(parts)
    dw, dgamma = _to_stack(dselected, w, gamma, scan_set)
    return dx.astype(x.dtype), dw.astype(options.kernel_type), dgamma


def _convolve_blocks(x: Array, kernels: list[Array], blocks: SiteBlocks, like: tuple, options: ConvOptions) -> Array:
    def write_chunk(t: Array, out: Array) -> Array:
        cells = _gather(x, blocks.rows[t], options)
        return _scatter(out, blocks.rows[t], _apply(cells, kernels, _kernel_of(blocks, kernels[0], t), options))

    out = zeros_varying_as((x.shape[0], kernels[0].shape[-1]), options.sum_type, like)
    return lax.fori_loop(0, blocks.count, write_chunk, out)


def _blocks_of(kmap: KernelMap) -> SiteBlocks:
    assert kmap.blocks is not None
    return jax.tree.map(jnp.asarray, kmap.blocks)


def _selected(w: Array, gamma: Array | None, scan_set: Array | None) -> Float[Array, "b v c d"]:
    """The kernel of each scan; one for all of them where none is selected."""
    if gamma is None or scan_set is None:
        return w[:1]
    return jnp.where(gamma[:, :, None, None] >= 0.5, w[0], w[scan_set])


def _to_stack(
    dselected: Array, w: Array, gamma: Array | None, scan_set: Array | None
) -> tuple[Float[Array, "s v c d"], Float[Array, "b v"] | None]:
    """Gradients of the stack and of gamma from those of each scan's kernel: the reverse of `_selected`."""
    if gamma is None or scan_set is None:
        return jnp.concatenate([dselected, jnp.zeros((len(w) - 1, *w.shape[1:]), dselected.dtype)]), None
    dgamma = jnp.einsum("bvcd,bvcd->bv", dselected, (w[0] - w[scan_set]).astype(dselected.dtype))
    shared = (gamma >= 0.5)[:, :, None, None]
    own = jax.ops.segment_sum(jnp.where(shared, 0, dselected), scan_set, len(w))
    return own.at[0].add(jnp.where(shared, dselected, 0).sum(0)), dgamma.astype(gamma.dtype)


def _kernel_of(blocks: SiteBlocks, kernels: Array, t: Array) -> Array | int:
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
    transformed = _input_transform(cells)
    return _output_transform([
        _batched(options, "tbc,tcd->tbd", v, kernel[scan])
        for v, kernel in zip(transformed, kernels, strict=True)
    ])  # fmt: skip


def _batched(options: ConvOptions, spec: str, a: Array, b: Array) -> Array:
    """Batched products of transformed values, in the type of the sums.

    Rounded to bfloat16, transformed values would make the result ten times less exact than the other algorithms'.
    """
    return jnp.einsum(spec, a, b, precision=options.precision, preferred_element_type=options.sum_type)


@cache
def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A', B', and G of all three axes at once [6, 36, 27], with its transpose in the order of the products."""
    one = winograd_transforms()
    cube = np.einsum("az,by,cx->abczyx", one.kernel, one.kernel, one.kernel).reshape(TILE, TILE * TILE, 27)
    return one.output, one.input, cube, cube.transpose(0, 2, 1)


def _kernel_transform(kernels: Float[Array, "b v c d"], options: ConvOptions) -> list[Float[Array, "b t c d"]]:
    _, _, cube, _ = _matrices()
    return [
        jnp.einsum("tv,bvcd->btcd", jnp.asarray(part, options.sum_type), kernels.astype(options.sum_type),
                   precision=lax.Precision.HIGHEST)
        for part in cube
    ]  # fmt: skip


def _kernel_transposed(parts: list[Float[Array, "b t c d"]]) -> Float[Array, "b v c d"]:
    _, _, _, cube = _matrices()
    total = jnp.zeros((), parts[0].dtype)
    for part, matrix in zip(parts, cube, strict=True):
        total = total + jnp.einsum(
            "vt,btcd->bvcd", jnp.asarray(matrix, part.dtype), part, precision=lax.Precision.HIGHEST
        )
    return total


def _input_transform(cells: Float[Array, "z y x n c"]) -> list[Float[Array, "t n c"]]:
    _, matrix, _, _ = _matrices()
    return _transform(matrix, list(cells))


def _output_transform(products: list[Float[Array, "t n d"]]) -> Float[Array, "z y x n d"]:
    matrix, _, _, _ = _matrices()
    planes = [p.reshape(TILE, TILE, *p.shape[1:]) for p in products]
    return jnp.stack(_combine(matrix, [_along(matrix, _along(matrix, p, 0), 1) for p in planes]))


def _output_transposed(cells: Float[Array, "z y x n d"]) -> list[Float[Array, "t n d"]]:
    matrix, _, _, _ = _matrices()
    return _transform(matrix.T, list(cells))


def _transform(matrix: np.ndarray, planes: list[Array]) -> list[Array]:
    """A matrix along all three axes, the first of them a list."""
    planes = [_along(matrix, _along(matrix, plane, 0), 1) for plane in _combine(matrix, planes)]
    return [plane.reshape(-1, *plane.shape[2:]) for plane in planes]


def _along(matrix: np.ndarray, values: Array, axis: int) -> Array:
    slices = [lax.index_in_dim(values, i, axis, keepdims=False) for i in range(values.shape[axis])]
    return jnp.stack(_combine(matrix, slices), axis)


def _combine(matrix: np.ndarray, parts: list[Array]) -> list[Array]:
    """Rows of a matrix over a list of arrays, by additions: most entries are zero, and small products are slow."""
    out = []
    for row in matrix:
        terms = [part * part.dtype.type(entry) for entry, part in zip(row, parts, strict=True) if entry]
        out.append(sum(terms[1:], terms[0]))
    return out

"""Kernels of other libraries, against their definitions written out pair by pair."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax import sparse
from h2a2_jax.layers import SparseConv, SparseConvTranspose, weights
from tests.sparse.transcription import padded

RNG = np.random.default_rng(0)
SITES = sparse.site_set(RNG.integers(0, 7, (60, 4)).astype(np.int32) % [2, 7, 7, 7])
COARSE = sparse.downsample(SITES, 2)
ORDERS = {"zyx": (0, 3, 2, 1), "xyz": (0, 1, 2, 3)}


def features(n, channels=3):
    return RNG.normal(size=(n, channels)).astype(np.float32)


def apply(layer, kernel, table, rows):
    """Rows that a layer with the kernel makes of rows [n, Cin], without padding."""
    kernel_map = padded(table)
    layer.kernel[...] = jnp.asarray(kernel)
    x = sparse.SparseTensor(jnp.asarray(sparse.pad_rows(rows, kernel_map.in_capacity)), kernel_map.inputs)
    return layer(x, kernel_map).features[: int(kernel_map.n_out)]


def spconv_pairs(inputs, outputs, size, stride, padding, order):
    """Pairs (place in the kernel, input row, output row): input index = output index * stride - padding + place."""
    columns = list(ORDERS[order])
    rows = {tuple(c): i for i, c in enumerate(inputs.coords[:, columns].tolist())}
    for o, (scan, *at) in enumerate(outputs.coords[:, columns].tolist()):
        for place in itertools.product(*(range(k) for k in size)):
            index = [a // outputs.stride * stride - p + k for a, p, k in zip(at, padding, place, strict=True)]
            if (scan, *index) in rows:
                yield place, rows[(scan, *index)], o


def in_order(size, order):
    return size if order == "xyz" else size[::-1]


@pytest.mark.parametrize("order", ["zyx", "xyz"])
@pytest.mark.parametrize(
    ("size", "stride"), [((3, 1, 5), 1), ((3, 3, 3), 2), ((2, 2, 2), 2)], ids=["submanifold", "strided 3", "strided 2"]
)
def test_spconv(size, stride, order):
    outputs = SITES if stride == 1 else COARSE
    table = sparse.submanifold_neighbors(SITES, size) if stride == 1 else sparse.strided_neighbors(SITES, COARSE, size)
    theirs = in_order(size, order)
    weight = RNG.normal(size=(4, *theirs, 3)).astype(np.float32)
    padding = [k // 2 if k % 2 else 0 for k in theirs]
    rows = features(len(SITES))
    expected, back = np.zeros((len(outputs), 4)), np.zeros((len(SITES), 5))
    inverse_weight, coarse_rows = RNG.normal(size=(5, *theirs, 4)).astype(np.float32), features(len(outputs), 4)
    for place, i, o in spconv_pairs(SITES, outputs, theirs, stride, padding, order):
        expected[o] += weight[(slice(None), *place)] @ rows[i]
        back[i] += inverse_weight[(slice(None), *place)] @ coarse_rows[o]  # the same pairs, the other way

    kernel = weights.from_spconv(weight, order=order)
    y = apply(SparseConv(3, 4, size, rngs=nnx.Rngs(0)), kernel, table, rows)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(weights.to_spconv(kernel, size, order=order), weight)
    if stride == 2:
        kernel = weights.from_spconv(inverse_weight, order=order)
        up = SparseConvTranspose(4, 5, size, rngs=nnx.Rngs(0))
        y = apply(up, kernel, sparse.inverse_neighbors(table), coarse_rows)
        np.testing.assert_allclose(y, back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel_size", "shape"), [((2, 3), (3, 2)), ((2, 1, 3, 4), (4, 3, 1, 2)), (1, (1, 1, 1))])
def test_spconv_in_other_dimensions(kernel_size, shape):
    weight = RNG.normal(size=(4, *shape, 3))
    kernel = weights.from_spconv(weight)
    assert kernel.shape == (np.prod(shape), 3, 4)
    np.testing.assert_array_equal(weights.to_spconv(kernel, kernel_size), weight)
    if kernel_size == (2, 3):  # x fastest
        np.testing.assert_array_equal(kernel[1 + 2 * 2], weight[:, 2, 1].T)


@pytest.mark.parametrize("library", ["minkowski", "torchsparse"])
@pytest.mark.parametrize("size", [(3, 3, 3), (2, 2, 2), (2, 1, 3)], ids=str)
def test_lists_of_slices(library, size):
    """Input coordinate = output coordinate + offset * stride; transposed: output = input + offset."""
    axes = [range(-(k // 2), k // 2 + 1) if k % 2 else range(k) for k in size]
    z_fastest = [np.array(o) for o in itertools.product(*axes)]
    x_fastest = [np.array(o[::-1]) for o in itertools.product(*axes[::-1])]
    offsets = z_fastest if library == "torchsparse" and np.prod(size) % 2 == 0 else x_fastest
    kernel = RNG.normal(size=(len(offsets), 3, 4)).astype(np.float32)
    up_kernel = RNG.normal(size=(len(offsets), 4, 5)).astype(np.float32)
    rows, coarse_rows = features(len(SITES)), features(len(COARSE), 4)
    at = {tuple(c): i for i, c in enumerate(SITES.coords.tolist())}
    expected, back = np.zeros((len(COARSE), 4)), np.zeros((len(SITES), 5))
    for o, (scan, *place) in enumerate(COARSE.coords.tolist()):
        for k, offset in enumerate(offsets):
            i = at.get((scan, *(place + offset).tolist()))
            if i is not None:
                expected[o] += rows[i] @ kernel[k]
                back[i] += coarse_rows[o] @ up_kernel[k]
    table = sparse.strided_neighbors(SITES, COARSE, size)
    convert, revert = (getattr(weights, f"{way}_{library}") for way in ("from", "to"))
    extra = () if library == "minkowski" else (size,)
    y = apply(SparseConv(3, 4, size, rngs=nnx.Rngs(0)), convert(kernel, *extra), table, rows)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    up, inverse = SparseConv(4, 5, size, rngs=nnx.Rngs(0)), sparse.inverse_neighbors(table)
    y = apply(up, convert(up_kernel, *extra), inverse, coarse_rows)
    np.testing.assert_allclose(y, back, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(revert(convert(kernel, *extra), *extra), kernel)


def test_a_kernel_of_one_slice_is_a_matrix_there():
    kernel = RNG.normal(size=(3, 4))
    for ours, back in (
        (weights.from_minkowski(kernel), weights.to_minkowski),
        (weights.from_torchsparse(kernel, 1), lambda k: weights.to_torchsparse(k, 1)),
    ):
        assert ours.shape == (1, 3, 4)
        np.testing.assert_array_equal(back(ours), kernel)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[Cout, \*K, Cin\] with K in 2 to 4 axes, given \[27, 3, 4\]"):
        weights.from_spconv(np.zeros((27, 3, 4)))
    for convert in (weights.to_spconv, weights.from_torchsparse, weights.to_torchsparse):
        with pytest.raises(ValueError, match=r"size \(3, 3, 3\) is \[27, Cin, Cout\], given \[8, 3, 4\]"):
            convert(np.zeros((8, 3, 4)), 3)

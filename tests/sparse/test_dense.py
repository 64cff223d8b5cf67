"""Convolution against JAX's dense convolution of the same grid in float64: dimensions, strides, dilations, groups."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from h2a2_jax import sparse
from tests.sparse.test_derivatives import assert_equal_modes

NATIVE = ("native",) if sparse.has_native() else ()

CASES = {
    # name: axes, kind, kernel, stride, dilation, groups, algorithm
    "2-D, odd": (2, "submanifold", (3, 3), 1, 1, 1, "gather"),
    "2-D, strided along x": (2, "strided", (3, 2), (2, 1), 1, 1, "tiles"),
    "3-D, even": (3, "submanifold", (2, 3, 4), 1, 1, 1, "im2col"),
    "3-D, dilated along y and z": (3, "submanifold", 3, 1, (1, 2, 3), 2, "tiles"),
    "3-D, depthwise": (3, "submanifold", 3, 1, 1, 4, "gather"),
    "3-D, strided per axis": (3, "strided", (3, 2, 1), (2, 2, 1), (1, 2, 1), 1, "pairs"),
    "3-D, strided, grouped": (3, "strided", 2, 2, 1, 2, "im2col"),
    "3-D, padded as in spconv": (3, "padded", 3, 2, 1, 1, "tiles"),
    "3-D, inverse": (3, "inverse", (3, 2, 2), (2, 2, 1), 1, 1, "tiles"),
    "3-D, generative": (3, "generative", (3, 2, 3), (2, 2, 1), 1, 2, "gather"),
    "4-D, odd": (4, "submanifold", (3, 3, 3, 3), 1, 1, 1, "tiles"),
    "4-D, strided along space": (4, "strided", (2, 2, 2, 1), (2, 2, 2, 1), 1, 1, "pairs"),
    "4-D, generative": (4, "generative", 2, 2, 1, 1, "im2col"),
}
C_IN, C_OUT = 4, 8


def edge(axes):
    """Half the length of the dense grid."""
    return 4 if axes == 4 else 8


def draw_sites(axes, stride, seed=0):
    """Three scans, the second one empty, with coordinates on both sides of zero."""
    rng = np.random.default_rng(seed)
    steps = np.array(sparse.sites.per_axis(stride, max(axes, 3)))[:axes]
    reach = edge(axes) // 4 + 1
    coords = [np.c_[np.full(n, b), rng.integers(-reach, reach, (n, axes)) * steps] for b, n in enumerate((30, 0, 45))]
    return sparse.site_set(np.concatenate(coords), stride=stride, num_scans=3)


def table_of(kind, axes, kernel, stride, dilation):
    """Table; padding of the kernel in strides of its finer sites."""
    full = max(axes, 3)
    sizes, dilations = (np.array(sparse.sites.per_axis(v, full)) for v in (kernel, dilation))
    centred = np.where(sizes % 2, sizes // 2, 0) * dilations
    if kind in ("submanifold", "strided", "padded"):
        fine = draw_sites(axes, 1)
        if kind == "submanifold":
            return sparse.submanifold_neighbors(fine, kernel, dilation), centred
        if kind == "strided":
            return sparse.strided_neighbors(fine, sparse.downsample(fine, stride), kernel, dilation), centred
        outputs = sparse.cover(fine, kernel, stride, padding=1)
        return sparse.strided_neighbors(fine, outputs, kernel, padding=1), np.ones(full, int)
    if kind == "inverse":
        fine = draw_sites(axes, 1)
        return sparse.inverse_neighbors(
            sparse.strided_neighbors(fine, sparse.downsample(fine, stride), kernel, dilation)
        ), centred
    coarse = draw_sites(axes, stride)
    return sparse.generative_neighbors(coarse, sparse.generate(coarse, kernel, stride), kernel), centred


def places_in_grid(sites, stride):
    """Scan and place of each site in the grid, the last axis first, as indices."""
    coords = sites.coords
    return (coords[:, 0], *((coords[:, 1:] + edge(sites.axes)) // np.array(stride)).T[::-1])


def dense(table, kernel, padding, stride, dilation, groups, x, w):
    """The convolution on the whole grid, read at the output sites."""
    axes = table.inputs.axes
    sizes, steps, dilations = (sparse.sites.per_axis(v, axes) for v in (kernel, stride, dilation))
    fine = (2 * edge(axes),) * axes
    coarse = tuple(2 * edge(axes) // s for s in steps)
    letters = "wzyx"[-axes:]
    layout = f"N{letters}C", f"{letters}IO", f"N{letters}C"
    weights = w.reshape(*sizes[::-1], *w.shape[1:])
    flip = table.kind in ("inverse", "generative")
    grid = jnp.zeros((3, *(coarse if flip else fine)[::-1], x.shape[1]))
    grid = grid.at[places_in_grid(table.inputs, steps if flip else (1,) * axes)].set(x[: len(table.inputs)])
    reach = [(k - 1) * d for k, d in zip(sizes, dilations, strict=True)]
    pads = [(int(p), int(r - p)) for p, r in zip(padding, reach, strict=True)]
    if not flip:
        y = lax.conv_general_dilated(
            grid, weights, steps[::-1], pads[::-1], rhs_dilation=dilations[::-1],
            dimension_numbers=layout, feature_group_count=groups,
        )  # fmt: skip
    else:  # the transpose: spread the inputs, mirror the kernel, take the padding from the other side
        mirrored = jnp.flip(weights, range(axes))
        ends = [(b, a + s - 1) for (a, b), s in zip(pads, steps, strict=True)]
        y = lax.conv_general_dilated(
            grid, mirrored, (1,) * axes, ends[::-1], lhs_dilation=steps[::-1], rhs_dilation=dilations[::-1],
            dimension_numbers=layout, feature_group_count=groups,
        )  # fmt: skip
    return y[places_in_grid(table.outputs, (1,) * axes if flip else steps)]


@pytest.mark.parametrize("case", CASES)
def test_sparse_equals_dense_in_every_mode(case):
    axes, kind, kernel, stride, dilation, groups, algorithm = CASES[case]
    table, padding = table_of(kind, axes, kernel, stride, dilation)
    inputs, outputs = (sparse.pad_sites(sites, len(sites) + 3) for sites in (table.inputs, table.outputs))
    kmap = sparse.pad_map(table, inputs, outputs, tile_size=16)
    rng = np.random.default_rng(1)
    shapes = (inputs.capacity, C_IN), (len(table.rows), C_IN // groups, C_OUT)
    args, ways = (tuple(rng.normal(size=shape) for shape in shapes) for _ in range(2))
    args[0][len(table.inputs) :] = 0
    weight = np.zeros((outputs.capacity, C_OUT))
    weight[: len(table.outputs)] = rng.normal(size=(len(table.outputs), C_OUT))

    def reference(x, w):
        y = dense(table, kernel, padding, stride, dilation, groups, jnp.asarray(x), jnp.asarray(w))
        return jnp.concatenate([y, jnp.zeros((3, C_OUT))])

    def function(x, w):
        return sparse.convolve(x, w[None], kmap, groups=groups, algorithm=algorithm)

    with jax.enable_x64(True):
        assert_equal_modes(function, reference, args, ways, weight, names=("output", "grad", "forward over reverse"))


@pytest.mark.parametrize("channels", [(1, 257), (257, 1)], ids=str)
@pytest.mark.parametrize("algorithm", ["segment_sum", "gather", "tiles", "im2col", "pairs", "winograd", *NATIVE])
def test_single_precision_with_one_and_many_channels(algorithm, channels):
    """1e-6 of the largest value; Winograd's transforms 1e-5."""
    sites = sparse.site_set(np.argwhere(np.random.default_rng(0).random((1, 9, 9, 9)) < 0.6))
    padded = sparse.pad_sites(sites, len(sites))
    kmap = sparse.pad_map(sparse.submanifold_neighbors(sites), padded, padded, tile_size=64, blocks="always")
    rng = np.random.default_rng(2)
    x, w = (rng.normal(size=s).astype(np.float32) for s in ((len(sites), channels[0]), (1, 27, *channels)))

    def both(x, w, how):
        y, pull = jax.vjp(partial(sparse.convolve, kernel_map=kmap, algorithm=how), x, w)
        return y, *pull(y)

    got = jax.jit(both, static_argnums=2)(x, w, algorithm)
    with jax.enable_x64(True):
        exact = jax.jit(both, static_argnums=2)(x.astype(float), w.astype(float), "segment_sum")
    for name, ours, theirs in zip(("y", "dx", "dw"), got, exact, strict=True):
        bound = (1e-5 if algorithm in ("winograd", "native") else 1e-6) * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=name)

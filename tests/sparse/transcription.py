"""Sparse convolution written out pair by pair in float64 numpy, and the scans that tests run it on."""

import numpy as np

from h2a2_jax import sparse
from h2a2_jax.sparse.kernel_map import fits_blocks


def random_sites(counts=(40, 0, 55), stride=1, reach=4, seed=0, axes=3):
    """Sites of a batch, some negative; `counts` draws a scan, fewer sites where they coincide."""
    rng = np.random.default_rng(seed)
    coords = [np.c_[np.full(n, b), rng.integers(-reach, reach, (n, axes)) * stride] for b, n in enumerate(counts)]
    return sparse.site_set(np.concatenate(coords).astype(np.int32), stride=stride, num_scans=len(counts))


def pairs_by_search(in_coords, out_coords, offsets):
    """Lists of (input row, output row) by offset (in voxels): in = out + offset, found in a dictionary."""
    rows = {tuple(int(v) for v in c): i for i, c in enumerate(in_coords)}
    found = []
    for offset in offsets:
        at = [(scan, *map(int.__add__, place, map(int, offset))) for scan, *place in out_coords.tolist()]
        found.append([(rows[key], o) for o, key in enumerate(at) if key in rows])
    return found


TABLES = {
    "submanifold 3": (1, lambda s: sparse.submanifold_neighbors(s, 3), lambda: sparse.kernel_offsets(3)),
    "submanifold 3, stride 4": (4, lambda s: sparse.submanifold_neighbors(s, 3), lambda: 4 * sparse.kernel_offsets(3)),
    "submanifold 3, dilation 2": (
        1,
        lambda s: sparse.submanifold_neighbors(s, 3, dilation=2),
        lambda: 2 * sparse.kernel_offsets(3),
    ),
    "submanifold 2": (1, lambda s: sparse.submanifold_neighbors(s, 2), lambda: sparse.kernel_offsets(2)),
    "submanifold 3x1x2": (
        1,
        lambda s: sparse.submanifold_neighbors(s, (3, 1, 2)),
        lambda: sparse.kernel_offsets((3, 1, 2)),
    ),
    "strided 3": (
        2,
        lambda s: sparse.strided_neighbors(s, sparse.downsample(s, 2), 3),
        lambda: 2 * sparse.kernel_offsets(3),
    ),
    "strided 3, dilation 3": (
        1,
        lambda s: sparse.strided_neighbors(s, sparse.downsample(s, 2), 3, dilation=3),
        lambda: 3 * sparse.kernel_offsets(3),
    ),
    "strided 2": (
        1,
        lambda s: sparse.strided_neighbors(s, sparse.downsample(s, 2), 2),
        lambda: sparse.kernel_offsets(2),
    ),
    "lookup": (
        2,
        lambda s: sparse.strided_neighbors(s, sparse.downsample(s, 2), 1),
        lambda: sparse.kernel_offsets(1),
    ),
    "pool": (2, lambda s: sparse.pool_neighbors(s, sparse.downsample(s, 2), 2), lambda: 2 * sparse.kernel_offsets(2)),
    # A generated site lies at in + offset: in = out - offset.
    "generative": (
        4,
        lambda s: sparse.generative_neighbors(s, sparse.generate(s, 3), 3),
        lambda: -2 * sparse.kernel_offsets(3),
    ),
}
"""Every kind of map: stride of the input sites, table, offsets in voxels from an output site to its inputs."""


def table_of(kind, **draws):
    stride, build, _ = TABLES[kind]
    return build(random_sites(stride=stride, **draws))


def pairs_of(kind, table):
    return pairs_by_search(table.inputs.coords, table.outputs.coords, TABLES[kind][2]())


def padded(table, more_in=6, more_out=9, tile_size=16):
    """A padded map; input and output sites are one array where they are one set."""
    inputs = sparse.pad_sites(table.inputs, len(table.inputs) + more_in)
    outputs = inputs
    if table.inputs is not table.outputs:
        outputs = sparse.pad_sites(table.outputs, len(table.outputs) + more_out)
    blocks = "always" if fits_blocks(table) else None
    return sparse.pad_map(table, inputs, outputs, tile_size=tile_size, blocks=blocks)


def convolve(x, kernels, pairs, out_scan, gamma=None):
    """y of all output rows; kernels [1, V, Cin, Cout], or [2, V, Cin, Cout] with gamma [B, V]."""
    y = np.zeros((len(out_scan), kernels.shape[-1]))
    for k, found in enumerate(pairs):
        for i, o in found:
            y[o] += x[i] @ _kernel(kernels, k, out_scan[o], gamma)
    return y


def _kernel(kernels, k, scan, gamma):
    if gamma is None:
        return kernels[0, k]
    return gamma[scan, k] * kernels[0, k] + (1 - gamma[scan, k]) * kernels[1, k]


def gradients(x, kernels, pairs, out_scan, weight, gamma=None):
    """Of sum(y * weight) with respect to x, kernels and gamma."""
    dx, dw = np.zeros_like(x), np.zeros_like(kernels)
    dgamma = None if gamma is None else np.zeros_like(gamma)
    for k, found in enumerate(pairs):
        for i, o in found:
            b = out_scan[o]
            dx[i] += _kernel(kernels, k, b, gamma) @ weight[o]
            share = 1.0 if gamma is None else gamma[b, k]
            outer = np.outer(x[i], weight[o])
            dw[0, k] += share * outer
            if dgamma is not None:
                dw[1, k] += (1 - share) * outer
                dgamma[b, k] += x[i] @ (kernels[0, k] - kernels[1, k]) @ weight[o]
    return dx, dw, dgamma

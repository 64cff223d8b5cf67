"""Mistakes of a beginner, and the sentence that each ends in.

The cases run in a process of their own (`python -m tests.layers.test_misuse`): here annotations are checked, and a
value of another type would never reach the layers.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TENSOR = "SparseConv takes a SparseTensor, given an array float32[8, 4]: make it by SparseTensor(features, sites)."
CASES = {
    "context for a map": (
        "conv(x, context)",
        "SparseConv takes a KernelMap, given a ForwardContext: the map comes before the context, as in layer(x, "
        "kernel_map, context).",
    ),
    "map for a context": (
        "norm(x, kernel_map)",
        "BatchNorm takes a ForwardContext as its context, given a KernelMap: the context is the last argument, and "
        "norms take no map.",
    ),
    "swapped map and context": (
        "conv(x, context, kernel_map)",
        "SparseConv takes a ForwardContext as its context, given a KernelMap: the context is the last argument, and "
        "norms take no map.",
    ),
    "table": ("conv(x, table)", "SparseConv takes a KernelMap, given a NeighborTable: pad it with sparse.pad_tables."),
    "table, transposed": (
        "transpose(x, table)",
        "SparseConvTranspose takes a KernelMap, given a NeighborTable: pad it with sparse.pad_tables.",
    ),
    "all maps": (
        "conv(x, {'fine': kernel_map})",
        "SparseConv takes a KernelMap, given a dict: give one of them.",
    ),
    "array": ("conv(rows, kernel_map)", TENSOR),
    "array without a map": ("point(rows)", TENSOR),
    "array in a norm": ("norm(rows)", TENSOR.replace("SparseConv", "BatchNorm")),
    "array in a block": ("block(rows, kernel_map)", TENSOR),
    "array in a gate": ("gate(rows, embedding)", TENSOR.replace("SparseConv", "ChannelGate")),
    "array in a modulation": ("modulation(rows, embedding)", TENSOR.replace("SparseConv", "LinearModulation")),
    "array in Linen": ("linen_conv(rows, kernel_map)", TENSOR),
    "set of sites": (
        "conv(SparseTensor(rows, site_set), kernel_map)",
        "SparseConv takes features on padded Sites, given a SiteSet: take the sites of a map (map.inputs), or pad a "
        "set with sparse.pad_sites.",
    ),
    "list": (
        "conv(SparseTensor(rows.tolist(), kernel_map.inputs), kernel_map)",
        "SparseConv takes features as an array [N, C], given a list: convert it with jnp.asarray.",
    ),
    "rows without padding": (
        "conv(SparseTensor(rows[:5], kernel_map.inputs), kernel_map)",
        "SparseConv takes a row of features for each of the 8 rows of the sites, padding included, given an array "
        "float32[5, 4]: pad the rows with sparse.pad_rows.",
    ),
    "integer features": (
        "conv(SparseTensor(rows.astype(int), kernel_map.inputs), kernel_map)",
        "SparseConv takes float features, given int64: convert with .astype(jnp.float32).",
    ),
    "bytes in a norm": (
        "norm(SparseTensor(rows.astype('uint8'), kernel_map.inputs))",
        "BatchNorm takes float features, given uint8: convert with .astype(jnp.float32).",
    ),
    "channels": (
        "conv(SparseTensor(rows[:, :3], kernel_map.inputs), kernel_map)",
        "SparseConv takes 4 channels, given features of 3.",
    ),
    "channels without a map": (
        "point(SparseTensor(rows[:, :3], kernel_map.inputs))",
        "SparseConv takes 4 channels, given features of 3.",
    ),
    "other volume": (
        "conv(x, flat)",
        "SparseConv has a kernel of 27 slices, given a map of 9 offsets: build the map with the layer's kernel size.",
    ),
    "other size of the same volume": (
        "conv(x, long)",
        "SparseConv has a kernel of size (3, 3, 3), given a map of size (1, 3, 9): build the map with the layer's "
        "kernel size.",
    ),
    "kernel size": (
        "SparseConv(4, 4, (3, 2.5, 1), rngs=rngs)",
        "kernel_size is (3, 2.5, 1); expected one integer from 1 on, or one for each of the 3 axes of the sites (x, y "
        "in 2-D).",
    ),
    "groups": (
        "SparseConv(4, 6, groups=4, rngs=rngs)",
        "groups=4 does not divide 4 input and 6 output channels; give a divisor of both.",
    ),
    "Torch's momentum": (
        "BatchNorm(4, momentum=0.1)",
        "BatchNorm was given momentum=0.1, expected is Flax's, the weight of the old statistics, in 0.5..1: for "
        "Torch's momentum m give 1 - m.",
    ),
    "initial values without a source": (
        "BatchNorm(4, scale_init=normal)",
        "scale_init was given without rngs, from which it draws: give rngs=nnx.Rngs(0).",
    ),
}
SIZES = ("np.int64(3)", "[3, 3, 3]", "np.array([3, 3, 3])", "(np.int32(3), 3, 3)")


def main():
    """Print the sentence of each case, and the kernel size that layers read from other kinds of integers."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from h2a2_jax import layers, linen, sparse

    rngs, site_set = nnx.Rngs(0), sparse.site_set(np.array([[0, 1, 2, 3], [0, 1, 2, 4], [0, 5, 5, 5]]))
    table = sparse.submanifold_neighbors(site_set, 3)
    sites = sparse.pad_sites(site_set, 8)
    kernel_map, flat, long = (
        sparse.pad_map(sparse.submanifold_neighbors(site_set, size), sites, sites) for size in (3, (3, 3), (1, 3, 9))
    )
    rows = np.zeros((8, 4), np.float32)
    conv, embedding = layers.SparseConv(4, 4, rngs=rngs), jnp.ones(64)
    small = {"rngs": rngs, "embedding_dim": 64}
    names = {
        **vars(layers), **vars(sparse), "np": np, "rngs": rngs, "table": table, "site_set": site_set, "flat": flat,
        "kernel_map": kernel_map, "long": long, "rows": rows, "conv": conv, "embedding": embedding,
        "x": sparse.SparseTensor(rows, sites), "context": layers.ForwardContext(), "norm": layers.BatchNorm(4),
        "point": layers.SparseConv(4, 4, 1, rngs=rngs), "transpose": layers.SparseConvTranspose(4, 4, rngs=rngs),
        "block": layers.ResidualBlock(4, 4, rngs=rngs), "gate": layers.ChannelGate(4, **small),
        "modulation": layers.LinearModulation(4, **small), "normal": jax.nn.initializers.normal(),
        "linen_conv": lambda *args: linen.SparseConv(4, 4).init(jax.random.key(0), *args),
    }  # fmt: skip
    said = {}
    for case, (code, _) in CASES.items():
        try:
            eval(code, names)
        except ValueError as error:
            said[case] = str(error)
    sizes = [layers.SparseConv(4, 4, eval(size, names), rngs=rngs).kernel_size for size in SIZES]
    print(json.dumps({"said": said, "sizes": sizes}))


@pytest.fixture(scope="module")
def outcome():
    command = [sys.executable, "-W", "ignore", "-m", "tests.layers.test_misuse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_in_one_sentence(case, outcome):
    assert outcome["said"].get(case) == CASES[case][1]


def test_any_integers_are_a_kernel_size(outcome):
    assert outcome["sizes"] == [[3, 3, 3]] * len(SIZES)


if __name__ == "__main__":
    main()

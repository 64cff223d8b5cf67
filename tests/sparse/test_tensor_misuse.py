"""Mistakes in calls of operations on tensors and points, and the sentence that each ends in.

The cases run in a process of their own (`python -m tests.sparse.test_tensor_misuse`): here annotations are checked, and
a value of another type would never reach the functions.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CASES = {
    "array for a tensor": (
        "prune(rows, keep)",
        "prune was given a ndarray; expected sparse.SparseTensor(features, sites) of padded sites.",
    ),
    "array in a pool": (
        "layers.max_pool(rows, kernel_map)",
        "max_pool was given a ndarray; expected sparse.SparseTensor(features, sites) of padded sites.",
    ),
    "set of sites": (
        "to_dense(SparseTensor(rows, site_set), 9)",
        "to_dense was given features on a SiteSet; expected sparse.SparseTensor(features, sites) of padded sites.",
    ),
    "rows without padding": (
        "layers.add(x, SparseTensor(rows[:5], sites))",
        "add was given features [5, 2] on sites with 8 rows, padding included; expected a row for each: see "
        "sparse.pad_rows.",
    ),
    "scores for keep": (
        "prune(x, rows[:, 0])",
        "prune was given keep float32[8]; expected bool[8], as of scores > 0.",
    ),
    "short keep": ("prune(x, keep[:3])", "prune was given keep bool[3]; expected bool[8], as of scores > 0."),
    "capacity": ("prune(x, keep, 2.5)", "capacity is 2.5; expected an integer from 0 on."),
    "whole numbers for scores": (
        "keep_highest(keep.astype(int), sites, 2)",
        "keep_highest was given scores int32[8]; expected floats [8], one for each row of the sites, padding included.",
    ),
    "whole numbers between sites": (
        "interpolate_sites(SparseTensor(rows.astype(int), sites), sites)",
        "interpolate_sites was given features of type int32; expected floats.",
    ),
    "other stride": ("union_add(x, coarse, 9)", "a union needs one stride, given 1 and 2."),
    "channels": ("union_add(x, wide, 99)", "a sum needs the same channels, given 2 and 3."),
    "values of another batch": (
        "broadcast(rows, sites)",
        "broadcast was given values [8, 2]; expected [1, C], one row a scan.",
    ),
    "empty shape": (
        "to_dense(x, 0)",
        "shape is 0; expected one integer from 1 on, or one for each of the 3 axes of the sites (x, y in 2-D).",
    ),
    "origin off the grid": (
        "to_dense(coarse, 9, origin=3)",
        "origin is 3; sites of stride 2 need a multiple of it along each axis.",
    ),
    "outside": (
        "to_dense(x, 5)",
        "2 of 3 sites lie outside a dense array of shape 5 and origin 0: they reach from [0, 2, 3] to [4, 5, 5] in "
        "voxels; enlarge the shape, or move the origin.",
    ),
    "matrix for a dense array": (
        "from_dense(rows)",
        "dense has the shape [8, 2]; expected [B, X, Y, Z, C], or [B, X, Y, C] in 2-D, or [B, X, Y, Z, T, C] in 4-D.",
    ),
    "far origin": (
        "from_dense(image, origin=40_000)",
        "a dense array [1, 2, 2, 1] with stride 1 and origin 40000 has 4 cells from [40000, 40000, 0] to [40001, "
        "40001, 0]; a key holds +-31744 voxels, a row number less than 2^31.",
    ),
    "mask": (
        "from_dense(image, mask=image)",
        "mask is float32[1, 2, 2, 1]; expected bool[1, 2, 2], a value for each cell.",
    ),
    "unknown number of sites": (
        "jax.jit(from_dense)(image)",
        "from_dense needs a capacity inside jit, where the number of sites is not known.",
    ),
    "table for a map": (
        "layers.max_pool(x, table)",
        "max_pool was given a NeighborTable for its map; expected a KernelMap: pad a table with sparse.pad_map or "
        "sparse.pad_tables, or build the map in jit.",
    ),
    "integers in a pool": (
        "average_pool(rows.astype('int32'), kernel_map)",
        "average_pool was given features of type int32; expected floats, as of astype(jnp.float32).",
    ),
    "map of other sites": (
        "layers.max_pool(moved, kernel_map)",
        "max_pool was given features and a map on different sites: 'sites' with 3 and 'sites' with 3 rows hold other "
        "coordinates; unite them (unite=True, sparse.union_add), or build the map for these sites.",
    ),
    "features beside points": (
        "interpolate(x, np.zeros((4, 6)), scan, 0.1)",
        "interpolate was given points [4, 6]; expected [m, 2 or 3], positions in metres, for sites with 3 axes.",
    ),
    "scans of other points": (
        "sites_of_points(np.zeros((4, 3)), scan[:2], 0.1, sites)",
        "sites_of_points was given scans int32[2] for 4 points; expected an integer each.",
    ),
    "voxel size": (
        "interpolate(x, np.zeros((4, 3)), scan, (0.1, 0.2))",
        "voxel_size is (0.1, 0.2); expected metres above 0: one number, or one for each of the 3 columns of the "
        "points.",
    ),
    "method": (
        "interpolate(x, np.zeros((4, 3)), scan, 0.1, method='cubic')",
        "interpolate was given features of type float32 and method 'cubic'; expected floats and one of trilinear, "
        "nearest.",
    ),
    "labels for features": (
        "voxel_max(scan[:, None], scan, 4)",
        "voxel_max was given features int32[4, 1] and sites [4]; expected floats [m, C] and [m].",
    ),
    "list for features": (
        "global_pool(SparseTensor([[0.0] * 2] * 8, sites))",
        "global_pool was given features that are a list; expected an array of numbers [N, C].",
    ),
    "words for features": (
        "global_pool(x.with_features(rows.astype(str)))",
        "global_pool was given features that are of type <U32; expected an array of numbers [N, C].",
    ),
    "integers in a global pool": (
        "global_pool(x.with_features(rows.astype('int32')))",
        "global_pool was given features of type int32; expected floats, as of astype(jnp.float32).",
    ),
    "tensor for features": (
        "max_pool(x, kernel_map)",
        "max_pool was given a SparseTensor for features; expected an array [N, C]: give x.features.",
    ),
    "one channel in a pool": (
        "average_pool(rows[:, 0], kernel_map)",
        "average_pool was given features [8]; expected rows of the input sites, [n, C].",
    ),
    "words in a pool": (
        "max_pool(rows.astype(str), kernel_map)",
        "features are of type <U32; expected is an array of numbers.",
    ),
    "values on a set": (
        "broadcast(rows[:1], site_set)",
        "broadcast was given a SiteSet; expected padded Sites: pad a set with sparse.pad_sites, or make sites with "
        "sparse.voxelize_points or sparse.sites_from_coords.",
    ),
    "no values": ("broadcast(None, sites)", "values are of type NoneType; expected is an array of numbers."),
    "no keep": ("prune(x, None)", "values of keep are of type NoneType; expected is an array of numbers."),
    "no tensors": ("unite_tensors()", "unite_tensors was given no tensor; expected at least one."),
    "dense words": (
        "from_dense(image.astype(str))",
        "the values of a dense array are of type <U32; expected is an array of numbers.",
    ),
    "bits for points": (
        "interpolate(x, np.ones((4, 3), bool), scan, 0.1)",
        "interpolate was given points of type bool; expected positions in metres.",
    ),
    "sites in a column": (
        "to_points(x, scan[:, None])",
        "to_points was given sites of shape [4, 1]; expected [m], one a point.",
    ),
    "products of integers": (
        "convolve(rows, np.ones((1, 27, 2, 3), 'f4'), kernel_map, dtype='int8')",
        "dtype is 'int8'; expected a type of floats, as jnp.bfloat16, or None.",
    ),
    "products of no type": (
        "convolve(rows, np.ones((1, 27, 2, 3), 'f4'), kernel_map, dtype='float33')",
        "dtype is 'float33'; expected a type of floats, as jnp.bfloat16, or None.",
    ),
    "a list for gamma": (
        "convolve(rows, np.ones((2, 27, 2, 3), 'f4'), kernel_map, gamma=[[1.0] * 27])",
        "gamma is a list; expected an array of floats (1, 27): scans x offsets.",
    ),
    "groups of floats": (
        "convolve(rows, np.ones((1, 27, 1, 2), 'f4'), kernel_map, groups=2.0)",
        "groups is 2.0; expected an integer from 0 on.",
    ),
    "points for their sites": (
        "to_points(x, np.zeros(4))",
        "to_points was given sites of type float32; expected rows, integers.",
    ),
}  # fmt: skip


def main():
    """Print the sentence of each case."""
    import jax

    from h2a2_jax import layers, sparse

    def tensor(coords, channels, stride=1):
        site_set = sparse.site_set(np.array(coords) * [1, stride, stride, stride], stride=stride)
        rows = np.zeros((8, channels), np.float32)
        return site_set, sparse.SparseTensor(rows, sparse.pad_sites(site_set, 8))

    site_set, x = tensor([[0, 0, 2, 3], [0, 1, 2, 5], [0, 4, 5, 5]], 2)
    moved, wide, coarse = (
        tensor([[0, 0, 2, 3], [0, 1, 2, 5], [0, 4, 5, 6]], channels, stride)[1]
        for channels, stride in ((2, 1), (3, 1), (2, 2))
    )
    table = sparse.submanifold_neighbors(site_set, 3)
    names = {
        **vars(sparse), "jax": jax, "layers": layers, "np": np, "x": x, "moved": moved, "wide": wide, "coarse": coarse,
        "rows": x.features, "sites": x.sites, "site_set": site_set, "table": table, "keep": np.ones(8, bool),
        "kernel_map": sparse.pad_map(table, x.sites, x.sites), "scan": np.zeros(4, np.int32),
        "image": np.ones((1, 2, 2, 1), np.float32),
    }  # fmt: skip
    said = {}
    for case, (code, _) in CASES.items():
        try:
            eval(code, names)
        except ValueError as error:
            said[case] = str(error)
    print(json.dumps(said))


@pytest.fixture(scope="module")
def said():
    command = [sys.executable, "-W", "ignore", "-m", "tests.sparse.test_tensor_misuse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_in_one_sentence(case, said):
    assert said.get(case) == CASES[case][1]


if __name__ == "__main__":
    main()

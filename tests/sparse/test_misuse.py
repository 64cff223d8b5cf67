"""Misuse of sites and tables ends in one sentence, and never in a wrong number.

The cases run in a process of their own, as a user's program does: in the tests wrong types already end at the
annotations.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from h2a2_jax import sparse
from tests.outcomes import print_outcomes

ROOT = Path(__file__).parents[2]


def make_cases():
    """Calls by name, each with the start of its error message, and results that look like misuse and are right."""
    fine = sparse.site_set(np.array([[0, 0, 0, 0], [0, 1, 2, 3], [1, 1, 1, 1]]))
    other = sparse.site_set(np.array([[0, 0, 0, 0], [0, 1, 2, 3], [1, 9, 1, 1]]))
    coarse = sparse.downsample(fine, 2)
    fine_rows, coarse_rows = sparse.pad_sites(fine, 8), sparse.pad_sites(coarse, 8)
    four = sparse.site_set(np.array([[0, 1, 2, 3, 4]]), num_scans=2)
    one_scan = sparse.site_set(np.array([[0, 0, 0, 0]]), stride=2)
    points, scan = np.random.default_rng(0).random((9, 3)).astype(np.float32), np.zeros(9, np.int32)
    table = sparse.submanifold_neighbors(fine)
    kmap = sparse.pad_map(table, fine_rows, fine_rows)
    repeated = np.array([[0, 0, 1]], np.int32), fine, fine
    nearest = sparse.NeighborTable(*repeated, "neighbors", np.zeros((1, 3), int))

    def sites(coords, **options):
        return sparse.site_set(np.array(coords), **options)

    def jitted(build, *arrays):
        return jax.jit(build)(*arrays)

    def voxels(cloud, size=0.1, **options):
        return sparse.voxelize([cloud], size, **options)

    def points_in_jit(p, b=scan, size=0.1, capacity=16, scans=1):
        return jitted(lambda p, b: sparse.voxelize_points(p, b, 9, size, capacity, scans), p, b)

    def rows_in_jit(coords, capacity=8, **options):
        return jitted(lambda c: sparse.sites_from_coords(c, capacity, 1, **options), coords)

    integers = "expected one integer from 1 on, or one for each of the 3 axes of the sites (x, y in 2-D)."
    host, in_jit = "expected a SiteSet of the host", "expected padded Sites"
    lengths = "expected rows (scan, x, y, z), (scan, x, y) in 2-D or (scan, x, y, z, t) in 4-D."
    swapped = "which is no multiple of it: swap the arguments."
    refused = {
        # coordinates
        "NaN coordinates": (lambda: sites([[0, np.nan, 0, 0]]), "hold 1 values that are no whole numbers"),
        "infinite coordinates": (lambda: sites([[0, 0, np.inf, 0]]), "hold 1 values that are no whole numbers"),
        "fractional coordinates": (lambda: sites([[0, -0.5, 0.5, 0]]), "hold 2 values that are no whole numbers"),
        "six columns": (lambda: sites([[0, 1, 2, 3, 4, 5]]), lengths),
        "one row": (lambda: sites([0, 1, 2, 3]), lengths),
        "off the grid": (lambda: sites([[0, 2, 1, 0]], stride=2), "site [0, 2, 1, 0] is none of a grid of stride 2"),
        "stride 0": (lambda: sites([[0, 2, 1, 0]], stride=0), f"stride is 0; {integers}"),
        "far coordinates": (lambda: sites([[0, 1 << 40, 0, 0]]), "a key holds +-31744"),
        "far floats": (lambda: sites([[0, 1e30, 0, 0]]), "a key holds +-31744"),
        "far unsigned": (lambda: sites(np.array([[0, (1 << 64) - 1, 0, 0]], np.uint64)), "a key holds +-31744"),
        "negative scans": (lambda: sites([[0, 0, 0, 0]], num_scans=-1), "num_scans is -1; expected an integer"),
        "set inside jit": (lambda: jitted(sparse.site_set, fine.coords), "use sparse.sites_from_coords there"),
        "look-up of floats": (lambda: fine.lookup(points), "lookup was given coordinates of type float32"),
        "floats inside jit": (lambda: rows_in_jit(np.zeros((2, 4), "f4")), "given coordinates of type float32"),
        "six columns inside jit": (lambda: rows_in_jit(np.zeros((2, 6), int)), lengths),
        "stride 0 inside jit": (lambda: rows_in_jit(fine.coords, stride=0), f"stride is 0; {integers}"),
        "negative capacity inside jit": (lambda: rows_in_jit(fine.coords, -8), "capacity is -8; expected an integer"),
        "find floats": (lambda: sparse.find_rows(fine_rows, points), "find_rows was given coordinates of type float32"),
        "find six columns": (lambda: sparse.find_rows(fine_rows, np.zeros((2, 6), int)), lengths),
        "the least integer": (lambda: sites([[0, -(1 << 63), 0, 0]]), "coordinates reach 9223372036854775808, a key"),
        "scans below 0": (lambda: sites([[-1, 0, 0, 0]]), "scan indices must lie in 0..16383, given -1 to -1."),
        "rows of two lengths": (lambda: sparse.site_set([[0, 1, 2, 3], [0, 1]]), "coordinates are no array: rows"),
        "masked coordinates": (
            lambda: sparse.site_set(np.ma.masked_equal(np.array([[0, 1, 2, 3]]), 3)), "coordinates are partly masked"
        ),
        "sites of floats": (
            lambda: sparse.submanifold_map(sparse.Sites(np.zeros((8, 4), "f4"), 3, 1, 1)),
            "given Sites with coordinates float32[8, 4]; expected int32 [N, 4]",
        ),
        "n beyond the rows": (lambda: rows_in_jit(fine.coords, n=4), "n is 4; expected an integer from 0 to 3."),
        "n between two": (lambda: rows_in_jit(fine.coords, n=1.5), "n is 1.5; expected an integer from 0 to 3."),
        # points
        "clouds of two lengths": (lambda: voxels([[1, 2, 3], [1, 2]]), "points are no array: rows have"),
        "masked points": (lambda: voxels(np.ma.masked_greater(points, 0.5)), "points are partly masked; give"),
        "colours for coordinates": (lambda: sparse.voxel_coordinates(np.zeros((2, 6)), 0.1), "positions alone: cut"),
        "words for coordinates": (lambda: sparse.voxel_coordinates(points.astype(str), 0.1), "the type <U"),
        "one point for coordinates": (lambda: sparse.voxel_coordinates(points[0], 0.1), "a cloud has the shape [3]"),
        "bits for coordinates": (lambda: sparse.voxel_coordinates(points > 0, 0.1), "[9, 3] and the type bool"),
        "coordinates inside jit": (
            lambda: jitted(lambda p: sparse.voxel_coordinates(p, 0.1), points), "use sparse.voxelize_points there."
        ),
        "words inside jit": (
            lambda: sparse.voxelize_points(points.astype(str), scan, 9, 0.1, 16, 1), "points are of type <U"
        ),
        "no points inside jit": (
            lambda: sparse.voxelize_points(None, scan, 9, 0.1, 16, 1), "points are of type NoneType; expected"
        ),
        "more points than there are": (
            lambda: sparse.voxelize_points(points, scan, 20, 0.1, 16, 1), "n is 20; expected an integer from 0 to 9."
        ),
        "colours": (lambda: voxels(np.zeros((2, 6))), "positions alone: cut colours and intensities off."),
        "intensities": (lambda: voxels(np.zeros((2, 4))), "or ask for axes=4."),
        "one cloud": (lambda: sparse.voxelize(points, 0.1), "one array [9, 3] was given; expected is a list"),
        "no clouds": (lambda: sparse.voxelize(None, 0.1), "one NoneType was given; expected is a list"),
        "one cloud as a list": (lambda: sparse.voxelize(points.tolist(), 0.1), "a cloud has the shape [3]"),
        "unlike clouds": (lambda: sparse.voxelize([points, points[:, :2]], 0.1), "one dimension for all"),
        "five axes": (lambda: voxels(points, axes=5), "axes is 5; expected 3"),
        "NaN points": (lambda: voxels(np.full((2, 3), np.nan)), "2 of 2 points are NaN or infinite"),
        "points inside jit": (lambda: jitted(voxels, points), "use sparse.voxelize_points there"),
        "two edges for three axes": (lambda: voxels(points, (0.1, 0.1)), "one for each of the 3 columns of the points"),
        "negative voxels": (lambda: voxels(points, -0.1), "voxel_size is -0.1; expected metres above 0"),
        "voxels of text": (lambda: voxels(points, "0.1"), "voxel_size is '0.1'; expected metres above 0"),
        "no voxels": (lambda: voxels(points, None), "voxel_size is None; expected metres above 0"),
        "colours inside jit": (lambda: points_in_jit(np.zeros((9, 6))), "points have the shape [9, 6]"),
        "bits inside jit": (lambda: points_in_jit(points > 0), "points have the shape [9, 3] and the type bool"),
        "float scans": (lambda: points_in_jit(points, points[:, 0]), "given scans of shape [9] and type float32"),
        "few scans": (lambda: points_in_jit(points, scan[:3]), "given scans of shape [3] and type int32"),
        "voxels of 0 inside jit": (lambda: points_in_jit(points, size=0.0), "voxel_size is 0.0; expected metres"),
        "traced voxels": (
            lambda: jitted(lambda s: sparse.voxelize_points(points, scan, 9, s, 16, 1), 0.1),
            "voxel_size is an argument of a function under jit",
        ),
        "capacity of -1": (lambda: points_in_jit(points, capacity=-1), "capacity is -1; expected an integer from 0"),
        "capacity of 16.0": (lambda: points_in_jit(points, capacity=16.0), "capacity is 16.0; expected an integer"),
        "too many scans": (lambda: points_in_jit(points, scans=1 << 15), "expected an integer from 0 to 16384."),
        # grids
        "downsample by -2": (lambda: sparse.downsample(fine, -2), f"factor is -2; {integers}"),
        "downsample by 0": (lambda: sparse.downsample(fine, 0), f"factor is 0; {integers}"),
        "downsample by 2.0": (lambda: sparse.downsample(fine, 2.0), f"factor is 2.0; {integers}"),
        "downsample_sites by -2": (lambda: sparse.downsample_sites(fine_rows, -2, 8), f"factor is -2; {integers}"),
        "downsample_sites by 0": (lambda: sparse.downsample_sites(fine_rows, 0, 8), f"factor is 0; {integers}"),
        "downsample_sites by 2.0": (lambda: sparse.downsample_sites(fine_rows, 2.0, 8), f"factor is 2.0; {integers}"),
        "generate by 3": (lambda: sparse.generate(coarse, 3, 3), "sites of stride 2 have no finer grid at 1/3 of it."),
        "union of strides": (lambda: sparse.unite(fine, coarse), "given strides 1 and 2, 3 and 3 axes."),
        "union of axes": (lambda: sparse.unite(fine, four), "given strides 1 and 1, 3 and 4 axes."),
        "union_sites of strides": (lambda: sparse.unite_sites(fine_rows, coarse_rows, 8), "given 1 and 2."),
        "cover by 0": (lambda: sparse.cover(fine, 3, 0), f"stride is 0; {integers}"),
        # kernels
        "4-D kernel": (lambda: sparse.submanifold_neighbors(fine, (3, 3, 3, 3)), "kernel_size is (3, 3, 3, 3); exp"),
        "4-D kernel inside jit": (lambda: sparse.submanifold_map(fine_rows, (3, 3, 3, 3)), "is (3, 3, 3, 3); exp"),
        "3-D kernel in 4-D": (lambda: sparse.submanifold_neighbors(four, (3, 3, 3)), "each of the 4 axes of the sites"),
        "kernel of 0": (lambda: sparse.submanifold_neighbors(fine, 0), f"kernel_size is 0; {integers}"),
        "kernel of 3.0": (lambda: sparse.submanifold_neighbors(fine, 3.0), f"kernel_size is 3.0; {integers}"),
        "kernel in words": (lambda: sparse.submanifold_neighbors(fine, "3"), f"kernel_size is '3'; {integers}"),
        "dilation of -1": (lambda: sparse.submanifold_neighbors(fine, 3, -1), f"dilation is -1; {integers}"),
        "padding of -1": (lambda: sparse.strided_neighbors(fine, coarse, 2, padding=-1), "padding is -1; expected one"),
        "wide padding": (lambda: sparse.strided_neighbors(fine, coarse, 2, padding=2000), "with padding 2000 on sites"),
        "seven axes": (lambda: sparse.kernel_offsets(3, 1, 7), "axes is 7; expected 3, also in 2-D, or 4."),
        # arguments of tables
        "strided without outputs": (lambda: sparse.strided_neighbors(fine, None, 2), host),
        "generative without inputs": (lambda: sparse.generative_neighbors(None, fine, 2), host),
        "strided map without outputs": (lambda: sparse.strided_map(fine_rows, None, 2), in_jit),
        "rows of no part": (lambda: sparse.union_rows(other, fine, 8, 8), "of 3 sites, of which the whole holds 2"),
        "rows of a small whole": (lambda: sparse.union_rows(fine, fine, 8, 2), "whole_capacity is 2; expected an"),
        "swapped strided": (lambda: sparse.strided_neighbors(coarse, fine, 2), swapped),
        "swapped pool": (lambda: sparse.pool_neighbors(coarse, fine, 2), swapped),
        "swapped generative": (lambda: sparse.generative_neighbors(fine, coarse, 2), swapped),
        "swapped strided inside jit": (lambda: sparse.strided_map(coarse_rows, fine_rows, 2), swapped),
        "swapped pool inside jit": (lambda: sparse.pool_map(coarse_rows, fine_rows, 2), swapped),
        "swapped generative inside jit": (lambda: sparse.generative_map(fine_rows, coarse_rows, 2), swapped),
        "two dimensions": (lambda: sparse.strided_neighbors(fine, four, 2), "3 and 4 axes"),
        "two batches": (lambda: sparse.strided_neighbors(fine, one_scan, 2), "of 2 and 1 scans"),
        # sets and padded sites
        "downsample of Sites": (lambda: sparse.downsample(fine_rows, 2), host),
        "downsample of a Voxelization": (lambda: sparse.downsample(voxels(points), 2), host),
        "generate of Sites": (lambda: sparse.generate(fine_rows, 3), host),
        "unite of Sites": (lambda: sparse.unite(fine_rows, fine_rows), host),
        "cover of Sites": (lambda: sparse.cover(fine_rows, 3, 2), host),
        "submanifold of Sites": (lambda: sparse.submanifold_neighbors(fine_rows), host),
        "submanifold of an array": (lambda: sparse.submanifold_neighbors(fine.coords), host),
        "strided of Sites": (lambda: sparse.strided_neighbors(fine_rows, coarse_rows, 2), host),
        "pad_sites of Sites": (lambda: sparse.pad_sites(fine_rows, 9), host),
        "union_rows of Sites": (lambda: sparse.union_rows(fine_rows, fine_rows, 8, 8), host),
        "downsample_sites of a set": (lambda: sparse.downsample_sites(fine, 2, 8), in_jit),
        "downsample_sites of a tensor": (
            lambda: sparse.downsample_sites(sparse.SparseTensor(np.zeros((8, 1)), fine_rows), 2, 8), in_jit,
        ),
        "generate_sites of a set": (lambda: sparse.generate_sites(coarse, 3, 8), in_jit),
        "unite_sites of sets": (lambda: sparse.unite_sites(fine, fine, 8), in_jit),
        "cover_sites of a set": (lambda: sparse.cover_sites(fine, 3, 2, 8), in_jit),
        "find_rows of a set": (lambda: sparse.find_rows(fine, fine.coords), in_jit),
        "rows_of_part of sets": (lambda: sparse.rows_of_part(fine, fine), in_jit),
        "submanifold_map of a set": (lambda: sparse.submanifold_map(fine), in_jit),
        "strided_map of sets": (lambda: sparse.strided_map(fine, coarse, 2), in_jit),
        "plan of Sites": (lambda: sparse.UNetPlan(fine_rows, 2), "expected voxels alone"),
        "plan in jit of a set": (lambda: sparse.UNetPlan.in_jit(fine, (8,)), in_jit),
        # tables and maps
        "inverse of a map": (lambda: sparse.inverse_neighbors(kmap), "inverse padded maps by sparse.inverse_map."),
        "inverse map of a table": (lambda: sparse.inverse_map(table), "given a NeighborTable; expected the Ker"),
        "inverse of nearest sites": (lambda: sparse.inverse_neighbors(nearest), "one input row to several output rows"),
        "inverse map of nearest sites": (
            lambda: sparse.inverse_map(sparse.pad_map(nearest, fine_rows, fine_rows)), "given a map of kind 'neighbors'"
        ),
        "unknown kind": (
            lambda: sparse.pad_map(sparse.NeighborTable(*repeated, "knn", nearest.offsets), fine_rows, fine_rows),
            "a table has the kind 'knn'; expected one of submanifold, strided,",
        ),
        "repeated rows": (
            lambda: sparse.pad_map(sparse.NeighborTable(*repeated, "strided", nearest.offsets), fine_rows, fine_rows),
            "give such a table the kind 'neighbors'",
        ),
        "tiles of nearest sites": (lambda: sparse.pad_map(nearest, fine_rows, fine_rows, tile_size=4), "has no tiles"),
        "other sites": (lambda: sparse.pad_map(table, coarse_rows, coarse_rows), "pad the table's own."),
        "as many other sites": (
            lambda: sparse.pad_map(table, sparse.pad_sites(other, 8), fine_rows), "inputs with other coordinates"
        ),
        "sets for pad_map": (lambda: sparse.pad_map(table, fine, fine), "given a SiteSet for inputs; expected Si"),
        "map for pad_map": (lambda: sparse.pad_map(kmap, fine_rows, fine_rows), "given a KernelMap; expected a Nei"),
        "tiles of 0": (lambda: sparse.pad_map(table, fine_rows, fine_rows, tile_size=0), "tile_size is 0; expected"),
        "tiles of 0 inside jit": (lambda: sparse.submanifold_map(fine_rows, tile_size=0), "tile_size is 0; expected"),
        "unknown blocks": (lambda: sparse.pad_map(table, fine_rows, fine_rows, blocks="all"), "blocks is 'all'; exp"),
        "table for limit_tiles": (lambda: sparse.limit_tiles(table, 4), "given a NeighborTable; expected a Ker"),
        "half a tile": (
            lambda: sparse.limit_tiles(sparse.pad_map(table, fine_rows, fine_rows, tile_size=4), 2.5), "capacity is 2.5"
        ),
        # capacities
        "ladder of a word": (lambda: sparse.BucketLadder("64"), "base is '64'; expected one capacity for"),
        "ladder below 0": (lambda: sparse.BucketLadder((64, -8)), "base of level 1 is -8; expected"),
        "ladder between two": (lambda: sparse.BucketLadder((8.5,)), "base of level 0 is 8.5; expected"),
        "no rows": (lambda: sparse.pad_rows(None, 3), "rows have the shape [] and the type obj"),
        "rows of words": (lambda: sparse.pad_rows(["a"], 3), "rows have the shape [1] and the type <U1"),
        "padded sites again": (lambda: sparse.pad_tables({"a": fine_rows}, (8,)), "['a'] is a Sites, which is padded"),
        "padded map again": (lambda: sparse.pad_tables([kmap], (8,)), "[0] is a KernelMap, which is padded already"),
        "sizes of padded sites": (lambda: sparse.level_sizes(fine_rows), "the top is a Sites, which is padded already"),
        "capacities None": (lambda: sparse.pad_tables(table, None), "capacities is None; expected one number for each"),
        "capacity None": (lambda: sparse.pad_tables(table, (None,)), "capacity of level 0 is None; expected"),
        "capacities 8": (lambda: sparse.pad_tables(table, 8), "capacities is 8; expected one number for each of 1 lev"),
        "small capacity": (lambda: sparse.pad_tables(table, (2,)), "do not fit a capacity of 2; take a larger bucket."),
        "pad_sites to -1": (lambda: sparse.pad_sites(fine, -1), "capacity is -1; expected an integer from 0 on."),
        "pad_sites to None": (lambda: sparse.pad_sites(fine, None), "capacity is None; expected an integer"),
        "pad_rows to less": (lambda: sparse.pad_rows(points, 3), "9 rows do not fit a capacity of 3"),
    }  # fmt: skip
    right = {
        "whole floats": (lambda: sites([[0, 2.0, -1.0, 0]]).coords.tolist(), [[0, 2, -1, 0]]),
        "a list of rows": (lambda: sparse.site_set([[0, 1, 2, 3]]).coords.tolist(), [[0, 1, 2, 3]]),
        "bytes": (lambda: sites(np.array([[0, 200, 0, 0]], np.uint8)).coords.tolist(), [[0, 200, 0, 0]]),
        "the least look-up": (lambda: fine.lookup([[0, -(1 << 63), 0, 0]]).tolist(), [-1]),
        "unsorted rows": (lambda: sites([[1, 0, 0, 0], [0, 5, 0, 0]]).coords.tolist(), [[0, 5, 0, 0], [1, 0, 0, 0]]),
        "a mask of nothing": (lambda: len(voxels(np.ma.array(points)).sites), 9),
        "far look-ups": (lambda: fine.lookup([[0, 1 << 20, 0, 0], [-1, 0, 0, 0], [1, 1, 1, 1]]).tolist(), [-1, -1, 2]),
        "points in 2-D": (lambda: voxels(np.array([[0.25, -0.25]])).sites.coords.tolist(), [[0, 2, -3, 0]]),
        "lists of lists": (lambda: voxels([[0.25, -0.25, 1.05]]).sites.coords.tolist(), [[0, 2, -3, 10]]),
        "integer points": (lambda: voxels(np.array([[4, -5, 6]]), 2).sites.coords.tolist(), [[0, 2, -3, 3]]),
        "flat voxels": (lambda: voxels([[0.5, 0.5, 0.5]], (0.1, 0.2, 1)).sites.coords.tolist(), [[0, 5, 2, 0]]),
        "points in 2-D inside jit": (
            lambda: points_in_jit(np.array([[0.25, -0.25]] * 9, "f4"))[0].coords[0].tolist(), [0, 2, -3, 0]
        ),
        "integer points inside jit": (
            lambda: points_in_jit(np.array([[4, -5, 6]] * 9), size=2)[0].coords[0].tolist(), [0, 2, -3, 3]
        ),
        "off the grid inside jit": (lambda: int(rows_in_jit(np.array([[0, 1, 0, 0]]), stride=2)[1]), 1),
        "np.int64 kernel": (lambda: list(sparse.submanifold_neighbors(fine, np.int64(3)).kernel_size), [3, 3, 3]),
        "kernel in a list": (lambda: list(sparse.submanifold_neighbors(fine, [3, 3, 1]).kernel_size), [3, 3, 1]),
        "kernel in an array": (
            lambda: list(sparse.submanifold_map(fine_rows, np.array([3, 1, 1])).kernel_size), [3, 1, 1]
        ),
        "np.int64 factor": (lambda: sparse.downsample(fine, np.int64(2)).stride, 2),
        "np.int64 capacities": (lambda: sparse.pad_tables(table, np.array([8])).in_capacity, 8),
        "np.int64 capacity": (lambda: points_in_jit(points, capacity=np.int64(16))[0].capacity, 16),
        "nearest sites": (
            lambda: sparse.pad_map(nearest, fine_rows, fine_rows).neighbors[0, :4].tolist(), [0, 0, 1, 8]
        ),
    }  # fmt: skip
    return refused, right


def main():
    """Print what becomes of every case."""
    print_outcomes(make_cases())


REFUSED, RIGHT = make_cases()


@pytest.fixture(scope="module")
def outcomes():
    command = [sys.executable, "-c", "from tests.sparse.test_misuse import main; main()"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("name", REFUSED)
def test_misuse_ends_in_a_sentence(name, outcomes):
    kind, _, sentence = outcomes[0][name].partition(": ")
    assert kind in ("ValueError", "InputError")
    assert REFUSED[name][1] in sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("name", RIGHT)
def test_what_looks_like_misuse_is_right(name, outcomes):
    assert outcomes[1][name] == RIGHT[name][1]

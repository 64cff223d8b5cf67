"""Neighbours in 16 bits are the same neighbours, in every algorithm and in a plan; what does not fit is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.sparse.packed import fits_packing, pack_neighbors
from tests.sparse.test_conv import draw, run
from tests.sparse.transcription import padded, table_of


@pytest.mark.parametrize("kind", ["submanifold 3", "strided 3", "generative"])
def test_a_packed_map_has_the_same_neighbours(kind):
    table = table_of(kind, counts=(90, 0, 75))
    kmap = padded(table)
    packed = pack_neighbors(kmap)
    np.testing.assert_array_equal(jnp.asarray(packed.neighbors), kmap.neighbors)
    assert fits_packing(table) and packed.neighbors.shape == kmap.neighbors.shape
    leaves = jax.tree.leaves(packed.neighbors)
    assert sum(leaf.nbytes for leaf in leaves) < 0.6 * kmap.neighbors.nbytes


def test_convolutions_and_pools_read_packed_maps():
    table = table_of("submanifold 3", counts=(40, 30))
    kmap, data = padded(table), draw(table, "gamma")
    for algorithm in ("im2col", "gather"):
        expected, got = (run(one, algorithm, *data) for one in (kmap, pack_neighbors(kmap)))
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    x = np.arange(kmap.in_capacity * 2, dtype=np.float32).reshape(-1, 2)
    np.testing.assert_array_equal(sparse.max_pool(x, pack_neighbors(kmap)), sparse.max_pool(x, kmap))


def test_neighbours_too_far_apart_are_refused():
    kmap = padded(table_of("submanifold 3", counts=(70,)))
    far = np.array(kmap.neighbors)
    far[0, :2] = 0, 70_000
    inputs = replace(kmap.inputs, coords=np.zeros((80_000, 4), np.int32))
    with pytest.raises(ValueError, match="70,000 rows apart"):
        pack_neighbors(replace(kmap, neighbors=far, inputs=inputs))

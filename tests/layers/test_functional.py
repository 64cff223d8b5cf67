import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import layers, sparse
from tests.sparse.transcription import padded, table_of

KMAP = padded(table_of("pool"))


def features(channels=4, seed=0):
    rows = np.random.default_rng(seed).normal(size=(int(KMAP.n_in), channels)).astype(np.float32)
    return sparse.SparseTensor(jnp.asarray(sparse.pad_rows(rows, KMAP.in_capacity)), KMAP.inputs)


def test_functions_of_features_keep_sites_and_padding():
    x, n = features(), int(KMAP.n_in)
    np.testing.assert_array_equal(layers.relu(x).features, np.maximum(x.features, 0))
    y = layers.activate(x, jax.nn.sigmoid)
    np.testing.assert_array_equal(y.features[:n], jax.nn.sigmoid(x.features[:n]))
    assert (y.features[n:] == 0).all() and y.sites is x.sites


def test_tensors_are_joined_on_the_same_sites_only():
    a, b = features(), features(seed=1)
    np.testing.assert_array_equal(layers.add(a, b).features, a.features + b.features)
    joined = layers.concatenate(a, features(2, seed=2), b)
    assert joined.features.shape == (KMAP.in_capacity, 10) and joined.sites is a.sites
    np.testing.assert_array_equal(joined.features[:, 6:], b.features)
    with pytest.raises(ValueError, match="same channels, given 4 and 1"):
        layers.add(a, features(1))
    coarse = layers.max_pool(b, KMAP)
    for join in (layers.add, layers.concatenate):
        with pytest.raises(ValueError, match="different sites"):
            join(a, coarse)


def test_pools_move_to_the_maps_output_sites():
    x = features()
    for pool, of_rows in ((layers.max_pool, sparse.max_pool), (layers.average_pool, sparse.average_pool)):
        y = pool(x, KMAP)
        assert y.sites is KMAP.outputs
        np.testing.assert_array_equal(y.features, of_rows(x.features, KMAP))
    assert layers.global_pool is sparse.global_pool

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import sparse
from tests.sparse.transcription import padded, pairs_of, table_of


def pooled_by_hand(x, pairs, n_out, weight):
    """Maxima of the windows, and the gradient of sum(y * weight): to the first site, in the order of the offsets."""
    y, dx = np.full((n_out, x.shape[1]), -np.inf), np.zeros_like(x)
    best = np.full(y.shape, -1)
    for found in pairs:
        for i, o in found:
            better = x[i] > y[o]
            y[o], best[o] = np.where(better, x[i], y[o]), np.where(better, i, best[o])
    for o, c in np.ndindex(*best.shape):
        dx[best[o, c], c] += weight[o, c]
    return y, dx


@pytest.mark.parametrize("values", ["distinct", "ties", "equal"])
def test_values_and_gradient(values):
    table = table_of("pool", counts=(60, 0, 45))
    kmap, pairs = padded(table), pairs_of("pool", table)
    rng = np.random.default_rng(0)
    x = {
        "distinct": rng.normal(size=(len(table.inputs), 5)) - 3,
        "ties": rng.integers(-2, 1, (len(table.inputs), 5)).astype(float),
        "equal": np.full((len(table.inputs), 5), -1.0),
    }[values].astype(np.float32)
    weight = rng.normal(size=(len(table.outputs), 5)).astype(np.float32)
    expected, expected_gradient = pooled_by_hand(x, pairs, len(weight), weight)

    def fill(rows, capacity):
        return jnp.asarray(np.concatenate([rows, np.full((capacity - len(rows), 5), np.nan, np.float32)]))

    y, pull = jax.vjp(lambda x: sparse.max_pool(x, kmap), fill(x, kmap.in_capacity))
    (dx,) = pull(fill(weight, kmap.out_capacity))
    np.testing.assert_array_equal(y[: len(weight)], expected)
    np.testing.assert_allclose(dx[: len(x)], expected_gradient, rtol=1e-6, atol=1e-6)
    assert (y[len(weight) :] == 0).all() and (dx[len(x) :] == 0).all()


def test_no_sites_give_zeros():
    kmap = padded(table_of("pool", counts=(0,)))
    y, pull = jax.vjp(lambda x: sparse.max_pool(x, kmap), jnp.full((kmap.in_capacity, 2), 3.0))
    (dx,) = pull(jnp.ones_like(y))
    assert (y == 0).all() and (dx == 0).all()


def test_a_scan_mean_counts_its_own_sites_only():
    sites = sparse.site_set(np.array([[0, 0, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0]], np.int32), num_scans=3)
    rows = np.array([[1.0], [3.0], [5.0], [np.nan]], np.float32)
    mean = sparse.scan_mean(sparse.SparseTensor(jnp.asarray(rows), sparse.pad_sites(sites, 4)))
    np.testing.assert_array_equal(mean, [[2], [0], [5]])

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from h2a2_jax import sparse
from tests.sparse.transcription import padded, pairs_by_search, random_sites


def window_map(size, counts=(60, 0, 45), two_d=False):
    """A pooling from stride 2 to 4, and its pairs of rows by offset; sizes above 2 overlap."""
    fine = random_sites(counts, stride=2)
    if two_d:
        fine = sparse.site_set(fine.coords[:, :3], stride=2, num_scans=len(counts))
    table = sparse.pool_neighbors(fine, sparse.downsample(fine, 2), size)
    return padded(table), pairs_by_search(fine.coords, table.outputs.coords, 2 * sparse.kernel_offsets(size))


def maxima(x, pairs, n_out):
    """Maximum of each window and the first site, in the order of the offsets, that holds it."""
    y, best = np.full((n_out, x.shape[1]), -np.inf), np.full((n_out, x.shape[1]), -1)
    for found in pairs:
        for i, o in found:
            better = x[i] > y[o]
            y[o], best[o] = np.where(better, x[i], y[o]), np.where(better, i, best[o])
    return y, best


def matrix(pairs, n_out, n_in):
    """Averaging as a matrix [n_out, n_in]."""
    a = np.zeros((n_out, n_in))
    for found in pairs:
        for i, o in found:
            a[o, i] += 1
    return a / np.maximum(a.sum(1, keepdims=True), 1)


def fill(rows, capacity):
    """Padding holds NaN."""
    return jnp.asarray(np.concatenate([rows, np.full((capacity - len(rows), rows.shape[1]), np.nan, rows.dtype)]))


def run(pool, x, weight, kmap):
    """Values and gradient of sum(y * weight), NaN in the padding of both; checks that padding comes out as zero."""

    @jax.jit
    def both(x, weight):
        y, pull = jax.vjp(lambda x: pool(x, kmap), x)
        return y, *pull(weight)

    y, dx = jax.device_get(both(fill(x, kmap.in_capacity), fill(weight, kmap.out_capacity)))
    assert (y[len(weight) :] == 0).all() and (dx[len(x) :] == 0).all()
    np.testing.assert_array_equal(pool(fill(x, kmap.in_capacity), kmap), y)
    return y[: len(weight)], dx[: len(x)]


WINDOWS = [(2, False), (3, False), ((2, 1, 3), False), ((3, 3), True)]


@pytest.mark.parametrize(
    ("size", "two_d", "values"),
    [(*window, "distinct") for window in WINDOWS] + [(3, False, "ties"), (2, False, "equal"), (6, False, "ties")],
    ids=str,
)
def test_maximum_and_its_gradient(size, two_d, values):
    kmap, pairs = window_map(size, two_d=two_d)
    rng, n_in, n_out = np.random.default_rng(0), int(kmap.n_in), int(kmap.n_out)
    x = {
        "distinct": rng.normal(size=(n_in, 5)) - 3,
        "ties": rng.integers(-2, 1, (n_in, 5)).astype(float),
        "equal": np.full((n_in, 5), -1.0),
    }[values].astype(np.float32)
    weight = rng.normal(size=(n_out, 5)).astype(np.float32)
    expected, best = maxima(x, pairs, n_out)
    gradient = np.zeros((n_in + 1, 5))
    np.add.at(gradient, (best, np.arange(5)), weight)  # row -1: of windows without a site
    y, dx = run(sparse.max_pool, x, weight, kmap)
    np.testing.assert_array_equal(y, np.where(best < 0, 0, expected))
    np.testing.assert_allclose(dx, gradient[:-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "two_d"), WINDOWS, ids=str)
def test_average_and_its_gradient(size, two_d):
    kmap, pairs = window_map(size, two_d=two_d)
    a = matrix(pairs, int(kmap.n_out), int(kmap.n_in))
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(a.shape[1], 5)), rng.normal(size=(a.shape[0], 5))
    with jax.enable_x64(True):
        y, dx = run(sparse.average_pool, x, weight, kmap)
    np.testing.assert_allclose(y, a @ x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dx, a.T @ weight, rtol=1e-12, atol=1e-12)
    half = sparse.average_pool(jnp.asarray(sparse.pad_rows(x, kmap.in_capacity), jnp.bfloat16), kmap)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half[: len(y)].astype(np.float32), a @ x, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", [2, 3])
def test_a_maximum_over_nan_is_nan(size):
    """Also with infinity beside it, and its gradient goes to the first site that holds NaN."""
    kmap, pairs = window_map(size)
    rng, n_in, n_out = np.random.default_rng(0), int(kmap.n_in), int(kmap.n_out)
    x = rng.choice(np.array([np.nan, np.inf, -np.inf, 0, 1], np.float32), (n_in, 6), p=[0.2, 0.2, 0.2, 0.2, 0.2])
    order = np.where(np.isnan(x), np.inf, np.where(np.isinf(x), np.sign(x) * 9, x))  # NaN is above all
    best, first = maxima(np.where(np.isneginf(order), -9, order), pairs, n_out)
    expected = np.where(first < 0, 0, np.take_along_axis(x, first, 0))
    y, dx = run(sparse.max_pool, x, np.ones((n_out, 6), np.float32), kmap)
    np.testing.assert_array_equal(y, expected)
    gradient = np.zeros((n_in + 1, 6))
    np.add.at(gradient, (first, np.arange(6)), best > -9)  # none where all sites hold -inf
    np.testing.assert_array_equal(dx, gradient[:-1])


def test_a_scans_maximum_over_nan_is_nan():
    sites = sparse.pad_sites(sparse.site_set(np.array([[0, 0, 0], [0, 1, 0], [0, 2, 0], [2, 0, 0]], np.int32)), 6)
    rows = jnp.array([[np.inf, 1, 0], [np.nan, 3, 0], [np.nan, 2, np.nan], [-np.inf, 7, 0], [9, 9, 9], [9, 9, np.nan]])
    pool = lambda f: sparse.global_pool(sparse.SparseTensor(f, sites), "max")  # noqa: E731
    y, pull = jax.vjp(pool, rows)
    np.testing.assert_array_equal(y, [[np.nan, 3, np.nan], [0, 0, 0], [-np.inf, 7, 0]])
    (dx,) = pull(jnp.ones((3, 3)))
    np.testing.assert_array_equal(dx, [[0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("pool", [sparse.max_pool, sparse.average_pool])
def test_derivatives_of_every_kind(pool):
    kmap, _ = window_map(3, counts=(9, 0, 7))
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, v = (jnp.asarray(rng.normal(size=(kmap.in_capacity, 2))) for _ in range(2))
        weight = jnp.asarray(rng.normal(size=(kmap.out_capacity, 2)))

        @jax.jit
        def derivatives(x, v, kmap):
            loss = lambda x: (pool(x, kmap) ** 3 * weight).sum()  # noqa: E731
            gradient = jax.grad(loss)
            products = {
                "forward over reverse": jax.jvp(gradient, (x,), (v,))[1],
                "reverse over forward": jax.grad(lambda x: jax.jvp(loss, (x,), (v,))[1])(x),
                "hessian": jnp.tensordot(jax.hessian(loss)(x), v, 2),
            }
            slope = gradient(x + 1e-6 * v) - gradient(x - 1e-6 * v)
            return products, slope / 2e-6

        products, expected = derivatives(x, v, kmap)
        step = 1e-7 * v
        slope = (pool(x + step, kmap) - pool(x - step, kmap)) / 2e-7
        np.testing.assert_allclose(jax.jvp(lambda x: pool(x, kmap), (x,), (v,))[1], slope, atol=1e-7)
    for product in products.values():
        np.testing.assert_allclose(product, expected, atol=1e-7)


def whole_scans(x, sites, reduce):
    """One row a scan, by hand."""
    parts = [x[sites.scan == b] for b in range(sites.num_scans)]
    by = {"mean": lambda p: p.mean(0), "sum": lambda p: p.sum(0), "max": lambda p: p.max(0)}[reduce]
    return np.stack([by(p) if len(p) else np.zeros(x.shape[1]) for p in parts])


@pytest.mark.parametrize("counts", [(30, 0, 21), (0,), tuple(range(70))], ids=["some", "none", "many scans"])
@pytest.mark.parametrize("reduce", ["mean", "max", "sum"])
def test_a_scan_is_pooled_over_its_own_sites(counts, reduce):
    sites = random_sites(counts)
    capacity = len(sites) + 4
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(len(sites), 3)) - 4, rng.normal(size=(len(counts), 3))
    with jax.enable_x64(True):
        pad = sparse.pad_sites(sites, capacity)
        y, pull = jax.vjp(lambda f: sparse.global_pool(sparse.SparseTensor(f, pad), reduce), fill(x, capacity))
        y, (dx,) = jax.device_get((y, pull(jnp.asarray(weight))))
    np.testing.assert_allclose(y, whole_scans(x, sites, reduce), rtol=1e-12)
    assert (dx[len(x) :] == 0).all()
    for entry in rng.permutation(x.size)[:20]:
        moved = np.zeros(x.size)
        moved[entry] = 1e-6
        up, down = (whole_scans(x + sign * moved.reshape(x.shape), sites, reduce) for sign in (1, -1))
        np.testing.assert_allclose(dx.ravel()[entry], ((up - down) * weight).sum() / 2e-6, atol=1e-8)


def test_the_gradient_of_a_scans_maximum_goes_to_its_first_site():
    sites = sparse.pad_sites(sparse.site_set(np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]], np.int32)), 5)
    rows = jnp.array([[1.0, 2], [1, 3], [7, 7], [7, 7], [9, 9]])
    dx = jax.grad(lambda f: sparse.global_pool(sparse.SparseTensor(f, sites), "max").sum())(rows)
    np.testing.assert_array_equal(dx, [[1, 0], [0, 1], [1, 1], [0, 0], [0, 0]])


def test_no_sites_give_zeros():
    kmap, _ = window_map(2, counts=(0,))
    for pool in (sparse.max_pool, sparse.average_pool):
        y, pull = jax.vjp(lambda x, pool=pool: pool(x, kmap), jnp.full((kmap.in_capacity, 2), 3.0))
        (dx,) = pull(jnp.ones_like(y))
        assert (y == 0).all() and (dx == 0).all()


def test_wrong_arguments_are_named():
    kmap, _ = window_map(2)
    for pool in (sparse.max_pool, sparse.average_pool):
        with pytest.raises(ValueError, match=f"3 rows, the kernel map expects {kmap.in_capacity}"):
            pool(jnp.zeros((3, 2)), kmap)
        for features in (np.ones((kmap.in_capacity, 2), np.int32), np.ones((kmap.in_capacity, 2), bool)):
            with pytest.raises((ValueError, TypeCheckError), match=r"float|Float"):
                pool(features, kmap)
        with pytest.raises((ValueError, TypeCheckError), match="KernelMap"):
            pool(jnp.ones((4, 2)), random_sites())
    with pytest.raises((ValueError, TypeCheckError), match="median"):
        sparse.global_pool(sparse.SparseTensor(jnp.zeros((kmap.in_capacity, 2)), kmap.inputs), "median")

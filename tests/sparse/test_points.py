from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import sparse
from tests.sparse.dictionaries import as_dictionary, differentiable, random_tensor

KINDS = [
    {"axes": 3},
    {"axes": 3, "stride": (2, 1, 4)},
    {"axes": 2, "stride": 2, "reach": 4},
    {"axes": 4, "stride": (1, 2, 1, 4), "reach": 2},
]


def random_points(x, axes, size, count=60, seed=0):
    """Points near sites, in metres, and their scans: some outside the batch."""
    rng, strides = np.random.default_rng(seed), np.array(x.sites.strides[:axes])
    site = np.asarray(x.sites.coords)[rng.integers(0, int(x.sites.n), count)]
    points = (site[:, 1 : 1 + axes] + rng.uniform(-1.2, 1.2, (count, axes)) * strides) * size
    return points.astype(np.float32), np.where(rng.random(count) < 0.8, site[:, 0], rng.integers(-1, 5, count))


def interpolated(x, points, scan, size):
    """Trilinear interpolation by loops over the corners, and its weights' sums."""
    by_site, dims = as_dictionary(x), points.shape[1]
    strides, size = np.array(x.sites.strides[:dims]), np.broadcast_to(np.asarray(size, np.float32), dims)
    out = np.zeros((len(points), x.features.shape[1]))
    for i, (point, b) in enumerate(zip(points.astype(float), scan.tolist(), strict=True)):
        place, total = (point / size - strides / 2) / strides, 0.0
        for corner in product((0, 1), repeat=dims):
            cell = np.floor(place) + corner
            site = (b, *(cell * strides).astype(int).tolist(), *[0] * (3 - dims))
            if site in by_site:
                weight = (1 - np.abs(place - cell)).prod()
                out[i] += weight * np.array(by_site[site])
                total += weight
        out[i] /= total or 1
    return out


# ---------------------------------------------------------------- points to voxels


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_points_find_the_voxels_that_hold_them(kind):
    x, size = random_tensor(**kind), np.array([0.1, 0.2, 0.1, 0.3][: kind["axes"]])
    points, scan = random_points(x, kind["axes"], size, 300)
    points[:3, 0] = np.nan, np.inf, 1e9
    rows = jax.jit(lambda points, scan: sparse.sites_of_points(points, scan, tuple(size.tolist()), x.sites))(
        points, scan
    )
    sites, strides = {site: i for i, site in enumerate(as_dictionary(x))}, np.array(x.sites.strides[: kind["axes"]])
    found = 0
    for i, (point, b) in enumerate(zip(points, scan.tolist(), strict=True)):
        site = None
        if np.isfinite(point).all() and point[0] < 1e8:
            voxel = sparse.voxel_coordinates(point[None], tuple(size.tolist()))[0]
            site = (b, *(voxel // strides * strides).tolist(), *[0] * (3 - len(voxel)))
        assert rows[i] == sites.get(site, x.sites.capacity)
        found += site in sites
    assert found > 10


def test_points_find_the_sites_of_the_host():
    rng = np.random.default_rng(0)
    clouds = [rng.uniform(-1, 1, (n, 3)).astype(np.float32) for n in (40, 0, 25)]
    voxels = sparse.voxelize(clouds, 0.3, inverse=True)
    scan = np.repeat(np.arange(3), [40, 0, 25])
    rows = sparse.sites_of_points(np.concatenate(clouds), scan, 0.3, sparse.pad_sites(voxels.sites, 80))
    np.testing.assert_array_equal(rows, voxels.site_of_point)


@pytest.mark.parametrize("values", ["distinct", "ties", "nan"])
def test_features_of_points_are_pooled_in_voxels(values):
    rng, capacity = np.random.default_rng(0), 9
    site = rng.integers(-2, 11, 50)  # -2, -1, 9 and 10 are no sites
    site = np.where(site == 4, 3, site)  # one without a point
    choices = {"distinct": None, "ties": [-1.0, 0, 1], "nan": [np.nan, np.inf, -np.inf, 1, 2]}[values]
    f = rng.normal(size=(50, 4)) if choices is None else rng.choice(choices, (50, 4))
    f = f.astype(np.float32)
    mean, most, gradient = np.zeros((capacity, 4)), np.zeros((capacity, 4)), np.zeros_like(f)
    weight = rng.normal(size=(capacity, 4)).astype(np.float32)
    for i in range(capacity):
        at = np.flatnonzero(site == i)
        if len(at):
            with np.errstate(invalid="ignore"):
                mean[i], most[i] = f[at].mean(0), f[at].max(0)
            for c in range(4):
                first = np.argmax(f[at, c])  # of numpy: the first NaN, else the first maximum
                gradient[at[first], c] = weight[i, c]
    np.testing.assert_allclose(jax.jit(sparse.voxel_mean, static_argnums=2)(f, site, capacity), mean, rtol=1e-5)
    y, pull = jax.vjp(lambda f: sparse.voxel_max(f, site, capacity), jnp.asarray(f))
    np.testing.assert_array_equal(y, most)
    np.testing.assert_array_equal(pull(jnp.asarray(weight))[0], gradient)


def test_pooling_of_points_is_differentiable():
    rng = np.random.default_rng(0)
    f, site = rng.normal(size=(12, 2)), rng.integers(-1, 6, 12)
    differentiable(lambda f: sparse.voxel_mean(f, site, 5), f)
    differentiable(lambda f: sparse.voxel_max(f, site, 5) ** 2, f, order=2)
    half = sparse.voxel_mean(jnp.ones((300, 1), jnp.bfloat16), np.zeros(300, np.int32), 1)
    assert half.dtype == jnp.bfloat16 and half[0, 0] == 1


@pytest.mark.parametrize("count", [0, 1])
def test_few_points(count):
    x, f = random_tensor((1, 0), more=1), jnp.full((count, 3), -2.0)
    points, scan = np.full((count, 3), 7.0, np.float32), np.zeros(count, np.int32)
    for pool in (sparse.voxel_mean, sparse.voxel_max):
        np.testing.assert_array_equal(pool(f, scan, 2), [[-2.0 * count] * 3, [0] * 3])
    assert sparse.to_points(x, scan).shape == (count, 2)
    for method in ("nearest", "trilinear"):
        assert (sparse.interpolate(x, points, scan, 0.1, method=method) == 0).all()


# ---------------------------------------------------------------- voxels to points


def test_points_take_the_features_of_their_voxels():
    x = random_tensor()
    rows = np.array([3, 0, 3, -1, x.sites.capacity, x.sites.capacity + 7], np.int32)
    expected = np.where((rows >= 0) & (rows < x.sites.capacity), x.features[rows.clip(0, 30)].T, 0).T
    np.testing.assert_array_equal(sparse.to_points(x, rows), expected)
    differentiable(lambda f: sparse.to_points(x.with_features(f), rows), x.features)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_features_are_interpolated_at_points(kind):
    x, size = random_tensor(**kind), np.array([0.25, 0.5, 0.125, 0.3][: kind["axes"]])
    points, scan = random_points(x, kind["axes"], size)
    points[0] = 1e12
    voxel_size = tuple(size.tolist())
    y = jax.jit(lambda x, p, s: sparse.interpolate(x, p, s, voxel_size))(x, points, scan)
    expected = interpolated(x, points, scan, size)
    assert (expected != 0).any(1).sum() > 20 and (expected == 0).all(1).any()
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)
    nearest = jax.jit(lambda x, p, s: sparse.interpolate(x, p, s, voxel_size, method="nearest"))(x, points, scan)
    np.testing.assert_array_equal(
        nearest, sparse.to_points(x, sparse.sites_of_points(points, scan, voxel_size, x.sites))
    )


@pytest.mark.parametrize("stride", [1, (2, 1, 4)])
def test_interpolation_reproduces_linear_functions_and_centres(stride):
    strides = np.broadcast_to(stride, 3)
    coords = np.array([(0, *(np.array(c) * strides)) for c in product(range(-2, 2), repeat=3)])
    sites = sparse.pad_sites(sparse.site_set(coords, stride=stride), 70)
    centres = (np.asarray(sites.coords)[:64, 1:] + strides / 2) * 0.5
    slope = np.array([[1.0, -2, 0.5]]).T
    x = sparse.SparseTensor(jnp.asarray(sparse.pad_rows((centres @ slope + 3).astype(np.float32), 70)), sites)
    points = np.random.default_rng(0).uniform(centres.min(0), centres.max(0), (30, 3)).astype(np.float32)
    points = np.concatenate([points, centres.astype(np.float32)])
    scan, at = np.zeros(len(points), np.int32), jax.jit(lambda p: sparse.interpolate(x, p, scan, 0.5))
    y, pull = jax.vjp(at, points)
    np.testing.assert_allclose(y, points @ slope + 3, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones_like(y))[0][:30], np.broadcast_to(slope[:, 0], (30, 3)), rtol=1e-4)
    on_centres = sparse.interpolate(x, points[30:], scan[30:], 0.5, method="nearest")
    np.testing.assert_array_equal(on_centres, x.features[:64])


def test_interpolation_is_differentiable_in_features_and_points():
    x = random_tensor((9, 5), axes=2, reach=2, channels=1)
    points, scan = random_points(x, 2, 0.5, 5)
    differentiable(lambda f, p: sparse.interpolate(x.with_features(f), p, scan, 0.5), x.features, points, order=2)
    differentiable(lambda f: sparse.interpolate(x.with_features(f), points, scan, 0.5, method="nearest"), x.features)


def test_nan_is_not_hidden_by_interpolation():
    x = random_tensor((5,))
    points = np.array([[np.nan, 0, 0], [0, np.inf, 0], [np.nan, 0, 0]], np.float32)
    for method in ("nearest", "trilinear"):
        y = jax.jit(lambda p, m=method: sparse.interpolate(x, p, np.array([0, 0, 1]), 0.5, method=m))(points)
        assert jnp.isnan(y[:2]).all() and (y[2] == 0).all()  # the last belongs to no scan
    nan = x.with_features(x.features * jnp.nan)
    centre = ((np.asarray(x.sites.coords)[:1, 1:] + 0.5) * 0.5).astype(np.float32)
    assert jnp.isnan(jax.jit(lambda p: sparse.interpolate(nan, p, np.array([0]), 0.5))(centre)).all()


def test_interpolation_is_mapped_over_features():
    x = random_tensor()
    points, scan = random_points(x, 3, 0.5, 10)
    both = jnp.stack([x.features, 2 * x.features])
    y = jax.vmap(lambda f: sparse.interpolate(x.with_features(f), points, scan, 0.5))(both)
    np.testing.assert_array_equal(2 * y[0], y[1])

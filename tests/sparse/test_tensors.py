from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from h2a2_jax import layers, sparse
from h2a2_jax.errors import InputError
from tests.sparse.dictionaries import as_dictionary, differentiable, random_tensor

KINDS = [{"axes": 3}, {"axes": 3, "stride": (2, 1, 3)}, {"axes": 2, "stride": 2}, {"axes": 4, "stride": (1, 2, 1, 4)}]


# ---------------------------------------------------------------- prune


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pruned_tensors_keep_the_sites_that_they_are_asked_to(kind):
    x = random_tensor(**kind)
    keep = np.random.default_rng(1).random(x.sites.capacity) < 0.5
    y, overflow = jax.jit(sparse.prune)(x, keep)
    rows = [tuple(c) for c, k in zip(x.sites.coords.tolist(), keep & x.sites.valid, strict=True) if k]
    before, after = as_dictionary(x), as_dictionary(y)
    assert overflow == 0 and after == {row: before[row] for row in rows} and 0 < len(after) < len(before)
    assert (y.sites.stride, y.sites.num_scans) == (x.sites.stride, 3) and y.sites.capacity == x.sites.capacity


@pytest.mark.parametrize("counts", [(0, 0), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("more", [0, 3])
def test_few_sites_are_pruned(counts, more):
    x = random_tensor(counts, more=more)
    for keep in (True, False):
        y, overflow = sparse.prune(x, np.full(x.sites.capacity, keep))
        assert overflow == 0 and as_dictionary(y) == (as_dictionary(x) if keep else {})


def test_scans_share_the_capacity_of_what_is_kept():
    x = random_tensor((3, 0, 30), reach=5)
    y, overflow = jax.jit(partial(sparse.prune, capacity=10))(x, np.ones(x.sites.capacity, bool))
    kept, scan = as_dictionary(y), np.asarray(x.sites.scan)
    assert overflow == int(x.sites.n) - 10 and len(kept) == 10 and kept.items() <= as_dictionary(x).items()
    assert sum(row[0] == 0 for row in kept) == (scan == 0).sum()
    with sparse.check_values(True):
        error, _ = checkify.checkify(partial(sparse.prune, capacity=10))(x, np.ones(x.sites.capacity, bool))
    with pytest.raises(checkify.JaxRuntimeError, match="prune left"):
        error.throw()


def test_features_are_pruned_differentiably_and_under_vmap():
    x = random_tensor()
    keep = np.arange(x.sites.capacity) % 3 > 0

    def of_features(features):
        return sparse.prune(x.with_features(features), keep, 12)[0].features

    differentiable(of_features, x.features)
    both = jnp.stack([x.features, -x.features])
    np.testing.assert_array_equal(jax.vmap(of_features)(both), jnp.stack([of_features(f) for f in both]))


def test_two_prunings_are_on_different_sites():
    x = random_tensor()
    a, b = (np.arange(x.sites.capacity) % k > 0 for k in (2, 3))

    def pruned(x, a, b, name=None):
        return sparse.prune(x, a, name=name)[0], sparse.prune(x, b, name=name)[0]

    y, z = jax.jit(pruned)(x, a, b)
    assert (y.sites.identity, z.sites.identity) == ("prune(sites0)", "prune(sites0)#1")
    with pytest.raises(ValueError, match=r"add was given tensors on different sites: 'prune\(sites0\)'"):
        jax.jit(lambda *args: layers.add(*pruned(*args)))(x, a, b)
    with pytest.raises(ValueError, match="hold other coordinates"):
        layers.add(*pruned(x, a, b))
    same = jax.jit(lambda *args: layers.add(*pruned(*args, name="kept")))(x, a, a)
    assert as_dictionary(same) == {row: [2 * v for v in value] for row, value in as_dictionary(y).items()}


# ---------------------------------------------------------------- union


def total(*dictionaries, channels=2):
    rows = {row for d in dictionaries for row in d}
    return {row: np.sum([d.get(row, [0] * channels) for d in dictionaries], 0, np.float32).tolist() for row in rows}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tensors_are_added_on_the_union_of_their_sites(kind):
    a, b = random_tensor(**kind), random_tensor(seed=1, **kind)
    expected = total(as_dictionary(a), as_dictionary(b))
    both = len(as_dictionary(a)) + len(as_dictionary(b))
    assert len(as_dictionary(a)) < len(expected) < both or kind["axes"] == 4
    y, overflow = jax.jit(partial(sparse.union_add, capacity=len(expected)))(a, b)
    assert overflow == 0 and as_dictionary(y) == expected
    assert y.sites.identity == "unite(sites0, sites1)" and y.sites.stride == a.sites.stride


def test_a_union_counts_what_does_not_fit_and_by_default_everything_fits():
    a, b = random_tensor(), random_tensor(seed=1)
    expected = total(as_dictionary(a), as_dictionary(b))
    y, overflow = jax.jit(partial(sparse.union_add, capacity=len(expected) - 3))(a, b)
    assert overflow == 3 and as_dictionary(y).items() < expected.items()
    z = jax.jit(partial(layers.add, unite=True))(a, b.with_features(b.features))
    assert as_dictionary(z) == expected and z.sites.capacity == a.sites.capacity + b.sites.capacity


def test_channels_are_concatenated_on_the_union_of_sites():
    tensors = [random_tensor(seed=seed, channels=1 + seed) for seed in range(3)]
    by_site = [as_dictionary(x) for x in tensors]
    y = layers.concatenate(*tensors, unite=True)
    rows = {row for d in by_site for row in d}
    parts = {row: [d.get(row, [0.0] * (1 + i)) for i, d in enumerate(by_site)] for row in rows}
    assert as_dictionary(y) == {row: [v for part in values for v in part] for row, values in parts.items()}


def test_equal_sites_are_joined_without_a_union():
    x = random_tensor()
    again = sparse.SparseTensor(x.features, sparse.Sites(np.array(x.sites.coords), x.sites.n, 1, 3, "another name"))
    for unite in (False, True):
        assert layers.add(x, again, unite=unite).sites is x.sites
        np.testing.assert_array_equal(layers.concatenate(x, again, unite=unite).features[:, 2:], x.features)


def test_sums_on_a_union_are_differentiable_in_both_tensors():
    a, b = random_tensor(), random_tensor(seed=1)

    def of_features(features):
        f, g = jnp.split(features, [len(a.features)])
        return sparse.union_add(a.with_features(f), b.with_features(g), 40)[0].features

    differentiable(of_features, jnp.concatenate([a.features, b.features]))


def test_empty_tensors_are_united():
    a, b = random_tensor((0, 0)), random_tensor((0, 1))
    assert as_dictionary(layers.add(a, b, unite=True)) == as_dictionary(b)
    assert as_dictionary(layers.add(a, a, unite=True)) == {}


# ---------------------------------------------------------------- broadcast


def test_values_of_a_scan_reach_all_of_its_sites():
    x = random_tensor(channels=3)
    values = np.random.default_rng(2).normal(size=(3, 3)).astype(np.float32)
    rows = sparse.broadcast(values, x.sites)
    n, scan = int(x.sites.n), np.asarray(x.sites.scan)
    np.testing.assert_array_equal(rows[:n], values[scan[:n]])
    assert (rows[n:] == 0).all()
    np.testing.assert_array_equal(layers.broadcast_add(x, values).features, x.features + rows)
    np.testing.assert_array_equal(layers.broadcast_multiply(x, values).features, x.features * rows)
    nan = np.where(np.arange(3)[:, None] == 2, np.nan, values)
    np.testing.assert_array_equal(jnp.isnan(sparse.broadcast(nan, x.sites)).all(1), scan == 2)
    differentiable(lambda v: sparse.broadcast(v, x.sites), values)
    with pytest.raises(ValueError, match=r"values \[2, 3\]; expected \[3, C\]"):
        sparse.broadcast(values[:2], x.sites)


# ---------------------------------------------------------------- dense arrays


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dense_arrays_and_back(kind):
    x = random_tensor(**kind)
    axes, flat = x.sites.axes, kind["axes"] == 2
    strides = np.array(x.sites.strides)
    size, origin = np.array([7, 8, 9, 10][:axes]), np.array([-3, -4, -4, -5][:axes]) * strides
    if flat:
        size, origin, strides = size[:2], origin[:2], strides[:2]
    options = {"origin": tuple(origin.tolist())}
    dense = jax.jit(lambda x: sparse.to_dense(x, tuple(size.tolist()), **options))(x)
    expected = np.zeros((3, *size, 2), np.float32)
    for (scan, *place), value in as_dictionary(x).items():
        expected[scan, *((np.array(place)[: len(size)] - origin) // strides)] = value
    np.testing.assert_array_equal(dense, expected)
    y, overflow = sparse.from_dense(dense, stride=x.sites.stride, **options)
    assert overflow == 0 and as_dictionary(y) == as_dictionary(x) and y.sites.capacity == int(x.sites.n)
    assert (y.sites.stride, y.sites.num_scans, y.sites.identity) == (x.sites.stride, 3, "dense")
    again = jax.jit(lambda d: sparse.from_dense(d, x.sites.capacity, stride=x.sites.stride, **options))
    z, overflow = again(dense)
    assert overflow == 0
    np.testing.assert_array_equal(z.sites.coords, x.sites.coords)
    np.testing.assert_array_equal(z.features, x.features)
    lost = jax.jit(lambda d: sparse.from_dense(d, 5, stride=x.sites.stride, **options)[1])(dense)
    assert lost == int(x.sites.n) - 5


def test_a_mask_names_the_sites_of_a_dense_array():
    dense, mask = np.zeros((2, 2, 2, 2, 1), np.float32), np.zeros((2, 2, 2, 2), bool)
    dense[0, 0, 1, 0], dense[1, 1, 1, 1] = np.nan, 3
    mask[0, 1, 1, 1] = mask[1, 1, 1, 1] = True
    assert list(as_dictionary(sparse.from_dense(dense)[0])) == [(0, 0, 1, 0), (1, 1, 1, 1)]
    x, _ = jax.jit(partial(sparse.from_dense, capacity=3))(dense, mask=mask)
    assert as_dictionary(x) == {(0, 1, 1, 1): [0.0], (1, 1, 1, 1): [3.0]}


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 2), (2, 0, 2, 2, 1), (0, 2, 2, 2, 1)], ids=str)
def test_dense_arrays_without_sites(shape):
    x, overflow = sparse.from_dense(np.zeros(shape, np.float32), 2)
    assert overflow == 0 and as_dictionary(x) == {} and x.features.shape == (2, shape[-1])
    assert sparse.from_dense(np.zeros(shape, np.float32))[0].sites.capacity == 0


def test_dense_arrays_are_differentiable():
    x = random_tensor(reach=2)
    differentiable(lambda f: sparse.to_dense(x.with_features(f), 4, origin=-2), x.features)
    dense = sparse.to_dense(x, 4, origin=-2)
    mask = np.asarray(dense != 0).any(-1)
    differentiable(lambda d: sparse.from_dense(d, 30, mask=mask)[0].features, dense)


def test_sites_outside_of_a_dense_array_are_refused_or_left_out():
    x = random_tensor()
    inside = {row: v for row, v in as_dictionary(x).items() if min(row[1:]) >= -1 and max(row[1:]) <= 1}
    with pytest.raises(InputError, match=rf"{int(x.sites.n) - len(inside)} of {int(x.sites.n)} sites lie outside"):
        sparse.to_dense(x, 3, origin=-1)
    dense = jax.jit(lambda x: sparse.to_dense(x, 3, origin=-1))(x)
    assert as_dictionary(sparse.from_dense(dense, origin=-1)[0]) == inside
    with sparse.check_values(True):
        error, _ = checkify.checkify(jax.jit(lambda x: sparse.to_dense(x, 3, origin=-1)))(x)
    with pytest.raises(checkify.JaxRuntimeError, match="sites outside"):
        error.throw()
    with pytest.raises(InputError, match="sites lie outside"):
        sparse.to_dense(x, (6, 6), origin=-3)  # z is not 0

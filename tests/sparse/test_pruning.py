from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax import sparse
from tests.boxes.golden import FIXTURES, load_cases
from tests.sparse.dictionaries import differentiable, random_tensor
from tests.sparse.transcription import random_sites

GOLDEN = load_cases(FIXTURES / "ops_fcaf3d_seed0.npz")
PRUNED = {name: case for name, case in GOLDEN.items() if name.startswith("prune_T")}


def interpolate_by_dictionary(x, sites, normalize=False):
    """The sum over the corners around each site, one after the other."""
    n, stride = int(x.sites.n), x.sites.stride
    coords, features = np.asarray(x.sites.coords)[:n], np.asarray(x.features)[:n]
    held = {tuple(c): f for c, f in zip(coords.tolist(), features, strict=True)}
    y = np.zeros((sites.capacity, features.shape[1]))
    for row, (scan, *place) in enumerate(np.asarray(sites.coords)[: int(sites.n)].tolist()):
        total = 0.0
        for bits in product((0, 1), repeat=3):
            weight = np.prod(np.abs(1 - np.array(bits) - np.mod(place, stride) / stride))
            corner = (scan, *((np.array(place) // stride + bits) * stride).tolist())
            if corner in held:
                y[row] += weight * held[corner]
                total += weight
        if normalize and total:
            y[row] /= total
    return y


@pytest.fixture(scope="module")
def golden_scores():
    case = GOLDEN["interp"]
    coarse = sparse.site_set(case["coarse_coords"], stride=int(case["coarse_stride"]))
    fine = sparse.site_set(case["fine_coords"], stride=int(case["fine_stride"]))
    scores = np.zeros((len(coarse), 1), np.float32)
    scores[coarse.lookup(case["coarse_coords"])] = case["coarse_score"][:, None]
    x = sparse.SparseTensor(jnp.asarray(sparse.pad_rows(scores, 128)), sparse.pad_sites(coarse, 128))
    sites = sparse.pad_sites(fine, 720)
    return jax.jit(sparse.interpolate_sites)(x, sites)[:, 0], sites, fine.lookup(case["fine_coords"])


def test_the_scores_of_the_reference(golden_scores):
    scores, sites, rows = golden_scores
    np.testing.assert_allclose(scores[rows], GOLDEN["interp"]["value"], atol=1e-6)
    assert (np.asarray(scores)[int(sites.n) :] == 0).all()


@pytest.mark.parametrize("name", PRUNED)
def test_the_reference_keeps_the_same_sites(golden_scores, name):
    scores, sites, rows = golden_scores
    case, most = PRUNED[name], int(name.removeprefix("prune_T"))
    keep = np.asarray(sparse.keep_highest(scores, sites, most))
    assert not keep[int(sites.n) :].any()
    keep, scan = keep[rows], np.asarray(sites.scan)[rows]
    assert keep[case["kept_for_sure"]].all() and not (keep & ~case["kept_for_sure"] & ~case["tied"]).any()
    for b, from_tied in enumerate(case["from_tied"]):
        assert (keep & case["tied"] & (scan == b)).sum() == from_tied
        assert (keep & (scan == b)).sum() == min(most, (scan == b).sum())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_interpolation_is_the_sum_over_the_corners(normalize, stride):
    x = random_tensor((30, 0, 20), stride=4, channels=3)
    finer = random_sites((60, 5, 40), stride=stride, reach=12 // stride, seed=1)
    sites = sparse.pad_sites(finer, len(finer) + 5)
    got = sparse.interpolate_sites(x, sites, normalize=normalize)
    np.testing.assert_allclose(got, interpolate_by_dictionary(x, sites, normalize), atol=1e-6)
    assert got.dtype == x.features.dtype and np.abs(got).max() > 0.5


def test_a_site_of_the_features_gets_its_own_value():
    x = random_tensor((30, 0, 20), stride=4, channels=3)
    np.testing.assert_array_equal(sparse.interpolate_sites(x, x.sites), x.features)
    narrow = x.with_features(x.features.astype(jnp.bfloat16))
    np.testing.assert_array_equal(sparse.interpolate_sites(narrow, x.sites), narrow.features)


def test_interpolation_in_the_plane_and_in_four_dimensions():
    for axes in (2, 4):
        x = random_tensor((40, 30), axes=axes, stride=2, reach=2)
        finer = sparse.pad_sites(random_sites((50, 50), reach=4, axes=axes, seed=2), 128)
        constant = sparse.interpolate_sites(x.with_features(jnp.ones((x.sites.capacity, 1))), finer, normalize=True)
        assert set(np.unique(np.round(constant, 6))) == {0.0, 1.0}


def test_interpolation_is_differentiable():
    x = random_tensor((10, 0, 8), stride=4)
    sites = sparse.pad_sites(random_sites((8, 0, 8), stride=2, reach=6, seed=1), 16)
    differentiable(lambda features: sparse.interpolate_sites(x.with_features(features), sites), x.features)


def test_each_scan_keeps_its_highest_scores_and_the_earlier_of_equal_ones():
    sites = sparse.pad_sites(random_sites((20, 0, 3, 30)), 60)
    n, scan = int(sites.n), np.asarray(sites.scan)
    scores = np.random.default_rng(0).integers(-3, 3, 60).astype(np.float32)
    scores[[1, n - 1]] = np.nan
    scores[n:] = 9
    for most in (0, 1, 7, 25):
        keep = np.asarray(sparse.keep_highest(scores, sites, most))
        expected = np.zeros(60, bool)
        for b in range(4):
            rows = np.flatnonzero(scan == b)
            ranked = sorted(rows, key=lambda r: (np.isnan(scores[r]), -np.nan_to_num(scores[r]), r))
            expected[ranked[:most]] = True
        np.testing.assert_array_equal(keep, expected)
    np.testing.assert_array_equal(sparse.keep_highest(scores, sites, 60), sites.valid)


def test_zeros_of_both_signs_are_tied():
    sites = sparse.pad_sites(random_sites((9,)), 12)
    scores = np.array([-0.0, 0.0] * 6, np.float32)
    np.testing.assert_array_equal(sparse.keep_highest(scores, sites, 4), np.arange(12) < 4)


def test_what_is_given_wrong_is_refused():
    x = random_tensor(stride=2)
    with pytest.raises(ValueError, match="one for each row"):
        sparse.keep_highest(np.zeros(3, np.float32), x.sites, 3)
    with pytest.raises(ValueError, match="most is -1"):
        sparse.keep_highest(np.zeros(x.sites.capacity, np.float32), x.sites, -1)
    with pytest.raises(ValueError, match="features of stride 2 and sites of stride 4; expected is a stride of the"):
        sparse.interpolate_sites(x, sparse.pad_sites(random_sites((3, 0, 3), stride=4), 9))
    with pytest.raises(ValueError, match="features on 3 scans of 3 axes and sites of 2 scans of 3 axes; expected are"):
        sparse.interpolate_sites(x, sparse.pad_sites(random_sites((3, 3)), 9))

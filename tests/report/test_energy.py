"""Response energies and their correlation."""

import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.report.energy import GROUPS, EnergySums, Measured, correlate, correlations, pair_kind
from h2a2_jax.report.offsets import CENTRE
from h2a2_jax.report.probe import offset_energies

RNG = np.random.default_rng(0)


def test_energy_is_the_squared_norm_of_each_offsets_response():
    x, kernel = RNG.normal(size=(5, 3)).astype(np.float32), RNG.normal(size=(27, 3, 4)).astype(np.float32)
    expected = (np.einsum("mc,vcd->vmd", x, kernel) ** 2).sum(-1)
    assert np.allclose(offset_energies(jnp.asarray(x), jnp.asarray(kernel)), expected, rtol=1e-4)


def test_profiles_average_over_neighbours_that_exist_and_sum_to_one():
    energies = RNG.uniform(1, 2, (27, 30))
    neighbors = np.where(RNG.uniform(size=(27, 20)) < 0.7, RNG.integers(0, 30, (27, 20)), -1)
    classes = np.arange(20) % 2  # planes and edges
    sums = EnergySums()
    sums.add(energies, neighbors, classes)
    profile = sums.profile(fewest=1)
    means = np.array([np.mean([energies[j, m] for m in neighbors[j] if m >= 0]) for j in range(27)])
    assert np.allclose(profile[0], means / means.sum())
    edges = np.array([np.mean([energies[j, m] for m in neighbors[j, 1::2] if m >= 0]) for j in range(27)])
    assert np.allclose(profile[GROUPS.index("edge")], edges / edges.sum())
    assert np.isnan(profile[GROUPS.index("corner")]).all()


def test_scans_add_up():
    energies, neighbors = RNG.uniform(1, 2, (27, 8)), RNG.integers(-1, 8, (27, 8))
    whole, parts = EnergySums(), EnergySums()
    whole.add(energies, neighbors, np.zeros(8, int))
    for half in (slice(0, 4), slice(4, 8)):
        parts.add(energies, neighbors[:, half], np.zeros(4, int))
    assert np.array_equal(whole.count, parts.count) and np.allclose(whole.total, parts.total)


def test_correlation_leaves_out_unknown_offsets_and_if_asked_the_centre():
    a = RNG.uniform(size=27)
    assert correlate(a, 3 * a + 1) == pytest.approx((1, 1))
    spoilt = 3 * a + 1
    spoilt[CENTRE] = 1000
    assert correlate(a, spoilt).pearson < 0.9
    assert correlate(a, spoilt, with_centre=False) == pytest.approx((1, 1))
    spoilt[:25] = np.nan
    assert np.isnan(correlate(a, spoilt)).all()
    assert np.isnan(correlate(a, np.ones(27))).all()


def measured(dataset, start, trained, profile):
    return Measured(dataset, start, trained, {"layer1_0.conv1": np.stack([profile] * len(GROUPS))})


def test_pairs_are_kept_apart_by_dataset_start_and_training():
    profile = RNG.uniform(size=27)
    a, b = measured("scannet", 0, True, profile), measured("s3dis", 0, True, profile)
    assert pair_kind(a, b) == "trained, same start"
    assert pair_kind(a, measured("s3dis", 1, True, profile)) == "trained, other start"
    assert pair_kind(a, measured("scannet", 1, True, profile)) == "same dataset, trained, other start"
    assert pair_kind(a, measured("s3dis", 0, False, profile)) is None
    first = measured("scannet", 0, False, profile)
    assert pair_kind(first, measured("s3dis", 0, False, profile)) == "untrained, same start"
    assert pair_kind(first, measured("s3dis", 7, False, profile)) == "untrained, other start"


def test_correlations_are_means_over_the_pairs_of_a_kind():
    profiles = RNG.uniform(size=(3, 27))
    names = ("scannet", "sunrgbd", "s3dis")
    detectors = [measured(name, 0, True, p) for name, p in zip(names, profiles, strict=True)]
    found = correlations(detectors, with_centre=True)
    pairs = [correlate(profiles[i], profiles[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert list(found) == ["trained, same start"]
    assert found["trained, same start"].shape == (1, len(GROUPS), 2)
    assert np.allclose(found["trained, same start"][0, 0], np.mean(pairs, 0))

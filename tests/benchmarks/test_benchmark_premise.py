"""The premise: response energies, their correlation, classes of sites, and the page."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.premise.__main__ import find_singles, write_premise
from benchmarks.premise.energy import (
    CENTRE,
    GROUPS,
    EnergySums,
    Measured,
    correlate,
    correlations,
    offset_energies,
    pair_kind,
)
from benchmarks.premise.site_classes import SITE_CLASSES, classify_sites
from h2a2_jax.errors import InputError
from h2a2_jax.sparse.sites import site_set
from tests.report.small_run import small, store

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


@pytest.mark.parametrize("kind", ["plane", "edge", "corner"])
def test_sites_of_axis_aligned_planes_edges_and_corners_are_found(kind):
    a, b = (part.ravel() for part in np.meshgrid(np.arange(-9, 9), np.arange(-9, 9)))
    zero = np.zeros_like(a)
    faces = {
        "plane": [np.stack([a, b, zero], 1)],
        "edge": [np.stack([a, b, zero], 1)[a >= 0], np.stack([zero, b, a], 1)[a >= 0]],
        "corner": [np.stack(axes, 1)[(a >= 0) & (b >= 0)] for axes in ((a, b, zero), (a, zero, b), (zero, a, b))],
    }[kind]
    sites = site_set(np.insert(np.unique(np.concatenate(faces), axis=0), 0, 0, 1).astype(np.int32))
    (at_origin,) = classify_sites(sites)[(sites.coords[:, 1:] == 0).all(1)]
    assert SITE_CLASSES[at_origin] == kind


def test_a_lone_site_and_a_filled_block_are_other():
    block = np.stack(np.meshgrid(*[np.arange(9)] * 3), -1).reshape(-1, 3)
    coords = np.insert(np.concatenate([block, [[40, 40, 40]]]), 0, 0, 1).astype(np.int32)
    sites = site_set(coords)
    names = dict(zip(map(tuple, sites.coords[:, 1:].tolist()), classify_sites(sites), strict=True))
    assert SITE_CLASSES[names[40, 40, 40]] == SITE_CLASSES[names[4, 4, 4]] == "other"


@pytest.mark.slow
def test_the_page_has_all_pictures_of_the_detectors_beside_a_run(tmp_path: Path) -> None:
    names = ("scannet", "s3dis")
    for name in names:
        store(small((name,), selection=False), tmp_path / "runs" / f"tr3d_{name}_seed0")
    assert [path.name for path in find_singles(tmp_path / "joint")] == ["tr3d_s3dis_seed0", "tr3d_scannet_seed0"]
    target = write_premise(tmp_path, scans=2)
    assert target == tmp_path / "premise" / "index.html" and "tr3d_s3dis_seed0 (seed 0" in target.read_text()
    pictures = {path.stem: path.stat().st_size for path in target.parent.glob("*.png")}
    assert {*pictures} == {"premise_with_centre", "premise_without_centre", "premise_profiles", "site_classes"}
    assert min(pictures.values()) > 5000


def test_folders_without_detectors_of_single_datasets_are_refused(tmp_path: Path) -> None:
    store(small(("scannet", "s3dis"), selection=True), tmp_path)
    with pytest.raises(InputError, match="detector of scannet, s3dis, with kernel selection; --singles takes"):
        write_premise(tmp_path, [tmp_path])
    with pytest.raises(InputError, match="it has no config"):
        write_premise(tmp_path, [tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"detectors of two datasets or more .* --mode=ablation"):
        write_premise(tmp_path)

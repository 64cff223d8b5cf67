"""What a selection has learnt: the numbers of made-up selections, and the section of the report."""

from pathlib import Path

import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.figures import Picture, Table
from h2a2_jax.layers.kernel_selection import SelectionConfig
from h2a2_jax.models.maps import detector_tables
from h2a2_jax.models.tr3d import TR3DKind
from h2a2_jax.report.learning import learnt_section
from h2a2_jax.report.observation import LayerSelection
from h2a2_jax.report.offsets import area_under_curve, kept_share, offset_classes, rank_correlation
from h2a2_jax.training.metrics import SelectionHistory


def test_area_under_the_curve_counts_pairs_and_ties_half():
    score, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, False, True, True])
    assert area_under_curve(score, positive) == (0.5 + 3) / 4
    assert area_under_curve(-score, positive) == 0.5 / 4
    assert np.isnan(area_under_curve(score, np.ones(4, bool)))


def test_rank_correlation_is_that_of_ranks_with_ties_at_their_mean():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert rank_correlation(x, np.array([1.0, 0.0, 0.0, 0.0])) == pytest.approx(-np.sqrt(0.6))
    assert np.isnan(rank_correlation(x, np.ones(4)))


def test_kept_choices_are_majorities_known_in_both():
    first = np.array([[0.9, 0.2, 0.6, np.nan]])
    assert kept_share(first, np.array([[0.5, 0.4, 0.1, 1.0]])) == pytest.approx(2 / 3)
    assert np.isnan(kept_share(first, np.full((1, 4), np.nan)))


def test_support_of_an_offset_is_the_share_of_sites_with_a_neighbour_there():
    # Three sites of stage 1 (8 voxels each) in a row along x: two of three have a left neighbour, two a right one.
    coords = np.array([[0, x, 0, 0] for x in (0, 8, 16)], np.int32)
    tables = detector_tables(sparse.site_set(coords, stride=1, num_scans=1))
    own = TR3DKind().support(tables, "layer1_0.conv2").reshape(3, 3, 3)  # z, y, x
    assert own[1, 1].tolist() == pytest.approx([2 / 3, 1, 2 / 3])
    assert own.sum() == pytest.approx(2 + 1 / 3)
    for layer, table in (
        ("layer1_0.conv1", tables.stages[0][0]),
        ("stem", tables.stem),
        ("neck0.out", tables.ups[1].lateral),
    ):
        assert TR3DKind().support(tables, layer).tolist() == pytest.approx((table.rows >= 0).mean(1).tolist())


def selection(shared: np.ndarray, gradients: np.ndarray | None) -> LayerSelection:
    """Two datasets and two scans that all choose alike; support is 1 at the centre and falls with the class."""
    away = offset_classes()
    alpha = np.tile(1 / (1 + away), (2, 1))
    return LayerSelection(
        alpha, [alpha, alpha], [np.tile(shared, (2, 1))] * 2, np.tile(1 - away / 4, (2, 1)), gradients
    )


def test_the_section_has_what_the_choices_follow_and_what_is_kept_of_the_start(tmp_path: Path):
    f = np.linspace(0, 6, 27)
    shared = (f < 2).astype(float)
    ones = np.ones((2, 2, 27))
    history = {"layer1_0.conv1": SelectionHistory(ones, ones, np.stack([ones[0], np.stack([shared, shared])]))}
    steps, layers = np.array([10, 20]), {"layer1_0.conv1": selection(shared, f)}
    section = learnt_section(SelectionConfig(), layers, steps, history, tmp_path)
    kept, follows = (item for item in section.contents if isinstance(item, Table))
    exclusive = f"{1 - shared.mean():.2f}"
    assert kept.rows[-1] == ["all", "0.00", exclusive, exclusive, *[f"{shared.mean():.2f}"] * 3]
    assert follows.rows[0][1:5] == [f"{np.median(f):.2f}", "6.00", f"{(f > 2).sum()} of 27", "1.00"]
    assert "it falls where support lacks: Spearman's correlation is 1.00" in section.text[-1]
    pictures = [item.path for item in section.contents if isinstance(item, Picture)]
    assert [path.name for path in pictures] == ["gradients.png", "support.png"]
    assert all(path.stat().st_size > 5000 for path in pictures)


def test_a_learned_prior_has_no_f_and_says_so(tmp_path: Path):
    layers = {"layer1_0.conv1": selection(np.ones(27), None)}
    section = learnt_section(SelectionConfig(prior="learned"), layers, np.zeros(0, np.int64), {}, tmp_path)
    assert "was not measured" in section.text[0]
    assert [path.name for path in tmp_path.iterdir()] == ["support.png"]

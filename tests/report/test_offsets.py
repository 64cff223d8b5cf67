"""Measures of kernel selection on arrays."""

import numpy as np
import pytest

from h2a2_jax.report.figures_selection import kernel_slices
from h2a2_jax.report.offsets import agreement, chance_agreement, disagreement, flip_shares, offset_classes


def test_a_kernel_has_one_centre_six_faces_twelve_edges_eight_corners():
    classes = offset_classes()
    assert np.bincount(classes).tolist() == [1, 6, 12, 8]
    assert classes[13] == 0 and classes[12] == classes[14] == 1  # x is fastest
    assert classes[0] == classes[26] == 3 and classes[1] == 2


def test_slices_of_a_kernel_lie_side_by_side_x_to_the_right():
    slices = kernel_slices(np.arange(27.0))
    assert slices.shape == (3, 11)
    assert slices[0, :3].tolist() == [0, 1, 2] and slices[2, 0] == 6
    assert slices[1, 5] == 13 and slices[2, 10] == 26
    assert np.isnan(slices[:, [3, 7]]).all()


def test_agreement_is_counted_by_pairs_of_datasets_and_class():
    gamma = np.ones((3, 27))
    gamma[2] = np.where(offset_classes() == 1, 0.4, 0.6)  # one of three disagrees at the faces
    assert np.allclose(agreement(gamma), [1, 1 / 3, 1, 1])


def test_one_dataset_has_nothing_to_agree_with():
    assert np.isnan(agreement(np.ones((1, 27)))).all()
    assert np.isnan(chance_agreement(np.ones((1, 27))))


def test_chance_is_what_random_places_with_the_same_shares_give():
    rng = np.random.default_rng(0)
    shared = (9, 21)
    draws = []
    for _ in range(4000):
        gamma = np.stack([rng.permutation(np.arange(27) < count) for count in shared]).astype(float)
        draws.append((gamma[0] == gamma[1]).mean())
    assert chance_agreement(gamma) == pytest.approx(np.mean(draws), abs=0.005)
    assert chance_agreement(gamma) == pytest.approx((9 * 21 + 18 * 6) / 27**2)


def test_flips_are_majorities_that_change_and_are_known_at_both_times():
    gamma = np.zeros((3, 2, 27))
    gamma[1, 0] = 0.4  # still the minority
    gamma[2, 0, :9] = 0.6
    assert flip_shares(gamma).tolist() == [0, 9 / 54]
    gamma[1, 1] = np.nan
    assert flip_shares(gamma).tolist() == [0, 9 / 27]


def test_disagreement_is_one_where_half_of_the_scans_take_each():
    gamma = np.array([[1.0, 0.0], [0.5, 0.5], [0.75, 1.0]])
    assert disagreement(gamma).tolist() == [0, 1, 0.25]

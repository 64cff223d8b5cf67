"""The table of kernel selection that a run prints at its end."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.initialization import build_detector
from h2a2_jax.models import selective_layers
from h2a2_jax.training.gradients import SelectionMetrics
from h2a2_jax.training.summary import selection_report, selection_table
from tests.report.small_run import small

NAMES = ("scannet", "s3dis")


@pytest.fixture(scope="module")
def detector():
    """A small detector with an F of 5 at three offsets of each layer."""
    built = build_detector(small(NAMES, selection=True))
    for layer in selective_layers(built).values():
        layer.disagreement[...] = layer.disagreement[...].at[:, :3].set(5.0)
    return built


def report(detector):
    """Its report after steps with scores from 0.1 to 0.2 of one dataset and from 0.3 to 0.4 of the other."""
    ones = jnp.ones((2, 27))
    seen = SelectionMetrics(ones.at[:, :3].set(0.4), ones, ones / 4, jnp.array([0.1, 0.3]), jnp.array([0.2, 0.4]))
    return selection_report(detector, detector, dict.fromkeys(selective_layers(detector), seen))


def test_offsets_that_prefer_exclusive_kernels_and_f_are_in_the_table(detector):
    found, moved = report(detector)
    assert {(one.exclusive_offsets, one.offsets, one.disagreement) for one in found} == {(3, 27, (1.0, 5.0))}
    assert "3 of 27   1.00     5.00" in selection_table(found, moved, NAMES).splitlines()[2]


def test_one_kernel_everywhere_follows_from_the_scores_not_from_the_choices_of_training(detector):
    first = report(detector)[0][0]
    assert np.allclose(first.exclusive_share, 0.75)
    assert first.explanation(NAMES) == (
        "scannet exclusive everywhere: alpha*beta at most 0.200 < tau 0.25; "
        "s3dis shared everywhere: alpha*beta at least 0.300 >= tau 0.25"
    )


def test_datasets_that_are_alike_are_named_at_once(detector):
    first = replace(report(detector)[0][0], lowest_score=np.array([0.31, 0.3]))
    assert first.explanation(NAMES).endswith("; all shared everywhere: alpha*beta at least 0.300 >= tau 0.25")
    assert replace(first, highest_score=np.ones(2), lowest_score=np.full(2, np.nan)).explanation(NAMES) == ""

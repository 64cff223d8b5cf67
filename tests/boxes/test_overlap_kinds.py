import jax
import numpy as np
import pytest

from benchmarks.independent import GROUPS, compare_overlaps
from benchmarks.overlaps import BEYOND, KINDS, ROOMS, draw_pairs, exact_overlaps, measure
from tests.boxes.polygons import intersection_area, iou_3d

PAIRS = 20_000


def test_float32_is_within_1e_5_of_exact_polygons():
    errors = list(measure(PAIRS, ROOMS, np.float32, seed=1))
    assert [kind.kind for kind in errors] == list(KINDS)
    for kind in errors:
        assert max(kind.bev, kind.volume) < 1e-5, kind
        assert kind.overlapping > 0.2, kind


def test_float64_is_within_1e_9_of_exact_polygons_of_any_size():
    with jax.enable_x64(True):
        for kind in measure(PAIRS, BEYOND, np.float64, seed=2):
            assert max(kind.bev, kind.volume) < 1e-9, kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_clipping_in_step_equals_that_of_single_polygons(kind):
    first, second = draw_pairs(np.random.default_rng(3), 150, kind, ROOMS)
    bev, volume = exact_overlaps(first, second)
    area = np.array([intersection_area(a, b) for a, b in zip(first, second, strict=True)])
    union = first[:, 3] * first[:, 4] + second[:, 3] * second[:, 4] - area
    np.testing.assert_allclose(bev, area / union, atol=1e-10)
    np.testing.assert_allclose(volume, [iou_3d(a, b) for a, b in zip(first, second, strict=True)], atol=1e-10)


def test_float32_is_within_1e_5_of_polygons_of_shapely():
    rooms = GROUPS[0]
    for found in compare_overlaps(rooms, 3_000, seed=20261130):
        assert found.overlapping > 0.2 * found.pairs
        assert max(found.errors.values()) < rooms.tolerance, found

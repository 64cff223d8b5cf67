"""The ways in which the benchmark gives a scan are the scan itself, where it says it is."""

import numpy as np
import pytest

from benchmarks.predict import _compared, variants
from h2a2_jax.boxes import Detections
from h2a2_jax.inference.input_files import InputFile, PredictRequest, load_file
from h2a2_jax.scans.specs import SCANNET

POINTS = np.random.default_rng(0).uniform(-2, 2, (500, 3)).astype(np.float32)
COLORS = np.random.default_rng(1).integers(0, 256, POINTS.shape).astype(np.uint8)
VARIANTS = variants(POINTS, COLORS, 0.64)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_is_the_scan_moved(tmp_path, variant):
    colors = {} if variant.colors is None else {"colors": variant.colors}
    np.savez(tmp_path / "scan.npz", points=variant.points, **colors)
    request = PredictRequest(("",), **variant.request)
    scan = load_file(InputFile(tmp_path / "scan.npz", "scan"), request, [SCANNET]).placed.scan
    moved = POINTS @ variant.motion[:3, :3].T + variant.motion[:3, 3]
    distances = np.abs(scan.points[:, None] - moved[None]).max(-1)
    assert distances.min(axis=1).max() < 1e-5
    held = (distances.min(axis=0) < 1e-5).mean()
    assert 0.3 < held < 0.7 if variant.name == "half of the points" else held == 1
    if variant.colors is not None:
        np.testing.assert_allclose(scan.colors, COLORS[distances.argmin(axis=1)] / 255, atol=1e-6)


def test_boxes_are_compared_within_their_class():
    boxes = np.array([[0, 0, 0, 1, 1, 1, 0], [5, 0, 0, 1, 1, 1, 0]], np.float32)
    still = Detections(boxes, np.array([0.5, 0.4], np.float32), np.array([0, 1], np.int32))
    other = Detections(boxes, np.array([0.6, 0.4], np.float32), np.array([0, 2], np.int32))
    assert _compared("x", still, still).split() == ["x", "2", "2", "of", "2", "1.000", "0.0000"]
    assert _compared("x", still, other).split() == ["x", "2", "1", "of", "2", "1.000", "0.1000"]

import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.distributed import stack_batches
from h2a2_jax.errors import InputError
from h2a2_jax.loader.batching import BucketLadder, collate, collate_to_fit, pad_batch, scan_sizes
from h2a2_jax.models import DetectorConfig, LevelSizes
from h2a2_jax.scans.scan import Scan

MODEL = DetectorConfig(voxel_size=0.02)


def make_scan(seed: int = 0, points: int = 400, boxes: int = 2) -> Scan:
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-1, 1, (boxes, 3))
    box = np.concatenate([centres, np.full((boxes, 3), 0.4), np.zeros((boxes, 1))], 1).astype(np.float32)
    return Scan(
        f"scan{seed}",
        rng.uniform(-1, 1, (points, 3)).astype(np.float32),
        rng.uniform(0, 1, (points, 3)).astype(np.float32),
        box,
        np.arange(boxes, dtype=np.int32),
    )


def test_collate_takes_the_colour_of_the_first_point_of_each_voxel() -> None:
    points = np.array([[0.001, 0, 0], [0.5, 0, 0], [0.003, 0, 0]], np.float32)
    colors = np.array([[0.1, 0, 0], [0.2, 0, 0], [0.9, 0, 0]], np.float32)
    scan = Scan("two voxels", points, colors, np.zeros((0, 7), np.float32), np.zeros(0, np.int32))
    batch = collate([scan], MODEL)
    assert len(batch.tables.voxels) == 2
    np.testing.assert_array_equal(batch.features[:, 0], np.float32([0.1, 0.2]))


def test_sizes_without_maps_are_those_of_the_maps() -> None:
    scan = make_scan()
    assert scan_sizes([scan], MODEL) == collate([scan], MODEL).tables.sizes


def test_a_ladder_keeps_the_names_of_the_levels() -> None:
    ladder = BucketLadder.measured([[collate([make_scan(seed)], MODEL).tables.sizes for seed in range(3)]], scans=2)
    assert isinstance(ladder.base, LevelSizes)
    assert isinstance(ladder.capacities(1), LevelSizes)


def test_a_batch_too_large_is_cropped_with_its_boxes_and_counted() -> None:
    scan = make_scan(points=3000, boxes=6)
    full = collate([scan], MODEL).tables.sizes
    ladder = BucketLadder(LevelSizes(*(max(64, int(0.5 * n)) for n in full)), max_bucket=0)
    batch = collate_to_fit([scan], MODEL, ladder)
    assert batch.tables.sizes.fits(ladder.capacities(0))
    assert batch.dropped_points == 3000 - len(batch.scans[0].points) > 0
    kept = batch.scans[0]
    reach = np.abs(kept.points[:, :2] - np.median(scan.points[:, :2], 0)).max()
    assert (np.abs(kept.boxes[:, :2] - np.median(scan.points[:, :2], 0)).max(1) < reach + 0.05).all()
    assert len(kept.boxes) == len(kept.labels) < 6


def test_a_batch_that_fits_is_left_alone() -> None:
    scan = make_scan()
    batch = collate_to_fit([scan], MODEL, BucketLadder(collate([scan], MODEL).tables.sizes, max_bucket=0))
    assert batch.dropped_points == 0
    assert batch.scans == (scan,)


def test_padding_holds_zeros_no_labels_and_no_sites() -> None:
    scans = [make_scan(0), make_scan(1, boxes=1)]
    batch = collate(scans, MODEL)
    capacities = BucketLadder(batch.tables.sizes).capacities(1)
    padded = pad_batch(batch, capacities, 4)
    n = len(batch.tables.voxels)
    assert padded.features.shape == (capacities.voxels, 3)
    assert not padded.features[n:].any()
    assert (padded.plan.voxels.coords[n:, 0] == 2).all()
    assert padded.labels.tolist() == [[0, 1, -1, -1], [0, -1, -1, -1]]
    stacked = stack_batches([[padded, padded]])
    assert stacked.features.shape == (1, 2, capacities.voxels, 3)


def test_padding_to_too_small_a_bucket_is_an_error() -> None:
    batch = collate([make_scan()], MODEL)
    with pytest.raises(InputError, match="do not fit a capacity"):
        pad_batch(batch, LevelSizes(*[8] * 9), 4)


def test_an_empty_scan_has_no_sites() -> None:
    nothing = np.zeros((0, 3), np.float32)
    scan = Scan("empty", nothing, nothing, np.zeros((0, 7), np.float32), np.zeros(0, np.int32))
    assert collate([scan], MODEL).tables.sizes == LevelSizes(*[0] * 9)
    assert sparse.voxelize([nothing], MODEL.voxel_size).sites.num_scans == 1

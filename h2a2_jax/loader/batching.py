"""Scans as padded arrays, in one shape for every device: a batch picks a bucket of a ladder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import jax
import numpy as np
from jaxtyping import Float32, Int32

from h2a2_jax import sparse
from h2a2_jax.models.maps import DetectorTables, LevelSizes, PlanLayout, detector_tables, pad_plan, pyramid_sizes
from h2a2_jax.scans.scan import Scan
from h2a2_jax.sparse import BucketLadder
from h2a2_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Scans of one dataset on one device, padded; leading axes stand for several datasets and devices.

    Attributes:
        features: float32 [N, 3], colours 0-1 of the voxels.
        plan: sites and maps (`DetectorPlan`).
        boxes: float32 [B, G, 7], ground truth: centre, size (m), yaw (rad).
        labels: int32 [B, G], -1 where there is no box.
        present: bool [], True if the dataset takes part in the step.
    """

    features: Leaf
    plan: Leaf
    boxes: Leaf
    labels: Leaf
    present: Leaf


@dataclass(frozen=True)
class ScanBatch:
    """Scans of one dataset for one device, on the host, before they have a bucket.

    Attributes:
        scans: scans as they are fed to the network.
        tables: sites and maps of all scans.
        features: float32 [n, 3], colours 0-1 of the voxels.
        dropped_points: points cropped to fit the largest bucket.
    """

    scans: tuple[Scan, ...]
    tables: DetectorTables
    features: Float32[np.ndarray, "n 3"]
    dropped_points: int = 0

    @property
    def num_boxes(self) -> int:
        """Largest number of boxes of a scan."""
        return max((len(scan.boxes) for scan in self.scans), default=0)


@cache
def no_scan() -> Scan:
    """A scan with neither points nor boxes, which fills a row of a batch and changes nothing."""
    none = np.zeros((0, 3), np.float32)
    return Scan("", none, none, np.zeros((0, 7), np.float32), np.zeros(0, np.int32))


def scan_sizes(scan: Scan, voxel_size: float) -> LevelSizes:
    """Sites of every level for one scan, without its maps."""
    return pyramid_sizes(sparse.voxelize([scan.points], voxel_size).sites)


def collate(scans: Sequence[Scan], voxel_size: float) -> ScanBatch:
    """Voxelise scans and build every map they need."""
    voxels = sparse.voxelize([scan.points for scan in scans], voxel_size)
    colors = np.concatenate([scan.colors for scan in scans]) if scans else np.zeros((0, 3), np.float32)
    return ScanBatch(tuple(scans), detector_tables(voxels.sites), colors[voxels.first_point].astype(np.float32))


def collate_to_fit(scans: Sequence[Scan], voxel_size: float, ladder: BucketLadder[LevelSizes]) -> ScanBatch:
    """Collate; if the ladder's highest bucket is too small, crop the scans' outskirts until they fit.

    A crop keeps the points nearest to the middle of the scan (in x, y) and the boxes whose centre lies among them.
    """
    batch = collate(scans, voxel_size)
    if ladder.bucket(batch.tables.sizes, ladder.max_bucket) is not None:
        return batch
    cropped, sizes = list(scans), batch.tables.sizes
    while ladder.bucket(sizes, ladder.max_bucket) is None:
        cropped = [_crop(scan, 0.95) for scan in cropped]
        sizes = pyramid_sizes(sparse.voxelize([scan.points for scan in cropped], voxel_size).sites)
    dropped = sum(len(scan.points) for scan in scans) - sum(len(scan.points) for scan in cropped)
    return replace(collate(cropped, voxel_size), dropped_points=dropped)


def _crop(scan: Scan, keep: float) -> Scan:
    if not len(scan.points):
        return scan
    middle = np.median(scan.points[:, :2], 0)
    distance = np.abs(scan.points[:, :2] - middle).max(1)
    radius = np.quantile(distance, keep)
    inside = distance < radius
    near = np.abs(scan.boxes[:, :2] - middle).max(1) < radius if len(scan.boxes) else np.zeros(0, bool)
    return replace(
        scan,
        points=scan.points[inside],
        colors=scan.colors[inside],
        boxes=scan.boxes[near],
        labels=scan.labels[near],
    )


def pad_batch(batch: ScanBatch, capacities: LevelSizes, max_boxes: int, layout: PlanLayout | None = None) -> Batch:
    """A batch in the shape of a bucket (numpy arrays).

    Args:
        batch: voxelised scans.
        capacities: rows of every level in the bucket.
        max_boxes: rows for the boxes of a scan.
        layout: lists of the maps; default: those for CPUs.

    Raises:
        InputError: a level does not fit its capacity.
        ValueError: the pairs do not fit the layout (`fits_layout`).
    """
    boxes, labels = pad_boxes(batch.scans, max_boxes)
    plan = pad_plan(batch.tables, capacities, layout)
    features = sparse.pad_rows(batch.features, capacities.voxels)
    return Batch(features, plan, boxes, labels, np.asarray(True))


def pad_boxes(scans: Sequence[Scan], max_boxes: int) -> tuple[Float32[np.ndarray, "b g 7"], Int32[np.ndarray, "b g"]]:
    """Boxes and labels of scans in padded arrays, label -1 where there is no box."""
    boxes = np.zeros((len(scans), max_boxes, 7), np.float32)
    labels = np.full((len(scans), max_boxes), -1, np.int32)
    for b, scan in enumerate(scans):
        boxes[b, : len(scan.boxes)] = scan.boxes
        labels[b, : len(scan.labels)] = scan.labels
    return boxes, labels

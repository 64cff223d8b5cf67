"""Scans as padded arrays, in one shape for every device: a batch picks a bucket of a ladder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32

from h2a2_jax import sparse
from h2a2_jax.models import DetectorConfig, PlanLayout, kind_of
from h2a2_jax.scans.scan import Scan
from h2a2_jax.sparse import BucketLadder
from h2a2_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Scans of one dataset on one device, padded; leading axes stand for several datasets and devices.

    Attributes:
        features: float32 [N, 3], colours 0-1 of the voxels.
        plan: sites and maps, as the kind of the detector pads them (`DetectorKind.pad`).
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
        tables: sites and maps of all scans (`h2a2_jax.models.detector.Tables`).
        features: float32 [n, 3], colours 0-1 of the voxels.
        dropped_points: points cropped to fit the largest bucket.
    """

    scans: tuple[Scan, ...]
    tables: Any
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


def scan_sizes(scans: Sequence[Scan], model: DetectorConfig) -> Any:
    """Sites of every level for scans in one batch, without its maps (`DetectorKind.sizes`)."""
    voxels = sparse.voxelize([scan.points for scan in scans], model.voxel_size)
    return kind_of(model).sizes(voxels.sites, model)


def collate(scans: Sequence[Scan], model: DetectorConfig) -> ScanBatch:
    """Voxelise scans and build every map that a detector of this architecture needs of them."""
    voxels = sparse.voxelize([scan.points for scan in scans], model.voxel_size)
    colors = np.concatenate([scan.colors for scan in scans]) if scans else np.zeros((0, 3), np.float32)
    tables = kind_of(model).tables(voxels.sites, model)
    return ScanBatch(tuple(scans), tables, colors[voxels.first_point].astype(np.float32))


def collate_to_fit(scans: Sequence[Scan], model: DetectorConfig, ladder: BucketLadder[Any]) -> ScanBatch:
    """Collate; if the ladder's highest bucket is too small, crop the scans' outskirts until they fit.

    A crop keeps the points nearest to the middle of the scan (in x, y) and the boxes whose centre lies among them.
    """
    batch = collate(scans, model)
    if ladder.bucket(batch.tables.sizes, ladder.max_bucket) is not None:
        return batch
    cropped, sizes = list(scans), batch.tables.sizes
    while ladder.bucket(sizes, ladder.max_bucket) is None:
        cropped = [_crop(scan, 0.95) for scan in cropped]
        sizes = scan_sizes(cropped, model)
    dropped = sum(len(scan.points) for scan in scans) - sum(len(scan.points) for scan in cropped)
    return replace(collate(cropped, model), dropped_points=dropped)


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


def pad_batch(batch: ScanBatch, capacities: Any, max_boxes: int, layout: PlanLayout | None = None) -> Batch:
    """A batch in the shape of a bucket (numpy arrays).

    Args:
        batch: voxelised scans.
        capacities: rows of every level in the bucket.
        max_boxes: rows for the boxes of a scan.
        layout: lists of the maps, of the architecture that the scans were voxelised for; default: those of TR3D for
            CPUs.

    Raises:
        InputError: a level does not fit its capacity.
        ValueError: the pairs do not fit the layout (`DetectorKind.fits`).
    """
    layout = layout or PlanLayout()
    boxes, labels = pad_boxes(batch.scans, max_boxes)
    plan = kind_of(layout.model).pad(batch.tables, capacities, layout)
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

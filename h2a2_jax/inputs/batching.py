"""From scans to the padded arrays of a step, in one shape for every device.

Shapes are static to the compiler, scans are not: a batch picks a bucket. All levels of the pyramid are coupled to
one scalar ladder (a rung multiplies every capacity by the same ratio), so that a run compiles a handful of shapes and
not one per combination of levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Float32, Int32

from h2a2_jax import sparse
from h2a2_jax.inputs.scan import Scan
from h2a2_jax.models.layout import PlanLayout
from h2a2_jax.models.plan import DetectorTables, LevelSizes, detector_tables, pad_plan, pyramid_sizes
from h2a2_jax.typing import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Scans of one dataset on one device, padded; or, with leading axes, of several.

    Attributes:
        features: float32 [N, 3], colours 0-1 of the voxels.
        plan: sites and maps (`DetectorPlan`).
        boxes: float32 [B, G, 7], ground truth: centre, size (m), yaw (rad).
        labels: int32 [B, G], -1 where there is no box.
        present: bool [], whether the dataset takes part in the step.
    """

    features: Leaf
    plan: Leaf
    boxes: Leaf
    labels: Leaf
    present: Leaf


@dataclass(frozen=True)
class BucketLadder:
    """Capacities by rung: those of rung r are base * ratio**r, rounded up to whole blocks of rows.

    Attributes:
        base: capacities of rung 0.
        ratio: from one rung to the next.
        max_rung: highest rung that training may use; a batch that does not fit it is cropped.
    """

    base: LevelSizes
    ratio: float = 1.25
    max_rung: int = 8

    _BLOCK = 64

    def capacities(self, rung: int) -> LevelSizes:
        """Capacities of a rung."""
        factor = self.ratio**rung
        return LevelSizes(*(int(-(-size * factor // self._BLOCK) * self._BLOCK) for size in self.base))

    def rung(self, sizes: LevelSizes, limit: int | None = None) -> int | None:
        """Lowest rung that these sizes fit; None if it lies above the limit."""
        rung = 0
        while not sizes.fits(self.capacities(rung)):
            rung += 1
            if limit is not None and rung > limit:
                return None
        return rung

    @classmethod
    def measured(cls, sizes: Sequence[Sequence[LevelSizes]], scans: int, **options: object) -> "BucketLadder":
        """A ladder for batches of `scans` scans from samples of the scans of each dataset.

        Level by level the base holds the mean of the batch's sum plus three of its standard deviations, for whichever
        dataset needs most.

        Args:
            sizes: for each dataset the sizes of some single scans.
            scans: in a batch.
            options: ratio and max_rung.
        """
        tables = [np.asarray(s, np.float64) for s in sizes if len(s)]
        needs = [t.mean(0) * scans + 3 * t.std(0) * scans**0.5 for t in tables]
        return cls(LevelSizes(*np.ceil(np.max(needs, 0)).astype(int).tolist()), **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ScanBatch:
    """Scans of one dataset for one device, on the host, before they have a bucket.

    Attributes:
        scans: as they are fed to the network.
        tables: sites and maps.
        features: float32 [n, 3] of the voxels.
        dropped_points: points that were cropped to fit.
    """

    scans: tuple[Scan, ...]
    tables: DetectorTables
    features: Float32[np.ndarray, "n 3"]
    dropped_points: int = 0

    @property
    def num_boxes(self) -> int:
        """Largest number of boxes of a scan."""
        return max((len(scan.boxes) for scan in self.scans), default=0)


def scan_sizes(scan: Scan, voxel_size: float) -> LevelSizes:
    """Sites of every level for one scan."""
    return pyramid_sizes(sparse.voxelize([scan.points], voxel_size).sites)


def collate(scans: Sequence[Scan], voxel_size: float) -> ScanBatch:
    """Voxelise scans and build every map they need."""
    voxels = sparse.voxelize([scan.points for scan in scans], voxel_size)
    colors = np.concatenate([scan.colors for scan in scans]) if scans else np.zeros((0, 3), np.float32)
    return ScanBatch(tuple(scans), detector_tables(voxels.sites), colors[voxels.first_point].astype(np.float32))


def collate_to_fit(scans: Sequence[Scan], voxel_size: float, ladder: BucketLadder) -> ScanBatch:
    """Collate; where the ladder's highest rung is too small, crop the scans' outskirts until they fit.

    A crop keeps the points nearest to the middle of the scan (in x, y) and the boxes whose centre lies among them.
    """
    batch = collate(scans, voxel_size)
    if ladder.rung(batch.tables.sizes, ladder.max_rung) is not None:
        return batch
    cropped, sizes = list(scans), batch.tables.sizes
    while ladder.rung(sizes, ladder.max_rung) is None:
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
        capacities: of the bucket.
        max_boxes: rows for the boxes of a scan.
        layout: lists of the maps, default those for CPUs.

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


def stack_batches(grid: Sequence[Sequence[Batch]]) -> Batch:
    """Batches [dataset][replica] as one with leading axes [D, R]."""
    rows = [jax.tree.map(lambda *leaves: np.stack(leaves), *row) for row in grid]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

"""What a worker does for one scan; imports little, as every worker imports it."""

import contextlib
from dataclasses import dataclass, replace

import numpy as np

from h2a2_jax.inputs.prepare.cache import DamagedScanError, ScanCache
from h2a2_jax.inputs.prepare.statistics import ScanSummary, summarise
from h2a2_jax.inputs.raw import RawDataset
from h2a2_jax.inputs.reach import FAR_POINTS, usable_boxes, within_reach
from h2a2_jax.inputs.scan import Scan, ScanError, validate_scan


@dataclass(frozen=True)
class PrepareScan:
    """Makes sure that the cache holds a scan; callable in any process.

    Attributes:
        raw: where scans come from.
        cache: where they go to.
    """

    raw: RawDataset
    cache: ScanCache

    def __call__(self, name: str) -> tuple[ScanSummary, bool]:
        """Loads a scan and writes it to the cache, unless it is there and whole.

        Returns:
            What is counted of it, and whether it had to be made.

        Raises:
            ScanError: the scan cannot be used.
            OutputError: it cannot be written.
        """
        num_classes = self.raw.spec.num_classes
        with contextlib.suppress(DamagedScanError):
            return summarise(self.cache.read(name), num_classes), False
        scan = _within_reach(self.raw.load(name))
        problems = validate_scan(scan, num_classes)
        if problems:
            raise ScanError(name, " ".join(problems))
        self.cache.write(scan)
        return summarise(scan, num_classes), True


def _within_reach(scan: Scan) -> Scan:
    """The scan without points too far away to be voxelised, and without the boxes that they stretched.

    Raises:
        ScanError: they are many.
    """
    if not np.isfinite(scan.points).all():
        return scan  # which is refused
    near = within_reach(scan.name, scan.points)
    if near.all():
        return scan
    usable, left_out = usable_boxes(scan.boxes)
    return replace(
        scan,
        points=scan.points[near],
        colors=scan.colors[near],
        boxes=scan.boxes[usable],
        labels=scan.labels[usable],
        notes={**scan.notes, FAR_POINTS: int((~near).sum()), **left_out},
    )

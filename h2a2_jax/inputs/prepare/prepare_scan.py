"""What a worker does for one scan; imports little, as every worker imports it."""

import contextlib
from dataclasses import dataclass

from h2a2_jax.inputs.prepare.cache import DamagedScanError, ScanCache
from h2a2_jax.inputs.prepare.statistics import ScanSummary, summarise
from h2a2_jax.inputs.raw import RawDataset
from h2a2_jax.inputs.scan import ScanError, validate_scan


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
        scan = self.raw.load(name)
        problems = validate_scan(scan, num_classes)
        if problems:
            raise ScanError(name, " ".join(problems))
        self.cache.write(scan)
        return summarise(scan, num_classes), True

"""What a parser of a benchmark's own files offers, and the sizes the benchmarks publish."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from h2a2_jax.inputs.scan import Scan
from h2a2_jax.inputs.specs import DatasetSpec


@runtime_checkable
class RawDataset(Protocol):
    """A benchmark as people download it.

    Opening one reads what all scans share and raises `InputError` if the folder is not laid out as expected.
    Instances can be pickled and travel to other processes without parsing anything again.
    """

    @property
    def spec(self) -> DatasetSpec:
        """The dataset's classes and protocol."""

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the scans of "train" and of "val", in order; unique across both."""

    @property
    def notes(self) -> Mapping[str, int]:
        """What opening left out, a count by kind; `Scan.notes` has what loading a scan left out."""

    def load(self, name: str) -> Scan:
        """Parses one scan.

        Args:
            name: one of the names in `splits`.

        Raises:
            ScanError: this scan's files are missing or cannot be used; the others may be fine.
        """


@dataclass(frozen=True)
class PublishedCounts:
    """Sizes that a benchmark's authors state.

    Attributes:
        scans: number of scans by split.
        classes: number of classes of the detection protocol.
    """

    scans: Mapping[str, int]
    classes: int


PUBLISHED: Mapping[str, PublishedCounts] = MappingProxyType(
    {
        "scannet": PublishedCounts({"train": 1201, "val": 312}, classes=18),
        "sunrgbd": PublishedCounts({"train": 5285, "val": 5050}, classes=10),
        "s3dis": PublishedCounts({"train": 204, "val": 68}, classes=5),
    }
)
"""Published sizes by dataset name; those of S3DIS are for Area 5 as validation."""

"""Prepared scans as a TFDS dataset of array_record files, which needs no TensorFlow."""

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.prepare.scan_cache import DamagedScanError, ScanCache, colors_to_bytes, write_json
from h2a2_jax.scans.specs import DatasetSpec

try:
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module as _  # noqa: F401  TFDS imports it only when it packs
except ImportError as error:
    raise InputError(
        f'Preparing data needs {error.name}, which is not installed: pip install "h2a2_jax[data]".'
    ) from error

STATISTICS_FILE = "statistics.json"
_BOXES = "centre x, y, z, sizes dx, dy, dz (m), yaw (rad)"


@dataclass(frozen=True)
class Packing:
    """Content of a dataset to write: scans of a cache, by split and in the order in which they are written."""

    cache: ScanCache
    splits: Mapping[str, Sequence[str]]
    metadata: Mapping[str, Any] = field(default_factory=dict)  # for metadata.json
    statistics: Mapping[str, Any] = field(default_factory=dict)  # for statistics.json
    on_scan: Callable[[], object] = lambda: None  # called after each scan
    shard_bytes: int = 128 << 20  # approximate; TFDS keeps the scans of a shard in memory while it writes it


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Do nothing: TFDS's servers have none of these datasets, and asking leaves an empty folder in /tmp."""


class ScanDatasetBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base class of the datasets: features, shards, metadata and statistics.

    Shards are written one after the other, not shuffled: TFDS shuffles more than a gigabyte only with TensorFlow
    installed, and readers shuffle anyway. A dataset is written to a temporary folder and renamed, so that it is
    complete or absent.

    A subclass `Builder` sets `spec`, `homepage`, `citation`, `licence` and describes the data in its docstring. Only
    `python -m data.<dataset>` has scans to pack; without them the builder only describes the dataset.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    # TFDS looks for checksums of downloads beside the code, with a package that it does not depend on; there are none.
    code_path = None

    spec: ClassVar[DatasetSpec]
    homepage: ClassVar[str]
    citation: ClassVar[str]
    licence: ClassVar[str]

    def __init__(self, *, packing: Packing | None = None, file_format: str = "array_record", **kwargs: Any):
        self._packing = packing
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        rows = functools.partial(features.Tensor, encoding=features.Encoding.BYTES)
        return _LocalInfo(
            builder=self,
            description=inspect.cleandoc(type(self).__doc__ or ""),
            features=features.FeaturesDict(
                {
                    "name": features.Text(doc="id of the scan"),
                    "points": rows(shape=(None, 3), dtype=np.float32, doc="x, y, z (m), in the frame of the boxes"),
                    "colors": rows(shape=(None, 3), dtype=np.uint8, doc="red, green, blue, 0-255"),
                    "boxes": rows(shape=(None, 7), dtype=np.float32, doc=_BOXES),
                    "labels": rows(shape=(None,), dtype=np.int32, doc="class of each box, -1: ignore"),
                    "transform": rows(shape=(4, 4), dtype=np.float32, doc="from the raw file's frame to the points'"),
                    "notes": features.Text(doc="what loading left out or repaired, a JSON object of counts"),
                }
            ),
            homepage=self.homepage,
            citation=self.citation,
            license=self.licence,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(self._packing.metadata if self._packing else {}),
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[Callable[[], Iterator[tuple[str, dict[str, Any]]]]]]:
        packing = self._packing
        if packing is None:
            raise InputError(
                f"{self.name} is made from raw files by python -m data.{self.name}, which its README.md describes."
            )
        return {
            split: [functools.partial(_examples, packing, shard) for shard in _cut_into_shards(packing, names)]
            for split, names in packing.splits.items()
        }

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        assert self._packing is not None
        # data_dir is TFDS's temporary folder here: the statistics are renamed with the shards.
        write_json(Path(self.data_dir) / STATISTICS_FILE, dict(self._packing.statistics))

    def _log_download_bytes(self) -> None:
        """Print nothing: nothing is downloaded."""

    def _log_download_done(self) -> None:
        """Print nothing: the command prints the folder."""


def _examples(packing: Packing, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        try:
            scan = packing.cache.read(name)
        except DamagedScanError as error:
            raise InputError(f"{error} It was whole a moment ago: give the same command again.") from error
        stored = {key: getattr(scan, key) for key in ("name", "points", "boxes", "labels", "transform")}
        yield name, {**stored, "colors": colors_to_bytes(scan.colors), "notes": json.dumps(dict(scan.notes))}
        packing.on_scan()


def _cut_into_shards(packing: Packing, names: Sequence[str]) -> list[list[str]]:
    """Split the names, in their order, where a shard is full."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        scan_bytes = packing.cache.path(name).stat().st_size
        size += scan_bytes
        if shards[-1] and size > packing.shard_bytes:
            shards.append([])
            size = scan_bytes
        shards[-1].append(name)
    return shards

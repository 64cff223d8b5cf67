"""A batch of training as a file: what the network saw and what it should have found, to be run again.

<batch>.npz holds, for each cell (the scans of one dataset on one device) by its number c: "c.keys" int64 [n] of the
voxels (`SiteSet`), "c.features" float32 [n, 3], "c.boxes" float32 [g, 7], "c.labels" int32 [g], "c.box_scans" int32
[g]; and "cells", JSON that names their dataset and scans.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float32, Int32, Int64

from h2a2_jax.errors import InputError
from h2a2_jax.files import whole_file
from h2a2_jax.inputs.batching import ScanBatch, no_scan
from h2a2_jax.inputs.drawing import DrawnCell
from h2a2_jax.inputs.scan import Scan
from h2a2_jax.models import detector_tables
from h2a2_jax.sparse import SiteSet

FOLDER = "nonfinite"
"""In the workdir: the kept batches, `<batch>.npz`; in a run of several processes each has a folder of its own in it."""

_ARRAYS = ("keys", "features", "boxes", "labels", "box_scans")


@dataclass(frozen=True)
class KeptCell:
    """The scans of one dataset on one device.

    Attributes:
        dataset: name.
        names: of the scans.
        num_scans: rows of the batch, those without a scan included.
        keys: int64 [n] of the voxels (`h2a2_jax.sparse.SiteSet`).
        features: float32 [n, 3], colours of the voxels.
        boxes: float32 [g, 7] of all scans: centre, size (m), yaw (rad).
        labels: int32 [g].
        box_scans: int32 [g], the scan of each box.
    """

    dataset: str
    names: tuple[str, ...]
    num_scans: int
    keys: Int64[np.ndarray, " n"]
    features: Float32[np.ndarray, "n 3"]
    boxes: Float32[np.ndarray, "g 7"]
    labels: Int32[np.ndarray, " g"]
    box_scans: Int32[np.ndarray, " g"]

    @classmethod
    def of(cls, dataset: str, cell: DrawnCell) -> "KeptCell":
        """A cell as it was drawn."""
        batch, scans = cell.batch, cell.batch.scans
        return cls(
            dataset,
            cell.names,
            len(scans),
            batch.tables.voxels.keys,
            batch.features,
            np.concatenate([scan.boxes for scan in scans]).astype(np.float32),
            np.concatenate([scan.labels for scan in scans]).astype(np.int32),
            np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan.boxes) for scan in scans]),
        )

    def bad_inputs(self) -> tuple[str, ...]:
        """The scans of which a colour or a box is not finite."""
        sites = SiteSet(self.keys, 1, self.num_scans)
        rows = ~np.isfinite(self.features).all(1)
        bad = {*sites.scan[rows].tolist(), *self.box_scans[~np.isfinite(self.boxes).all(1)].tolist()}
        return tuple(name for number, name in enumerate(self.names) if number in bad)

    def batch(self) -> ScanBatch:
        """The scans with their maps, as they were fed to the network; without points."""
        scans = []
        for number in range(self.num_scans):
            own = self.box_scans == number
            name = self.names[number] if number < len(self.names) else ""
            empty = no_scan()
            scans.append(Scan(name, empty.points, empty.colors, self.boxes[own], self.labels[own]))
        sites = SiteSet(self.keys, 1, self.num_scans)
        return ScanBatch(tuple(scans), detector_tables(sites), self.features)


def kept_batches(workdir: Path) -> dict[int, list[Path]]:
    """Files of the batches that a run kept, by number, rising; of several processes a file each."""
    found: dict[int, list[Path]] = {}
    for path in sorted((workdir / FOLDER).rglob("*.npz")):
        if path.stem.isdecimal():
            found.setdefault(int(path.stem), []).append(path)
    return dict(sorted(found.items()))


def write_batch(path: Path, cells: list[KeptCell]) -> None:
    """Write the file in one go.

    Raises:
        OSError: it cannot be written.
    """
    listed = [{"dataset": c.dataset, "names": c.names, "num_scans": c.num_scans} for c in cells]
    arrays = {f"{i}.{name}": getattr(cell, name) for i, cell in enumerate(cells) for name in _ARRAYS}
    with whole_file(path) as part:
        np.savez(part, cells=np.array(json.dumps(listed)), **arrays)


def read_batch(path: Path) -> list[KeptCell]:
    """The cells of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            return [
                KeptCell(
                    entry["dataset"],
                    tuple(entry["names"]),
                    entry["num_scans"],
                    *(file[f"{i}.{name}"] for name in _ARRAYS),
                )
                for i, entry in enumerate(json.loads(str(file["cells"])))
            ]
    except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
        raise InputError(f"{path} is no batch that a run kept ({error}): give one of its folder nonfinite.") from error

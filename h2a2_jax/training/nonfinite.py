"""Batches that are not finite: found, kept and named.

A batch of training as a file: what the network saw and what it should have found, to be run again.

<batch>.npz holds, for each cell (the scans of one dataset on one device) by its number c: "c.keys" int64 [n] of the
voxels (`SiteSet`), "c.features" float32 [n, 3], "c.boxes" float32 [g, 7], "c.labels" int32 [g], "c.box_scans" int32
[g]; and "cells", JSON that names their dataset and scans.

Steps in which something was not finite: named, counted, kept for replay, and the end of a run of nothing else.

The step itself leaves the state as it was (`h2a2_jax.training.step`). What it reports is looked at one step later, when
the device is at work on the next one, so that looking takes no time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import jax
import numpy as np
from jaxtyping import Float32, Int32, Int64

from h2a2_jax.checkpoint.parameter_groups import place_of
from h2a2_jax.distributed import is_main, say
from h2a2_jax.errors import InputError
from h2a2_jax.files import whole_file
from h2a2_jax.loader.batching import ScanBatch, no_scan
from h2a2_jax.loader.drawing import DrawnCell
from h2a2_jax.loader.stream import JointStep, JointStream
from h2a2_jax.models import detector_tables
from h2a2_jax.scans.scan import Scan
from h2a2_jax.sparse import SiteSet
from h2a2_jax.training.step import StepMetrics

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


_MOST_KEPT = 20
_FIRST_SAID = 10


class NonFiniteError(Exception):
    """So many steps in a row were skipped that the run ends."""


@dataclass
class NonFiniteWatch:
    """Looks at what the steps report.

    Attributes:
        workdir: of the run.
        datasets: names, in the order of the dataset axis.
        tensors: what the columns of `StepMetrics.nonfinite` stand for.
        stream: the batches are drawn from it again.
        most_in_row: skipped steps in a row that end the run.
        skipped: steps skipped so far, as far as they were looked at.
    """

    workdir: Path
    datasets: Sequence[str]
    tensors: Sequence[str]
    stream: JointStream
    most_in_row: int
    skipped: int = 0
    _pending: tuple[int, StepMetrics] | None = None
    _said: int = field(default=0)

    def see(self, item: JointStep, metrics: StepMetrics) -> None:
        """Look at the batch before this one.

        Args:
            item: the batch.
            metrics: what the step reports, still on the device.

        Raises:
            NonFiniteError: so many steps in a row were skipped.
        """
        before, self._pending = self._pending, (item.step, metrics)  # not the batch, which fills memory
        if before is not None:
            self._look(*before)

    def look(self) -> None:
        """Look at the last batch now; waits for the device.

        Raises:
            NonFiniteError: so many steps in a row were skipped.
        """
        before, self._pending = self._pending, None
        if before is not None:
            self._look(*before)

    def _look(self, number: int, metrics: StepMetrics) -> None:
        found, self.skipped, in_row = jax.device_get((metrics.nonfinite, metrics.skipped, metrics.skipped_in_row))
        if not found.any():
            return
        drawn = self.stream.cells(number)
        cells = [KeptCell.of(self.datasets[d], cell) for (d, _), cell in sorted(drawn.items())]
        path = self._keep(number, cells)
        bad = {self.datasets[d] for d in np.flatnonzero(found.any(1)).tolist()}
        if self._said < _FIRST_SAID:
            if is_main() or any(cell.dataset in bad for cell in cells):  # who loads the scans knows their names
                print(self._sentence(number, found, cells, path), flush=True)
        elif self._said == _FIRST_SAID:
            say("Further batches that are not finite are counted (skipped_steps in metrics.jsonl), not named.")
        self._said += 1
        if in_row >= self.most_in_row:
            raise NonFiniteError(
                f"{in_row} steps in a row were not finite, so that the run ends; its parameters are those from before "
                f"them. Look at one of them again with: python run.py --mode=replay --workdir={self.workdir}"
            )

    def _sentence(self, number: int, found: np.ndarray, cells: list[KeptCell], path: Path) -> str:
        parts = []
        for d in np.flatnonzero(found.any(1)).tolist():
            columns = [name for name, bad in zip(self.tensors, found[d], strict=True) if bad]
            places = places_of(columns)
            scans = [suspects(cell) for cell in cells if cell.dataset == self.datasets[d]]
            where = "; ".join(filter(None, scans)) or "scans of another process"
            parts.append(f"{', '.join(places)} of {self.datasets[d]} ({where})")
        return f"Batch {number} is not finite and is skipped: {'; '.join(parts)}. It is kept in {path}."

    def _keep(self, number: int, cells: list[KeptCell]) -> Path:
        """Writes the batch; the oldest of many give way, for the last ones are those that end a run."""
        folder = self.workdir / FOLDER
        if jax.process_count() > 1:
            folder /= f"process{jax.process_index()}"
        others = sorted(folder.glob("*.npz"), key=lambda path: int(path.stem))
        for path in others[: max(0, len(others) + 1 - _MOST_KEPT)]:
            path.unlink()
        path = folder / f"{number}.npz"
        write_batch(path, cells)
        return path


def suspects(cell: KeptCell) -> str:
    """The scans of a cell of which an input is not finite; else all of them."""
    names = cell.bad_inputs()
    if names:
        return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} values that are not finite"
    return f"scans {', '.join(cell.names)}" if cell.names else ""


def places_of(columns: Sequence[str]) -> list[str]:
    """Where something is not finite, in few words: the loss, gradients by part of the network, statistics."""
    of_gradients = dict.fromkeys(place_of(name) for name in columns if name not in ("loss", "statistics"))
    parts = ["the loss"] if "loss" in columns else []
    parts += [f"the gradients of {', '.join(of_gradients)}"] if of_gradients else []
    return parts + (["the running statistics"] if "statistics" in columns else [])

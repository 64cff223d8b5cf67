"""The stream of joint training: which scans make which step, and their arrays.

A step is a function of its number and the seed: nothing is remembered from step to step, so that a resumed run sees the
same batches as one that was never interrupted.
"""

import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.inputs.augment import augment, sample_points
from h2a2_jax.inputs.batching import (
    Batch,
    BucketLadder,
    ScanBatch,
    collate_to_fit,
    pad_batch,
    scan_sizes,
    stack_batches,
)
from h2a2_jax.inputs.scan import Scan, ScanError, ScanSource
from h2a2_jax.inputs.specs import DatasetSpec
from h2a2_jax.models import PlanLayout, fits_layout

_MEASURED = 24
"""Scans of each dataset that are measured for the bucket ladder."""

_BOX_ROWS = 16
"""Rows for boxes come in powers of two times this."""


@dataclass(frozen=True)
class StreamConfig:
    """How scans become batches.

    Attributes:
        batch_size: scans of each dataset in a step.
        replicas: devices that share the scans of one dataset; divides the batch size.
        voxel_size: metres.
        seed: of order, sampling and augmentation.
        max_rung: highest rung of the bucket ladder; what does not fit it is cropped, and counted.
        layout: lists of the maps, for the machine that trains.
    """

    batch_size: int
    replicas: int = 1
    voxel_size: float = 0.01
    seed: int = 0
    max_rung: int = 3
    layout: PlanLayout = field(default_factory=PlanLayout)


@dataclass(frozen=True)
class StreamDataset:
    """One dataset of a stream.

    Attributes:
        spec: of the dataset.
        source: its training scans.
        repeats: how often an epoch goes through them; None: as the spec says.
        sample: whether points are drawn as the spec says, else all are used.
        augment: whether scans are augmented as the spec says.
    """

    spec: DatasetSpec
    source: ScanSource
    repeats: int | None = None
    sample: bool = True
    augment: bool = True


@dataclass(frozen=True)
class JointStep:
    """One step's input on the host.

    Attributes:
        step: its number, from 0.
        batch: arrays with leading axes [D, replicas].
        names: of the scans, by dataset.
        dropped_points: points cropped to fit the largest bucket.
    """

    step: int
    batch: Batch
    names: tuple[tuple[str, ...], ...]
    dropped_points: int

    @property
    def num_scans(self) -> int:
        """Scans of all datasets."""
        return sum(len(names) for names in self.names)


@dataclass
class JointStream:
    """Batches of several datasets, each dataset in an order of its own.

    A dataset goes through a permutation of its scans, then through another one, for as long as the run lasts. A scan
    that cannot be read is left out, with its name and the reason in `skipped`; the next one takes its place.

    Attributes:
        datasets: in the order of the dataset axis.
        config: see there.
        skipped: reason by scan name.
    """

    datasets: Sequence[StreamDataset]
    config: StreamConfig
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Measure the scans for the bucket ladder.

        Raises:
            InputError: an empty dataset, or a batch that the replicas cannot share evenly.
        """
        for dataset in self.datasets:
            if not len(dataset.source):
                raise InputError(f"dataset {dataset.spec.name} has no scans; check its folder and info files.")
        if self.config.batch_size % self.config.replicas:
            raise InputError(
                f"train.batch_size is {self.config.batch_size}, shared by {self.config.replicas} devices a dataset: "
                f"choose a multiple of {self.config.replicas}."
            )
        samples = [
            [self._scan(d, position) for position in range(min(_MEASURED, 2 * len(dataset.source)))]
            for d, dataset in enumerate(self.datasets)
        ]
        self._per_device = self.config.batch_size // self.config.replicas
        self.ladder = BucketLadder.measured(
            [[scan_sizes(scan, self.config.voxel_size) for scan in scans] for scans in samples],
            self._per_device,
            max_rung=self.config.max_rung,
        )
        self._box_rows = _BOX_ROWS
        self._grow_box_rows(max(len(scan.boxes) for scans in samples for scan in scans))

    @property
    def steps_per_epoch(self) -> int:
        """Steps until the dataset that needs most has been gone through as often as it repeats."""
        return max(
            math.ceil(len(d.source) * (d.spec.repeats if d.repeats is None else d.repeats) / self.config.batch_size)
            for d in self.datasets
        )

    def step(self, step: int) -> JointStep:
        """The input of a step, from its number alone."""
        size, per_device = self.config.batch_size, self._per_device
        grid = []
        for d in range(len(self.datasets)):
            scans = [self._scan(d, step * size + i) for i in range(size)]
            grid.append(
                [
                    collate_to_fit(scans[i : i + per_device], self.config.voxel_size, self.ladder)
                    for i in range(0, size, per_device)
                ]
            )
        cells = [cell for row in grid for cell in row]
        rung = max(self.ladder.rung(cell.tables.sizes) or 0 for cell in cells)
        self._grow_box_rows(max(cell.num_boxes for cell in cells))
        capacities = self.ladder.capacities(rung)

        layout = self.config.layout
        if not all(fits_layout(cell.tables, capacities, layout) for cell in cells):
            layout = replace(layout, machine="any")  # every device's batch has the same structure

        def padded(cell: ScanBatch) -> Batch:
            return pad_batch(cell, capacities, self._box_rows, layout)

        return JointStep(
            step,
            stack_batches([[padded(cell) for cell in row] for row in grid]),
            tuple(tuple(scan.name for cell in row for scan in cell.scans) for row in grid),
            sum(cell.dropped_points for cell in cells),
        )

    def steps(self, first: int, last: int, *, ahead: int = 2) -> Iterator[JointStep]:
        """Steps first..last-1, prepared in a thread while the device works on the ones before.

        Raises:
            Exception: whatever preparing a step raised.
        """
        ready: queue.Queue[JointStep | BaseException] = queue.Queue(maxsize=ahead)
        stop = threading.Event()

        def prepare() -> None:
            for number in range(first, last):
                try:
                    item: JointStep | BaseException = self.step(number)
                except BaseException as error:
                    item = error
                while not stop.is_set():
                    try:
                        ready.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stop.is_set() or isinstance(item, BaseException):
                    return

        worker = threading.Thread(target=prepare, name="joint-stream", daemon=True)
        worker.start()
        try:
            for _ in range(first, last):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            worker.join()

    def _scan(self, dataset: int, position: int) -> Scan:
        """The scan at a position of a dataset's endless stream, sampled and augmented."""
        recipe = self.datasets[dataset]
        source, spec = recipe.source, recipe.spec
        epoch, place = divmod(position, len(source))
        order = np.random.default_rng([self.config.seed, dataset, epoch]).permutation(len(source))
        rng = np.random.default_rng([self.config.seed, dataset, position, 1])
        for index in np.roll(order, -place):
            try:
                scan = source[int(index)]
            except ScanError as error:
                self.skipped[f"{spec.name}/{error.scan}"] = str(error)
                continue
            if recipe.sample:
                scan = sample_points(scan, spec.train_sampling, rng)
            return augment(scan, spec.augmentation, rng, has_yaw=spec.has_yaw) if recipe.augment else scan
        raise InputError(
            f"none of the {len(source)} scans of {spec.name} can be used; the last: {list(self.skipped.values())[-1]}"
        )

    def _grow_box_rows(self, boxes: int) -> None:
        while self._box_rows < boxes:
            self._box_rows *= 2

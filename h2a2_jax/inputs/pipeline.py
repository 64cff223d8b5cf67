"""The stream of joint training: which scans make which step, and their arrays.

A step is a function of its number and the seed: nothing is remembered from step to step, so that a resumed run sees the
same batches as one that was never interrupted, and every process of a run draws its part of the same step.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from h2a2_jax.errors import InputError
from h2a2_jax.inputs.augment import augment, sample_points
from h2a2_jax.inputs.batching import (
    Batch,
    BucketLadder,
    ScanBatch,
    collate_to_fit,
    no_scan,
    pad_batch,
    scan_sizes,
)
from h2a2_jax.inputs.division import Answer, Division
from h2a2_jax.inputs.scan import Scan, ScanError, ScanSource
from h2a2_jax.inputs.specs import DatasetSpec
from h2a2_jax.inputs.turns import Turns
from h2a2_jax.models import LevelSizes, PlanLayout, fits_layout

_MEASURED = 24
"""Scans of each dataset that are measured for the bucket ladder."""

_BOX_ROWS = 16
"""Rows for boxes come in powers of two times this."""


@dataclass(frozen=True)
class StreamConfig:
    """How scans become batches.

    Attributes:
        batch_size: scans of each dataset in a step, of those that name no number of their own.
        replicas: devices that share the scans of one dataset; divides the batch sizes.
        voxel_size: metres.
        seed: of order, sampling, augmentation, and of which datasets take part in a step.
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
        source: its training scans; None where another process loads them.
        repeats: how often an epoch goes through them; None: as the spec says.
        sample: whether points are drawn as the spec says, else all are used.
        augment: whether scans are augmented as the spec says.
        batch_size: its scans in a step; None: as many as the stream says.
        weight: probability, above 0 up to 1, with which it takes part in a step (`Turns`).
    """

    spec: DatasetSpec
    source: ScanSource | None
    repeats: int | None = None
    sample: bool = True
    augment: bool = True
    batch_size: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class JointStep:
    """One step's input.

    Attributes:
        step: its number, from 0.
        batch: arrays with leading axes [D, replicas]; `Batch.present` says which datasets take part. Scans fill their
            rows up to the largest batch of a device with scans that have neither sites nor boxes.
        names: of the scans that this process loaded, by dataset; none of a dataset that takes no part.
        num_scans: scans of all datasets that take part, on all processes.
        dropped_points: points cropped to fit the largest bucket, on all processes.
    """

    step: int
    batch: Batch
    names: tuple[tuple[str, ...], ...]
    num_scans: int
    dropped_points: int


class _Needs(NamedTuple):
    """What processes tell each other of their part of a step.

    Attributes:
        failed: 1 where the part could not be prepared.
        rung: lowest one of the ladder that its sites fit.
        layout_rung: lowest one in which the maps' pairs fit their layout.
        boxes: largest number of a scan.
        dropped_points: cropped to fit the largest bucket.
    """

    failed: int
    rung: int = 0
    layout_rung: int = 0
    boxes: int = 0
    dropped_points: int = 0


@dataclass(frozen=True)
class _Drawn:
    """This process's part of a step before it has a bucket: its cells (dataset, replica)."""

    step: int
    present: tuple[bool, ...]
    cells: dict[tuple[int, int], ScanBatch]
    names: tuple[tuple[str, ...], ...]
    needs: _Needs


@dataclass
class JointStream:
    """Batches of several datasets, each dataset in an order of its own.

    A dataset goes through a permutation of its scans, then through another one, for as long as the run lasts. A scan
    that cannot be read is left out, with its name and the reason in `skipped`; the next one takes its place.

    Attributes:
        datasets: in the order of the dataset axis.
        config: see there.
        division: which part of every step is this process's, and how all agree on its shape.
        skipped: reason by scan name, of the scans that this process met.
    """

    datasets: Sequence[StreamDataset]
    config: StreamConfig
    division: Division = field(default_factory=Division)
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Measure the scans for the bucket ladder.

        Raises:
            InputError: an empty dataset, a batch that the replicas cannot share evenly, or no scan that can be used.
        """
        chosen = [d.batch_size for d in self.datasets]
        replicas = self.config.replicas
        for dataset, size in zip(self.datasets, chosen, strict=True):
            name = dataset.spec.name
            if dataset.source is not None and not len(dataset.source):
                raise InputError(f"dataset {name} has no scans; check its folder and info files.")
            key, size = ("train.batch_size", self.config.batch_size) if size is None else (f"{name}.batch_size", size)
            if size % replicas:
                raise InputError(
                    f"{key} is {size}, shared by {replicas} devices a dataset: choose a multiple of {replicas}."
                )
        self.batch_sizes = tuple(self.config.batch_size if size is None else size for size in chosen)
        self._rows = max(self.batch_sizes) // replicas
        self._cells = [(d, r) for d in range(len(self.datasets)) for r in range(replicas) if self.division.owns(d, r)]
        for d, _ in self._cells:
            if self.datasets[d].source is None:
                raise ValueError(f"this process works on {self.datasets[d].spec.name}, whose source is None.")
        self._turns = Turns(self.config.seed, [d.weight for d in self.datasets])
        self._box_rows = _BOX_ROWS
        self.num_scans, self.ladder = self._measured()

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the dataset that needs most is expected to be gone through as often as it repeats."""
        each = zip(self.datasets, self.num_scans, self.batch_sizes, strict=True)
        return max(
            math.ceil(count * (d.spec.repeats if d.repeats is None else d.repeats) / (size * d.weight))
            for d, count, size in each
        )

    def step(self, step: int) -> JointStep:
        """The input of a step, from its number alone; in a run of several processes, all ask for it at once."""
        drawn = self._draw(step)
        return self._padded(drawn, self.division.exchange(np.array(drawn.needs, np.int32))())

    def steps(self, first: int, last: int, *, ahead: int = 2) -> Iterator[JointStep]:
        """Steps first..last-1, prepared in threads while the device works on the ones before.

        What processes exchange is asked for in the caller's thread, that of step k + 1 before step k is given: so all
        keep one order, and the answer does not wait for step k.

        Raises:
            Exception: whatever preparing a step raised.
        """
        numbers = iter(range(first, last))
        drawn: deque[Future[_Drawn]] = deque()
        ready: deque[Future[JointStep]] = deque()
        drawer, padder = (ThreadPoolExecutor(1, name) for name in ("joint-stream-draw", "joint-stream-pad"))

        def draw_more() -> None:
            while len(drawn) < ahead and (number := next(numbers, None)) is not None:
                drawn.append(drawer.submit(self._draw, number))

        def pad_next() -> None:
            draw_more()
            if drawn:
                part, answer = self._outcome(drawn.popleft())
                ready.append(padder.submit(lambda: self._padded(part, answer())))
                draw_more()

        try:
            pad_next()
            while ready:
                pad_next()
                yield ready.popleft().result()
        finally:
            for pool in (drawer, padder):
                pool.shutdown(cancel_futures=True)

    def _draw(self, step: int) -> _Drawn:
        """The scans of this process's cells, collated, and what they need of the bucket that all share."""
        present = self._turns.present(step)
        replicas, cells, names = self.config.replicas, {}, []
        for d, r in self._cells:
            per_replica = self.batch_sizes[d] // replicas if present[d] else 0
            first = self._turns.before(d, step) * self.batch_sizes[d] + r * per_replica
            scans = [self._scan(d, first + i) for i in range(per_replica)]
            names.append((d, [scan.name for scan in scans]))
            scans += [no_scan()] * (self._rows - per_replica)
            cells[d, r] = collate_to_fit(scans, self.config.voxel_size, self.ladder)
        needs = _Needs(
            failed=0,
            rung=max((self.ladder.rung(cell.tables.sizes) or 0 for cell in cells.values()), default=0),
            layout_rung=max(map(self._layout_rung, cells.values()), default=0),
            boxes=max((cell.num_boxes for cell in cells.values()), default=0),
            dropped_points=sum(cell.dropped_points for cell in cells.values()),
        )
        by_dataset = tuple(
            tuple(name for owner, some in names if owner == d for name in some) for d in range(len(self.datasets))
        )
        return _Drawn(step, present, cells, by_dataset, needs)

    def _layout_rung(self, cell: ScanBatch) -> int:
        """Lowest rung in which the maps' pairs fit their layout."""
        layout, highest = self.config.layout, self.ladder.max_rung
        fits = (fits_layout(cell.tables, self.ladder.capacities(rung), layout) for rung in range(highest + 1))
        return next((rung for rung, fit in enumerate(fits) if fit), highest + 1)

    def _outcome(self, drawn: "Future[_Drawn]") -> tuple[_Drawn, Answer]:
        """A drawn part and the answer to come; a failure is told to the other processes before it is raised."""
        try:
            part = drawn.result()
        except BaseException:
            self.division.exchange(np.array(_Needs(failed=1), np.int32))()
            raise
        return part, self.division.exchange(np.array(part.needs, np.int32))

    def _padded(self, drawn: _Drawn, answers: Int32[np.ndarray, "processes needs"]) -> JointStep:
        """The step in the shape that all processes' parts fit."""
        _refuse_failures(answers[:, 0], f"prepare step {drawn.step}")
        most = _Needs(*answers.max(0).tolist())
        self._grow_box_rows(most.boxes)
        capacities = self.ladder.capacities(most.rung)
        layout = self.config.layout
        if most.layout_rung > most.rung:
            layout = replace(layout, machine="any")  # every device's batch has the same structure

        def padded(cell: ScanBatch, present: bool) -> Batch:
            return replace(pad_batch(cell, capacities, self._box_rows, layout), present=np.asarray(present))

        return JointStep(
            drawn.step,
            self.division.assemble({key: padded(cell, drawn.present[key[0]]) for key, cell in drawn.cells.items()}),
            drawn.names,
            sum(size for size, present in zip(self.batch_sizes, drawn.present, strict=True) if present),
            int(_Needs(*answers.sum(0).tolist()).dropped_points),
        )

    def _measured(self) -> tuple[tuple[int, ...], BucketLadder[LevelSizes]]:
        """Numbers of scans and the ladder, from every process's own datasets."""
        levels = len(LevelSizes._fields)
        lengths, base, boxes = [0] * len(self.datasets), [0] * levels, 0
        try:
            for d in sorted({d for d, _ in self._cells}):
                lengths[d] = len(self._source(d))
                # Of one seed for all runs: runs that differ in it have the same shapes and the same program.
                scans = [self._scan(d, position, 0) for position in range(min(_MEASURED, 2 * lengths[d]))]
                boxes = max(boxes, *(len(scan.boxes) for scan in scans))
                sizes = [scan_sizes(scan, self.config.voxel_size) for scan in scans]
                ladder = BucketLadder.measured([sizes], self.batch_sizes[d] // self.config.replicas)
                base = [max(pair) for pair in zip(base, ladder.base, strict=True)]
        except BaseException:
            self.division.exchange(np.array([1, *lengths, *base, boxes], np.int32))()
            raise
        answers = self.division.exchange(np.array([0, *lengths, *base, boxes], np.int32))()
        _refuse_failures(answers[:, 0], "measure its scans")
        _, *most = answers.max(0).tolist()
        self._grow_box_rows(most[-1])
        ladder = BucketLadder(LevelSizes(*most[len(lengths) : -1]), max_rung=self.config.max_rung)
        return tuple(most[: len(lengths)]), ladder

    def _source(self, dataset: int) -> ScanSource:
        source = self.datasets[dataset].source
        assert source is not None
        return source

    def _scan(self, dataset: int, position: int, seed: int | None = None) -> Scan:
        """The scan at a position of a dataset's endless stream, sampled and augmented."""
        recipe = self.datasets[dataset]
        source, spec = self._source(dataset), recipe.spec
        epoch, place = divmod(position, len(source))
        seed = self.config.seed if seed is None else seed
        order = np.random.default_rng([seed, dataset, epoch]).permutation(len(source))
        rng = np.random.default_rng([seed, dataset, position, 1])
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


def _refuse_failures(failed: Int32[np.ndarray, " processes"], of_what: str) -> None:
    if failed.any():
        which = ", ".join(map(str, np.flatnonzero(failed)))
        raise InputError(f"process {which} failed to {of_what}; what it printed says why.")

"""The stream of joint training: which scans make which step, and their arrays.

A step is a function of its number and the seed: nothing is remembered from step to step, so that a resumed run sees the
same batches as one that was never interrupted, and every process of a run draws its part of the same step.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores
from h2a2_jax.loader.batching import Batch, BucketLadder, ScanBatch, pad_batch, scan_sizes
from h2a2_jax.loader.drawing import DatasetSchedule, Drawing, DrawnCell, Log, StreamDataset
from h2a2_jax.loader.process_layout import Answer, ProcessLayout
from h2a2_jax.loader.workers import prepared_ahead
from h2a2_jax.models import LevelSizes, PlanLayout, fits_layout
from h2a2_jax.scans.scan import ScanSource

_MEASURED = 24
"""Scans of each dataset that are measured for the bucket ladder."""

_MOST_PADDERS = 4
"""Threads that pad cells beside each other; memory keeps no more of them busy."""

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
        max_bucket: highest bucket of the bucket ladder; what does not fit it is cropped, and counted.
        layout: lists of the maps, for the machine that trains.
        workers: processes that load scans and build maps; 0: a thread does.
    """

    batch_size: int
    replicas: int = 1
    voxel_size: float = 0.01
    seed: int = 0
    max_bucket: int = 3
    layout: PlanLayout = field(default_factory=PlanLayout)
    workers: int = 0


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
        bucket: lowest one of the ladder that its sites fit.
        layout_bucket: lowest one in which the maps' pairs fit their layout.
        boxes: largest number of a scan.
        dropped_points: cropped to fit the largest bucket.
    """

    failed: int
    bucket: int = 0
    layout_bucket: int = 0
    boxes: int = 0
    dropped_points: int = 0


@dataclass(frozen=True)
class _Drawn:
    """This process's part of a step before it has a bucket: its cells (dataset, replica)."""

    step: int
    cells: dict[tuple[int, int], DrawnCell]
    needs: _Needs


@dataclass(frozen=True)
class _CellAt:
    """The cells of a process, numbered through all steps; travels to workers."""

    drawing: Drawing
    schedule: DatasetSchedule
    cells: tuple[tuple[int, int], ...]
    ladder: BucketLadder[LevelSizes]

    def __call__(self, number: int) -> DrawnCell:
        step, place = divmod(number, len(self.cells))
        return self.drawing.cell(step, *self.cells[place], self.ladder, self.schedule)


@dataclass
class JointStream:
    """Batches of several datasets, each dataset in an order of its own (`Drawing`).

    Attributes:
        datasets: in the order of the dataset axis.
        config: see there.
        process_layout: which part of every step is this process's, and how all agree on its shape.
        log: what this process met; a scan that cannot be read is left out, with its name and the reason in
            `log.skipped`, and the next one takes its place.
        waited: seconds for which steps were asked for and not yet ready.
    """

    datasets: Sequence[StreamDataset]
    config: StreamConfig
    process_layout: ProcessLayout = field(default_factory=ProcessLayout)
    log: Log = field(default_factory=Log)
    waited: float = 0.0

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
        self._cells = [
            (d, r) for d in range(len(self.datasets)) for r in range(replicas) if self.process_layout.owns(d, r)
        ]
        for d, _ in self._cells:
            if self.datasets[d].source is None:
                raise ValueError(f"this process works on {self.datasets[d].spec.name}, whose source is None.")
        self._schedule = DatasetSchedule(self.config.seed, [d.weight for d in self.datasets])
        self._padders = ThreadPoolExecutor(min(_MOST_PADDERS, available_cores()), "joint-stream-pad-cell")
        self.num_scans, self.ladder, self._fewest_box_rows = self._measured()

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the dataset that needs most is expected to be gone through as often as it repeats."""
        each = zip(self.datasets, self.num_scans, self.batch_sizes, strict=True)
        return max(
            math.ceil(count * (d.spec.repeats if d.repeats is None else d.repeats) / (size * d.weight))
            for d, count, size in each
        )

    @property
    def skipped(self) -> dict[str, str]:
        """Reason by "dataset/scan", of the scans that this process could not read."""
        return self.log.skipped

    @property
    def scans_per_second_per_core(self) -> float:
        """Scans that one core prepares in a second, from file to padded maps; NaN before the first."""
        seconds = sum(self.log.seconds.values())
        return self.log.scans / seconds if seconds else math.nan

    def step(self, step: int) -> JointStep:
        """The input of a step, from its number alone; in a run of several processes, all ask for it at once."""
        drawn = self._gathered(step, list(self.cells(step).values()))
        return self._padded(drawn, self.process_layout.exchange(np.array(drawn.needs, np.int32))())

    def cells(self, step: int) -> dict[tuple[int, int], DrawnCell]:
        """This process's cells (dataset, replica) of a step, before they have a bucket; other processes are not asked.

        Raises:
            InputError: no scan of a dataset can be used.
        """
        first = step * len(self._cells)
        return {cell: self._cell_at(first + place) for place, cell in enumerate(self._cells)}

    def steps(self, first: int, last: int, *, ahead: int = 2) -> Iterator[JointStep]:
        """Steps first..last-1, prepared by workers while the device works on the ones before.

        What processes exchange is asked for in the caller's thread, that of step k + 1 before step k is given: so all
        keep one order, and the answer does not wait for step k.

        Args:
            first: number of the first step.
            last: behind that of the last step.
            ahead: steps that are held ready.

        Raises:
            Exception: whatever preparing a step raised.
        """
        own = len(self._cells)
        cells = prepared_ahead(
            self._cell_at, first * own, last * own, workers=self.config.workers, ahead=(ahead - 1) * own
        )
        numbers = iter(range(first, last))
        drawn: deque[Future[_Drawn]] = deque()
        ready: deque[Future[JointStep]] = deque()
        drawer, padder = (ThreadPoolExecutor(1, name) for name in ("joint-stream-draw", "joint-stream-pad"))

        def draw_next(step: int) -> _Drawn:
            return self._gathered(step, [next(cells) for _ in range(own)])

        def draw_more() -> None:
            while len(drawn) < ahead and (number := next(numbers, None)) is not None:
                drawn.append(drawer.submit(draw_next, number))

        def pad_next() -> None:
            draw_more()
            if drawn:
                part = drawn.popleft()
                answer = self._told(part)
                # What could not be drawn is raised in its turn: till then all processes do the same in the same order.
                ready.append(padder.submit(lambda: self._padded(part.result(), answer())))
                draw_more()

        try:
            asked = time.monotonic()
            pad_next()
            while ready:
                pad_next()
                item = ready.popleft().result()
                self.waited += time.monotonic() - asked
                yield item
                asked = time.monotonic()
        finally:
            for pool in (drawer, padder):
                pool.shutdown(cancel_futures=True)
            cells.close()

    @property
    def _drawing(self) -> Drawing:
        config = self.config
        return Drawing(tuple(self.datasets), self.batch_sizes, config.replicas, config.voxel_size, config.seed)

    @property
    def _cell_at(self) -> _CellAt:
        return _CellAt(self._drawing, self._schedule, tuple(self._cells), self.ladder)

    def _gathered(self, step: int, parts: Sequence[DrawnCell]) -> _Drawn:
        """The cells of a step, and what they need of the bucket that all share."""
        cells = dict(zip(self._cells, parts, strict=True))
        for part in parts:
            self.log.add(part.log)
        batches = [part.batch for part in parts]
        needs = _Needs(
            failed=0,
            bucket=max((self.ladder.bucket(batch.tables.sizes) or 0 for batch in batches), default=0),
            layout_bucket=max(map(self._layout_bucket, batches), default=0),
            boxes=max((batch.num_boxes for batch in batches), default=0),
            dropped_points=sum(batch.dropped_points for batch in batches),
        )
        return _Drawn(step, cells, needs)

    def _layout_bucket(self, cell: ScanBatch) -> int:
        """Lowest bucket in which the maps' pairs fit their layout."""
        layout, highest = self.config.layout, self.ladder.max_bucket
        fits = (fits_layout(cell.tables, self.ladder.capacities(bucket), layout) for bucket in range(highest + 1))
        return next((bucket for bucket, fit in enumerate(fits) if fit), highest + 1)

    def _told(self, drawn: "Future[_Drawn]") -> Answer:
        """The answer to come to what a drawn part needs, or to its failure; waits until it is drawn."""
        try:
            wait([drawn])
        except BaseException:  # a second Ctrl-C
            self.process_layout.exchange(np.array(_Needs(failed=1), np.int32))()
            raise
        needs = _Needs(failed=1) if drawn.exception() is not None else drawn.result().needs
        return self.process_layout.exchange(np.array(needs, np.int32))

    def _padded(self, drawn: _Drawn, answers: Int32[np.ndarray, "processes needs"]) -> JointStep:
        """The step in the shape that all processes' parts fit."""
        _refuse_failures(answers[:, 0], f"prepare step {drawn.step}")
        most = _Needs(*answers.max(0).tolist())
        # Of this step alone: rows that had grown with the steps before would make a resumed stream another one.
        box_rows = _box_rows(most.boxes, self._fewest_box_rows)
        capacities = self.ladder.capacities(most.bucket)
        layout = self.config.layout
        if most.layout_bucket > most.bucket:
            layout = replace(layout, machine="any")  # every device's batch has the same structure

        present = self._schedule.present(drawn.step)

        def padded(key: tuple[int, int]) -> tuple[Batch, float]:
            started = time.thread_time()
            batch = pad_batch(drawn.cells[key].batch, capacities, box_rows, layout)
            return replace(batch, present=np.asarray(present[key[0]])), time.thread_time() - started

        cells = dict(zip(drawn.cells, self._padders.map(padded, drawn.cells), strict=True))
        started = time.thread_time()
        batch = self.process_layout.assemble({key: cell for key, (cell, _) in cells.items()})
        self.log.spent("pad", time.thread_time() - started + sum(seconds for _, seconds in cells.values()))
        names = tuple(
            tuple(name for (owner, _), cell in drawn.cells.items() if owner == d for name in cell.names)
            for d in range(len(self.datasets))
        )
        scans = sum(size for size, is_present in zip(self.batch_sizes, present, strict=True) if is_present)
        dropped = int(_Needs(*answers.sum(0).tolist()).dropped_points)
        return JointStep(drawn.step, batch, names, scans, dropped)

    def _measured(self) -> tuple[tuple[int, ...], BucketLadder[LevelSizes], int]:
        """Numbers of scans, the ladder and the rows for boxes, from every process's own datasets."""
        levels = len(LevelSizes._fields)
        log = Log()
        lengths, base, boxes = [0] * len(self.datasets), [0] * levels, 0
        try:
            for d in sorted({d for d, _ in self._cells}):
                lengths[d] = len(self._source(d))
                # Of one seed for all runs: runs that differ in it have the same shapes and the same program.
                scans = [
                    self._drawing.scan(d, position, log, seed=0) for position in range(min(_MEASURED, 2 * lengths[d]))
                ]
                boxes = max(boxes, *(len(scan.boxes) for scan in scans))
                sizes = [scan_sizes(scan, self.config.voxel_size) for scan in scans]
                ladder = BucketLadder.measured([sizes], self.batch_sizes[d] // self.config.replicas)
                base = [max(pair) for pair in zip(base, ladder.base, strict=True)]
        except BaseException:
            self.process_layout.exchange(np.array([1, *lengths, *base, boxes], np.int32))()
            raise
        answers = self.process_layout.exchange(np.array([0, *lengths, *base, boxes], np.int32))()
        _refuse_failures(answers[:, 0], "measure its scans")
        # What measuring took is no part of what steps take.
        self.log.add(Log(log.skipped, log.notes))
        _, *most = answers.max(0).tolist()
        ladder = BucketLadder(LevelSizes(*most[len(lengths) : -1]), max_bucket=self.config.max_bucket)
        return tuple(most[: len(lengths)]), ladder, _box_rows(most[-1], _BOX_ROWS)

    def _source(self, dataset: int) -> ScanSource:
        source = self.datasets[dataset].source
        assert source is not None
        return source


def _box_rows(boxes: int, fewest: int) -> int:
    """The smallest power of two times `fewest` that is at least `boxes`."""
    while fewest < boxes:
        fewest *= 2
    return fewest


def _refuse_failures(failed: Int32[np.ndarray, " processes"], of_what: str) -> None:
    if failed.any():
        which = ", ".join(map(str, np.flatnonzero(failed)))
        raise InputError(f"process {which} failed to {of_what}; what it printed says why.")

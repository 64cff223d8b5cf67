"""The stream of joint training: scans drawn, augmented and batched, step by step.

A step is a function of its number and the seed. Nothing is remembered from step to step, so that a resumed run sees the
same batches as an uninterrupted one, and every process of a run prepares its part of the same step. A shard is the
scans of one dataset on one device in one step. Any worker may draw any shard, in any order.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Int32

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import ExchangeFuture, MeshLayout
from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores
from h2a2_jax.loader.augment import augment, sample_points
from h2a2_jax.loader.batching import Batch, ScanBatch, collate_to_fit, no_scan, pad_batch, scan_sizes
from h2a2_jax.loader.workers import prepared_ahead
from h2a2_jax.models import PlanLayout, kind_of
from h2a2_jax.scans.scan import Scan, ScanError, ScanSource
from h2a2_jax.sparse import BucketLadder

_BLOCK = 1024
"""Steps whose datasets are drawn at once."""

_MEASURED = 24
"""Scans of each dataset that are measured for the bucket ladder."""

_MOST_PADDERS = 4
"""Threads that pad shards side by side; memory keeps no more of them busy."""

_BOX_ROWS = 16
"""Rows for boxes come in powers of two times this number."""


class DatasetSchedule:
    """Datasets of each step, by their weights, from the seed and the number of the step alone.

    A dataset of weight w takes part in a step with probability w, independently of the others. If no dataset would,
    the one that missed its weight by the smallest factor takes part. With all weights 1 every dataset takes part in
    every step.

    Args:
        seed: another seed gives other steps.
        weights: above 0 up to 1, in the order of the dataset axis.
    """

    def __init__(self, seed: int, weights: Sequence[float]):
        self._seed, self._weights = seed, np.asarray(weights, float)
        self._present: list[Bool[np.ndarray, "steps d"]] = []
        self._before: list[Int[np.ndarray, " d"]] = [np.zeros(len(weights), np.int64)]

    def present(self, step: int) -> tuple[bool, ...]:
        """Return for each dataset if it takes part in a step."""
        return tuple(self._block(step // _BLOCK)[step % _BLOCK].tolist())

    def before(self, dataset: int, step: int) -> int:
        """Number of earlier steps in which a dataset took part."""
        block, row = divmod(step, _BLOCK)
        return int(self._block(block)[:row, dataset].sum() + self._before[block][dataset])

    def _block(self, index: int) -> Bool[np.ndarray, "steps d"]:
        while len(self._present) <= index:
            number = len(self._present)
            draws = [
                np.random.default_rng([self._seed, d, number, 2]).random(_BLOCK) for d in range(len(self._weights))
            ]
            misses = np.stack(draws, axis=1) / self._weights
            present = misses < 1
            none = np.flatnonzero(~present.any(1))
            present[none, misses[none].argmin(1)] = True
            self._present.append(present)
            self._before.append(self._before[-1] + present.sum(0))
        return self._present[index]


@dataclass
class Log:
    """Problems, repairs and times of loading scans.

    Attributes:
        skipped: reason by "dataset/scan", of scans that could not be read.
        notes: repairs and omissions by "dataset/scan", a count by kind; only scans that have some.
        seconds: time of one core by task: "load", "sample and augment", "voxelise and build maps", "pad".
        scans: number of scans.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Mapping[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    scans: int = 0

    def add(self, other: "Log") -> None:
        """Add the entries of another log."""
        self.skipped |= other.skipped
        self.notes |= other.notes
        for task, seconds in other.seconds.items():
            self.spend(task, seconds)
        self.scans += other.scans

    def spend(self, task: str, seconds: float) -> None:
        """Add time of one core to a task."""
        self.seconds[task] = self.seconds.get(task, 0.0) + seconds


@dataclass(frozen=True)
class DrawnShard:
    """A shard before it has a bucket.

    Attributes:
        batch: sites, maps, features and boxes; the scans have lost their points.
        names: names of the scans.
        log: problems and times of loading them.
    """

    batch: ScanBatch
    names: tuple[str, ...]
    log: Log


def draw_scan(
    config: ExperimentConfig, source: ScanSource, dataset: int, position: int, log: Log, seed: int | None = None
) -> Scan:
    """The scan at a position of a dataset's endless stream, sampled and augmented.

    A dataset goes through a permutation of its scans, then through another one, for as long as the run lasts. If a scan
    cannot be read, the next one takes its place.

    Args:
        config: the run's configuration.
        source: training scans of the dataset.
        dataset: index on the dataset axis.
        position: from 0.
        log: takes problems and times.
        seed: another seed than the run's, for measuring.

    Raises:
        InputError: no scan of the dataset can be used.
    """
    recipe, seed = config.datasets[dataset], config.train.seed if seed is None else seed
    spec, rng = recipe.spec, np.random.default_rng([seed, dataset, position, 1])
    epoch, place = divmod(position, len(source))
    order = np.random.default_rng([seed, dataset, epoch]).permutation(len(source))
    started = time.thread_time()
    for index in np.roll(order, -place):
        try:
            scan = source[int(index)]
        except ScanError as error:
            log.skipped[f"{spec.name}/{error.scan}"] = str(error)
            continue
        if scan.notes:
            log.notes[f"{spec.name}/{scan.name}"] = scan.notes
        loaded = time.thread_time()
        if recipe.sample:
            scan = sample_points(scan, spec.train_sampling, rng)
        if recipe.augment:
            scan = augment(scan, spec.augmentation, rng, has_yaw=spec.has_yaw)
        log.spend("load", loaded - started)
        log.spend("sample and augment", time.thread_time() - loaded)
        log.scans += 1
        return scan
    raise InputError(
        f"none of the {len(source)} scans of {spec.name} can be used; the last: {list(log.skipped.values())[-1]}"
    )


@dataclass(frozen=True)
class _DrawShard:
    """Draws shards by number, counted through all steps; travels to worker processes."""

    config: ExperimentConfig
    sources: tuple[ScanSource | None, ...]
    replicas: int
    shards: tuple[tuple[int, int], ...]
    schedule: DatasetSchedule
    ladder: BucketLadder[Any]

    def __call__(self, number: int) -> DrawnShard:
        step, place = divmod(number, len(self.shards))
        dataset, replica = self.shards[place]
        source, log = self.sources[dataset], Log()
        assert source is not None
        sizes = batch_sizes(self.config)
        count = sizes[dataset] // self.replicas if self.schedule.present(step)[dataset] else 0
        first = self.schedule.before(dataset, step) * sizes[dataset] + replica * count
        scans = [draw_scan(self.config, source, dataset, first + i, log) for i in range(count)]
        names = tuple(scan.name for scan in scans)
        # Every shard of a step has as many rows: empty scans fill those of smaller and absent datasets.
        scans += [no_scan()] * (max(sizes) // self.replicas - count)
        started = time.thread_time()
        batch = collate_to_fit(scans, self.config.model, self.ladder)
        log.spend("voxelise and build maps", time.thread_time() - started)
        none = no_scan().points
        return DrawnShard(replace(batch, scans=tuple(replace(s, points=none, colors=none) for s in scans)), names, log)


@dataclass(frozen=True)
class JointStep:
    """The input of one step.

    Attributes:
        step: number of the step, from 0.
        batch: arrays with leading axes [D, replicas]; `Batch.present` marks the datasets that take part. Scans with
            neither sites nor boxes fill the rows up to the largest batch of a device.
        names: names of the scans that this process loaded, by dataset; empty for a dataset that takes no part.
        num_scans: scans of all datasets that take part, on all processes.
        dropped_points: points cropped to fit the largest bucket, on all processes.
    """

    step: int
    batch: Batch
    names: tuple[tuple[str, ...], ...]
    num_scans: int
    dropped_points: int


class _Needs(NamedTuple):
    """A process's demands on the shape of a step, exchanged with the other processes.

    Attributes:
        failed: 1 if the process could not prepare its part.
        bucket: lowest bucket of the ladder that its sites fit.
        layout_bucket: lowest bucket in which the maps' pairs fit their layout.
        boxes: largest number of boxes of a scan.
        dropped_points: points cropped to fit the largest bucket.
    """

    failed: int
    bucket: int = 0
    layout_bucket: int = 0
    boxes: int = 0
    dropped_points: int = 0

    def array(self) -> Int32[np.ndarray, " needs"]:
        """The numbers as they are exchanged."""
        return np.array(self, np.int32)


@dataclass(frozen=True)
class _Part:
    """This process's part of a step before it has a bucket: its shards by (dataset, replica)."""

    step: int
    shards: dict[tuple[int, int], DrawnShard]
    needs: _Needs


@dataclass
class JointStream:
    """Batches of several datasets, each dataset in its own order (`draw_scan`).

    Attributes:
        config: the run's configuration.
        sources: training scans by dataset; None for a dataset that other processes load.
        process_layout: shards of this process, and exchanges with the others.
        log: problems and times of this process.
        waited: seconds for which the caller waited for steps.
        layout: lists of the maps, by default those of the machine that JAX computes on.
        num_scans: training scans by dataset.
    """

    config: ExperimentConfig
    sources: Sequence[ScanSource | None]
    process_layout: MeshLayout
    log: Log = field(default_factory=Log)
    waited: float = 0.0

    def __post_init__(self) -> None:
        """Check the batch sizes, and measure scans for the bucket ladder.

        Raises:
            InputError: an empty dataset, a batch that the replicas cannot share evenly, or no scan that can be used.
        """
        replicas = self.process_layout.replicas
        self.batch_sizes = batch_sizes(self.config)
        for dataset, source, size in zip(self.config.datasets, self.sources, self.batch_sizes, strict=True):
            if source is not None and not len(source):
                raise InputError(f"dataset {dataset.name} has no scans; check its folder and info files.")
            if size % replicas:
                key = "train.batch_size" if dataset.batch_size is None else f"{dataset.name}.batch_size"
                raise InputError(
                    f"{key} is {size}, shared by {replicas} devices a dataset: choose a multiple of {replicas}."
                )
        self._shards = self.process_layout.shards
        self._padders = ThreadPoolExecutor(min(_MOST_PADDERS, available_cores()), "joint-stream-pad-shard")
        self.layout = PlanLayout.of(self.config.model)
        self.num_scans, self.ladder, self._fewest_box_rows = self._measure()
        self._schedule = DatasetSchedule(self.config.train.seed, step_weights(self.config, self.num_scans))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch (`batches_per_epoch`)."""
        return batches_per_epoch(self.config, self.num_scans)

    @property
    def scans_per_second_per_core(self) -> float:
        """Scans that one core prepares in a second, from file to padded arrays; NaN before the first scan."""
        seconds = sum(self.log.seconds.values())
        return self.log.scans / seconds if seconds else math.nan

    def step(self, step: int) -> JointStep:
        """Prepare one step without workers; in a run of several processes, all of them call this together."""
        part = self._part(step, list(self.shards(step).values()))
        return self._pad(part, self.process_layout.exchange(part.needs.array()))

    def shards(self, step: int) -> dict[tuple[int, int], DrawnShard]:
        """This process's shards (dataset, replica) of a step, without an exchange with other processes.

        Raises:
            InputError: no scan of a dataset can be used.
        """
        first, draw = step * len(self._shards), self._draw_shard()
        return {shard: draw(first + place) for place, shard in enumerate(self._shards)}

    def steps(self, first: int, last: int, *, ahead: int = 2) -> Iterator[JointStep]:
        """Yield steps first..last-1, prepared by workers while the device works on the steps before.

        Processes exchange their needs in the caller's thread, those of step k + 1 before step k is yielded. All
        processes therefore keep one order, and no exchange waits for step k.

        Args:
            first: number of the first step.
            last: number after that of the last step.
            ahead: steps that are held ready.

        Raises:
            Exception: an error from preparing a step, in the turn of that step.
        """
        per_step, workers = len(self._shards), count_workers(self.config)
        shards = prepared_ahead(
            self._draw_shard(), first * per_step, last * per_step, workers=workers, ahead=(ahead - 1) * per_step
        )
        numbers = iter(range(first, last))
        parts: deque[Future[_Part]] = deque()
        ready: deque[Future[JointStep]] = deque()
        drawer, padder = (ThreadPoolExecutor(1, name) for name in ("joint-stream-draw", "joint-stream-pad"))

        def draw_next(step: int) -> _Part:
            return self._part(step, [next(shards) for _ in range(per_step)])

        def draw_more() -> None:
            while len(parts) < ahead and (number := next(numbers, None)) is not None:
                parts.append(drawer.submit(draw_next, number))

        def pad_next() -> None:
            draw_more()
            if parts:
                part = parts.popleft()
                needs = self._exchange_needs(part)
                # A failure is raised in its turn: until then all processes do the same in the same order.
                ready.append(padder.submit(lambda: self._pad(part.result(), needs)))
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
            shards.close()

    def _draw_shard(self) -> _DrawShard:
        sources, shards = tuple(self.sources), tuple(self._shards)
        return _DrawShard(self.config, sources, self.process_layout.replicas, shards, self._schedule, self.ladder)

    def _part(self, step: int, shards: Sequence[DrawnShard]) -> _Part:
        """The shards of a step, and their needs of the bucket that all processes share."""
        for shard in shards:
            self.log.add(shard.log)
        batches = [shard.batch for shard in shards]
        needs = _Needs(
            failed=0,
            bucket=max((self.ladder.bucket(batch.tables.sizes) or 0 for batch in batches), default=0),
            layout_bucket=max(map(self._layout_bucket, batches), default=0),
            boxes=max((batch.num_boxes for batch in batches), default=0),
            dropped_points=sum(batch.dropped_points for batch in batches),
        )
        return _Part(step, dict(zip(self._shards, shards, strict=True)), needs)

    def _layout_bucket(self, batch: ScanBatch) -> int:
        """Lowest bucket in which the maps' pairs fit their layout."""
        highest, kind = self.ladder.max_bucket, kind_of(self.config.model)
        fits = (kind.fits(batch.tables, self.ladder.capacities(b), self.layout) for b in range(highest + 1))
        return next((bucket for bucket, fit in enumerate(fits) if fit), highest + 1)

    def _exchange_needs(self, part: "Future[_Part]") -> ExchangeFuture:
        """Wait for a part, and exchange its needs or its failure."""
        try:
            wait([part])
        except BaseException:  # a second Ctrl-C
            self.process_layout.exchange(_Needs(failed=1).array()).result()
            raise
        needs = _Needs(failed=1) if part.exception() is not None else part.result().needs
        return self.process_layout.exchange(needs.array())

    def _pad(self, part: _Part, exchanged: ExchangeFuture) -> JointStep:
        """The step in the shape that the parts of all processes fit."""
        needs = exchanged.result()
        _raise_failures(needs[:, 0], f"prepare step {part.step}")
        most = _Needs(*needs.max(0).tolist())
        # Of this step alone: rows that had grown with the steps before would make a resumed stream another one.
        box_rows = _box_rows(most.boxes, self._fewest_box_rows)
        capacities, layout = self.ladder.capacities(most.bucket), self.layout
        if most.layout_bucket > most.bucket:
            layout = replace(layout, machine="any")  # every device's batch has the same structure
        present = self._schedule.present(part.step)

        def pad(key: tuple[int, int]) -> tuple[Batch, float]:
            started = time.thread_time()
            batch = pad_batch(part.shards[key].batch, capacities, box_rows, layout)
            return replace(batch, present=np.asarray(present[key[0]])), time.thread_time() - started

        padded = dict(zip(part.shards, self._padders.map(pad, part.shards), strict=True))
        started = time.thread_time()
        batch = self.process_layout.assemble({key: batch for key, (batch, _) in padded.items()})
        self.log.spend("pad", time.thread_time() - started + sum(seconds for _, seconds in padded.values()))
        names = tuple(
            tuple(name for (owner, _), shard in part.shards.items() if owner == d for name in shard.names)
            for d in range(len(self.sources))
        )
        scans = sum(size for size, is_present in zip(self.batch_sizes, present, strict=True) if is_present)
        dropped = int(_Needs(*needs.sum(0).tolist()).dropped_points)
        return JointStep(part.step, batch, names, scans, dropped)

    def _measure(self) -> tuple[tuple[int, ...], BucketLadder[Any], int]:
        """Numbers of scans, the ladder and the rows for boxes, from the datasets of all processes."""
        config, log = self.config, Log()
        levels = kind_of(config.model).levels
        lengths, base, boxes = [0] * len(self.sources), [0] * len(levels._fields), 0
        try:
            for d in self.process_layout.datasets:
                source = self.sources[d]
                if source is None:
                    raise ValueError(f"this process works on {config.datasets[d].name}, whose source is None.")
                lengths[d] = len(source)
                # Of one seed for all runs: runs that differ in it have the same shapes and the same program.
                scans = [draw_scan(config, source, d, i, log, seed=0) for i in range(min(_MEASURED, 2 * lengths[d]))]
                boxes = max(boxes, *(len(scan.boxes) for scan in scans))
                sizes = [scan_sizes([scan], config.model) for scan in scans]
                ladder: BucketLadder[Any] = BucketLadder.measured(
                    [sizes], self.batch_sizes[d] // self.process_layout.replicas
                )
                base = [max(pair) for pair in zip(base, ladder.base, strict=True)]
        except BaseException:
            self.process_layout.exchange(np.array([1, *lengths, *base, boxes], np.int32)).result()
            raise
        found = self.process_layout.exchange(np.array([0, *lengths, *base, boxes], np.int32)).result()
        _raise_failures(found[:, 0], "measure its scans")
        # The times of measuring are not those of steps.
        self.log.add(Log(log.skipped, log.notes))
        _, *most = found.max(0).tolist()
        ladder = BucketLadder(levels(*most[len(lengths) : -1]), max_bucket=config.train.max_bucket)
        return tuple(most[: len(lengths)]), ladder, _box_rows(most[-1], _BOX_ROWS)


def batch_sizes(config: ExperimentConfig) -> tuple[int, ...]:
    """Scans of each dataset in a step, over all its devices."""
    return tuple(config.train.batch_size if d.batch_size is None else d.batch_size for d in config.datasets)


def step_weights(config: ExperimentConfig, num_scans: Sequence[int]) -> tuple[float, ...]:
    """Probability with which each dataset takes part in a step.

    It is the dataset's `weight`; for datasets with a `share`, times the batches that an epoch draws of the dataset over
    the most that it draws of one of them.

    Args:
        config: the run's configuration.
        num_scans: training scans by dataset.
    """
    batches = _batches_of_epoch(config, num_scans)
    most = max((count for d, count in zip(config.datasets, batches, strict=True) if d.share is not None), default=1.0)
    return tuple(
        d.weight * (1.0 if d.share is None else count / most) for d, count in zip(config.datasets, batches, strict=True)
    )


def batches_per_epoch(config: ExperimentConfig, num_scans: Sequence[int]) -> int:
    """Batches in which the dataset that needs most is expected to be gone through as often as it repeats.

    `num_scans` are training scans by dataset; a dataset with a `share` is gone through in that share.
    """
    each = zip(_batches_of_epoch(config, num_scans), step_weights(config, num_scans), strict=True)
    # Shares give several datasets the same number, but for rounding.
    return max(math.ceil(count / weight - 1e-6) for count, weight in each)


def _batches_of_epoch(config: ExperimentConfig, num_scans: Sequence[int]) -> list[float]:
    """Batches that an epoch draws of each dataset."""
    each = zip(config.datasets, num_scans, batch_sizes(config), strict=True)
    return [
        count * (d.spec.repeats if d.repeats is None else d.repeats) * (d.share or 1.0) / size
        for d, count, size in each
    ]


def count_workers(config: ExperimentConfig) -> int:
    """Number of processes that prepare scans; 0 for a thread of this one."""
    if config.train.workers is not None:
        return config.train.workers
    if jax.default_backend() == "cpu":
        return 0  # training keeps the cores busy
    return max(1, available_cores() - 2)


def _box_rows(boxes: int, fewest: int) -> int:
    """The smallest power of two times `fewest` that is at least `boxes`."""
    while fewest < boxes:
        fewest *= 2
    return fewest


def _raise_failures(failed: Int32[np.ndarray, " processes"], action: str) -> None:
    if failed.any():
        numbers = ", ".join(map(str, np.flatnonzero(failed)))
        raise InputError(f"process {numbers} failed to {action}; what it printed says why.")

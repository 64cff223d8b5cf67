"""Which scans a step sees: the schedule of the datasets, and scans drawn, augmented and batched.

Which scans make which cell of which step, and their sites and maps: a function of numbers and the seed alone.

A cell is what one device works on of one dataset in one step. Nothing here remembers anything, so that a cell may be
drawn by any worker, in any order, and again after a resume, and is the same.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Int

from h2a2_jax.errors import InputError
from h2a2_jax.loader.augment import augment, sample_points
from h2a2_jax.loader.batching import ScanBatch, collate_to_fit, no_scan
from h2a2_jax.models import LevelSizes
from h2a2_jax.scans.scan import Scan, ScanError, ScanSource
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.sparse import BucketLadder

_BLOCK = 1024
"""Steps that are drawn together."""


class DatasetSchedule:
    """Draws the datasets of each step by their weights, from the seed and the number of the step alone.

    A dataset of weight w takes part in a step with probability w, independently of the others; where that would leave
    a step without any, the one that missed its weight by the smallest factor takes part. With all weights 1 every
    dataset takes part in every step.

    Args:
        seed: another one gives other steps.
        weights: above 0 up to 1, in the order of the dataset axis.
    """

    def __init__(self, seed: int, weights: Sequence[float]):
        self._seed, self._weights = seed, np.asarray(weights, float)
        self._present: list[Bool[np.ndarray, "steps d"]] = []
        self._before: list[Int[np.ndarray, " d"]] = [np.zeros(len(weights), np.int64)]

    def present(self, step: int) -> tuple[bool, ...]:
        """Whether each dataset takes part in a step."""
        return tuple(self._block(step // _BLOCK)[step % _BLOCK].tolist())

    def before(self, dataset: int, step: int) -> int:
        """In how many of the steps before this one a dataset took part."""
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
        weight: probability, above 0 up to 1, with which it takes part in a step (`DatasetSchedule`).
    """

    spec: DatasetSpec
    source: ScanSource | None
    repeats: int | None = None
    sample: bool = True
    augment: bool = True
    batch_size: int | None = None
    weight: float = 1.0


@dataclass
class Log:
    """What was met while scans were drawn.

    Attributes:
        skipped: reason by "dataset/scan", of scans that could not be read.
        notes: what loading left out or repaired, a count by kind, by "dataset/scan"; only scans that have something.
        seconds: of one core's time, by what it was spent on: "load", "augment", "voxelise".
        scans: that were drawn.
    """

    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Mapping[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    scans: int = 0

    def add(self, other: "Log") -> None:
        """Take over what another one holds."""
        self.skipped |= other.skipped
        self.notes |= other.notes
        for part, seconds in other.seconds.items():
            self.spent(part, seconds)
        self.scans += other.scans

    def spent(self, part: str, seconds: float) -> None:
        """Add time of one core."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds


@dataclass(frozen=True)
class DrawnCell:
    """The scans of one dataset on one device in one step.

    Attributes:
        batch: sites, maps, features and boxes; its scans have lost their points.
        names: of the scans.
        log: what was met.
    """

    batch: ScanBatch
    names: tuple[str, ...]
    log: Log


@dataclass(frozen=True)
class Drawing:
    """Draws the scans of cells.

    A dataset goes through a permutation of its scans, then through another one, for as long as the run lasts. A scan
    that cannot be read is left out; the next one takes its place.

    Attributes:
        datasets: in the order of the dataset axis.
        batch_sizes: scans of each dataset in a step, over all devices.
        replicas: devices that share the scans of one dataset.
        voxel_size: metres.
        seed: of order, sampling, augmentation, and of which datasets take part in a step.
    """

    datasets: Sequence[StreamDataset]
    batch_sizes: Sequence[int]
    replicas: int
    voxel_size: float
    seed: int

    def cell(
        self, step: int, dataset: int, replica: int, ladder: BucketLadder[LevelSizes], schedule: DatasetSchedule
    ) -> DrawnCell:
        """One cell of a step; rows that it does not need hold scans with neither sites nor boxes.

        Args:
            step: its number, from 0.
            dataset: place on the dataset axis.
            replica: device of the dataset.
            ladder: a scan that does not fit its highest bucket is cropped.
            schedule: of the datasets, by the seed and weights of this drawing.

        Raises:
            InputError: no scan of the dataset can be used.
        """
        log = Log()
        own = self.batch_sizes[dataset] // self.replicas if schedule.present(step)[dataset] else 0
        first = schedule.before(dataset, step) * self.batch_sizes[dataset] + replica * own
        scans = [self.scan(dataset, first + i, log) for i in range(own)]
        names = tuple(scan.name for scan in scans)
        scans += [no_scan()] * (max(self.batch_sizes) // self.replicas - own)
        started = time.thread_time()
        batch = collate_to_fit(scans, self.voxel_size, ladder)
        log.spent("voxelise and build maps", time.thread_time() - started)
        none = no_scan().points
        return DrawnCell(replace(batch, scans=tuple(replace(s, points=none, colors=none) for s in scans)), names, log)

    def scan(self, dataset: int, position: int, log: Log, seed: int | None = None) -> Scan:
        """The scan at a position of a dataset's endless stream, sampled and augmented.

        Args:
            dataset: place on the dataset axis.
            position: from 0.
            log: is told what was met.
            seed: another one than that of the drawing.

        Raises:
            InputError: no scan of the dataset can be used.
        """
        recipe = self.datasets[dataset]
        source, spec = recipe.source, recipe.spec
        assert source is not None
        epoch, place = divmod(position, len(source))
        seed = self.seed if seed is None else seed
        order = np.random.default_rng([seed, dataset, epoch]).permutation(len(source))
        rng = np.random.default_rng([seed, dataset, position, 1])
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
            log.spent("load", loaded - started)
            log.spent("sample and augment", time.thread_time() - loaded)
            log.scans += 1
            return scan
        raise InputError(
            f"none of the {len(source)} scans of {spec.name} can be used; the last: {list(log.skipped.values())[-1]}"
        )

"""Batches that are not finite: found, kept as files, named, and run again.

The step leaves the state as it was (`h2a2_jax.training.step`). The watch looks at the metrics of a step one step later,
while the device is at work on the next one, so that looking takes no time.

A kept batch is <batch>.npz. For each shard (the scans of one dataset on one device), by its number c, it holds "c.keys"
int64 [n] of the voxels (`SiteSet`), "c.features" float32 [n, 3], "c.boxes" float32 [g, 7], "c.labels" int32 [g],
"c.box_scans" int32 [g]; and "cells", JSON with the dataset and the scans of every shard.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, Int64

from h2a2_jax.checkpoint.parameter_groups import place_of
from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.checkpoint.train_state import merge_model, split_model
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import is_main, say
from h2a2_jax.errors import InputError, reason_of
from h2a2_jax.files import whole_file
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.batching import ScanBatch, no_scan, pad_batch
from h2a2_jax.loader.stream import DrawnShard, JointStep
from h2a2_jax.models import DetectorConfig, DetectorNetwork, PlanLayout, kind_of
from h2a2_jax.scans.scan import Scan
from h2a2_jax.sparse import SiteSet, SparseTensor
from h2a2_jax.training.callbacks import Callback, Training
from h2a2_jax.training.gradients import detector_loss, targets_of
from h2a2_jax.training.step import StepMetrics, tensor_names
from h2a2_jax.untrusted.arrays import load_arrays

FOLDER = "nonfinite"
"""In the workdir: the kept batches, `<batch>.npz`; each of several processes has a folder of its own in it."""

_ARRAYS = ("keys", "features", "boxes", "labels", "box_scans")
_MOST_KEPT, _MOST_SCANS = 20, 1 << 16
_MOST_NAMED = 10


@dataclass(frozen=True)
class KeptShard:
    """The scans of one dataset on one device.

    Attributes:
        dataset: name of the dataset.
        names: names of the scans.
        num_scans: rows of the batch, with rows without a scan.
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
    def of(cls, dataset: str, shard: DrawnShard) -> "KeptShard":
        """Keep a shard of the stream."""
        batch, scans = shard.batch, shard.batch.scans
        return cls(
            dataset,
            shard.names,
            len(scans),
            batch.tables.voxels.keys,
            batch.features,
            np.concatenate([scan.boxes for scan in scans]).astype(np.float32),
            np.concatenate([scan.labels for scan in scans]).astype(np.int32),
            np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan.boxes) for scan in scans]),
        )

    def bad_inputs(self) -> tuple[str, ...]:
        """Scans with a colour or a box that is not finite."""
        rows = ~np.isfinite(self.features).all(1)
        bad = {*self._sites.scan[rows].tolist(), *self.box_scans[~np.isfinite(self.boxes).all(1)].tolist()}
        return tuple(name for number, name in enumerate(self.names) if number in bad)

    def suspects(self) -> str:
        """Name the scans with an input that is not finite; without such a scan, all of them."""
        if names := self.bad_inputs():
            return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} values that are not finite"
        return f"scans {', '.join(self.names)}" if self.names else ""

    def batch(self, model: DetectorConfig) -> ScanBatch:
        """The scans with the maps of a detector, as they were fed to the network; without points."""
        scans, empty = [], no_scan()
        for number in range(self.num_scans):
            of_scan = self.box_scans == number
            name = self.names[number] if number < len(self.names) else ""
            scans.append(Scan(name, empty.points, empty.colors, self.boxes[of_scan], self.labels[of_scan]))
        return ScanBatch(tuple(scans), kind_of(model).tables(self._sites, model), self.features)

    @property
    def _sites(self) -> SiteSet:
        return SiteSet(self.keys, 1, self.num_scans)


def kept_batches(workdir: Path) -> dict[int, list[Path]]:
    """Files of the batches that a run kept, by number, rising; each process wrote its own file of a batch."""
    found: dict[int, list[Path]] = {}
    for path in sorted((workdir / FOLDER).rglob("*.npz")):
        if path.stem.isdecimal():
            found.setdefault(int(path.stem), []).append(path)
    return dict(sorted(found.items()))


def write_batch(path: Path, shards: Sequence[KeptShard]) -> None:
    """Write the file, which is there whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    listed = [{"dataset": s.dataset, "names": s.names, "num_scans": s.num_scans} for s in shards]
    arrays = {f"{i}.{name}": getattr(shard, name) for i, shard in enumerate(shards) for name in _ARRAYS}
    with whole_file(path) as part:
        np.savez(part, cells=np.array(json.dumps(listed)), **arrays)


def read_batch(path: Path) -> list[KeptShard]:
    """Read the shards of a file.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        arrays = load_arrays(path)
        return [_shard(entry, arrays, f"{i}.") for i, entry in enumerate(json.loads(str(arrays["cells"])))]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is no batch that a run kept ({reason_of(error)}): give one of its folder nonfinite."
        ) from error


def _shard(entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray], prefix: str) -> KeptShard:
    """The shard of an entry and its arrays; ValueError for arrays of other types or shapes than `KeptShard` has."""
    keys, features, boxes, labels, box_scans = found = [arrays[prefix + name] for name in _ARRAYS]
    count, types = entry["num_scans"], [array.dtype.str for array in found]
    shapes = [(len(keys),), (len(keys), 3), (len(boxes), 7), (len(boxes),), (len(boxes),)]
    if types != ["<i8", "<f4", "<f4", "<i4", "<i4"] or [array.shape for array in found] != shapes:
        raise ValueError("its arrays have other types or shapes")
    names = tuple(map(str, entry["names"]))
    if type(count) is not int or not len(names) <= count <= _MOST_SCANS or not isinstance(entry["dataset"], str):
        raise ValueError("its shards are described in another way")
    if len(boxes) and not 0 <= box_scans.min() <= box_scans.max() < count:
        raise ValueError("it has a box of no scan")
    return KeptShard(entry["dataset"], names, count, keys, features, boxes, labels, box_scans)


class NonFiniteError(Exception):
    """Too many steps in a row were skipped: the run ends."""


class NonFiniteWatch(Callback):
    """Name and keep the batches of skipped steps, and end a run that skips too many in a row.

    Args:
        training: the run, at its first step.

    Attributes:
        skipped: steps skipped so far, as far as the watch has looked.
    """

    def __init__(self, training: Training):
        self._training, self._tensors = training, tensor_names(training.state)
        self.skipped, self._named = 0, 0
        self._pending: tuple[int, StepMetrics] | None = None

    def after_batch(self, training: Training, item: JointStep, metrics: StepMetrics) -> None:
        """Look at the batch before this one.

        Raises:
            NonFiniteError: too many steps in a row were skipped.
        """
        before, self._pending = self._pending, (item.step, metrics)  # not the batch, which fills memory
        if before is not None:
            self._look(*before)

    def after_step(self, training: Training, metrics: StepMetrics) -> None:
        """Look at the last batch now, and wait for the device, if the step is logged or saved.

        Raises:
            NonFiniteError: too many steps in a row were skipped.
        """
        if training.is_logged and self._pending is not None:
            self._look(*self._pending)
            self._pending = None

    def _look(self, number: int, metrics: StepMetrics) -> None:
        found, self.skipped, in_row = jax.device_get((metrics.nonfinite, metrics.skipped, metrics.skipped_in_row))
        if not found.any():
            return
        config = self._training.config
        names = config.dataset_names
        drawn = self._training.stream.shards(number)
        shards = [KeptShard.of(names[d], shard) for (d, _), shard in sorted(drawn.items())]
        path = self._keep(number, shards)
        bad = {names[d] for d in np.flatnonzero(found.any(1)).tolist()}
        if self._named < _MOST_NAMED:
            if is_main() or any(shard.dataset in bad for shard in shards):  # who loads the scans knows their names
                print(self._report(number, found, shards, path), flush=True)
        elif self._named == _MOST_NAMED:
            say("Further batches that are not finite are counted (skipped_steps in metrics.jsonl), not named.")
        self._named += 1
        if in_row >= config.train.max_skipped_steps:
            raise NonFiniteError(
                f"{in_row} steps in a row were not finite, so that the run ends; its parameters are those from before "
                "them. Look at one of them again with: python run.py --mode=replay "
                f"--workdir={self._training.workdir}"
            )

    def _report(self, number: int, found: np.ndarray, shards: Sequence[KeptShard], path: Path) -> str:
        parts = []
        for d in np.flatnonzero(found.any(1)).tolist():
            dataset = self._training.config.dataset_names[d]
            columns = [name for name, bad in zip(self._tensors, found[d], strict=True) if bad]
            scans = [shard.suspects() for shard in shards if shard.dataset == dataset]
            where = "; ".join(filter(None, scans)) or "scans of another process"
            parts.append(f"{', '.join(places_of(columns))} of {dataset} ({where})")
        return f"Batch {number} is not finite and is skipped: {'; '.join(parts)}. It is kept in {path}."

    def _keep(self, number: int, shards: Sequence[KeptShard]) -> Path:
        """Write the batch, and remove the oldest of many: the last ones are those that end a run."""
        folder = self._training.workdir / FOLDER
        if jax.process_count() > 1:
            folder /= f"process{jax.process_index()}"
        others = sorted(folder.glob("*.npz"), key=lambda path: int(path.stem))
        for path in others[: max(0, len(others) + 1 - _MOST_KEPT)]:
            path.unlink()
        path = folder / f"{number}.npz"
        write_batch(path, shards)
        return path


def places_of(columns: Sequence[str]) -> list[str]:
    """Name the places of values that are not finite: the loss, gradients by part of the network, statistics."""
    of_gradients = dict.fromkeys(place_of(name) for name in columns if name not in ("loss", "statistics"))
    parts = ["the loss"] if "loss" in columns else []
    parts += [f"the gradients of {', '.join(of_gradients)}"] if of_gradients else []
    return parts + (["the running statistics"] if "statistics" in columns else [])


@dataclass(frozen=True)
class ShardReplay:
    """Results of running a dataset's scans of a kept batch again.

    Attributes:
        dataset: name of the dataset.
        scans: names of the scans.
        bad_inputs: scans with a colour or a box that is not finite.
        loss: loss of the shard; NaN or infinite if it is not finite.
        first: name of the first layer whose output is not finite; None: all outputs are finite.
        places: further places that are not finite: the loss, gradients by part of the network, running statistics.
    """

    dataset: str
    scans: tuple[str, ...]
    bad_inputs: tuple[str, ...]
    loss: float
    first: str | None
    places: tuple[str, ...]

    @property
    def is_finite(self) -> bool:
        """True if all inputs and results are finite."""
        return not (self.bad_inputs or self.first or self.places)

    def text(self) -> str:
        """Describe the results in a line."""
        head = f"{self.dataset} ({', '.join(self.scans)}): loss {self.loss:.6g}"
        if self.is_finite:
            return f"{head}, everything is finite."
        parts = [f"not finite among the inputs: {', '.join(self.bad_inputs)}"] if self.bad_inputs else []
        parts += [f"first in the network: {self.first}"] if self.first else []
        parts += [f"not finite: {', '.join(self.places)}"] if self.places else []
        return f"{head}; {'; '.join(parts)}."


class Replay(NamedTuple):
    """Results of running a kept batch again.

    Attributes:
        number: number of the batch.
        step: step of the checkpoint whose parameters were used.
        shards: results of each shard, as if each device had its dataset alone.
    """

    number: int
    step: int
    shards: list[ShardReplay]


def replay(workdir: Path, number: int | None = None) -> Replay:
    """Run a kept batch again, in training mode, with the newest parameters saved before its step or right after it.

    Skipped steps change no parameter, so that a run which ended because of them has the parameters that led to them. If
    all checkpoints are later, the oldest one is taken.

    Args:
        workdir: folder of the run.
        number: number of the batch; None: the last one kept.

    Raises:
        InputError: there is no such batch, or no checkpoint.
    """
    kept = kept_batches(workdir)
    if not kept:
        raise InputError(f"{workdir} has no kept batch: nothing was not finite in that run, or --workdir is another.")
    number = [*kept][-1] if number is None else number
    if number not in kept:
        listed = ", ".join(map(str, kept))
        raise InputError(f"{workdir} has no kept batch {number}; there are those of {listed} (--step).")
    shards = [shard for path in kept[number] for shard in read_batch(path)]
    with CheckpointStore(workdir / "checkpoints") as store:
        batches = store.stored_config(store.existing(None)).optim.accumulate_steps
        step = checkpoint_of(number // batches, store.steps())
        detector, config = store.restore_model(step, averaged=False)
    return Replay(number, step, [_replay_shard(detector, config, shard) for shard in shards])


def checkpoint_of(step: int, saved: Sequence[int]) -> int:
    """The checkpoint with the parameters of a skipped step, counted from 0.

    Args:
        step: number of the skipped step.
        saved: steps of the checkpoints, rising.

    Returns:
        The newest one saved before the step or right after it; if all are later, the oldest.
    """
    return max((before for before in saved if before <= step + 1), default=saved[0])


def _replay_shard(detector: DetectorNetwork, config: ExperimentConfig, shard: KeptShard) -> ShardReplay:
    names = config.dataset_names
    index = names.index(shard.dataset)
    host = shard.batch(config.model)
    layout = PlanLayout.of(config.model)
    batch = jax.tree.map(jnp.asarray, pad_batch(host, host.tables.sizes, max(host.num_boxes, 1), layout))
    targets = jax.tree.map(lambda leaf: leaf[index], targets_of(config.specs, config.model))
    graph, exclusive, shared, stats = split_model(detector)

    def loss(shared: Any, exclusive: Any) -> tuple[jax.Array, tuple[Mapping[str, jax.Array], Any]]:
        seen: dict[str, jax.Array] = {}

        def tap(name: str, value: Any) -> None:
            rows = value.features if isinstance(value, SparseTensor) else value
            valid = value.sites.valid[:, None] if isinstance(value, SparseTensor) else True
            seen[name] = jnp.isfinite(jnp.where(valid, rows, 0)).all()

        context = ForwardContext(
            DatasetContext.one(index, len(names)),
            training=True,
            dtype=None if config.train.precision == "float32" else jnp.dtype(config.train.precision),
            tap=tap,
        )
        model = merge_model(graph, exclusive, shared, jax.tree.map(jnp.copy, stats))
        losses = detector_loss(model, batch, targets, context).losses
        return losses.total, (seen, split_model(model)[3])

    with_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, (seen, new_stats)), grads = with_gradients(shared, exclusive)
    finite = [bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads)]
    bad = [name for name, ok in zip([*flat_names(shared), *flat_names(exclusive)], finite, strict=True) if not ok]
    bad += [] if all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new_stats)) else ["statistics"]
    bad += [] if np.isfinite(value) else ["loss"]
    first = next((name for name, ok in seen.items() if not ok), None)
    return ShardReplay(shard.dataset, shard.names, shard.bad_inputs(), float(value), first, tuple(places_of(bad)))

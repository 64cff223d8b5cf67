"""Checkpoints of a run: written in the background, restored on any number of devices.

A checkpoint of step s is the folder <directory>/<s> with the items params, batch_stats, optimizer (both optimiser
states, counters, balancer), averages if the run averages its parameters, and config (JSON, with the checksums of the
items). `h2a2_jax.checkpoint.tree` describes the arrays in them.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from h2a2_jax.checkpoint.integrity import AVERAGES, CheckpointFiles, DamagedCheckpointError
from h2a2_jax.checkpoint.train_state import Averages, TrainState, head_configs, merge_model, split_model
from h2a2_jax.checkpoint.tree import (
    COUNTERS,
    Arrays,
    differences,
    filled,
    host_arrays,
    reordered_balancer,
    stacked,
    stored_state,
)
from h2a2_jax.config import ExperimentConfig, from_json, leaves_of, to_json
from h2a2_jax.errors import InputError
from h2a2_jax.models import DetectorConfig, DetectorNetwork, HeadConfig, build_network
from h2a2_jax.scans.specs import DatasetSpec

CHECKPOINT_VERSION = 1
"""Version of the layout; stored beside the config."""

_SHOWN = 3


class CheckpointStore(CheckpointFiles):
    """The checkpoints of one run: training states, and the detectors in them.

    A context manager, which closes at its end, so that the last checkpoint is complete.
    """

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: TrainState,
        config: ExperimentConfig,
        names: Sequence[str],
        scans: Sequence[int] | None = None,
    ) -> None:
        """Store a state, on any devices; return when it is copied, and write it in the background.

        A checkpoint counts only when it is finished, whatever kills the program before. A step that is stored already
        stays unchanged.

        Args:
            step: optimiser steps done.
            state: the state after them.
            config: the run's config.
            names: the datasets in the order of the dataset axis.
            scans: number of training scans of each; None: not stored.

        Raises:
            UnsavedCheckpointError: this checkpoint, or the one before, could not be written.
        """
        if step in self.steps():
            return
        header = {"version": CHECKPOINT_VERSION, "datasets": list(names), "config": json.loads(to_json(config))}
        if scans is not None:
            header["scans"] = dict(zip(names, map(int, scans), strict=True))
        self.save_items(step, stored_state(state, _specs(config, names)), header)

    def stored_config(self, step: int) -> ExperimentConfig:
        """Read the config that a checkpoint was saved with."""
        return self._read_header(self.existing(step)).config

    def stored_scans(self, step: int) -> dict[str, int]:
        """Read the numbers of training scans by dataset of a checkpoint; empty where none are stored."""
        return self._read_header(self.existing(step)).scans

    def restore_state(
        self, step: int | None, like: TrainState, names: Sequence[str], config: ExperimentConfig | None = None
    ) -> TrainState:
        """Restore a whole training state to resume from.

        Args:
            step: number of the checkpoint; None: the last one.
            like: state of the wanted shapes; each array is restored to the devices of its counterpart here. Its values
                are not read.
            names: the datasets in the order of `like`'s dataset axis; the checkpoint may have another order.
            config: the run's config; if given, a difference in the architecture is reported by its config key.

        Raises:
            InputError: there is no such checkpoint, or it holds other datasets, another architecture or another
                optimiser.
        """
        step = self.existing(step)
        header = self._read_header(step)
        self._check_datasets(step, header.names, names)
        if config is not None:
            self._check_model(step, header.config.model, config.model)
        with self._whole(step):
            return self._restored(step, like, names, header)

    def _restored(self, step: int, like: TrainState, names: Sequence[str], header: "_Header") -> TrainState:
        items = self.read_items(step, tuple(header.checksums), header.checksums)
        if header.is_old:
            self._check_step(step, int(items["optimizer"]["step"]))
        # The model first: if the architecture differs, the error message should name it and not the optimiser.
        exclusive, shared, stats = self._fill_model(step, (like.exclusive, like.shared, like.stats), items, names)
        optimizer = items["optimizer"]
        balancer = reordered_balancer(optimizer["balancer"], like.balancer, header.names, names)
        # Scalars of the optimiser state, such as its count, have no dataset axis.
        exclusive_optimizer = stacked(optimizer["datasets"], names) | optimizer["scalars"]
        counters = {name: getattr(like, name) for name in COUNTERS}
        agreement = like.agreement
        if agreement is not None:
            agreement = self._fill(step, "agreement of gradients", agreement, stacked(optimizer["agreement"], names))
        averages = like.averages
        if averages is not None:
            # A run that did not average so far begins its averages with its parameters.
            parts = (averages.exclusive, averages.shared, averages.stats)
            own, common, statistics = self._fill_model(step, parts, items.get(AVERAGES) or items, names)
            averages = Averages(common, own, statistics)
        return TrainState(
            shared=shared,
            exclusive=exclusive,
            stats=stats,
            shared_optimizer=self._fill(step, "optimiser", like.shared_optimizer, optimizer["shared"]),
            exclusive_optimizer=self._fill(step, "optimiser", like.exclusive_optimizer, exclusive_optimizer),
            balancer=self._fill(step, "gradient harmonisation (harmonize.method)", like.balancer, balancer),
            averages=averages,
            accumulated=like.accumulated,
            agreement=agreement,
            **filled(counters, {name: optimizer.get(name, 0) for name in COUNTERS}),
        )

    def restore_model(
        self, step: int | None = None, expected: ExperimentConfig | None = None, *, averaged: bool = True
    ) -> tuple[DetectorNetwork, ExperimentConfig]:
        """Restore the detector alone, built from the stored config, on JAX's default device.

        The arguments are those of `restore_detector`.

        Returns:
            The detector and the stored config. The dataset axis has the order of the datasets of `expected`, else of
            the stored config.
        """
        stored = self.restore_detector(step, expected, averaged=averaged)
        return stored.build(), stored.config

    def restore_detector(
        self, step: int | None = None, expected: ExperimentConfig | None = None, *, averaged: bool = True
    ) -> "StoredDetector":
        """Read the arrays of a detector, without building it.

        Args:
            step: number of the checkpoint; None: the last one.
            expected: config whose architecture and datasets the checkpoint must have; sets the order of the datasets.
            averaged: True takes the averages of parameters and statistics if the run kept some.
        """
        step = self.existing(step)
        header = self._read_header(step)
        names, config = header.names, header.config
        if expected is not None:
            self._check_datasets(step, names, expected.dataset_names)
            self._check_model(step, config.model, expected.model)
            names = list(expected.dataset_names)
        origin = {"run": str(self.directory.parent), "step": step}
        with self._whole(step):
            parts = _detector_arrays(self._read_detector(step, header, averaged), names)
        specs = tuple(_specs(config, names))
        return StoredDetector(config, specs, parts, self.place(step), origin)

    def restore_arrays(self, step: int | None = None) -> "StoredModel":
        """Read the stored arrays of a checkpoint's detector (None: the last one), for one of any architecture."""
        step = self.existing(step)
        header = self._read_header(step)
        with self._whole(step):
            items = self._read_detector(step, header, averaged=True)
            return StoredModel(step, header.config, **items["params"], statistics=items["batch_stats"])

    def _read_detector(self, step: int, header: "_Header", averaged: bool) -> Mapping[str, Any]:
        """Read the items params and batch_stats, or their averages."""
        if averaged and AVERAGES in header.checksums:
            return self.read_items(step, (AVERAGES,), header.checksums)[AVERAGES]
        return self.read_items(step, ("params", "batch_stats"), header.checksums)

    def _read_header(self, step: int) -> "_Header":
        stored = self.read_config(step)
        if stored.get("version") != CHECKPOINT_VERSION:
            raise InputError(
                f"{self.place(step)} has version {stored.get('version')}, this program reads version "
                f"{CHECKPOINT_VERSION}: use the program that stored it."
            )
        try:
            config = from_json(json.dumps(stored.get("config")))
        except InputError as error:
            raise InputError(f"{self.place(step)} has a config that this program cannot read: {error}") from error
        names: Any = stored.get("datasets")
        are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not are_names or sorted(names) != sorted(config.dataset_names):
            raise DamagedCheckpointError(
                f"{self.place(step)} is damaged: it names the datasets {names!r:.200}, its config "
                f"{', '.join(config.dataset_names)}; choose another step."
            )
        scans = stored.get("scans")
        return _Header(
            names, config, stored["checksums"], "step" not in stored, scans if isinstance(scans, dict) else {}
        )

    @contextlib.contextmanager
    def _whole(self, step: int) -> Iterator[None]:
        """Turn what the wrong layout of a checkpoint's items leads to into an error that names the checkpoint."""
        try:
            yield
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DamagedCheckpointError(
                f"{self.place(step)} does not hold the arrays of a detector and its training "
                f"({type(error).__name__}: {str(error)[:200]}): choose another step."
            ) from error

    def _check_datasets(self, step: int, saved: Sequence[str], names: Sequence[str]) -> None:
        if set(saved) != set(names):
            raise InputError(
                f"{self.place(step)} holds the datasets {', '.join(saved)}, the config asks for {', '.join(names)}: "
                "give the same ones, in any order."
            )

    def _check_model(self, step: int, saved: DetectorConfig, given: DetectorConfig) -> None:
        theirs, ours = leaves_of(saved), leaves_of(given)
        if (saved.selection is None) != (given.selection is None):
            on, off = ("on", "off") if given.selection is None else ("off", "on")
            found = [f"model.selection is {on} in the checkpoint and {off} in the config"]
        else:
            keys = [key for key in theirs if theirs[key] != ours[key]]
            found = [f"model.{key} is {theirs[key]} in the checkpoint and {ours[key]} in the config" for key in keys]
        _refuse_differences(self.place(step), "model", found)

    def _fill_model(
        self, step: int, parts: tuple[Any, Any, Any], items: Mapping[str, Any], names: Sequence[str]
    ) -> tuple[Any, Any, Any]:
        """Fill (exclusive, shared, statistics), in the order of `split_model`, from the items of a detector."""
        exclusive, shared, stats = (
            self._fill(step, "model", part, stored)
            for part, stored in zip(parts, _detector_arrays(items, names), strict=True)
        )
        return exclusive, shared, stats

    def _fill(self, step: int, part: str, like: Any, stored: Arrays) -> Any:
        return _fill(self.place(step), part, like, stored)


class _Header(NamedTuple):
    """The stored config of a checkpoint, with the names of its datasets in order and the checksums of its items.

    Attributes:
        is_old: True where the step is not stored with the config, but among the counters alone.
        scans: numbers of training scans by dataset.
    """

    names: list[str]
    config: ExperimentConfig
    checksums: Mapping[str, int]
    is_old: bool
    scans: dict[str, int]


@dataclass(frozen=True)
class StoredDetector:
    """The detector of a checkpoint, before a model is built of its arrays, which takes longer than reading them.

    Attributes:
        config: the stored config.
        specs: the datasets in the order of the dataset axis.
        parts: (exclusive, shared, statistics) by path, in the order of `split_model`; those of the datasets stacked.
        place: the checkpoint, as the beginning of an error message.
        origin: facts for a model card, of JSON values: "run" and "step" of a checkpoint, or those that a pretrained
            folder holds (`h2a2_jax.pretrained.card.CardFacts`).
    """

    config: ExperimentConfig
    specs: tuple[DatasetSpec, ...]
    parts: tuple[Arrays, Arrays, Arrays]
    place: str
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: DetectorNetwork, config: ExperimentConfig, place: str) -> "StoredDetector":
        """Take the arrays of a built detector, which has the config's datasets in their order, to the host."""
        _, *parts = split_model(model)
        exclusive, shared, stats = map(host_arrays, parts)
        return cls(config, tuple(config.specs), (exclusive, shared, stats), place)

    @property
    def heads(self) -> tuple[HeadConfig, ...]:
        """Configs of the datasets' heads."""
        return tuple(head_configs(self.specs, self.config.model))

    def build(self) -> DetectorNetwork:
        """Build the detector on JAX's default device.

        Raises:
            InputError: the arrays are those of another architecture than the config's.
        """
        graph, *shapes = split_model(self.shapes())
        exclusive, shared, stats = map(filled, shapes, self.parts)
        return merge_model(graph, exclusive, shared, stats)

    def shapes(self) -> DetectorNetwork:
        """Build the detector with shapes in place of arrays; errors are as of `build`."""
        model = nnx.eval_shape(lambda: build_network(self.config.model, self.heads, rngs=_OneKey(0)))
        for like, stored in zip(split_model(model)[1:], self.parts, strict=True):
            _refuse_differences(self.place, "model", differences(stored, like))
        return model


class _OneKey(nnx.Rngs):
    """Random streams that give the same key again and again: counting draws takes longer than all else there."""

    def params(self) -> Any:
        """The key."""
        return jax.random.key(0)


class StoredModel(NamedTuple):
    """The arrays of a checkpoint's detector by path, in the layout of `h2a2_jax.checkpoint.tree`."""

    step: int
    config: ExperimentConfig
    shared: Arrays
    datasets: dict[str, Arrays]  # parameters by dataset name
    statistics: dict[str, Arrays]


def restore_checkpoint(
    path: str | Path, step: int | None = None, expected: ExperimentConfig | None = None
) -> tuple[DetectorNetwork, ExperimentConfig]:
    """Restore the detector of a checkpoint and the config it is built by, as `CheckpointStore.restore_model` does.

    The path is the folder of a run, the "checkpoints" in it, or the folder of one step in that; without a step in the
    path or beside it, the last one is restored. An InputError explains a checkpoint that is missing, damaged or not of
    the expected config.
    """
    place = existing_place(path)
    with CheckpointStore(place.directory) as store:
        return store.restore_model(place.step if step is None else step, expected)


def read_detector(
    path: str | Path, step: int | None = None, expected: ExperimentConfig | None = None
) -> StoredDetector:
    """Read a checkpoint's detector without building it; arguments and errors are those of `restore_checkpoint`."""
    place = existing_place(path)
    with CheckpointStore(place.directory) as store:
        return store.restore_detector(place.step if step is None else step, expected)


class CheckpointPlace(NamedTuple):
    """Folder of a run, folder of its checkpoints, and the step if the path is the folder of one."""

    run: Path
    directory: Path
    step: int | None


def existing_place(path: str | Path) -> CheckpointPlace:
    """Resolve a path as `checkpoint_place` does; raise InputError if it is missing or a file."""
    path = Path(path)
    if path.is_file():
        raise InputError(
            f"{path} is a file; a checkpoint is a folder, that of a run or one in its checkpoints. Weights of other "
            "programs are turned into one by `python -m h2a2_jax.convert.tr3d`."
        )
    if not path.is_dir():
        raise InputError(f"There is no folder {path}: train first, or give the folder of a run, its workdir.")
    return checkpoint_place(path)


def checkpoint_place(path: Path) -> CheckpointPlace:
    """Resolve the folder of a run, of its checkpoints or of one of them.

    Checkpoints that were copied into a folder of another name count as a run of their own.
    """
    step = int(path.name) if path.name.isdecimal() and (path / "params").is_dir() else None
    directory = path if step is None else path.parent
    if directory.name == "checkpoints":
        return CheckpointPlace(directory.parent, directory, step)
    inside = directory / "checkpoints"
    # Folders called by numbers do not make it a folder of checkpoints if `inside` is there: they hold results.
    if step is None and (inside.is_dir() or not any(child.name.isdecimal() for child in directory.glob("*/"))):
        return CheckpointPlace(directory, inside, None)
    return CheckpointPlace(directory, directory, step)


def _detector_arrays(items: Mapping[str, Any], names: Sequence[str]) -> tuple[Arrays, Arrays, Arrays]:
    """(exclusive, shared, statistics) by path, those of the datasets stacked, from the items of a detector."""
    params = items["params"]
    return stacked(params["datasets"], names), params["shared"], stacked(items["batch_stats"], names)


def _fill(place: str, part: str, like: Any, stored: Arrays) -> Any:
    _refuse_differences(place, part, differences(stored, like))
    return filled(like, stored)


def _refuse_differences(place: str, part: str, found: Sequence[str]) -> None:
    if found:
        more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
        raise InputError(
            f"{place} is of another {part}: {'; '.join(found[:_SHOWN])}{more}. Give the config it was trained with, or "
            "another --workdir."
        )


def _specs(config: ExperimentConfig, names: Sequence[str]) -> list[DatasetSpec]:
    by_name = {spec.name: spec for spec in config.specs}
    return [by_name[name] for name in names]

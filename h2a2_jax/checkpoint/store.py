"""Checkpoints of a run: written in the background, restored on any number of devices.

A checkpoint of step s is the folder <directory>/<s> with the items params, batch_stats, optimizer (both optimiser
states, step, balancer), averages where the run averages its parameters, and config (JSON; with checksums of all).
`checkpoint_tree` says what they hold.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from h2a2_jax.checkpoint import tree as layout
from h2a2_jax.checkpoint.integrity import AVERAGES, ITEMS, CheckpointFiles
from h2a2_jax.checkpoint.train_state import Averages, TrainState, head_configs, merge_model, split_model
from h2a2_jax.config import ExperimentConfig, from_json, to_json
from h2a2_jax.errors import InputError
from h2a2_jax.models import TR3D, DetectorConfig
from h2a2_jax.scans.specs import DatasetSpec

CHECKPOINT_VERSION = 1
"""Version of the layout; stored beside the config."""

_SHOWN = 3


class CheckpointStore(CheckpointFiles):
    """The checkpoints of one run: its states, and the detectors in them.

    Used as a context manager, or closed, so that the last one is complete.
    """

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, step: int, state: TrainState, config: ExperimentConfig, names: Sequence[str]) -> None:
        """Store a state; returns when it is copied, and writes it in the background.

        A checkpoint that is not finished, whatever kills the program, does not count as one. A step that is stored
        already is left as it is. What fails in the background is raised by the next call here or of `check`, `wait`.

        Args:
            step: steps done, the number of the checkpoint.
            state: the state after that step, on any devices.
            config: of the run.
            names: of the datasets, in the order of the dataset axis.

        Raises:
            UnsavedCheckpointError: this one, or the one before, could not be written.
        """
        if step in self.steps():
            return
        specs = _specs(config, names)
        items = {
            "params": layout.stored_params(state.shared, state.exclusive, specs),
            "batch_stats": layout.stored_statistics(state.stats, specs),
            "optimizer": layout.stored_optimizer(state, specs),
        }
        if state.averages is not None:
            items[AVERAGES] = layout.stored_averages(state.averages, specs)
        stored_config = {
            "version": CHECKPOINT_VERSION,
            "datasets": list(names),
            "config": json.loads(to_json(config)),
        }
        self.save_items(step, items, stored_config)

    def stored_config(self, step: int) -> ExperimentConfig:
        """The config that a checkpoint was saved with.

        Raises:
            InputError: there is no such checkpoint, or its config cannot be read.
        """
        return self._restore_config(self.existing(step)).config

    def restore_state(
        self,
        step: int | None,
        like: TrainState,
        names: Sequence[str],
        config: ExperimentConfig | None = None,
    ) -> TrainState:
        """Everything of a state, to go on from; each array where that of `like` lies.

        Args:
            step: of the checkpoint; None: the last.
            like: state of the shapes and places wanted; its values are not read.
            names: of the datasets, in the order of `like`'s dataset axis; those of the checkpoint in any order.
            config: of the run; with it, what differs in the architecture is named by the config's fields.

        Raises:
            InputError: there is no such checkpoint, or it holds other datasets, another architecture or another
                optimiser.
        """
        step = self.existing(step)
        stored = self._restore_config(step)
        self._check_datasets(step, stored.names, names)
        if config is not None:
            self._check_model(step, stored.config.model, config.model)
        items = self.read_items(step, tuple(stored.checksums), stored.checksums)
        params, optimizer = items["params"], items["optimizer"]
        return TrainState(
            shared=self._fill(step, "model", like.shared, params["shared"]),
            exclusive=self._fill_stacked(step, "model", like.exclusive, params["datasets"], names),
            stats=self._fill_stacked(step, "model", like.stats, items["batch_stats"], names),
            shared_optimizer=self._fill(step, "optimiser", like.shared_optimizer, optimizer["shared"]),
            exclusive_optimizer=self._fill_stacked(
                step, "optimiser", like.exclusive_optimizer, optimizer["datasets"], names, optimizer["scalars"]
            ),
            balancer=self._fill(
                step,
                "gradient harmonisation (harmonize.method)",
                like.balancer,
                layout.reordered_balancer(optimizer["balancer"], like.balancer, stored.names, names),
            ),
            averages=like.averages and self._averages(step, like.averages, items.get(AVERAGES) or items, names),
            accumulated=like.accumulated,
            **layout.filled(counters := _counters(like), {name: optimizer.get(name, 0) for name in counters}),
        )

    def restore_model(
        self, step: int | None = None, expected: ExperimentConfig | None = None, *, averaged: bool = True
    ) -> tuple[TR3D, ExperimentConfig]:
        """The detector alone, built from the stored config, where JAX puts its arrays.

        Args:
            step: of the checkpoint; None: the last.
            expected: config that the checkpoint must agree with in architecture and datasets; it sets their order.
            averaged: whether to take the averages of parameters and statistics where the run kept some.

        Returns:
            TR3D and stored config; the dataset axis has the order of the datasets of `expected`, else of the
            stored config.

        Raises:
            InputError: there is no such checkpoint, it cannot be read, or it is not of the expected config.
        """
        step = self.existing(step)
        stored = self._restore_config(step)
        names, config = stored.names, stored.config
        if expected is not None:
            self._check_datasets(step, names, expected.dataset_names)
            self._check_model(step, config.model, expected.model)
            names = list(expected.dataset_names)
        heads = head_configs(_specs(config, names))
        shapes = nnx.eval_shape(lambda: TR3D(config.model, heads, rngs=nnx.Rngs(0)))
        graph, exclusive, shared, stats = split_model(shapes)
        items = self._restore_detector(step, stored, averaged)
        params = items["params"]
        return merge_model(
            graph,
            self._fill_stacked(step, "model", exclusive, params["datasets"], names),
            self._fill(step, "model", shared, params["shared"]),
            self._fill_stacked(step, "model", stats, items["batch_stats"], names),
        ), config

    def restore_arrays(self, step: int | None = None) -> "StoredModel":
        """What is stored of the detector, as it is, whatever detector it is to go into.

        Args:
            step: of the checkpoint; None: the last.

        Raises:
            InputError: there is no such checkpoint, or it cannot be read.
        """
        step = self.existing(step)
        stored = self._restore_config(step)
        items = self._restore_detector(step, stored, averaged=True)
        params = items["params"]
        return StoredModel(step, stored.config, params["shared"], params["datasets"], items["batch_stats"])

    def _restore_detector(self, step: int, stored: "_Stored", averaged: bool) -> Mapping[str, Any]:
        """The items params and batch_stats, or the averages of them."""
        if averaged and AVERAGES in stored.checksums:
            return self.read_items(step, (AVERAGES,), stored.checksums)[AVERAGES]
        return self.read_items(step, ("params", "batch_stats"), stored.checksums)

    def _restore_config(self, step: int) -> "_Stored":
        stored = self.read_config(step)
        if stored.get("version") != CHECKPOINT_VERSION:
            raise InputError(
                f"{self.place(step)} has version {stored.get('version')}, this program reads version "
                f"{CHECKPOINT_VERSION}: use the program that stored it."
            )
        checksums = stored.get("checksums", dict.fromkeys(ITEMS))  # those of programs before this one have none
        return _Stored(stored["datasets"], from_json(json.dumps(stored["config"])), checksums)

    def _check_datasets(self, step: int, saved: Sequence[str], names: Sequence[str]) -> None:
        if set(saved) != set(names):
            raise InputError(
                f"{self.place(step)} holds the datasets {', '.join(saved)}, the config asks for {', '.join(names)}: "
                "give the same ones, in any order."
            )

    def _check_model(self, step: int, saved: DetectorConfig, given: DetectorConfig) -> None:
        ours, theirs = _leaves("model", given), _leaves("model", saved)
        if (saved.selection is None) != (given.selection is None):
            on, off = ("on", "off") if given.selection is None else ("off", "on")
            found = [f"model.selection is {on} in the checkpoint and {off} in the config"]
        else:
            keys = [key for key in theirs if theirs[key] != ours[key]]
            found = [f"{key} is {theirs[key]} in the checkpoint and {ours[key]} in the config" for key in keys]
        self._refuse_differences(step, "model", found)

    def _refuse_differences(self, step: int, of_what: str, found: Sequence[str]) -> None:
        if found:
            more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
            raise InputError(
                f"{self.place(step)} is of another {of_what}: {'; '.join(found[:_SHOWN])}{more}. Give the config it "
                "was trained with, or another --workdir."
            )

    def _averages(self, step: int, like: Averages, items: Mapping[str, Any], names: Sequence[str]) -> Averages:
        """Averages of a checkpoint; where it has none, they begin with what `items` hold instead: its parameters."""
        params = items["params"]
        return Averages(
            self._fill(step, "model", like.shared, params["shared"]),
            self._fill_stacked(step, "model", like.exclusive, params["datasets"], names),
            self._fill_stacked(step, "model", like.stats, items["batch_stats"], names),
        )

    def _fill(self, step: int, of_what: str, like: Any, stored: layout.Arrays) -> Any:
        self._refuse_differences(step, of_what, layout.differences(stored, like))
        return layout.filled(like, stored)

    def _fill_stacked(
        self,
        step: int,
        of_what: str,
        like: Any,
        stored: dict[str, layout.Arrays],
        names: Sequence[str],
        scalars: layout.Arrays | None = None,
    ) -> Any:
        return self._fill(step, of_what, like, layout.stacked(stored, names, like) | (scalars or {}))


class _Stored(NamedTuple):
    """What a checkpoint says of itself."""

    names: list[str]
    config: ExperimentConfig
    checksums: Mapping[str, int | None]


def _counters(like: TrainState) -> dict[str, Any]:
    return {name: getattr(like, name) for name in ("step", "skipped", "skipped_in_row")}


class StoredModel(NamedTuple):
    """The arrays of a checkpoint's detector by path, in the layout of `checkpoint_tree`.

    Attributes:
        step: of the checkpoint.
        config: of the run.
        shared: parameters that its datasets share.
        datasets: each dataset's own parameters, by its name.
        statistics: running statistics, likewise.
    """

    step: int
    config: ExperimentConfig
    shared: layout.Arrays
    datasets: dict[str, layout.Arrays]
    statistics: dict[str, layout.Arrays]


def restore_checkpoint(
    path: str | Path, step: int | None = None, expected: ExperimentConfig | None = None
) -> tuple[TR3D, ExperimentConfig]:
    """The detector of a checkpoint and the config it is built by, wherever in a run's folder one points.

    Args:
        path: the folder of a run, the "checkpoints" in it, or the folder of one step in that.
        step: of the checkpoint; None: that of the path, or the last.
        expected: see `CheckpointStore.restore_model`.

    Returns:
        TR3D and config; the datasets of both in the order of `expected`, else of the stored config.

    Raises:
        InputError: there is no such checkpoint, it cannot be read, or it is not of the expected config.
    """
    path = Path(path)
    if path.is_file():
        raise InputError(
            f"{path} is a file; a checkpoint is a folder, that of a run or one in its checkpoints. Weights of other "
            "programs are turned into one by `python -m h2a2_jax.convert.tr3d_weights`."
        )
    if not path.is_dir():
        raise InputError(f"There is no folder {path}: train first, or give the folder of a run, its workdir.")
    place = checkpoint_place(path)
    with CheckpointStore(place.directory) as store:
        return store.restore_model(place.step if step is None else step, expected)


class CheckpointPlace(NamedTuple):
    """Where a path points in the folder of a run.

    Attributes:
        run: folder of the run, where results belong.
        directory: of its checkpoints.
        step: if the path is that of one.
    """

    run: Path
    directory: Path
    step: int | None


def checkpoint_place(path: Path) -> CheckpointPlace:
    """What the folder of a run, the checkpoints in it, or the folder of one of these stands for.

    Checkpoints that were copied elsewhere, into a folder of another name, are their own run.
    """
    step = int(path.name) if path.name.isdecimal() and (path / "params").is_dir() else None
    directory = path if step is None else path.parent
    if directory.name == "checkpoints":
        return CheckpointPlace(directory.parent, directory, step)
    inside = directory / "checkpoints"  # beside which a run may hold results in folders of any name
    if step is None and (inside.is_dir() or not any(child.name.isdecimal() for child in directory.glob("*/"))):
        return CheckpointPlace(directory, inside, None)
    return CheckpointPlace(directory, directory, step)


def _specs(config: ExperimentConfig, names: Sequence[str]) -> list[DatasetSpec]:
    """What is fixed of the named datasets of a config."""
    by_name = {spec.name: spec for spec in config.specs}
    return [by_name[name] for name in names]


def _leaves(path: str, value: Any) -> dict[str, Any]:
    """Fields of nested dataclasses by dotted path."""
    if not dataclasses.is_dataclass(value):
        return {path: value}
    parts = [_leaves(f"{path}.{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value)]
    return {key: leaf for part in parts for key, leaf in part.items()}

"""Checkpoints of a run: written in the background, restored on any number of devices.

A checkpoint of step s is the folder <directory>/<s> with the items params, batch_stats, optimizer (both optimiser
states, step, balancer), averages where the run averages its parameters, and config (JSON; with checksums of all).
`checkpoint_tree` says what they hold.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx

from h2a2_jax.errors import InputError
from h2a2_jax.inputs.specs import DatasetSpec
from h2a2_jax.models import Detector, DetectorConfig, HeadConfig
from h2a2_jax.training import checkpoint_tree as layout
from h2a2_jax.training.config import ExperimentConfig, from_json, to_json
from h2a2_jax.training.state import Averages, TrainState, merge_model, split_model

CHECKPOINT_VERSION = 1
"""Version of the layout; stored beside the config."""

_ITEMS = ("params", "batch_stats", "optimizer")
_AVERAGES = "averages"
_UNKNOWN: Mapping[str, int | None] = {}
_OF_THE_SYSTEM = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")
_SHOWN = 3
_PATIENCE, _PAUSE_S = 20, 0.1


class DamagedCheckpointError(InputError):
    """A checkpoint of which something is missing or is not what was saved."""


class UnsavedCheckpointError(InputError):
    """A checkpoint could not be written, for want of space as a rule."""


class CheckpointStore:
    """The checkpoints of one run.

    Used as a context manager, or closed, so that the last one is complete.

    Attributes:
        directory: absolute path; made by the first `save`.
    """

    def __init__(self, directory: str | Path, keep: int = 2, best: Callable[[], int | None] = lambda: None):
        """Opens the folder.

        Args:
            directory: of the checkpoints, "<workdir>/checkpoints".
            keep: how many of the latest stay when another is saved.
            best: step of one that stays whatever its age, asked for when another is saved.
        """
        self.directory = Path(directory).absolute()
        self._kept = _Kept(keep, best)
        self._manager: ocp.CheckpointManager | None = None
        _quieten_orbax()

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
        with self._noticing_failure():
            manager = self._open(create=True)
            assert manager is not None
            if step in manager.all_steps():
                return
        specs = _specs(config, names)
        items = {
            "params": layout.stored_params(state.shared, state.exclusive, specs),
            "batch_stats": layout.stored_statistics(state.stats, specs),
            "optimizer": layout.stored_optimizer(state, specs),
        }
        if state.averages is not None:
            items[_AVERAGES] = layout.stored_averages(state.averages, specs)
        stored_config = {
            "version": CHECKPOINT_VERSION,
            "datasets": list(names),
            "config": json.loads(to_json(config)),
            "checksums": {name: layout.checksum(item) for name, item in items.items()},
        }
        stored_config["checksum"] = _checksum(stored_config)
        arguments: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        with self._noticing_failure():
            manager.save(step, args=ocp.args.Composite(**arguments, config=ocp.args.JsonSave(stored_config)))

    def latest_step(self) -> int | None:
        """Number of the last finished checkpoint; None without one."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Numbers of the finished checkpoints, rising."""
        manager = self._open()
        return sorted(manager.all_steps()) if manager is not None else []

    def stored_config(self, step: int) -> ExperimentConfig:
        """The config that a checkpoint was saved with.

        Raises:
            InputError: there is no such checkpoint, or its config cannot be read.
        """
        return self._restore_config(self._existing(step)).config

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
        step = self._existing(step)
        stored = self._restore_config(step)
        self._check_datasets(step, stored.names, names)
        if config is not None:
            self._check_model(step, stored.config.model, config.model)
        items = self._restore(step, tuple(stored.checksums), stored.checksums)
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
            averages=like.averages and self._averages(step, like.averages, items.get(_AVERAGES) or items, names),
            accumulated=like.accumulated,
            **layout.filled(counters := _counters(like), {name: optimizer.get(name, 0) for name in counters}),
        )

    def restore_model(
        self, step: int | None = None, expected: ExperimentConfig | None = None, *, averaged: bool = True
    ) -> tuple[Detector, ExperimentConfig]:
        """The detector alone, built from the stored config, where JAX puts its arrays.

        Args:
            step: of the checkpoint; None: the last.
            expected: config that the checkpoint must agree with in architecture and datasets; it sets their order.
            averaged: whether to take the averages of parameters and statistics where the run kept some.

        Returns:
            Detector and stored config; the dataset axis has the order of the datasets of `expected`, else of the
            stored config.

        Raises:
            InputError: there is no such checkpoint, it cannot be read, or it is not of the expected config.
        """
        step = self._existing(step)
        stored = self._restore_config(step)
        names, config = stored.names, stored.config
        if expected is not None:
            self._check_datasets(step, names, expected.dataset_names)
            self._check_model(step, config.model, expected.model)
            names = list(expected.dataset_names)
        heads = [HeadConfig(s.name, s.num_classes, s.num_outputs) for s in _specs(config, names)]
        shapes = nnx.eval_shape(lambda: Detector(config.model, heads, rngs=nnx.Rngs(0)))
        graph, exclusive, shared, stats = split_model(shapes)
        items = self._restore_detector(step, stored, averaged)
        params = items["params"]
        return merge_model(
            graph,
            self._fill_stacked(step, "model", exclusive, params["datasets"], names),
            self._fill(step, "model", shared, params["shared"]),
            self._fill_stacked(step, "model", stats, items["batch_stats"], names),
        ), config

    def set_aside(self, step: int) -> Path:
        """Move a checkpoint out of the way, into the folder <directory>_damaged, so that it does not count any more.

        Returns:
            Where it is now.
        """
        self.close()
        place = self.directory.with_name(f"{self.directory.name}_damaged") / str(step)
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # one that was set aside before
        return (self.directory / str(step)).rename(place)

    def tidy(self) -> None:
        """Remove what a kill in the middle of saving or removing a checkpoint left behind.

        A checkpoint is removed when newer ones are there, so that what lacks something without them is damaged: it
        stays. Nobody else may be saving there.
        """
        self.close()
        folders = {int(folder.name): folder for folder in self.directory.glob("*/") if folder.name.isdecimal()}
        whole = [step for step in sorted(folders) if _has_all_items(folders[step])]
        stay = {*self._kept.of(whole), *(step for step in folders if sum(w > step for w in whole) < self._kept.latest)}
        for folder in self.directory.glob("*/"):
            if not folder.name.isdecimal() or int(folder.name) not in stay:
                shutil.rmtree(folder)

    def restore_arrays(self, step: int | None = None) -> "StoredModel":
        """What is stored of the detector, as it is, whatever detector it is to go into.

        Args:
            step: of the checkpoint; None: the last.

        Raises:
            InputError: there is no such checkpoint, or it cannot be read.
        """
        step = self._existing(step)
        stored = self._restore_config(step)
        items = self._restore_detector(step, stored, averaged=True)
        params = items["params"]
        return StoredModel(step, stored.config, params["shared"], params["datasets"], items["batch_stats"])

    def check(self) -> None:
        """Notice what failed in the background.

        Raises:
            UnsavedCheckpointError: a checkpoint could not be written.
        """
        if self._manager is not None:
            with self._noticing_failure():
                self._manager.check_for_errors()

    def wait(self) -> None:
        """Until everything saved so far is on disk.

        Raises:
            UnsavedCheckpointError: a checkpoint could not be written.
        """
        if self._manager is not None:
            with self._noticing_failure():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the folder.

        Raises:
            UnsavedCheckpointError: a checkpoint could not be written.
        """
        if self._manager is not None:
            with self._noticing_failure():
                self._manager.close()
            self._manager = None

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _noticing_failure(self) -> Iterator[None]:
        """What Orbax and the threads that write for it met, as one sentence; nothing half-written remains."""
        try:
            yield
        except Exception as error:  # of many kinds, most of them RuntimeErrors of other errors
            manager, self._manager = self._manager, None
            if manager is not None:
                with contextlib.suppress(Exception):  # it says again what was said
                    manager.close()
            self._tidy_behind_writers()
            raise UnsavedCheckpointError(
                f"A checkpoint could not be written to {self.directory} ({_reason(error)}): free space there or make "
                f"it writable; {self._what_is_left()}"
            ) from error

    def _tidy_behind_writers(self) -> None:
        """`tidy` until nothing comes after it: TensorStore writes on for a while when one of its writes failed."""
        for _ in range(_PATIENCE):
            with contextlib.suppress(OSError):
                self.tidy()
            time.sleep(_PAUSE_S)
            if all(folder.name.isdecimal() for folder in self.directory.glob("*/")):
                return

    def _what_is_left(self) -> str:
        with contextlib.suppress(Exception):
            if (newest := self.latest_step()) is not None:
                return f"the same command goes on after step {newest}, which is saved."
        return "there is no earlier one, so that the same command begins anew."

    def _open(self, create: bool = False) -> ocp.CheckpointManager | None:
        """Orbax's manager; None where there is no folder and none is to be made."""
        if self._manager is None and (create or self.directory.is_dir()):
            handlers: dict[str, Any] = {item: ocp.StandardCheckpointHandler() for item in (*_ITEMS, _AVERAGES)}
            if create:
                self.directory.mkdir(parents=True, exist_ok=True)
            # Each process on its own: all hold what is stored, so that the first writes alone, and all read.
            process = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(
                primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
            )
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._kept,
                    create=create and jax.process_count() == 1,
                    multiprocessing_options=alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions(),
                ),
                item_handlers={**handlers, "config": ocp.JsonCheckpointHandler()},
            )
        return self._manager

    def _existing(self, step: int | None) -> int:
        manager = self._open()
        steps = sorted(manager.all_steps()) if manager is not None else []
        if not steps:
            raise InputError(f"There is no checkpoint in {self.directory}: train first, or give another --workdir.")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise InputError(
                f"There is no checkpoint of step {step} in {self.directory}; there are those of "
                f"{', '.join(map(str, steps))}."
            )
        return step

    def _restore(
        self, step: int, items: Sequence[str], checksums: Mapping[str, int | None] = _UNKNOWN
    ) -> Mapping[str, Any]:
        """Items of a checkpoint; those whose checksum is known as they were saved."""
        manager = self._open()
        assert manager is not None
        arguments = {item: ocp.args.JsonRestore() if item == "config" else ocp.args.StandardRestore() for item in items}
        try:
            restored = manager.restore(step, args=ocp.args.Composite(**arguments))
        except (OSError, KeyError, ValueError) as error:
            raise DamagedCheckpointError(
                f"{self._place(step)} cannot be read, a file in it is missing or damaged "
                f"({str(error).splitlines()[0]}): choose another step."
            ) from error
        found = {item: restored[item] for item in items}
        for item, value in found.items():
            expected = checksums.get(item)
            if expected is not None and layout.checksum(value) != expected:
                raise DamagedCheckpointError(
                    f"{self._place(step)} is damaged: {item} is not what was saved (its checksum differs); choose "
                    "another step."
                )
        return found

    def _restore_detector(self, step: int, stored: "_Stored", averaged: bool) -> Mapping[str, Any]:
        """The items params and batch_stats, or the averages of them."""
        if averaged and _AVERAGES in stored.checksums:
            return self._restore(step, (_AVERAGES,), stored.checksums)[_AVERAGES]
        return self._restore(step, ("params", "batch_stats"), stored.checksums)

    def _restore_config(self, step: int) -> "_Stored":
        stored = self._restore(step, ("config",))["config"]
        if stored.get("checksum", _checksum(stored)) != _checksum(stored):
            raise DamagedCheckpointError(
                f"{self._place(step)} is damaged: config is not what was saved (its checksum differs); choose another "
                "step."
            )
        if stored.get("version") != CHECKPOINT_VERSION:
            raise InputError(
                f"{self._place(step)} has version {stored.get('version')}, this program reads version "
                f"{CHECKPOINT_VERSION}: use the program that stored it."
            )
        checksums = stored.get("checksums", dict.fromkeys(_ITEMS))  # those of programs before this one have none
        return _Stored(stored["datasets"], from_json(json.dumps(stored["config"])), checksums)

    def _place(self, step: int) -> str:
        return f"The checkpoint of step {step} in {self.directory}"

    def _check_datasets(self, step: int, saved: Sequence[str], names: Sequence[str]) -> None:
        if set(saved) != set(names):
            raise InputError(
                f"{self._place(step)} holds the datasets {', '.join(saved)}, the config asks for {', '.join(names)}: "
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
                f"{self._place(step)} is of another {of_what}: {'; '.join(found[:_SHOWN])}{more}. Give the config it "
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


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Which checkpoints stay, as Orbax asks it: the latest, and the best."""

    latest: int
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        stay = self.of([info.step for info in checkpoints])
        return [info.step in stay for info in checkpoints]

    def of(self, steps: Sequence[int]) -> set[int]:
        """Those of rising steps that stay."""
        best = self.best()
        return {*steps[-self.latest :], *(step for step in steps if step == best)}


def _has_all_items(folder: Path) -> bool:
    return all((folder / item).is_dir() for item in (*_ITEMS, "config"))


def _reason(error: BaseException) -> str:
    """What was met first, in a line; where it is the system's word for it, that."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    known = next((link.strerror for link in reversed(chain) if isinstance(link, OSError) and link.strerror), None)
    phrases = [phrase for phrase in _OF_THE_SYSTEM if phrase in str(error)]  # as TensorStore passes them on
    return known or next(iter((*phrases, *str(error).splitlines())), type(error).__name__)


def _checksum(stored: Mapping[str, Any]) -> int:
    """Of what a checkpoint says of itself."""
    rest = {key: value for key, value in stored.items() if key != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


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
) -> tuple[Detector, ExperimentConfig]:
    """The detector of a checkpoint and the config it is built by, wherever in a run's folder one points.

    Args:
        path: the folder of a run, the "checkpoints" in it, or the folder of one step in that.
        step: of the checkpoint; None: that of the path, or the last.
        expected: see `CheckpointStore.restore_model`.

    Returns:
        Detector and config; the datasets of both in the order of `expected`, else of the stored config.

    Raises:
        InputError: there is no such checkpoint, it cannot be read, or it is not of the expected config.
    """
    path = Path(path)
    if path.is_file():
        raise InputError(
            f"{path} is a file; a checkpoint is a folder, that of a run or one in its checkpoints. Weights of other "
            "programs are turned into one by `python -m h2a2_jax.convert.tr3d`."
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


class _NoOrbax(logging.Filter):
    """Drops what Orbax logs below an error, on each folder it meets, and with an exception, which it raises too."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname or (record.levelno >= logging.ERROR and not record.exc_info)


@dataclasses.dataclass(frozen=True)
class _NoClosedLoop:
    """Drops what TensorStore prints when a file could not be read and Orbax no longer waits for the others."""

    before: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)):
            self.before(unraisable)


def _quieten_orbax() -> None:
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _NoOrbax) for f in logger.filters):
        logger.addFilter(_NoOrbax())
    if not isinstance(sys.unraisablehook, _NoClosedLoop):
        sys.unraisablehook = _NoClosedLoop(sys.unraisablehook)

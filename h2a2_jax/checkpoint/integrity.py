"""The folder of a run's checkpoints: items of arrays by step, written in the background and read whole or not at all.

What Orbax does not do by itself: checksums, for it does not notice a bit that a disk turned; one sentence for whatever
fails, and nothing half-written left behind; the best checkpoint kept beside the latest.
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
from typing import Any

import jax
import orbax.checkpoint as ocp

from h2a2_jax.checkpoint.tree import checksum
from h2a2_jax.errors import InputError

ITEMS = ("params", "batch_stats", "optimizer")
"""What every checkpoint has, beside its config."""
AVERAGES = "averages"
"""What some have."""

_UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of a checkpoint's folder while Orbax writes it."""
_PATIENCE, _PAUSE_S = 20, 0.1
_UNKNOWN: Mapping[str, int | None] = {}
_OF_THE_SYSTEM = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied")


class DamagedCheckpointError(InputError):
    """A checkpoint of which something is missing or is not what was saved."""


class UnsavedCheckpointError(InputError):
    """A checkpoint could not be written, for want of space as a rule."""


class CheckpointFiles:
    """The checkpoints in a folder; to be closed, so that the last one is complete.

    Attributes:
        directory: absolute path; made when something is saved first.
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

    def latest_step(self) -> int | None:
        """Number of the last finished checkpoint; None without one."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Numbers of the finished checkpoints, rising."""
        manager = self._open()
        return sorted(manager.all_steps()) if manager is not None else []

    def save_items(self, step: int, items: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Store items; returns at once, and writes them in the background.

        Args:
            step: number of the checkpoint; one that is there already is left as it is.
            items: nested dicts of numpy arrays by name, which must not change any more.
            config: JSON values; gets the items' checksums.

        Raises:
            UnsavedCheckpointError: this checkpoint, or the one before, could not be written.
        """
        with self._noticing_failure():
            manager = self._open(create=True)
            assert manager is not None
            if step in manager.all_steps():
                return
            arguments: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            told = {**config, "checksums": {name: checksum(item) for name, item in items.items()}}
            told["checksum"] = _own_checksum(told)
            manager.save(step, args=ocp.args.Composite(**arguments, config=ocp.args.JsonSave(told)))

    def read_config(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself: the config it was saved with, and "checksums" of its items.

        Raises:
            DamagedCheckpointError: it is missing, cannot be read, or is not what was saved.
        """
        stored = self.read_items(step, ("config",))["config"]
        if stored.get("checksum", _own_checksum(stored)) != _own_checksum(stored):
            raise DamagedCheckpointError(
                f"{self.place(step)} is damaged: config is not what was saved (its checksum differs); choose another "
                "step."
            )
        return stored

    def read_items(
        self, step: int, items: Sequence[str], checksums: Mapping[str, int | None] = _UNKNOWN
    ) -> Mapping[str, Any]:
        """Items of a checkpoint; those whose checksum is known as they were saved.

        Args:
            step: of a finished checkpoint.
            items: names; "config" is JSON.
            checksums: as the config has them.

        Raises:
            DamagedCheckpointError: one is missing, cannot be read, or is not what was saved.
        """
        manager = self._open()
        assert manager is not None
        arguments = {item: ocp.args.JsonRestore() if item == "config" else ocp.args.StandardRestore() for item in items}
        try:
            restored = manager.restore(step, args=ocp.args.Composite(**arguments))
        except (OSError, KeyError, ValueError) as error:
            raise DamagedCheckpointError(
                f"{self.place(step)} cannot be read, a file in it is missing or damaged "
                f"({str(error).splitlines()[0]}): choose another step."
            ) from error
        found = {item: restored[item] for item in items}
        for item, value in found.items():
            expected = checksums.get(item)
            if expected is not None and checksum(value) != expected:
                raise DamagedCheckpointError(
                    f"{self.place(step)} is damaged: {item} is not what was saved (its checksum differs); choose "
                    "another step."
                )
        return found

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
        """Remove checkpoints that need not stay, and what a kill in the middle of saving or removing one left behind.

        A checkpoint is removed when newer ones are there, so that what lacks something without them is damaged: it
        stays. Nobody else may be saving there.
        """
        self.close()
        folders = {int(folder.name): folder for folder in self.directory.glob("*/") if folder.name.isdecimal()}
        whole = [step for step in sorted(folders) if _has_all_items(folders[step])]
        stay = {*self._kept.of(whole), *(step for step in folders if sum(w > step for w in whole) < self._kept.latest)}
        unfinished = [folder for folder in self.directory.glob("*/") if _UNFINISHED in folder.name]
        for folder in [*unfinished, *(folder for step, folder in folders.items() if step not in stay)]:
            shutil.rmtree(folder)

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

    def existing(self, step: int | None) -> int:
        """A step that there is a checkpoint of.

        Args:
            step: the one wanted; None: the last.

        Raises:
            InputError: there is none.
        """
        steps = self.steps()
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

    def place(self, step: int) -> str:
        """A checkpoint, as the beginning of a sentence."""
        return f"The checkpoint of step {step} in {self.directory}"

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
            if not any(_UNFINISHED in folder.name for folder in self.directory.glob("*/")):
                return

    def _what_is_left(self) -> str:
        with contextlib.suppress(Exception):
            if (newest := self.latest_step()) is not None:
                return f"the same command goes on after step {newest}, which is saved."
        return "there is no earlier one, so that the same command begins anew."

    def _open(self, create: bool = False) -> ocp.CheckpointManager | None:
        """Orbax's manager; None where there is no folder and none is to be made."""
        if self._manager is None and (create or self.directory.is_dir()):
            handlers: dict[str, Any] = {item: ocp.StandardCheckpointHandler() for item in (*ITEMS, AVERAGES)}
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
    return all((folder / item).is_dir() for item in (*ITEMS, "config"))


def _own_checksum(stored: Mapping[str, Any]) -> int:
    """Of what a checkpoint says of itself."""
    rest = {key: value for key, value in stored.items() if key != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _reason(error: BaseException) -> str:
    """What was met first, in a line; where it is the system's word for it, that."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    known = next((link.strerror for link in reversed(chain) if isinstance(link, OSError) and link.strerror), None)
    phrases = [phrase for phrase in _OF_THE_SYSTEM if phrase in str(error)]  # as TensorStore passes them on
    return known or next(iter((*phrases, *str(error).splitlines())), type(error).__name__)


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

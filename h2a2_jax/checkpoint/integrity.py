"""The folder of a run's checkpoints: items of arrays by step, written in the background and read whole or not at all.

This module adds to Orbax: checksums (Orbax does not notice a bit that a disk turned), one error message for every kind
of failed write, the removal of half-written checkpoints, and a best checkpoint that stays beside the latest ones.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from h2a2_jax.checkpoint.tree import checksum
from h2a2_jax.errors import InputError, reason_of
from h2a2_jax.files import check_name, read_json, remedy
from h2a2_jax.host import available_memory

ITEMS = ("params", "batch_stats", "optimizer")
"""Items of every checkpoint, beside its config."""
AVERAGES = "averages"
"""Item of the checkpoints of runs that average their parameters."""

_UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of a checkpoint's folder while Orbax writes it."""
_STEP = "0|[1-9][0-9]*"
_METADATA = "_CHECKPOINT_METADATA"
"""Orbax's file of times and kinds of items, in the folder of a checkpoint."""
_METADATA_TYPES: dict[str, Any] = {
    "item_handlers": dict | str | None,
    "metrics": dict | None,
    "performance_metrics": dict | None,
    "custom_metadata": dict | None,
    "init_timestamp_nsecs": int | None,
    "commit_timestamp_nsecs": int | None,
}
_OF_DICT = 2
"""Orbax's number for a key of a dict."""
_TIDY_ATTEMPTS, _TIDY_PAUSE_S = 20, 0.1
_SYSTEM_PHRASES = (
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "Permission denied",
    "Too many open files",
    "File too large",
)
"""The system's words in messages of TensorStore."""


class DamagedCheckpointError(InputError):
    """A part of a checkpoint is missing or differs from what was saved."""


class UnsavedCheckpointError(InputError):
    """A checkpoint could not be written, usually for want of space."""


class CheckpointFiles:
    """Checkpoints in a folder, which the first save makes; `close` makes sure that the last one is complete.

    A write that fails in the background raises UnsavedCheckpointError in the next call of `save_items`, `check`, `wait`
    or `close`.

    Args:
        directory: folder of the checkpoints, "<workdir>/checkpoints".
        keep: number of the latest checkpoints that stay when another one is saved.
        lasting: returns those of the steps with a checkpoint that stay at any age, such as the best one; called when
            another one is saved.

    Raises:
        InputError: the path is not UTF-8.
    """

    def __init__(
        self, directory: str | Path, keep: int = 2, lasting: Callable[[Sequence[int]], set[int]] = lambda steps: set()
    ):
        self.directory = Path(directory).absolute()
        check_name(self.directory)
        self._preserved = _Preserved(keep, lasting)
        self._manager: Any = None  # Orbax's manager

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        if self._manager is not None:
            return sorted(self._manager.all_steps())
        # Orbax gives a folder its name when it is finished.
        names = (folder.name for folder in self.directory.glob("*/"))
        return sorted(int(name) for name in names if re.fullmatch(_STEP, name))

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def existing(self, step: int | None) -> int:
        """Return the step, or the latest one for None; raise InputError if there is no such checkpoint."""
        steps = self.steps()
        if not steps:
            raise InputError(f"There is no checkpoint in {self.directory}: train first, or give another --workdir.")
        if step is not None and step not in steps:
            raise InputError(
                f"There is no checkpoint of step {step} in {self.directory}; there are those of "
                f"{', '.join(map(str, steps))}."
            )
        return steps[-1] if step is None else step

    def place(self, step: int) -> str:
        """Name a checkpoint, as the beginning of an error message."""
        return f"The checkpoint of step {step} in {self.directory}"

    def save_items(self, step: int, items: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Store nested dicts of numpy arrays, which must not change any more; return at once, write in the background.

        The config, of JSON values, is stored with the step, the checksums of the items and its own. A step that is
        stored already stays unchanged.

        Raises:
            UnsavedCheckpointError: this checkpoint, or the one before, could not be written, or there is one of a later
                step.
        """
        import orbax.checkpoint as ocp

        if (newest := self.latest_step()) is not None and step < newest:  # Orbax would leave it out without a word
            raise UnsavedCheckpointError(
                f"The checkpoint of step {step} cannot be saved: {self.directory} has one of step {newest}, which this "
                "run has not reached; move that one away, and the same command goes on from what is saved."
            )
        with self._write_errors():
            manager = self._open(create=True)
            assert manager is not None
            if step in manager.all_steps():
                return
            arguments: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            stored = {**config, "step": step, "checksums": {name: checksum(item) for name, item in items.items()}}
            stored["checksum"] = _config_checksum(stored)
            manager.save(step, args=ocp.args.Composite(**arguments, config=ocp.args.JsonSave(stored)))

    def read_config(self, step: int) -> dict[str, Any]:
        """Read the config that a checkpoint was saved with, and the "checksums" of its items.

        Raises:
            DamagedCheckpointError: the config is missing, cannot be read, or differs from what was saved.
            InputError: the checkpoint was saved as that of another step.
        """
        stored = self.read_items(step, ("config",))["config"]
        sums = stored.get("checksums") if isinstance(stored, dict) else None
        if sums is None or not {*ITEMS} <= {*sums} <= {*ITEMS, AVERAGES} or "checksum" not in stored:
            raise DamagedCheckpointError(
                f"{self.place(step)} is damaged: its config lacks the checksums of itself, {', '.join(ITEMS)}; choose "
                "another step."
            )
        self._check(step, "config", stored["checksum"], _config_checksum(stored))
        self._check_step(step, stored.get("step", step))  # version 0.1.0 stored none
        return stored

    def read_items(self, step: int, items: Sequence[str], checksums: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Read items of a finished checkpoint and compare those that have a checksum (CRC-32) with it.

        Raises:
            DamagedCheckpointError: an item is missing, cannot be read, or differs from what was saved.
        """
        restored = {item: _read_directly(self.directory / str(step) / item) for item in items}
        if others := [item for item in items if restored[item] is None]:
            restored |= self._restore(step, others)
        for item in items:
            if (expected := (checksums or {}).get(item)) is not None:
                self._check(step, item, expected, checksum(restored[item]))
        return restored

    def _restore(self, step: int, items: Sequence[str]) -> dict[str, Any]:
        """Read items by Orbax, which knows every layout and says what is wrong with an item."""
        import orbax.checkpoint as ocp

        arguments = {item: ocp.args.JsonRestore() if item == "config" else ocp.args.StandardRestore() for item in items}
        try:
            manager = self._open()
            assert manager is not None
            restored = manager.restore(step, args=ocp.args.Composite(**arguments))
            return {item: restored[item] for item in items}
        except Exception as error:  # Orbax raises anything on metadata of another shape
            raise DamagedCheckpointError(
                f"{self.place(step)} cannot be read, a file in it is missing or damaged ({reason_of(error)}): choose "
                "another step."
            ) from error

    def set_aside(self, step: int) -> Path:
        """Move a checkpoint into the folder "<directory>_damaged", where it no longer counts; return its new place."""
        self.close()
        place = self.directory.with_name(f"{self.directory.name}_damaged") / str(step)
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # one that was set aside before
        return (self.directory / str(step)).rename(place)

    def tidy(self) -> None:
        """Remove superseded checkpoints and the remains of a save or a removal that a kill interrupted.

        An incomplete checkpoint with newer ones beside it was being removed, so it goes. One without is damaged and
        stays, for the caller to set aside. No other process may be saving in the folder.
        """
        self.close()
        folders = {int(folder.name): folder for folder in self.directory.glob("*/") if re.fullmatch(_STEP, folder.name)}
        whole = [s for s in sorted(folders) if all((folders[s] / item).is_dir() for item in (*ITEMS, "config"))]
        keep = self._preserved.latest
        stay = self._preserved.of(whole) | {step for step in folders if sum(w > step for w in whole) < keep}
        for folder in [*self._unfinished(), *(folder for step, folder in folders.items() if step not in stay)]:
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)

    def check(self) -> None:
        """Raise UnsavedCheckpointError if a write in the background failed."""
        if self._manager is not None:
            with self._write_errors():
                self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until everything saved so far is on disk."""
        if self._manager is not None:
            with self._write_errors():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until everything is on disk and release the folder."""
        if self._manager is not None:
            with self._write_errors():
                self._manager.close()
            self._manager = None

    def _check_step(self, step: int, saved: Any) -> None:
        if saved != step:
            raise InputError(
                f"{self.place(step)} was saved as that of step {saved!r:.80}: give its folder that name again, or move "
                "it away."
            )

    def _check(self, step: int, item: str, expected: int, found: int) -> None:
        if expected != found:
            raise DamagedCheckpointError(
                f"{self.place(step)} is damaged: {item} is not what was saved (its checksum differs); choose another "
                "step."
            )

    def _remove_odd_metadata(self) -> None:
        """Remove metadata that Orbax cannot read: it reads those of all checkpoints to save one, and needs none."""
        for step in self.steps():
            file = self.directory / str(step) / _METADATA
            found = read_json(file)
            is_plain = isinstance(found, dict) and all(
                isinstance(value, _METADATA_TYPES.get(key, object)) for key, value in found.items()
            )
            if os.path.lexists(file) and not is_plain:
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _unfinished(self) -> list[Path]:
        return list(self.directory.glob(f"*{_UNFINISHED}*/"))

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turn any error of Orbax and its writing threads into one message, and remove what was half-written."""
        try:
            yield
        except Exception as error:  # of many kinds, most of them RuntimeErrors around other errors
            manager, self._manager = self._manager, None
            if manager is not None:
                with contextlib.suppress(Exception):  # raises the same error again
                    manager.close()
            # TensorStore goes on writing for a while after one of its writes failed: tidy until nothing new appears.
            for _ in range(_TIDY_ATTEMPTS):
                with contextlib.suppress(OSError):
                    self.tidy()
                time.sleep(_TIDY_PAUSE_S)
                if not self._unfinished():
                    break
            newest = None
            with contextlib.suppress(Exception):
                newest = self.latest_step()
            outlook = "there is no earlier one, so that the same command begins anew."
            if newest is not None:
                outlook = f"the same command goes on after step {newest}, which is saved."
            reason = _reason(error)
            raise UnsavedCheckpointError(
                f"A checkpoint could not be written to {self.directory} ({reason}): {remedy(reason)}; {outlook}"
            ) from error

    def _open(self, create: bool = False) -> Any:
        """Return Orbax's manager; None if the folder is missing and `create` is False."""
        import orbax.checkpoint as ocp  # takes a quarter of a second; reading does without

        if self._manager is None and (create or self.directory.is_dir()):
            if create:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._remove_odd_metadata()
            options = ocp.CheckpointManagerOptions(preservation_policy=self._preserved, create=create)
            if jax.process_count() > 1:
                # Every process holds the whole state, so that each opens the folder alone: the first one writes, all
                # read, and none waits for another.
                process = jax.process_index()
                multiprocessing = ocp.options.MultiprocessingOptions(
                    primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
                )
                options = dataclasses.replace(options, create=False, multiprocessing_options=multiprocessing)
            handlers: dict[str, Any] = {item: ocp.StandardCheckpointHandler() for item in (*ITEMS, AVERAGES)}
            handlers["config"] = ocp.JsonCheckpointHandler()
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        return self._manager


def _read_directly(folder: Path) -> dict[str, Any] | None:
    """Read an item in the layout that Orbax writes here, without Orbax, which takes four times as long.

    Returns:
        None where the layout is another one, or a file is missing or damaged; `CheckpointFiles._restore` reads it, or
        says what is wrong.

    Raises:
        InputError: the arrays are larger than the free memory.
    """
    try:
        if folder.name == "config":
            found = json.loads((folder / "metadata").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else None
        layout = json.loads((folder / "_METADATA").read_text())
        entries = layout["tree_metadata"].values()
        paths = [tuple(part["key"] for part in entry["key_metadata"]) for entry in entries]
        kinds = {entry["value_metadata"]["value_type"] for entry in entries}
        types = {part["key_type"] for entry in entries for part in entry["key_metadata"]}
        if layout["use_zarr3"] or kinds != {"np.ndarray"} or types != {_OF_DICT}:
            return None
        arrays = _read_arrays(folder, [".".join(path) for path in paths])
        item: dict[str, Any] = {}
        for path, array in zip(paths, arrays, strict=True):
            place = item
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = array
    except InputError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    return item


def _read_arrays(folder: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Read arrays of an item, all side by side."""
    import tensorstore

    store = {"driver": "ocdbt", "base": f"file://{folder}/"}
    opening = [
        tensorstore.open({"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}, open=True) for name in names
    ]
    stored = [opened.result() for opened in opening]
    declared = sum(array.size * array.dtype.numpy_dtype.itemsize for array in stored)
    if declared > (free := available_memory()):
        raise InputError(
            f"{folder} says that it holds {declared / 1e9:.3g} GB, more than the {free / 1e9:.3g} GB of free memory: "
            "it is damaged, or of a larger detector than this machine can hold."
        )
    reading = [array.read() for array in stored]
    return [read.result() for read in reading]


@dataclasses.dataclass(frozen=True)
class _Preserved:
    """Orbax's preservation policy: the latest checkpoints and the lasting ones stay."""

    latest: int
    lasting: Callable[[Sequence[int]], set[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        stay = self.of([info.step for info in checkpoints])
        return [info.step in stay for info in checkpoints]

    def of(self, steps: Sequence[int]) -> set[int]:
        """Steps that stay, of ascending ones."""
        return {*steps[-self.latest :], *self.lasting(steps)}


def _config_checksum(stored: Mapping[str, Any]) -> int:
    """CRC-32 of a stored config without its own checksum."""
    rest = {key: value for key, value in stored.items() if key != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _reason(error: BaseException) -> str:
    """The first cause of an error in one line, in the operating system's words if there are any."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    known = next((link.strerror for link in reversed(chain) if isinstance(link, OSError) and link.strerror), None)
    phrases = [phrase for phrase in _SYSTEM_PHRASES if phrase in str(error)]  # as TensorStore passes them on
    return known or next(iter((*phrases, *str(error).splitlines())), type(error).__name__)[:200]

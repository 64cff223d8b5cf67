"""Files that are whole or absent, files of JSON lines, and a lock on a folder."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from h2a2_jax.errors import InputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when all went well, and is removed otherwise.

    Args:
        path: of the file; its folder is made if missing.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")  # of several processes each its own
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_json(file: Path) -> Any:
    """What a JSON file holds; None if it cannot be read as such."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


FILE_NAME = "lock"


@contextlib.contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Keeps a second program out of a folder while this one works there; the system lets go of it however that ends.

    The file `lock` in the folder holds the process that has it, or had it last. Where the system or the file system
    knows no locks, the user has to take care.

    Args:
        folder: made if missing.
        what: works there, as in "training run".

    Raises:
        InputError: another one works there, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / FILE_NAME).open("a+")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to ({error.strerror or error}): make it writable, or give another --workdir."
        ) from error
    with file:
        _lock(file.fileno(), folder, what)
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield


def _lock(descriptor: int, folder: Path, what: str) -> None:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = (folder / FILE_NAME).read_text().strip() or "another process"
        raise InputError(
            f"Another {what} is at work in {folder} ({holder}): wait for it, or give another --workdir."
        ) from error
    except (ImportError, OSError):  # not a POSIX system, or a file system without locks
        return


class JsonLinesWriter:
    """Appends objects to a file, one a line; "step" and "version" are the first keys of each.

    Every line is flushed when written, so that a killed run leaves its lines behind. A last line that a kill cut short
    is dropped when the run goes on.

    Args:
        path: of the file; its folder is made if missing.
        version: of the schema.
    """

    def __init__(self, path: Path, version: int):
        self.path, self._version = path, version
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            step: optimiser steps done.
            values: further keys; JSON values, finite.

        Raises:
            ValueError: a key is one of the schema, or a number is not finite.
        """
        reserved = {"step", "version"} & values.keys()
        if reserved:
            raise ValueError(f"metrics of step {step} contain {sorted(reserved)}, which the writer sets; rename them")
        line = {"step": int(step), "version": self._version, **values}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; writing after that is an error."""
        self._file.close()


def read_json_lines(path: Path, version: int) -> list[dict[str, Any]]:
    """The lines of a file in the order of their steps; of two lines of one step the later one counts.

    A last line that a kill cut short is passed over.

    Raises:
        InputError: a line is no JSON object with a step, or of another version.
    """
    text = path.read_text(encoding="utf-8")
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            values = json.loads(line)
            step, given = values["step"], values["version"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"Line {number} of {path} is no JSON object with a step and a version ({error})."
            ) from error
        if given != version:
            raise InputError(
                f"Line {number} of {path} has version {given}, this program reads version {version}: use the program "
                "that wrote it."
            )
        by_step[step] = values
    return [by_step[step] for step in sorted(by_step)]


def drop_lines_after(path: Path, step: int) -> None:
    """Cut the lines of later steps off a file that may not be there, and what a kill cut short.

    Args:
        path: of the file.
        step: the last one to stay.

    Raises:
        InputError: a line is no JSON object with a step.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line, path) <= step]
    if len(kept) < len(lines):
        with whole_file(path) as part:
            part.write_bytes(b"".join(kept))


def _step_of(line: bytes, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"A line of {path} is no JSON object with a step ({error}): repair or remove it.") from error


def _drop_cut_line(path: Path) -> None:
    """Cut the file behind its last line feed."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)

"""Files that survive kills: whole files and folders, files of JSON lines, and a lock on a folder."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from h2a2_jax.errors import InputError

_REMEDIES = {
    os.strerror(number): advice
    for advice, numbers in {
        "allow more open files (ulimit -n 4096)": (errno.EMFILE, errno.ENFILE),
        "allow larger files (ulimit -f unlimited)": (errno.EFBIG,),
        "move what is there away": (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
    }.items()
    for number in numbers
}


def remedy(reason: str | None) -> str:
    """What to do where a file cannot be written, for the reason in the system's words, as in "File exists"."""
    return _REMEDIES.get(reason or "", "free space there or make it writable")


def check_name(folder: Path) -> None:
    """Raise InputError if a path cannot be looked at, or is not UTF-8: the libraries that store arrays cannot open it.

    A folder that is missing passes.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"The folder {str(folder)!a} has characters in its name that are not UTF-8, in which no checkpoint can be "
            "stored: give another one, or rename it."
        ) from None
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, a folder above that is closed, a NUL
        why = getattr(error, "strerror", None) or error
        raise InputError(f"The folder {folder} cannot be opened ({why}): give another one.") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` if the block ends well, and is removed otherwise.

    The folder of the file is made if missing; an OSError if the file cannot be written is the caller's to explain.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")  # each of several processes has its own
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write to; it becomes `folder` if the block ends well, and is removed otherwise.

    What was in `folder` before is removed. The folder above is made if missing; what a killed process left in it is
    removed. An OSError is the caller's to explain.
    """
    place = folder.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_remains(place)
    own = f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}"
    part, earlier = place.with_name(f"{own}.part"), place.with_name(f"{own}.earlier.part")
    part.mkdir()
    try:
        yield part
        if place.exists():
            place.rename(earlier)
        part.rename(place)
    except BaseException:
        if earlier.exists() and not place.exists():
            earlier.rename(place)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


def _remove_remains(place: Path) -> None:
    """Remove what a killed process left beside a folder; put an earlier one back that it had moved away."""
    name = re.compile(rf"\.{re.escape(place.name)}\.(\d+)\.[0-9a-f]{{8}}(\.earlier)?\.part")
    for left in sorted(place.parent.iterdir()):
        found = name.fullmatch(left.name)
        if found and not _is_running(int(found[1])):
            if found[2] and not place.exists():
                left.rename(place)
            shutil.rmtree(left, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of files in a folder that they wrote with `whole_file`."""
    for left in folder.glob(".*.part*"):
        found = re.fullmatch(r"\..*\.(\d+)\.part(\..*)?", left.name)
        if found and not _is_running(int(found[1])):
            left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # there the question would be a signal
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def read_json(file: Path) -> Any:
    """Read a JSON file; None if it is missing, is no JSON, or is nested too deeply to be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


_CHECKSUM = "checksum"


def sealed(documents: Mapping[str, Mapping[str, Any]], place: str) -> dict[str, dict[str, Any]]:
    """Add a "checksum" (CRC-32) to each document, over its content, its name, and where the file of them lies."""
    plain = {name: {key: value for key, value in own.items() if key != _CHECKSUM} for name, own in documents.items()}
    return {name: {**own, _CHECKSUM: _checksum_of(name, own, place)} for name, own in plain.items()}


def read_sealed(file: Path, place: str) -> dict[str, dict[str, Any]]:
    """Read a file of JSON with the documents of `sealed`; return them without their checksums.

    A document without a checksum is taken as it is.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no documents by name, or others than were written; the message says why.
    """
    try:
        found = json.loads(file.read_bytes().decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, too deeply nested
        raise ValueError("it is no JSON") from error
    if not isinstance(found, dict) or not found or not all(isinstance(document, dict) for document in found.values()):
        raise ValueError("it does not hold documents by name")
    for name, document in found.items():
        expected = document.pop(_CHECKSUM, None)
        if expected is not None and expected != _checksum_of(name, document, place):
            raise ValueError(f"what it has of {name!r:.80} is not what was written, its checksum differs")
    return found


def _checksum_of(name: str, document: Mapping[str, Any], place: str) -> int:
    return zlib.crc32(json.dumps([name, document, place], sort_keys=True).encode())


@contextlib.contextmanager
def alone_in(folder: Path, what: str, *, flag: str = "--workdir", name: str = "lock") -> Iterator[None]:
    """Keep a second program out of a folder; the system releases the lock however this program ends.

    The file `name` in the folder names the process that holds the lock or held it last. Without locks in the system or
    the file system nothing is checked. `what` names the program's work in the error message, as in "training run", and
    `flag` chooses the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a+")
    except OSError as error:
        place, advice = error.filename or folder, remedy(error.strerror)
        raise InputError(
            f"{place} cannot be written to ({error.strerror or error}): {advice}, or give another {flag}."
        ) from error
    with file:
        try:
            import fcntl  # POSIX only

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = Path(file.name).read_text().strip() or "another process"
            raise InputError(
                f"Another {what} is at work in {folder} ({holder}): wait for it, or give another {flag}."
            ) from error
        except (ImportError, OSError):
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield


class JsonLinesWriter:
    """Appends JSON objects to a file, one a line, with "step" and "version" as the first keys of each.

    Every line is flushed when written, so that a killed run leaves its lines behind. Opening the file drops a last line
    that a kill cut short, and makes the folder if missing. A file that was removed or moved meanwhile is begun anew.
    The version is that of the schema.
    """

    def __init__(self, path: Path, version: int):
        self.path, self._version = path, version
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; raise ValueError if a key is "step" or "version", or a number is not finite."""
        if reserved := {"step", "version"} & values.keys():
            raise ValueError(f"metrics of step {step} contain {sorted(reserved)}, which the writer sets; rename them")
        line = {"step": int(step), "version": self._version, **values}
        if not self._is_there():
            lost, self._file = self._file, self.path.open("ab+")
            lost.close()
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; writing after that is an error."""
        self._file.close()

    def _is_there(self) -> bool:
        """Return False if the open file is no longer the one at its path."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except OSError:
            return False


def read_json_lines(path: Path, version: int) -> list[dict[str, Any]]:
    """Read the lines of a file in the order of their steps; of several lines of one step the last one counts.

    A last line that a kill cut short is skipped.

    Raises:
        InputError: the file cannot be read, a line is damaged or of another version.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_whole_lines(path), 1):
        step, values = _parsed(path, number, line)
        if (given := values.get("version")) != version:
            raise InputError(
                f"Line {number} of {path} has version {given!r:.80}, this program reads version {version}: use the "
                "program that wrote it."
            )
        by_step[step] = values
    return [by_step[step] for step in sorted(by_step)]


def drop_lines_after(path: Path, step: int) -> None:
    """Remove from a file, if there is one, the lines of later steps and a last line that a kill cut short."""
    if not path.exists():
        return

    lines = _whole_lines(path)
    kept = [line for number, line in enumerate(lines, 1) if _parsed(path, number, line)[0] <= step]
    if sum(map(len, kept)) < path.stat().st_size:
        with whole_file(path) as part:
            part.write_bytes(b"".join(kept))


def _whole_lines(path: Path) -> list[bytes]:
    """Lines of a file, without a last one that a kill cut short."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): expected is a file of lines; move what is there away."
        ) from error
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _parsed(path: Path, number: int, line: bytes) -> tuple[int, dict[str, Any]]:
    """Step and values of a line of JSON."""
    try:
        values = json.loads(line)
        step = values["step"]
        if not isinstance(step, int) or not isinstance(values, dict):
            raise TypeError("its step is no whole number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"Line {number} of {path} is no JSON object with a step ({str(error)[:200]}): repair or remove it."
        ) from error
    return step, values

"""A folder of results as a job that can be stopped at any time and goes on with the same command.

    DIR/predictions.jsonl   the journal: what the job is, then a line for each scan that is done or failed
    DIR/boxes.csv           a line for each box; scans are appended as they finish
    DIR/predictions.json    boxes of all scans (`results`), written at the end and from time to time
    DIR/index.html          all scans, totals and failures, written with it

The journal is the truth, and is only appended to: of several lines on a scan the last one counts. The results of a scan
are written first, then its line in the journal, then its rows of the table: a kill at any moment loses the scan under
way. What the table lacks of the journal is appended when the job goes on, so that it ends as that of a job that nobody
stopped. A table is removed before the journal says that rows of it are no longer true, and then written anew.
"""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h2a2_jax.errors import InputError
from h2a2_jax.files import alone_in, whole_file
from h2a2_jax.inference.box_table import csv_header, csv_text, table_rows
from h2a2_jax.inference.input_files import InputFile, free_name, is_usable_name, printable
from h2a2_jax.inference.results import document_of
from h2a2_jax.inference.writers import ALL_BOXES, TABLE, write_document

JOURNAL = "predictions.jsonl"
LOCK = ".lock"
_VERSION = 1
_KIND = "h2a2_jax predictions"
_REFRESH = 10.0
"""Seconds between two writings of what shows all scans; twenty times what a writing takes, if that is more."""
_UNFINISHED = re.compile(r"\..+\.\d+\.part(\.\w+)?")
"""Names of files that `whole_file` has not finished."""


@dataclass(frozen=True)
class FileIdentity:
    """A file as it was when it was predicted: another size or time of change make it another one."""

    path: str  # absolute, with the bytes that are no text as `os.fsdecode` gives them
    size: int
    changed: int  # ns

    @staticmethod
    def of(path: Path) -> "FileIdentity":
        """Look at a file; one that is missing has the size -1."""
        place = os.path.abspath(path)
        try:
            status = path.stat()
        except OSError:
            return FileIdentity(place, -1, 0)
        return FileIdentity(place, status.st_size, status.st_mtime_ns)


class Job:
    """The results of a prediction in a folder; `open_job` opens one.

    Attributes:
        folder: where the results are.
        entries: `results.entry_of` of each scan that is done, by name, in the order of the journal.
        failed: sentences on the files that failed, by path. Scans may be noted from several threads.
        is_new: True for a folder without a job.
    """

    def __init__(self, folder: Path, what: Mapping[str, Any], has_table: bool):
        self.folder, self.what, self._has_table = folder, dict(what), has_table
        self.entries: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self._files: dict[str, FileIdentity] = {}  # by name of the scan
        self._folders = {folder, folder / "thumbnails"}  # that results are written to
        self._is_table_behind = False  # for want of space, for example
        self._next_refresh = 0.0
        self._lock = threading.Lock()
        self.is_new = True

    def named(self, files: Sequence[InputFile]) -> list[InputFile]:
        """Name files as the journal does; those that it does not know get names that no other file has."""
        known = {identity.path: name for name, identity in self._files.items()}
        taken = {name.casefold() for name in known.values()}
        result = []
        for file in files:
            name = known.get(FileIdentity.of(file.path).path)
            if name is None:
                name = free_name(file.name, taken)
                taken.add(name.casefold())
            result.append(InputFile(file.path, name))
        places = {(self.folder / file.name).parent.relative_to(self.folder) for file in result}
        self._folders |= {top / place for place in places for top in (self.folder, self.folder / "thumbnails")}
        return result

    def is_done(self, file: InputFile) -> bool:
        """Return True if the file was predicted as it is now."""
        return file.name in self.entries and self._files[file.name] == FileIdentity.of(file.path)

    def add(self, file: InputFile, identity: FileIdentity, entry: dict[str, Any]) -> None:
        """Note a scan whose results are written; `identity` is that of the file before it was read.

        A table that cannot be written is completed with a later scan, by `complete_table` or when the job goes on.

        Raises:
            OSError: the journal cannot be written, and the scan is not noted.
        """
        with self._lock:
            self._record(file, identity, {"entry": entry})

    def fail(self, file: InputFile, identity: FileIdentity, sentence: str) -> None:
        """Note a file that could not be predicted; the job tries it again when it goes on.

        Raises:
            OSError: the journal cannot be written, and the failure is not noted.
        """
        with self._lock:
            self._record(file, identity, {"failure": sentence})

    def complete_table(self) -> None:
        """Write the rows that the table lacks, if any; raise OSError if that cannot be done."""
        with self._lock:
            if self._is_table_behind:
                self._write_table()

    def state(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Return copies of `entries` and `failed` as they are together, while other threads note scans."""
        with self._lock:
            return dict(self.entries), dict(self.failed)

    def refresh(self, write: Callable[[], None]) -> None:
        """Write predictions.json and what else shows all scans, if it is time to."""
        started = time.monotonic()
        if started < self._next_refresh:
            return
        write()
        ended = time.monotonic()
        self._next_refresh = ended + max(_REFRESH, 20 * (ended - started))

    def write_document(self, dataset: str) -> None:
        """Write predictions.json."""
        entries, _ = self.state()
        write_document(self.folder / ALL_BOXES, document_of(entries.values(), dataset))

    def _record(self, file: InputFile, identity: FileIdentity, result: Mapping[str, Any]) -> None:
        has_rows = self._has_table and file.name in self.entries  # the file has changed: its old rows go
        if has_rows:
            self._is_table_behind = True
            (self.folder / TABLE).unlink(missing_ok=True)
        self._append(JOURNAL, _line(file.name, identity, result))
        self._note(file, identity, result)
        if not self._has_table:
            return
        try:
            if self._is_table_behind:
                self._write_table()
            elif "entry" in result:
                self._append(TABLE, csv_text(result["entry"]))
        except OSError:
            self._is_table_behind = True

    def _note(self, file: InputFile, identity: FileIdentity, result: Mapping[str, Any]) -> None:
        for known in (self._files, self.entries):  # what comes again comes last, in the journal as in the table
            known.pop(file.name, None)
        self._files[file.name] = identity
        self.failed.pop(identity.path, None)
        if "entry" in result:
            self.entries[file.name] = result["entry"]
        else:
            self.failed[identity.path] = result["failure"]

    def _head(self) -> str:
        return json.dumps({"kind": _KIND, "version": _VERSION, "what": self.what}) + "\n"

    def _append(self, name: str, text: str) -> None:
        """Append to a file that is there, all of the text or nothing."""
        with (self.folder / name).open("rb+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            rest = memoryview(text.encode())
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:  # half a line would run into the next one
                file.truncate(end)
                raise

    def _write_journal(self) -> None:
        with whole_file(self.folder / JOURNAL) as part:
            part.write_text(self._head(), encoding="utf-8")

    def _write_table(self) -> None:
        with whole_file(self.folder / TABLE) as part:
            part.write_bytes(self._table())
        self._is_table_behind = False

    def _table(self) -> bytes:
        return (csv_header() + "".join(map(csv_text, self.entries.values()))).encode()

    def start(self) -> None:
        """Begin the journal and the table of a new job; complete the table of one that goes on.

        What a killed process left unfinished is removed.

        Raises:
            InputError: the table was changed by another program, or journal and table cannot be written.
        """
        try:
            for place in self._folders:
                for path in place.iterdir() if place.is_dir() else ():
                    if _UNFINISHED.fullmatch(path.name):
                        path.unlink(missing_ok=True)
            if self.is_new:
                if self._has_table:
                    (self.folder / TABLE).unlink(missing_ok=True)  # of another job than the journal would say
                self._write_journal()
                if self._has_table:
                    self._write_table()
            elif self._has_table:
                self._extend_table()
        except OSError as error:
            raise InputError(
                f"{error.filename or self.folder} cannot be written ({error.strerror or error}): free space there, or "
                "choose another folder with --output."
            ) from error

    def read(self) -> None:
        """Read the journal.

        Raises:
            InputError: it is damaged, of another program, or of other weights or flags.
        """
        path = self.folder / JOURNAL
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror or error}): choose another --output, or remove it."
            ) from error
        self._check_head(path, lines[0])
        for number, line in enumerate(lines[1:-1], 2):  # behind the last line break is what a kill cut short
            try:
                self._note(*_read_line(line))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"Line {number} of {path} is damaged: remove it, and its scan is predicted again, or begin anew "
                    "with --overwrite."
                ) from error
        if lines[-1]:
            try:
                os.truncate(path, path.stat().st_size - len(lines[-1]))
            except OSError as error:
                raise InputError(
                    f"{path} cannot be written ({error.strerror or error}): choose another --output."
                ) from error

    def _check_head(self, path: Path, line: bytes) -> None:
        """Raise InputError unless the first line of the journal is of this program, weights and flags."""
        try:
            head = json.loads(line)
            kind, version, what = head["kind"], head["version"], head["what"]
            is_ours = kind == _KIND and isinstance(what, dict)
        except (ValueError, KeyError, TypeError, RecursionError):
            is_ours = False
        if not is_ours:
            raise InputError(f"{path} is no journal of this program: choose another --output, or remove it.")
        if version != _VERSION:
            raise InputError(
                f"{path} has version {version!r}, this program reads version {_VERSION}: choose another --output, or "
                "--overwrite to begin anew."
            )
        others = [key for key in {**what, **self.what} if what.get(key) != self.what.get(key)]
        if "weights" in others:
            raise InputError(
                f"{self.folder} holds results of other weights: give another --output, or --overwrite to begin anew."
            )
        if others:
            was, now = (", ".join(_spelled(key, values.get(key)) for key in others) for values in (what, self.what))
            raise InputError(
                f"{self.folder} holds results {was}, and now they would be {now}: give the same flags, another "
                "--output, or --overwrite to begin anew."
            )

    def _extend_table(self) -> None:
        path, whole = self.folder / TABLE, self._table()
        present = path.read_bytes() if path.exists() else b""
        if not whole.startswith(present):
            raise InputError(
                f"{path} was changed by another program, and rows would be appended to it: keep it under another name, "
                "or begin anew with --overwrite."
            )
        if not path.exists():
            self._write_table()
        elif len(present) < len(whole):
            self._append(TABLE, whole[len(present) :].decode())


def _line(name: str, identity: FileIdentity, result: Mapping[str, Any]) -> str:
    place = {"name": name, "file": identity.path, "size": identity.size, "changed": identity.changed}
    return json.dumps({**place, **result}) + "\n"


def _read_line(line: bytes) -> tuple[InputFile, FileIdentity, dict[str, Any]]:
    """Read a line of the journal; a name that leads out of the folder is an error like any other."""
    values = json.loads(line)
    identity = FileIdentity(values["file"], values["size"], values["changed"])
    file = InputFile(Path(identity.path), values["name"])
    if not is_usable_name(file.name):
        raise ValueError(f"{file.name!r} is no name of a scan")
    if "entry" not in values:
        return file, identity, {"failure": str(values["failure"])}
    table_rows(values["entry"])  # what the table and the index need is there
    if values["entry"]["name"] != file.name:
        raise ValueError("the entry is of another scan")
    return file, identity, {"entry": values["entry"]}


def _spelled(key: str, value: Any) -> str:
    """Spell a flag as on the command line, behind "results": "with --score=0.3", "without --agnostic_nms"."""
    if value is None or value is False or value in ([], {}):
        return f"without {key}"
    if value is True:
        return f"with {key}"
    if isinstance(value, dict):
        value = [f"{old}={new}" for old, new in value.items()]
    text = ",".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if type(value) is float else value
    return printable(f"with {key}={text}")


@contextlib.contextmanager
def open_job(folder: Path, what: Mapping[str, Any], *, has_table: bool, overwrite: bool) -> Iterator[Job]:
    """Open the job of a folder; no other process may be at work in the folder.

    Nothing is written before `Job.start`.

    Args:
        folder: folder of the results.
        what: the weights and flags that results depend on; a folder holds results of one kind.
        has_table: True if boxes.csv is written.
        overwrite: True forgets what an earlier job did; its files are written over as their scans are predicted.

    Raises:
        InputError: another process is at work there, or the results are of other weights or flags.
    """
    with alone_in(folder, "prediction", flag="--output", name=LOCK):
        job = Job(folder, what, has_table)
        job.is_new = overwrite or not (folder / JOURNAL).exists()
        if not job.is_new:
            job.read()
        yield job

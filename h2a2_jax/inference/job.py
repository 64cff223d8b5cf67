"""A folder of results as a job that can be stopped at any time and goes on with the same command.

    DIR/predictions.jsonl   the journal: what the job is, then a line for each scan that is done or failed
    DIR/boxes.csv           a line for each box; scans are appended as they finish
    DIR/predictions.json    boxes of all scans (`results`), written at the end and from time to time
    DIR/index.html          all scans, totals and failures, written with it

The journal is the truth. The results of a scan are written first, then its line in the journal, then its rows of the
table: a kill at any moment loses the scan under way. What the table lacks of the journal is appended when the job goes
on, so that it ends as that of a job that nobody stopped.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h2a2_jax.errors import InputError
from h2a2_jax.files import alone_in, whole_file
from h2a2_jax.inference.box_table import csv_header, csv_text
from h2a2_jax.inference.input_files import InputFile, free_name, printable
from h2a2_jax.inference.results import document_of
from h2a2_jax.inference.writers import ALL_BOXES, TABLE, write_document

JOURNAL = "predictions.jsonl"
LOCK = ".lock"
_VERSION = 1
_KIND = "h2a2_jax predictions"
_REFRESH = 10.0
"""Seconds between two writings of what shows all scans; twenty times what a writing takes, if that is more."""


@dataclass(frozen=True)
class FileIdentity:
    """A file as it was when it was predicted: another size or time of change make it another one."""

    path: str  # absolute
    size: int
    changed: int  # ns

    @staticmethod
    def of(path: Path) -> "FileIdentity":
        """Look at a file; one that is missing has the size -1."""
        try:
            status = path.stat()
        except OSError:
            return FileIdentity(printable(path.absolute()), -1, 0)
        return FileIdentity(printable(path.absolute()), status.st_size, status.st_mtime_ns)


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
        return result

    def is_done(self, file: InputFile) -> bool:
        """Return True if the file was predicted as it is now."""
        return file.name in self.entries and self._files[file.name] == FileIdentity.of(file.path)

    def add(self, file: InputFile, identity: FileIdentity, entry: dict[str, Any]) -> None:
        """Note a scan whose results are written; `identity` is that of the file before it was read."""
        with self._lock:
            again = file.name in self.entries
            self._note(file, identity, {"entry": entry})
            if again:  # the file has changed: its old rows go
                self._write_journal()
                self._write_table()
            else:
                self._append(JOURNAL, self._line(file.name))
                if self._has_table:
                    self._append(TABLE, csv_text(entry))

    def fail(self, file: InputFile, identity: FileIdentity, sentence: str) -> None:
        """Note a file that could not be predicted; the job tries it again when it goes on."""
        with self._lock:
            before = self.entries.pop(file.name, None)
            self._note(file, identity, {"failure": sentence})
            if before is None:
                self._append(JOURNAL, self._line(file.name))
            else:  # predicted before the file was changed
                self._write_journal()
                self._write_table()

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
        write_document(self.folder / ALL_BOXES, document_of(self.entries.values(), dataset))

    def _note(self, file: InputFile, identity: FileIdentity, result: Mapping[str, Any]) -> None:
        for known in (self._files, self.entries):  # what comes again comes last, in the journal as in the table
            known.pop(file.name, None)
        self._files[file.name] = identity
        self.failed.pop(identity.path, None)
        if "entry" in result:
            self.entries[file.name] = result["entry"]
        else:
            self.failed[identity.path] = result["failure"]

    def _line(self, name: str) -> str:
        identity = self._files[name]
        line: dict[str, Any] = {"name": name, "file": identity.path, "size": identity.size, "changed": identity.changed}
        result = {"entry": self.entries[name]} if name in self.entries else {"failure": self.failed[identity.path]}
        return json.dumps(line | result) + "\n"

    def _head(self) -> str:
        return json.dumps({"kind": _KIND, "version": _VERSION, "what": self.what}) + "\n"

    def _append(self, name: str, text: str) -> None:
        with (self.folder / name).open("ab") as file:
            file.write(text.encode())

    def _write_journal(self) -> None:
        with whole_file(self.folder / JOURNAL) as part:
            part.write_text(self._head() + "".join(map(self._line, self._files)), encoding="utf-8")

    def _write_table(self) -> None:
        if self._has_table:
            with whole_file(self.folder / TABLE) as part:
                part.write_bytes(self._table())

    def _table(self) -> bytes:
        return (csv_header() + "".join(map(csv_text, self.entries.values()))).encode()

    def start(self) -> None:
        """Begin the journal and the table of a new job; complete the table of one that goes on.

        Raises:
            InputError: the table was changed by another program.
        """
        if self.is_new:
            self._write_journal()
            self._write_table()
        elif self._has_table:
            self._complete_table()

    def read(self) -> None:
        """Read the journal.

        Raises:
            InputError: it is damaged, of another program, or of other weights or flags.
        """
        path = self.folder / JOURNAL
        lines = path.read_bytes().split(b"\n")
        try:
            head = json.loads(lines[0])
            is_ours = head["kind"] == _KIND and head["version"] == _VERSION
            what = head["what"]
        except (ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            raise InputError(f"{path} is no journal of this program: choose another --output, or remove it.")
        if other := [key for key in {**what, **self.what} if what.get(key) != self.what.get(key)]:
            was, now = (json.dumps(values.get(other[0])) for values in (what, self.what))
            raise InputError(
                f"{self.folder} holds results with another {other[0]} ({was}, now {now}): give another --output, or "
                "--overwrite to begin anew."
            )
        for number, line in enumerate(lines[1:-1], 2):  # behind the last line break is what a kill cut short
            try:
                values = json.loads(line)
                identity = FileIdentity(values["file"], values["size"], values["changed"])
                file = InputFile(Path(identity.path), values["name"])
                self._note(file, identity, values)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"Line {number} of {path} is damaged: remove it, and its scan is predicted again, or begin anew "
                    "with --overwrite."
                ) from error
        if lines[-1]:
            with path.open("rb+") as journal:
                journal.truncate(path.stat().st_size - len(lines[-1]))

    def _complete_table(self) -> None:
        path, whole = self.folder / TABLE, self._table()
        present = path.read_bytes() if path.exists() else b""
        if not whole.startswith(present):
            raise InputError(
                f"{path} was changed by another program, and rows would be appended to it: keep it under another name, "
                "or begin anew with --overwrite."
            )
        if len(present) < len(whole):
            with path.open("ab") as table:
                table.write(whole[len(present) :])


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

"""Scans on disk while a dataset is prepared: a file each, whole or not there, whatever was killed when.

A file holds eight bytes that name the format, the SHA-256 digest of what follows, and an uncompressed `.npz`. It is
written under a temporary name, synced to disk and renamed.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.files import read_json
from h2a2_jax.scans.scan import Scan, colors_from_bytes

FORMAT_VERSION = 1
"""Raised when files of scans change their meaning: older caches are then refused."""

_MAGIC = b"h2a2scan"
_DIGEST_BYTES = 32
_TEMPORARY = ".writing"


class OutputError(InputError):
    """Nothing can be written where the output should go; no other scan would fare better."""


class DamagedScanError(Exception):
    """A file of the cache is not what was written, or was written with other settings."""


class ScanCache:
    """Files of scans that were prepared with the same settings.

    Several processes may write different scans at once. Picklable.

    Args:
        folder: of the files.
        settings: of the preparation, numbers and strings by name. A scan that was written with others is not read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.settings = {"format": FORMAT_VERSION, **settings}

    def open(self) -> None:
        """Makes the folder, or checks that the one there is of the same settings; removes what a kill left behind.

        Raises:
            InputError: the folder holds scans of other settings.
            OutputError: the folder cannot be written to.
        """
        make_folder(self.folder)
        file = self.folder / "settings.json"
        if file.exists():
            found = read_json(file)
            if found != self.settings:
                raise InputError(
                    f"{self.folder} holds scans that were prepared with other settings "
                    f"({difference(found, self.settings)}): remove that folder, or give another --output."
                )
        else:
            write_whole(file, _json_bytes(self.settings))
        for left_over in self.folder.glob(f"*{_TEMPORARY}"):
            left_over.unlink()

    def path(self, name: str) -> Path:
        """The file of a scan."""
        return self.folder / f"{quote(name, safe=' ')}.scan"

    def write(self, scan: Scan) -> None:
        """Writes a scan in one go; colours are rounded to 1/255.

        Raises:
            OutputError: it cannot be written.
        """
        facts = {"name": scan.name, "settings": self.settings, "notes": dict(scan.notes)}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            facts=np.frombuffer(_json_bytes(facts), np.uint8),
            points=scan.points.astype(np.float32),
            colors=colors_to_bytes(scan.colors),
            boxes=scan.boxes.astype(np.float32),
            labels=scan.labels.astype(np.int32),
            transform=scan.transform.astype(np.float32),
        )
        body = buffer.getvalue()
        write_whole(self.path(scan.name), _MAGIC + hashlib.sha256(body).digest() + body)

    def read(self, name: str) -> Scan:
        """Reads a scan.

        Raises:
            DamagedScanError: the file is not there, is not as it was written, or is of other settings.
        """
        try:
            content = self.path(name).read_bytes()
        except OSError as error:
            raise DamagedScanError(str(error)) from error
        head, body = content[: len(_MAGIC) + _DIGEST_BYTES], content[len(_MAGIC) + _DIGEST_BYTES :]
        if head != _MAGIC + hashlib.sha256(body).digest():
            raise DamagedScanError(f"{self.path(name)} is not as it was written.")
        try:
            with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                scan = Scan(
                    facts["name"],
                    arrays["points"],
                    colors_from_bytes(arrays["colors"]),
                    arrays["boxes"],
                    arrays["labels"],
                    arrays["transform"],
                    facts["notes"],
                )
        except (ValueError, KeyError, zipfile.BadZipFile) as error:  # of another format, though whole
            raise DamagedScanError(f"{self.path(name)} is of another format.") from error
        if scan.name != name or facts["settings"] != self.settings:
            raise DamagedScanError(f"{self.path(name)} is of another scan or of other settings.")
        return scan

    def write_failures(self, reasons: Mapping[str, str]) -> None:
        """Remembers which scans could not be prepared, and why; an empty mapping forgets those of before."""
        file = self.folder / "failed.json"
        if reasons or file.exists():
            write_whole(file, _json_bytes(reasons))

    def read_failures(self) -> dict[str, str]:
        """Why scans could not be prepared when it was last tried, by name."""
        file = self.folder / "failed.json"
        found = read_json(file) if file.exists() else None
        return found if isinstance(found, dict) else {}

    def remove(self) -> None:
        """Removes the folder with all scans."""
        shutil.rmtree(self.folder, ignore_errors=True)


def colors_to_bytes(colors: np.ndarray) -> np.ndarray:
    """Colours 0-1 as uint8 0-255, rounded."""
    return np.rint(colors * np.float32(255)).astype(np.uint8)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file such that after a kill at any moment it is there in full, or as it was before.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
    with writing_to(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def make_folder(folder: Path) -> None:
    """Makes a folder with those above it; it may be there.

    Raises:
        OutputError: it cannot be made.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Says in one sentence what hinders writing.

    Raises:
        OutputError: instead of an OSError from inside.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"No space is left on the disk of {path}: free some, or give an --output on another disk; "
                "the same command then goes on."
            ) from error
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}): give an --output that can."
        ) from error


def difference(found: Any, wanted: Mapping[str, Any]) -> str:
    """Which settings differ, as in "scale: demo there, full asked for"."""
    if not isinstance(found, dict):
        return "they cannot be read"
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} asked for" for name in names)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()

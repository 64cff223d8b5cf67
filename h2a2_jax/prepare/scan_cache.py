"""Scans on disk while a dataset is prepared: one file a scan, complete or absent after a kill at any moment.

A file holds eight bytes that name the format, the SHA-256 digest of the rest, and an uncompressed `.npz`. It is written
under a temporary name, synced to disk and renamed.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.files import read_json
from h2a2_jax.scans.scan import Scan, colors_from_bytes
from h2a2_jax.untrusted import read_bytes
from h2a2_jax.untrusted.arrays import load_arrays

FORMAT_VERSION = 1
"""Raised when files of scans change their meaning: older caches are then refused."""

_MAGIC = b"h2a2scan"
_DIGEST_BYTES = 32
_TEMPORARY = ".writing"


class OutputError(InputError):
    """Nothing can be written where the output should go; no other scan would fare better."""


class DamagedScanError(Exception):
    """A file of the cache differs from the one written, or was written with other settings."""


class ScanCache:
    """Files of scans that were prepared with the same settings, numbers and strings by name; others are not read.

    Several processes may write different scans at once. Picklable.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.settings = {"format": FORMAT_VERSION, **settings}

    def open(self) -> None:
        """Make the folder, or check that an existing one has the same settings; remove half-written files."""
        make_folder(self.folder)
        file = self.folder / "settings.json"
        if not file.exists():
            write_json(file, self.settings)
        elif (found := read_json(file)) != self.settings:
            raise InputError(
                f"{self.folder} holds scans that were prepared with other settings "
                f"({difference(found, self.settings)}): remove that folder, or give another --output."
            )
        for left_over in self.folder.glob(f"*{_TEMPORARY}"):
            left_over.unlink()

    def path(self, name: str) -> Path:
        """File of a scan."""
        return self.folder / f"{quote(name, safe=' ')}.scan"

    def write(self, scan: Scan) -> None:
        """Write a scan in one go; colours are rounded to 1/255."""
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
        _write_atomically(self.path(scan.name), _MAGIC + hashlib.sha256(body).digest() + body)

    def read(self, name: str) -> Scan:
        """Read a scan; raise DamagedScanError if its file is missing, damaged, or of other settings."""
        path = self.path(name)
        try:
            content = read_bytes(path)
        except OSError as error:
            raise DamagedScanError(str(error)) from error
        head, body = content[: len(_MAGIC) + _DIGEST_BYTES], content[len(_MAGIC) + _DIGEST_BYTES :]
        if head != _MAGIC + hashlib.sha256(body).digest():
            raise DamagedScanError(f"{path} is not as it was written.")
        try:
            arrays = load_arrays(path, body)
            facts = json.loads(arrays["facts"].tobytes())
            others = {key: arrays[key] for key in ("points", "boxes", "labels", "transform")}
            scan = Scan(facts["name"], colors=colors_from_bytes(arrays["colors"]), notes=facts["notes"], **others)
            if not _is_scan(scan):
                raise ValueError("its arrays have other types or shapes")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:  # complete, of another version
            raise DamagedScanError(f"{path} is of another format.") from error
        if scan.name != name or facts["settings"] != self.settings:
            raise DamagedScanError(f"{path} is of another scan or of other settings.")
        return scan

    def write_failures(self, reasons: Mapping[str, str]) -> None:
        """Store the scans that failed with their reasons; an empty mapping clears those of an earlier call."""
        file = self.folder / "failed.json"
        if reasons or file.exists():
            write_json(file, reasons)

    def read_failures(self) -> dict[str, str]:
        """Reasons of the scans that failed at the last attempt, by name."""
        found = read_json(self.folder / "failed.json")
        return found if isinstance(found, dict) else {}

    def remove(self) -> None:
        """Remove the folder with all scans."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_scan(scan: Scan) -> bool:
    """Return True if the arrays of a scan have the types and shapes that `Scan` states."""
    size, count = len(scan.points), len(scan.boxes)
    shapes = [(size, 3), (size, 3), (count, 7), (count,), (4, 4)]
    arrays = [scan.points, scan.colors, scan.boxes, scan.labels, scan.transform]
    types = [array.dtype.str for array in arrays]
    return types == ["<f4", "<f4", "<f4", "<i4", "<f4"] and [array.shape for array in arrays] == shapes


def colors_to_bytes(colors: np.ndarray) -> np.ndarray:
    """Colours 0-1 as uint8 0-255, rounded."""
    return np.rint(colors * np.float32(255)).astype(np.uint8)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that a kill at any moment leaves complete or as it was before."""
    _write_atomically(path, _json_bytes(value))


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; it may exist."""
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside into an OutputError about the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"No space is left on the disk of {path}: free some, or give an --output on another disk; "
                "the same command then goes on."
            ) from error
        problem = f"{path} cannot be written ({error.strerror or error})"
        raise OutputError(f"{problem}: give an --output that can.") from error


def difference(found: Any, wanted: Mapping[str, Any]) -> str:
    """Name the settings that differ, as in "scale: demo there, full asked for"."""
    if not isinstance(found, dict):
        return "they cannot be read"
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} asked for" for name in names)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
    with explain_write_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file of the name
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()

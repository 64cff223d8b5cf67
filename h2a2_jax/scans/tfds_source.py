"""Scans of datasets that were prepared with `python -m data.<dataset>`, read at random from array_record files."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from h2a2_jax.errors import InputError, quoted
from h2a2_jax.files import read_json
from h2a2_jax.scans.scan import Scan, ScanError, colors_from_bytes
from h2a2_jax.scans.specs import DatasetSpec

METADATA_FILE = "metadata.json"
"""Written by TFDS beside the scans: "dataset", "classes", "has_yaw", "settings", "names" by split, "failed"."""

_INFO_FILE = "dataset_info.json"
_FEATURES, _FEATURE_MODULES = "features.json", "tensorflow_datasets.core.features."
_INCOMPLETE = "incomplete."
_BELOW = ("", "*/", "*/*/", "prepared/*/*/")
"""Places of a version's folder below the folder that a user gives."""


class TfdsSource:
    """Scans of one split of a prepared dataset.

    Files are opened by each process when it first reads, so that a source can be pickled and used by several threads at
    once. array_record crashes in a process that is forked after its parent has read: such a process is refused.
    `folder` is that of the version which is read, as in data/scannet/prepared/scannet/1.0.0.
    """

    def __init__(self, root: str | Path, split: str, spec: DatasetSpec):
        """Find the dataset and check that it is whole.

        `root` is a version's folder, or one up to three levels above it: data/scannet, data/scannet/prepared, ...
        """
        self.folder = find_tfds(root, spec)
        metadata = _metadata(self.folder) or {}
        if tuple(metadata["classes"]) != spec.classes:
            raise InputError(
                f"{self.folder} holds the {len(metadata['classes'])} classes {quoted(', '.join(metadata['classes']))}; "
                f"{spec.name} has {', '.join(spec.classes)}: give another folder or another dataset."
            )
        if split not in metadata["names"]:
            raise InputError(f"{self.folder} has no split {split}: use one of {', '.join(metadata['names'])}.")
        problem = why_not_whole(self.folder)
        if problem is not None:
            raise InputError(f"{problem}: remove {self.folder} and prepare the dataset again.")
        try:
            import array_record.python.array_record_data_source  # noqa: F401
            import tensorflow_datasets  # noqa: F401
        except ImportError as error:
            raise InputError(
                f'Reading {self.folder} needs {error.name}, which is not installed: pip install "h2a2_jax[data]".'
            ) from error
        self._split = split
        self.names: Sequence[str] = tuple(metadata["names"][split])
        self._lock = threading.Lock()
        self._opened: Any = None
        self._process = 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Scan:
        """Read one scan; raise `ScanError` if its record is damaged, `InputError` if the files cannot be opened."""
        if not 0 <= index < len(self.names):
            raise IndexError(f"scan {index} of {len(self.names)}")
        name = self.names[index]
        records = self._records()
        try:
            found = records[index]
            arrays = {key: found[key] for key in ("points", "boxes", "labels", "transform")}
            colors, notes = colors_from_bytes(found["colors"]), json.loads(found["notes"])
            scan = Scan(found["name"].decode(), colors=colors, notes=notes, **arrays)
        except Exception as error:  # array_record, protobuf and TFDS each have their own
            raise ScanError(
                name,
                f"Scan {name} cannot be read from {self.folder} ({quoted(error)}): remove that "
                "folder and prepare the dataset again.",
            ) from error
        if scan.name != name:
            raise ScanError(name, f"{self.folder} holds scan {scan.name} in the place of {name}: prepare it again.")
        return scan

    def _records(self) -> Any:
        """Return TFDS's view of the files, opened once per process."""
        with self._lock:
            if self._opened is None or self._process != os.getpid():
                global _first_reader
                # array_record keeps threads for all its readers, which a fork does not copy.
                if _first_reader not in (None, os.getpid()):
                    raise RuntimeError(
                        "Prepared data are read in a process that was forked after its parent had read some: start "
                        "processes by spawn, or fork before reading."
                    )
                _first_reader = os.getpid()
                import tensorflow_datasets as tfds

                try:
                    _check_features(self.folder / _FEATURES)
                    self._opened = tfds.builder_from_directory(self.folder).as_data_source(split=self._split)
                except InputError:
                    raise
                except Exception as error:  # TFDS has no base class of its errors
                    raise InputError(
                        f"{self.folder} cannot be opened ({quoted(error)}): remove it and prepare the dataset again."
                    ) from error
                self._process = os.getpid()
            return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_opened": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


_first_reader: int | None = None  # process


def _check_features(file: Path) -> None:
    """Refuse features that are not TFDS's own: TFDS imports the module that the name of a feature's class has."""
    names = (text for text in _texts(json.loads(file.read_text(encoding="utf-8"))) if "." in text)
    strange = next((name for name in names if not name.startswith(_FEATURE_MODULES)), None)
    if strange is not None:
        raise InputError(
            f"{file} names {strange[:100]!r}, which is no feature of TFDS, and reading it could run code: prepare the "
            "dataset yourself, as data/README.md describes."
        )


def _texts(document: Any) -> Iterator[str]:
    """All values of a JSON document that are text."""
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict | list):
        for part in document.values() if isinstance(document, dict) else document:
            yield from _texts(part)


def is_tfds(root: str | Path) -> bool:
    """Return True if `python -m data.<dataset>` prepared a dataset here, in full or in part."""
    return bool(_versions(Path(root)) or _unfinished(Path(root)))


def find_tfds(root: str | Path, spec: DatasetSpec) -> Path:
    """Find the version's folder of a prepared dataset, at most three levels below `root`; the newest of several."""
    root = Path(root)
    found = {folder: metadata["dataset"] for folder, metadata in _versions(root).items()}
    fitting = [folder for folder, dataset in found.items() if dataset == spec.name]
    datasets = {folder.parent for folder in fitting}
    if len(datasets) > 1:
        raise InputError(
            f"{root} holds {len(datasets)} prepared datasets of {spec.name}: "
            f"give one of {', '.join(map(str, sorted(datasets)))}."
        )
    if fitting:
        return max(fitting, key=lambda folder: [int(n) if n.isdigit() else 0 for n in folder.name.split(".")])
    if found:
        others = ", ".join(f"{folder} ({dataset})" for folder, dataset in found.items())
        raise InputError(f"{root} holds no prepared {spec.name}, but {others}: give another folder or another dataset.")
    unfinished = _unfinished(root)
    if unfinished:
        raise InputError(
            f"{root} was only half prepared ({unfinished[0]} is left of it): give the command that prepares it again, "
            "it goes on where it was."
        )
    raise InputError(
        f"{root} holds no prepared dataset: prepare it with python -m data.<dataset>, as data/README.md describes."
    )


def why_not_whole(folder: Path) -> str | None:
    """Describe the missing part of a version's folder in half a sentence; None if it is whole.

    No record is read: a file that was cut or is missing shows in the sizes.
    """
    info = read_json(folder / _INFO_FILE)
    if info is None or _metadata(folder) is None:
        return f"{folder} lacks {_INFO_FILE} or {METADATA_FILE}, or they are damaged"
    try:
        return _missing_part(folder, info)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:  # OSError: a name that is too long
        return f"{folder / _INFO_FILE} is damaged ({type(error).__name__}: {quoted(error, 100)})"


def _metadata(folder: Path) -> dict[str, Any] | None:
    """The metadata of a version's folder; None if they are missing or of another form."""
    found = read_json(folder / METADATA_FILE)
    if not isinstance(found, dict) or not isinstance(found.get("dataset"), str):
        return None
    names = found.get("names")
    lists = [found.get("classes"), *(names.values() if isinstance(names, dict) else (None,))]
    return found if all(isinstance(each, list) and all(isinstance(n, str) for n in each) for each in lists) else None


def _missing_part(folder: Path, info: Any) -> str | None:
    for split in info["splits"]:
        number = len(split["shardLengths"])
        files = [
            folder / f"{info['name']}-{split['name']}.{info['fileFormat']}-{i:05d}-of-{number:05d}"
            for i in range(number)
        ]
        if missing := [file.name for file in files if not file.is_file()]:
            return f"{folder} lacks {missing[0]}"
        size, expected = sum(file.stat().st_size for file in files), int(split["numBytes"])
        if size != expected:
            return f"The files of {split['name']} in {folder} have {size} bytes instead of {expected}"
    return None


def _versions(root: Path) -> dict[Path, dict[str, Any]]:
    """Metadata of the versions below a folder, by their folders."""
    files = {file for below in _BELOW for file in root.glob(f"{below}{_INFO_FILE}")}
    folders = sorted(file.parent for file in files if not file.parent.name.startswith(_INCOMPLETE))
    return {folder: metadata for folder in folders if (metadata := _metadata(folder)) is not None}


def _unfinished(root: Path) -> list[Path]:
    patterns = ["*.cache/settings.json", "prepared/*.cache/settings.json"]
    patterns += [f"{below}{_INCOMPLETE}*/" for below in ("", "*/", "prepared/*/")]
    return sorted(path for pattern in patterns for path in root.glob(pattern))

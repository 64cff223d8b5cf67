"""Pretrained folders: a detector in three files that any machine reads, and that the Hugging Face hub shows.

model.safetensors   the arrays by part and path, as in "shared/backbone.stem.conv.kernel"; parts are exclusive,
                    shared, statistics, those of the datasets stacked in the order of "datasets"
config.json         {"format": "h2a2_jax.pretrained", "version": 1, "datasets": [names],
                     "classes": {dataset: [names], which a
                     detector shows}, "sha256": of model.safetensors,
                     "facts": of the card (`CardFacts`), "versions": {package: version},
                     "config": of the experiment (`h2a2_jax.config.to_json`),
                     ["checksum": sha256 of all the rest; older folders have none]}
README.md           the model card (`model_card`)
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from h2a2_jax.checkpoint.store import StoredDetector
from h2a2_jax.checkpoint.tree import Arrays, describe_array
from h2a2_jax.config import ExperimentConfig, from_json, to_json
from h2a2_jax.errors import InputError, quoted
from h2a2_jax.files import read_json, whole_folder
from h2a2_jax.host import versions
from h2a2_jax.pretrained.card import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, CardFacts, facts_of_run, model_card
from h2a2_jax.scans.sources import ROOTS
from h2a2_jax.scans.specs import DatasetSpec, check_class_names
from h2a2_jax.untrusted import read_bytes

FILES = (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)
"""Files of a pretrained folder."""

_FORMAT, _VERSION = "h2a2_jax.pretrained", 1
_CHECKSUM = "checksum"
_PARTS = ("exclusive", "shared", "statistics")
_DTYPES: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def write_pretrained(detector: StoredDetector, folder: str | Path, facts: CardFacts | None = None) -> None:
    """Write a detector as a pretrained folder, whole or not at all.

    An earlier pretrained folder of the same name is replaced.

    Args:
        detector: the detector.
        folder: the folder; missing, empty, or an earlier pretrained folder without other files.
        facts: facts for the model card; None: those of the detector's origin (`card_facts`).

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    _check_replaceable(folder)
    tensors = {
        f"{part}/{path}": np.ascontiguousarray(array).reshape(array.shape)
        for part, arrays in zip(_PARTS, detector.parts, strict=True)
        for path, array in arrays.items()
    }
    weights = safetensors.numpy.save(tensors, {"format": _FORMAT})
    facts = card_facts(detector) if facts is None else facts
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "datasets": [spec.name for spec in detector.specs],
        "classes": {spec.name: spec.classes for spec in detector.specs},
        "sha256": hashlib.sha256(weights).hexdigest(),
        "facts": facts.to_json(),
        "versions": versions(),
        "config": json.loads(to_json(_without_paths(detector.config))),
    }
    document[_CHECKSUM] = _checksum(document)
    card = model_card(facts, detector.specs, folder.absolute().name, versions(), detector.config.model.label_space)
    try:
        with whole_folder(folder) as part:
            (part / WEIGHTS_FILE).write_bytes(weights)
            (part / CONFIG_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            (part / CARD_FILE).write_text(card, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror or error}): free space there, or give another folder."
        ) from error


def _without_paths(config: ExperimentConfig) -> ExperimentConfig:
    """Leave out the folders of the machine that trained: they mean nothing elsewhere, and are nobody's business."""
    datasets = tuple(
        replace(source, root=ROOTS.get(source.name, f"data/{source.name}")) if source.root else source
        for source in config.datasets
    )
    return replace(config, datasets=datasets, train=replace(config.train, init_from=""))


def read_pretrained(folder: str | Path) -> StoredDetector:
    """Read the detector of a pretrained folder; nothing in it is run.

    `StoredDetector.build` refuses arrays of another architecture than the config's.

    Raises:
        InputError: a file is missing, damaged, of another program or of another version.
    """
    folder = Path(folder)
    stored = _read_config(folder)
    weights = _read_bytes(folder / WEIGHTS_FILE)
    if hashlib.sha256(weights).hexdigest() != stored.get("sha256"):
        raise InputError(
            f"{folder / WEIGHTS_FILE} is not the file that {CONFIG_FILE} beside it was written with (its sha256 "
            "differs): remove the folder, and write, copy or download it again."
        )
    try:
        config = from_json(json.dumps(stored.get("config")))
    except InputError as error:
        raise InputError(f"{folder / CONFIG_FILE} cannot be used: {error}") from error
    names, by_name = stored.get("datasets"), {spec.name: spec for spec in config.specs}
    if not isinstance(names, list) or sorted(map(repr, names)) != sorted(map(repr, by_name)):
        raise InputError(
            f"{folder / CONFIG_FILE} lists the datasets {quoted(names)}; expected are those of its config, "
            f"{', '.join(config.dataset_names)}: write or download the folder again."
        )
    # The columns of a union of classes go by the names of the config.
    classes = stored.get("classes") if config.model.label_space == "separate" else None
    specs = tuple(_named(by_name[name], classes, folder / CONFIG_FILE) for name in names)
    exclusive, shared, statistics = _read_parts(folder / WEIGHTS_FILE, weights)
    facts = CardFacts.from_json(stored.get("facts")).to_json()
    return StoredDetector(config, specs, (exclusive, shared, statistics), f"The detector in {folder}", facts)


def _named(spec: DatasetSpec, classes: Any, file: Path) -> DatasetSpec:
    """Return a spec with the names of classes that the folder gives, which may be plainer than the dataset's own.

    Raises:
        InputError: the names are not as many as the classes, or cannot be told apart (`check_class_names`).
    """
    given = classes.get(spec.name) if isinstance(classes, dict) else None
    if given is None:
        return spec
    if (
        not isinstance(given, list)
        or not all(isinstance(name, str) for name in given)
        or len(given) != spec.num_classes
    ):
        raise InputError(
            f"{file} lists the classes {quoted(given)} of {spec.name}; expected are {spec.num_classes} names: write or "
            "download the folder again."
        )
    check_class_names(tuple(given), spec.name)
    return replace(spec, classes=tuple(given))


def is_pretrained(folder: Path) -> bool:
    """Return True if a folder has the files of a pretrained folder, whoever wrote them."""
    return os.path.isfile(folder / CONFIG_FILE) and os.path.isfile(folder / WEIGHTS_FILE)


def card_facts(detector: StoredDetector) -> CardFacts:
    """Facts for the model card of a detector: those of its pretrained folder, or of its run."""
    run, step = detector.origin.get("run"), detector.origin.get("step")
    if isinstance(run, str) and isinstance(step, int):
        return facts_of_run(Path(run), step)
    return CardFacts.from_json(detector.origin)


def weights_digest(detector: StoredDetector) -> str:
    """SHA-256, in hexadecimal digits, of the architecture, the classes and the arrays: the identity of weights.

    It does not depend on where the detector was read from, nor on how it was trained, nor on options that a later
    version has and that are off.
    """
    specs = [[spec.name, spec.classes, spec.has_yaw] for spec in detector.specs]
    digest = hashlib.sha256(json.dumps([_chosen(detector.config.model), specs], sort_keys=True).encode())
    for part, arrays in zip(_PARTS, detector.parts, strict=True):
        for path, array in sorted(arrays.items()):
            digest.update(f"{part}/{path} {describe_array(array)}\n".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _chosen(options: Any) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults, and of the dataclasses in it."""
    values = ((field, getattr(options, field.name)) for field in fields(options))
    return {f.name: _chosen(value) if is_dataclass(value) else value for f, value in values if value != f.default}


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_bytes(file: Path) -> bytes:
    try:
        return read_bytes(file, growth=2)
    except FileNotFoundError:
        raise InputError(
            f"There is no file {file}: a pretrained folder holds {WEIGHTS_FILE} and {CONFIG_FILE}; copy or download it "
            "whole."
        ) from None
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror or error}): check the file and its rights."
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of this format and version."""
    file = folder / CONFIG_FILE
    try:
        stored = json.loads(_read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged, it is no JSON ({quoted(error)}): write or download it again.") from error
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
        raise InputError(
            f"{file} is of another program: expected is a folder that h2a2_jax wrote (Detector.save_pretrained)."
        )
    if stored.get("version") != _VERSION:
        raise InputError(
            f"{file} has version {quoted(stored.get('version'))}, this program reads version {_VERSION}: install the "
            "h2a2_jax that wrote it, or write the folder again."
        )
    if (expected := stored.pop(_CHECKSUM, None)) is not None and expected != _checksum(stored):
        raise InputError(
            f"{file} is damaged, it is not what was written (its checksum differs): write, copy or download it again."
        )
    return stored


def _checksum(document: Mapping[str, Any]) -> str:
    """SHA-256 of the content of config.json without its checksum."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _read_parts(file: Path, weights: bytes) -> tuple[Arrays, Arrays, Arrays]:
    parts: dict[str, Arrays] = {part: {} for part in _PARTS}
    try:
        for name, tensor in safetensors.deserialize(weights):
            part, _, path = name.partition("/")
            parts[part][path] = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{file} holds no arrays of a detector ({quoted(error)}): write it again.") from error
    return parts["exclusive"], parts["shared"], parts["statistics"]


# --- writing ---------------------------------------------------------------------------------------------------------


def _check_replaceable(folder: Path) -> None:
    """Refuse a place that holds anything but an earlier pretrained folder."""
    try:
        if not folder.exists() and not folder.is_symlink():
            return
        place = folder.resolve()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): give another folder.") from error
    if place in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{folder} is the folder that this program runs in and is not replaced: give a new folder.")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; expected is a folder for the weights: give another name.")
    try:
        held = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror or error}): give another folder.") from error
    stored = read_json(folder / CONFIG_FILE)
    is_ours = isinstance(stored, dict) and stored.get("format") == _FORMAT
    others = [name for name in held if name not in FILES] if is_ours else held
    if others:
        more = ", ..." if len(others) > 3 else ""
        raise InputError(
            f"{folder} holds {', '.join(others[:3])}{more}, and a pretrained folder is written as a whole: give a new "
            "folder, or an earlier pretrained one without other files."
        )

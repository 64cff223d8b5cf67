"""Detectors by name, folder, file or hub: `load_pretrained` returns what a predictor is made of."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from h2a2_jax.checkpoint.store import StoredDetector, checkpoint_place, read_detector
from h2a2_jax.convert.conversion import convert_file
from h2a2_jax.convert.torch_file import read_torch_file
from h2a2_jax.distributed import say as say_once
from h2a2_jax.errors import InputError
from h2a2_jax.pretrained.cached_file import alone_with, check_file, discard_download, fetch_file
from h2a2_jax.pretrained.card import WEIGHTS_FILE, CardFacts
from h2a2_jax.pretrained.catalog import CatalogEntry, find_entry, unknown_name
from h2a2_jax.pretrained.download import SILENCE_S
from h2a2_jax.pretrained.folder import FILES, is_pretrained, read_pretrained, write_pretrained

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN = 3

Say = Callable[[str], None]


def load_pretrained(name: str | Path, say: Say = say_once, *, silence: float = SILENCE_S) -> StoredDetector:
    """Load a detector by what a user calls it.

    Args:
        name: a name of the catalog (`h2a2_jax.pretrained.catalog.CATALOG`); else a pretrained folder, the folder of a
            run or of one of its checkpoints; else a file of mmdetection3d's TR3D or FCAF3D (.pth), which is converted
            on the fly; else org/name on the Hugging Face hub. A `Path` is never a name.
        say: takes a sentence at the first use of weights: their licence, where they are kept, what is odd about them.
        silence: seconds without a byte after which a server counts as gone.

    Raises:
        InputError: there is nothing of the name, or it cannot be downloaded, read or used; one sentence.
    """
    if isinstance(name, str) and (entry := find_entry(name)) is not None:
        return load_entry(entry, say, silence=silence)
    path = Path(name)
    if os.path.isdir(path):
        return _load_folder(path)
    if os.path.isfile(path):
        return read_pretrained(path.parent) if path.name == WEIGHTS_FILE else convert_weights(path, say)
    if path.suffix == ".pth" or isinstance(name, Path) or path.is_absolute():
        raise InputError(
            f"There is no file or folder {path}: give a pretrained folder, the folder of a run, or a .pth file of "
            "TR3D or FCAF3D."
        )
    if _HUB_NAME.fullmatch(name):
        return read_pretrained(_hub_folder(name))
    raise unknown_name(name)


def load_entry(entry: CatalogEntry, say: Say = say_once, *, silence: float = SILENCE_S) -> StoredDetector:
    """Load weights of the catalog; published ones are downloaded and converted the first time.

    Raises:
        InputError: as of `load_pretrained`.
    """
    if not entry.path:
        if not is_pretrained(entry.folder):
            raise InputError(
                f"The weights {entry.name!r} are not part of this installation of h2a2_jax ({entry.folder} holds no "
                f"{WEIGHTS_FILE}): give others, which h2a2 weights lists, or install a release that has them."
            )
        return read_pretrained(entry.folder)
    if not entry.folder.is_dir():
        with alone_with(entry, say):
            if not entry.folder.is_dir():
                _convert_entry(entry, say, silence)
    check_file(entry.file)
    return read_pretrained(entry.folder)


def convert_weights(path: Path, say: Say = say_once) -> StoredDetector:
    """Convert a file of mmdetection3d's TR3D or FCAF3D; nothing in it is run.

    Raises:
        InputError: the file is damaged, of another program or of another network, or lacks parameters.
    """
    file = read_torch_file(path)
    try:
        conversion = convert_file(file)
    except InputError as error:
        raise InputError(
            f"{path} is no TR3D or FCAF3D of a known dataset: {error} (Flags are those of h2a2 convert.)"
        ) from error
    missing = [entry.name for entry in conversion.of("missing")]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise InputError(
            f"{path} lacks {', '.join(missing[:_SHOWN])}{more}: give a whole detector; h2a2 convert --partial makes a "
            "run of a part of one, to train on from."
        )
    for note in conversion.notes:
        say("".join(letter if letter.isprintable() else "?" for letter in f"{path.name}: {note}"))
    facts = CardFacts(source=path.name, terms="")
    detector = StoredDetector.of(conversion.build(), conversion.config, f"The detector in {path}")
    return replace(detector, origin=facts.to_json())


def _convert_entry(entry: CatalogEntry, say: Say, silence: float) -> None:
    """Make the pretrained folder of an entry."""
    file = fetch_file(entry, say, silence)
    try:
        detector = convert_weights(file, say)
        if detector.config.dataset_names != entry.datasets:
            raise InputError(
                f"{file} holds a detector for {', '.join(detector.config.dataset_names)}; expected is one for "
                f"{', '.join(entry.datasets)}."
            )
    except InputError as error:
        if discard_download(file):
            raise InputError(f"What {entry.address} sent cannot be used and is not kept: {error}") from error
        raise
    facts = CardFacts(
        name=entry.name,
        source=entry.address,
        terms=entry.license,
        scores=entry.shares,
        measured="the validation scans, as mmdetection3d publishes it",
    )
    write_pretrained(detector, entry.folder, facts)
    say(f"{entry.name} is converted and kept in {entry.folder}. {entry.license}")


def _load_folder(folder: Path) -> StoredDetector:
    """Load a pretrained folder or a checkpoint."""
    if checkpoint_place(folder).directory.is_dir():
        return read_detector(folder)
    if is_pretrained(folder) or (folder / WEIGHTS_FILE).is_file():
        return read_pretrained(folder)
    raise InputError(
        f"{folder} holds neither a pretrained detector ({WEIGHTS_FILE} and config.json) nor the checkpoints of a run: "
        "give the folder that save_pretrained wrote, or the workdir of a training."
    )


def _hub_folder(name: str) -> Path:
    """Download a pretrained folder from the Hugging Face hub into the hub's own cache, and return it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"{name} is neither a folder here nor a name of the catalog, and weights of the Hugging Face hub need the "
            "package huggingface_hub: pip install 'h2a2_jax[hub]'."
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of many kinds: of the hub, of its network, of the file system
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InputError(
            f"{name} cannot be downloaded from the Hugging Face hub ({reason}): check the name and the network, log in "
            "where it is not public, or give a folder or a name that h2a2 weights lists."
        ) from error

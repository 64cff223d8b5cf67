"""What a folder of scans is: a user's own, prepared by mmdetection3d, or prepared by `python -m data.<dataset>`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from h2a2_jax.errors import InputError
from h2a2_jax.inputs.mmdet3d import Mmdet3dFolder, default_info_files
from h2a2_jax.inputs.scan import ScanSource
from h2a2_jax.inputs.scan_folder import (
    BOXES_FILE,
    FolderDescription,
    ScanEntry,
    ScanFolder,
    class_label,
    folder_classes,
    is_scan_folder,
    point_cloud_files,
    read_folder,
)
from h2a2_jax.inputs.specs import SPECS, DatasetSpec, own_spec

Split = Literal["train", "val"]
_SPLITS: tuple[Split, ...] = ("train", "val")
_FULL_TURN = 6.3


@dataclass(frozen=True)
class CheckedFolder:
    """A folder that was recognised.

    Attributes:
        root: the folder.
        kind: what it is, in words.
        spec: the classes and protocol it is compared with.
        sources: its scans by split.
        up: axis that is said to point up.
        unit: that is said to be meant.
        mend: sentences on what must be mended, met on the way.
        hints: sentences on what is worth knowing.
    """

    root: Path
    kind: str
    spec: DatasetSpec
    sources: Mapping[Split, ScanSource]
    up: str = "z"
    unit: str = "m"
    mend: Sequence[str] = ()
    hints: Sequence[str] = ()

    @property
    def is_own(self) -> bool:
        """Whether frame and unit are the user's to say."""
        return any(isinstance(source, ScanFolder) for source in self.sources.values())


def recognise(root: Path, spec: DatasetSpec | None) -> CheckedFolder:
    """Finds out what a folder is.

    Args:
        root: the folder.
        spec: the dataset it is to be; None: by the files in it.

    Raises:
        InputError: there is no such folder, or it is none that is known.
    """
    from h2a2_jax.inputs.tfds_source import is_tfds

    if not root.is_dir():
        what = f"{root} is a file, not a folder" if root.is_file() else f"There is no folder {root}"
        raise InputError(f"{what}: give a folder of scans with --data=FOLDER.")
    if is_scan_folder(root):
        return _own_folder(root, spec)
    if is_tfds(root):
        return _tfds_folder(root, spec)
    infos = [file.name for file in root.glob("*.pkl")]
    if infos:
        return _mmdet3d_folder(root, spec, infos)
    files = point_cloud_files(root)
    if files:
        return _bare_folder(root, spec, files)
    raise InputError(
        f"{root} holds no scans: expected are {BOXES_FILE} with point clouds, or *_infos_*.pkl with points/ as "
        "mmdetection3d prepares them, or what python -m data.<dataset> prepares."
    )


def _own_folder(root: Path, spec: DatasetSpec | None) -> CheckedFolder:
    description = read_folder(root)
    classes = folder_classes(root)
    hints = []
    if spec is None:
        known = {s.name: sum(class_label(name, s) >= 0 for name in classes) for s in SPECS}
        spec = max(SPECS, key=lambda s: known[s.name])
        if known[spec.name] < len(classes):
            has_yaw = any(box.box[6] for scan in description.scans for box in scan.boxes)
            spec = own_spec("its own", classes, has_yaw=has_yaw)
        hints.append(
            f"Of the {len(classes)} classes in {BOXES_FILE}, "
            f"{', '.join(f'{name} has {count}' for name, count in known.items())}; choose whose count with --dataset."
        )
    named = {scan.file for scan in description.scans}
    others = [file for file in point_cloud_files(root) if Path(file).as_posix() not in named]
    if others:
        hints.append(f"{len(others)} point clouds are not in {BOXES_FILE} and not used ({some(others)}).")
    sources: dict[Split, ScanSource] = {}
    mend = []
    yaws = [abs(box.box[6]) for scan in description.scans for box in scan.boxes]
    far = [yaw for yaw in yaws if _FULL_TURN < yaw < math.inf]
    if far:
        mend.append(
            f"{len(far)} boxes have a yaw of more than a full turn, up to {max(far):g}: give radians, not degrees."
        )
    for split in _SPLITS:
        try:
            source = ScanFolder(root, split, spec, description=description)
        except InputError as error:
            mend.append(str(error))
            continue
        hints += source.warnings
        if not source.warnings:  # else it is that of the other split
            sources[split] = source
    return CheckedFolder(root, "own scans", spec, sources, description.up, description.unit, mend, hints)


def _bare_folder(root: Path, spec: DatasetSpec | None, files: Sequence[str]) -> CheckedFolder:
    description = FolderDescription("z", "m", "auto", tuple(ScanEntry(file, "train", ()) for file in files))
    spec = spec or SPECS[0]
    entry = json.dumps({"file": files[0], "boxes": []})
    example = f'{{"version": 1, "up": "z", "unit": "m", "scans": [{entry}, ...]}}'
    mend = [f"There is no {BOXES_FILE}, so nothing says where the boxes are: write one such as {example}."]
    source = ScanFolder(root, "train", spec, description=description)
    return CheckedFolder(root, f"point clouds without {BOXES_FILE}", spec, {"train": source}, mend=mend)


def _mmdet3d_folder(root: Path, spec: DatasetSpec | None, infos: Sequence[str]) -> CheckedFolder:
    named = next((s for s in SPECS if any(info.startswith(f"{s.name}_infos") for info in infos)), None)
    spec = spec or named
    if spec is None:
        raise InputError(
            f"{root} holds {some(infos)}, which do not tell the dataset: choose one with --dataset="
            f"{'|'.join(s.name for s in SPECS)}; expected are names such as {default_info_files(SPECS[0], 'train')[0]}."
        )
    sources: dict[Split, ScanSource] = {}
    mend = []
    for split in _SPLITS:
        try:
            sources[split] = Mmdet3dFolder(root, default_info_files(spec, split), spec)
        except InputError as error:
            mend.append(f"Split {split}: {error}")
    return CheckedFolder(root, "a folder prepared by mmdetection3d", spec, sources, mend=mend)


def _tfds_folder(root: Path, spec: DatasetSpec | None) -> CheckedFolder:
    from h2a2_jax.inputs.tfds_source import TfdsSource, find_tfds

    if spec is None:
        for candidate in SPECS:
            try:
                find_tfds(root, candidate)
            except InputError:
                continue
            spec = candidate
            break
    spec = spec or SPECS[0]
    sources: dict[Split, ScanSource] = {}
    mend = []
    for split in _SPLITS:
        try:
            sources[split] = TfdsSource(root, split, spec)
        except InputError as error:
            mend.append(str(error))
    return CheckedFolder(root, "a dataset prepared by python -m data", spec, sources, mend=list(dict.fromkeys(mend)))


def some(names: Sequence[str]) -> str:
    """The first three, for a sentence."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

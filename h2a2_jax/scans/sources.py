"""Sources of scans by config: what kind of data a folder holds, and the source that reads it."""

import dataclasses
import json
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.scans.mmdet3d import Mmdet3dFolder, default_info_files
from h2a2_jax.scans.scan import Scan, ScanError, ScanSource
from h2a2_jax.scans.scan_folder import (
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
from h2a2_jax.scans.specs import SPECS, DatasetSpec, dataset_spec, own_spec
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.scans.tfds_source import TfdsSource, is_tfds

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
    from h2a2_jax.scans.tfds_source import is_tfds

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
    from h2a2_jax.scans.tfds_source import TfdsSource, find_tfds

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


ROOTS: Mapping[str, str] = {"scannet": "data/scannet", "sunrgbd": "data/sun_rgbd", "s3dis": "data/s3dis"}
"""Where a dataset is looked for, below the folder that a program is started in: where its command prepares it."""

_POINTS_FOLDER = "points"


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of a run, and where its scans come from.

    Attributes:
        name: of the dataset: "scannet", "sunrgbd", "s3dis", or any other with `classes` of its own.
        kind: "mmdet3d", a folder prepared by mmdetection3d; "tfds", one that `python -m data.<dataset>` prepared;
            "scans", a folder of scans with boxes.json (`ScanFolder`); "auto", whichever of these `root` is; or
            "synthetic", procedural scans.
        root: the folder; none for procedural scans.
        train_infos: info files of the training scans in `root` (mmdet3d); empty: the names mmdetection3d gives them.
        val_infos: likewise, of the validation scans.
        train_size: number of training scans (synthetic).
        val_size: number of validation scans (synthetic).
        scale: rooms like the real ones, "full", or small ones with few classes, "demo" (synthetic).
        seed: another seed gives other scans (synthetic).
        repeats: how often an epoch goes through the training scans; None: as the dataset's recipe says.
        augment: whether training scans are mirrored, turned, scaled and moved by the dataset's recipe.
        sample: whether points of training scans are drawn by the dataset's recipe; else all are used.
        batch_size: training scans in a step, over all devices of the dataset; None: as `train.batch_size` says.
        weight: probability, above 0 up to 1, with which the dataset takes part in a training step.
        classes: of a dataset of one's own; the built-in ones have theirs.
        has_yaw: whether the boxes of a dataset of one's own turn about z.
        large_classes: see `own_spec`.
    """

    name: str
    kind: Literal["auto", "mmdet3d", "tfds", "scans", "synthetic"] = "auto"
    root: str = ""
    train_infos: tuple[str, ...] = ()
    val_infos: tuple[str, ...] = ()
    train_size: int = 1000
    val_size: int = 100
    scale: Literal["demo", "full"] = "full"
    seed: int = 0
    repeats: int | None = None
    augment: bool = True
    sample: bool = True
    batch_size: int | None = None
    weight: float = 1.0
    classes: tuple[str, ...] = ()
    has_yaw: bool = False
    large_classes: tuple[str, ...] | None = None

    @property
    def is_procedural(self) -> bool:
        """Whether its scans are made here, so that what is measured on them says nothing about the real ones."""
        return self.kind == "synthetic"

    @property
    def spec(self) -> DatasetSpec:
        """What is fixed of the dataset.

        Raises:
            InputError: neither a built-in name nor classes, or both; see `own_spec`.
        """
        if self.classes:
            return own_spec(self.name, self.classes, has_yaw=self.has_yaw, large_classes=self.large_classes)
        return dataset_spec(self.name)


def build_source(source: SourceConfig, split: Split) -> ScanSource:
    """The scans of one split of a dataset.

    Args:
        source: which dataset, from where.
        split: "train" or "val".

    Raises:
        InputError: the dataset is unknown, or its folder or a file in it is missing or cannot be understood.
    """
    spec = source.spec
    match _kind(source):
        case "synthetic":
            size = source.train_size if split == "train" else source.val_size
            return SyntheticSource(spec, split, size, seed=source.seed, scale=source.scale)
        case "tfds":
            return TfdsSource(source.root, split, spec)
        case "scans":
            scans = ScanFolder(source.root, split, spec)
            _check_classes(source)
            return scans
    infos = (source.train_infos if split == "train" else source.val_infos) or default_info_files(spec, split)
    _check_folder(source, infos)
    return Mmdet3dFolder(source.root, infos, spec, points_folder=_POINTS_FOLDER)


def holds_dataset(root: Path) -> bool:
    """Whether a folder has scans with their boxes in one of the forms that `kind` "auto" knows."""
    return _kind_found(root) is not None


def _kind(source: SourceConfig) -> str:
    """What `root` is, where the config leaves it open; of a folder that is nothing mmdetection3d's files are missed."""
    return source.kind if source.kind != "auto" else _kind_found(Path(source.root)) or "mmdet3d"


def _kind_found(root: Path) -> str | None:
    if is_scan_folder(root):
        return "scans"
    if (root / _POINTS_FOLDER).exists():
        return "mmdet3d"
    return "tfds" if is_tfds(root) else None


def _check_classes(source: SourceConfig) -> None:
    """Boxes of other classes than the dataset's are left out; nothing is learnt if that is all of them."""
    found, spec = folder_classes(source.root), source.spec
    if found and not any(class_label(name, spec) >= 0 for name in found):
        raise InputError(
            f"No box in {Path(source.root) / BOXES_FILE} is of a class of {source.name}: there are {_listed(found)}; "
            f"expected are {_listed(spec.classes)}."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _check_folder(source: SourceConfig, infos: Sequence[str]) -> None:
    root = Path(source.root)
    wanted = [root, root / _POINTS_FOLDER, *(root / info for info in infos)]
    missing = next((path for path in wanted if not path.exists()), None)
    if missing is not None:
        prepares = ".".join(root.parts) if (root / "__main__.py").is_file() else "data.<dataset>"
        raise InputError(
            f"The data of {source.name} is not there: {missing} does not exist; expected is a folder prepared by "
            f"mmdetection3d, {root}/ with {', '.join(infos)} and {_POINTS_FOLDER}/<scan>.bin, or one that "
            f"`python -m {prepares}` prepared, or scans with {BOXES_FILE} (set another one with "
            f"--config.datasets.{source.name}.root=...); --config=configs/joint.py:demo runs without data."
        )


def summed_notes(notes: Mapping[str, Mapping[str, int]]) -> str | None:
    """One sentence on what loading left out or repaired; None if there is nothing.

    Args:
        notes: a count by kind (`Scan.notes`), by scan.
    """
    total: Counter[str] = Counter()
    for each in notes.values():
        total.update(each)
    if not total:
        return None
    counts = "; ".join(f"{count:,} {kind}" for kind, count in total.items())
    return f"In {len(notes)} of the scans: {counts}."


class CachedSource:
    """Keeps every scan of a source in memory once it was loaded; several threads may ask at once.

    Attributes:
        source: what is kept.
    """

    def __init__(self, source: ScanSource):
        self.source = source
        self._scans: dict[int, Scan] = {}
        self._locks = [threading.Lock() for _ in range(len(source))]

    @property
    def names(self) -> Sequence[str]:
        """Names of the scans, in order."""
        return self.source.names

    def __len__(self) -> int:
        """Number of scans."""
        return len(self._locks)

    def __getitem__(self, index: int) -> Scan:
        """One scan, loaded at the first call; a scan that failed to load is tried again.

        Raises:
            ScanError: the scan cannot be used.
        """
        with self._locks[index]:
            if index not in self._scans:
                self._scans[index] = self.source[index]
            return self._scans[index]


def permuted_boxes(source: ScanSource, seed: int) -> ScanSource:
    """Every scan carries the boxes and labels of another scan of its source: a control that cannot be learnt.

    What a detector trained on it still scores is due to where boxes usually are, not to what it sees. The permutation
    is one cycle through all scans, so that none keeps its own boxes.

    Args:
        source: of the scans; a source of one scan stays as it is.
        seed: another seed gives another permutation.
    """
    return _PermutedBoxes(source, seed)


class _PermutedBoxes:
    def __init__(self, source: ScanSource, seed: int):
        self.source = source
        order = np.random.default_rng(seed).permutation(len(source))
        self._donor = dict(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))

    @property
    def names(self) -> Sequence[str]:
        """Names of the scans, in order."""
        return self.source.names

    def __len__(self) -> int:
        """Number of scans."""
        return len(self.source)

    def __getitem__(self, index: int) -> Scan:
        """One scan with another one's boxes.

        Raises:
            ScanError: this scan or the other one cannot be used.
        """
        scan = self.source[index]
        try:
            donor = self.source[self._donor[index]]
        except ScanError as error:
            raise ScanError(scan.name, f"Scan {scan.name} has no boxes to take: {error}") from error
        return dataclasses.replace(scan, boxes=donor.boxes, labels=donor.labels)

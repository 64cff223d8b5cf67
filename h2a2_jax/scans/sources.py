"""Sources of scans by config: what kind of data a folder holds, and the source that reads it."""

import contextlib
import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from h2a2_jax.errors import InputError
from h2a2_jax.scans.mmdet3d import (
    POINTS_FOLDERS,
    Mmdet3dFolder,
    default_info_files,
    is_info_file,
    points_folder,
    preparer,
)
from h2a2_jax.scans.scan import Scan, ScanError, ScanSource, is_hidden, some
from h2a2_jax.scans.scan_folder import (
    BOXES_FILE,
    FolderDescription,
    ScanEntry,
    ScanFolder,
    is_scan_folder,
    point_cloud_files,
    read_folder,
)
from h2a2_jax.scans.specs import (
    ALL_SPECS,
    DatasetSpec,
    class_label,
    dataset_spec,
    fcaf3d_protocol,
    own_spec,
    plain_name,
)
from h2a2_jax.scans.synthetic.gap import protocol_at
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.scans.tfds_source import TfdsSource, find_tfds, is_tfds

Split = Literal["train", "val"]
_SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class CheckedFolder:
    """A folder of a known kind, for a check before training.

    Attributes:
        kind: kind of the folder in words.
        spec: classes and protocol that the folder is compared with.
        up: axis that points up, as the folder declares it; `unit` is that of the files.
        problems: sentences on what must be changed before training.
        hints: sentences on what is worth knowing.
    """

    root: Path
    kind: str
    spec: DatasetSpec
    sources: Mapping[Split, ScanSource]
    up: str = "z"
    unit: str = "m"
    problems: Sequence[str] = ()
    hints: Sequence[str] = ()


def recognise(root: Path, spec: DatasetSpec | None) -> CheckedFolder:
    """Find the kind of a folder and open its scans, of an expected dataset or (None) the one that its files name."""
    if not root.is_dir():
        what = f"{root} is a file, not a folder" if root.is_file() else f"There is no folder {root}"
        raise InputError(f"{what}: give a folder of scans with --data=FOLDER.")
    if is_scan_folder(root):
        return _own_folder(root, spec)
    if is_tfds(root):
        return _tfds_folder(root, spec)
    if infos := [file.name for file in root.glob("*.pkl") if not is_hidden(file.name)]:
        return _mmdet3d_folder(root, spec, infos)
    files = point_cloud_files(root)
    inner = (path for path in root.glob("*/*") if path.name == BOXES_FILE or path.match("*_infos*.pkl"))
    below = sorted(path.parent for path in inner if not is_hidden(path.parent.name))
    if below and all("/" in file for file in files):
        raise InputError(f"{root} itself holds no scans, but {below[0]} does: give that folder with --data.")
    if files:
        return _bare_folder(root, spec, files)
    raise InputError(
        f"{root} holds no scans: expected are {BOXES_FILE} with point clouds, or *_infos_*.pkl with points/ as "
        "mmdetection3d and UniDet3D prepare them, or what python -m data.<dataset> prepares."
    )


def _open_splits(
    open_split: Callable[[Split], ScanSource], problem: str = "{error}"
) -> tuple[dict[Split, ScanSource], list[str]]:
    """Open both splits; one that cannot be opened becomes a problem, named once if both have the same."""
    sources: dict[Split, ScanSource] = {}
    problems: list[str] = []
    for split in _SPLITS:
        try:
            sources[split] = open_split(split)
        except InputError as error:
            problems.append(problem.format(split=split, error=error))
    return sources, list(dict.fromkeys(problems))


def _own_folder(root: Path, spec: DatasetSpec | None) -> CheckedFolder:
    description = read_folder(root)
    classes = description.classes
    problems, hints = [], []
    if spec is None:
        known = {s.name: sum(class_label(name, s) >= 0 for name in classes) for s in ALL_SPECS}
        spec = max(ALL_SPECS, key=lambda s: known[s.name])
        if known[spec.name] < len(classes):
            # Spellings of one class, as "Chair" and "chair", are one.
            spelt = {plain_name(name): name for name in reversed(classes)}
            spec = own_spec(
                "its own",
                tuple(sorted(spelt.values())),
                has_yaw=any(box.box[6] for scan in description.scans for box in scan.boxes),
            )
        hints.append(
            f"Of the {len(classes)} classes in {BOXES_FILE}, "
            f"{', '.join(f'{name} has {count}' for name, count in known.items())}; choose whose count with --dataset."
        )
    named = {scan.file for scan in description.scans}
    if others := [file for file in point_cloud_files(root) if file not in named]:
        hints.append(f"{len(others)} point clouds are not in {BOXES_FILE} and not used ({some(others)}).")
    if description.yaw_problem:
        problems.append(description.yaw_problem)
    sources, failures = _open_splits(lambda split: ScanFolder(root, split, spec, description=description))
    for split, source in list(sources.items()):
        warnings = cast(ScanFolder, source).warnings
        hints += warnings
        if warnings:  # validation uses the training scans, which need no second check
            del sources[split]
    return CheckedFolder(root, "own scans", spec, sources, description.up, description.unit, problems + failures, hints)


def _bare_folder(root: Path, spec: DatasetSpec | None, files: Sequence[str]) -> CheckedFolder:
    description = FolderDescription("z", "m", "auto", tuple(ScanEntry(file, "train", ()) for file in files))
    spec = spec or ALL_SPECS[0]
    entry = json.dumps({"file": files[0], "boxes": []})
    example = f'{{"version": 1, "up": "z", "unit": "m", "scans": [{entry}, ...]}}'
    problems = [f"There is no {BOXES_FILE}, so nothing says where the boxes are: write one such as {example}."]
    source = ScanFolder(root, "train", spec, description=description)
    return CheckedFolder(root, f"point clouds without {BOXES_FILE}", spec, {"train": source}, problems=problems)


def _mmdet3d_folder(root: Path, spec: DatasetSpec | None, infos: Sequence[str]) -> CheckedFolder:
    named = [s for s in ALL_SPECS if any(is_info_file(info, s) for info in infos)]
    if spec is None and not named:
        raise InputError(
            f"{root} holds {some(infos)}, which do not tell the dataset: choose one with --dataset="
            f"{'|'.join(s.name for s in ALL_SPECS)}; expected are names such as "
            f"{default_info_files(ALL_SPECS[0], 'train')[0]}."
        )
    spec = spec or named[0]
    if named and spec not in named:
        raise InputError(
            f"{root} holds info files of {', '.join(s.name for s in named)} ({some(infos)}), none of {spec.name}: say "
            f"--dataset={named[0].name}, or rename them to {', '.join(default_info_files(spec, 'train'))}."
        )
    sources, problems = _open_splits(
        lambda split: Mmdet3dFolder(root, default_info_files(spec, split, root), spec), "Split {split}: {error}"
    )
    hints = dict.fromkeys(warning for source in sources.values() for warning in cast(Mmdet3dFolder, source).warnings)
    kind = f"a folder prepared by {preparer(spec)}"
    return CheckedFolder(root, kind, spec, sources, problems=problems, hints=[*hints])


def _tfds_folder(root: Path, spec: DatasetSpec | None) -> CheckedFolder:
    for candidate in ALL_SPECS if spec is None else ():
        with contextlib.suppress(InputError):
            find_tfds(root, candidate)
            spec = candidate
            break
    chosen = spec or ALL_SPECS[0]
    sources, problems = _open_splits(lambda split: TfdsSource(root, split, chosen))
    return CheckedFolder(root, "a dataset prepared by python -m data", chosen, sources, problems=problems)


ROOTS: Mapping[str, str] = {
    "scannet": "data/scannet",
    "sunrgbd": "data/sun_rgbd",
    "s3dis": "data/s3dis",
    "arkitscenes": "data/arkitscenes",
    "multiscan": "data/multiscan/bins",
    "3rscan": "data/3rscan",
    "scannetpp": "data/scannetpp/bins",
}
"""Default folder of a dataset, below the working folder: the one that its command, or UniDet3D, prepares."""


Recipe = Literal["tr3d", "fcaf3d"]
"""Detector whose published recipe a dataset has."""


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of a run, and the place of its scans.

    Attributes:
        name: of a built-in dataset (`ALL_SPECS`), or any other name with `classes` of its own.
        kind: "mmdet3d", a folder prepared by mmdetection3d or UniDet3D; "tfds", one that `python -m data.<dataset>`
            prepared; "scans", a folder of scans with boxes.json (`ScanFolder`); "auto", whichever of these `root` is;
            or "synthetic", procedural scans.
        root: the folder; none for procedural scans.
        train_infos: info files of the training scans in `root` (mmdet3d); empty: the names mmdetection3d gives them.
        val_infos: info files of the validation scans; empty as above.
        train_size: number of training scans (synthetic).
        val_size: number of validation scans (synthetic).
        scale: rooms of the size of the real ones, "full"; small ones with few classes, "demo"; or "varied", homes of
            mixed use with clutter, seen as sensors see them, for detectors of real scans (synthetic).
        seed: another seed gives other scans (synthetic).
        gap: 0: the three datasets are one distribution under three names; 1: stand-ins of the real datasets; up to 2:
            further apart (synthetic; `h2a2_jax.scans.synthetic.gap`). Give all datasets of a run the same.
        recipe: detector whose published recipe the dataset has: passes of an epoch, augmentation and the number of
            points, in training and evaluation. "fcaf3d" changes that of ScanNet, SUN RGB-D and S3DIS; other datasets
            keep that of "tr3d", since FCAF3D is not published for them.
        repeats: passes of an epoch through the training scans; None: as the dataset's recipe says.
        augment: True to mirror, turn, scale and move training scans by the dataset's recipe.
        sample: True to sample points of training scans by the dataset's recipe; False uses all.
        batch_size: training scans in a step, over all devices of the dataset; None: as `train.batch_size` says.
        weight: probability, above 0 up to 1, with which the dataset takes part in a training step.
        share: part, above 0 up to 1, of the training scans that a pass of an epoch draws, as UniDet3D's `partition`.
            Among datasets with a share, the one with most batches to draw in an epoch takes part in a step with its
            `weight`, any other with its `weight` times the ratio of their batches. None: a pass draws all scans, and
            `weight` alone counts.
        classes: classes of a dataset of one's own; the built-in ones have theirs.
        has_yaw: True if the boxes of a dataset of one's own turn about z.
        large_classes: classes of the coarse level, see `own_spec`.
    """

    name: str
    kind: Literal["auto", "mmdet3d", "tfds", "scans", "synthetic"] = "auto"
    root: str = ""
    train_infos: tuple[str, ...] = ()
    val_infos: tuple[str, ...] = ()
    train_size: int = 1000
    val_size: int = 100
    scale: Literal["demo", "full", "varied"] = "full"
    seed: int = 0
    gap: float = 1.0
    recipe: Recipe = "tr3d"
    repeats: int | None = None
    augment: bool = True
    sample: bool = True
    batch_size: int | None = None
    weight: float = 1.0
    share: float | None = None
    classes: tuple[str, ...] = ()
    has_yaw: bool = False
    large_classes: tuple[str, ...] | None = None

    @property
    def is_procedural(self) -> bool:
        """True if the scans are procedural: scores on them say nothing about real ones."""
        return self.kind == "synthetic"

    @property
    def spec(self) -> DatasetSpec:
        """Classes and protocol of the dataset by its `recipe`; of a procedural one at its `gap`.

        Raises:
            InputError: neither a built-in name nor classes, or both; see `own_spec`.
        """
        if self.classes:
            return own_spec(self.name, self.classes, has_yaw=self.has_yaw, large_classes=self.large_classes)
        spec = dataset_spec(self.name)
        spec = protocol_at(spec, self.gap) if self.is_procedural else spec
        if self.recipe == "fcaf3d":
            # Below a gap of 1 all procedural datasets have ScanNet's protocol (`protocol_at`).
            return fcaf3d_protocol(spec, "scannet" if self.is_procedural and self.gap < 1 else None)
        return spec


def build_source(source: SourceConfig, split: Split) -> ScanSource:
    """Open the scans of one split of a dataset.

    Raises:
        InputError: the dataset is unknown, or its folder or a file in it is missing or cannot be understood.
    """
    spec, root = source.spec, Path(source.root)
    # Of a folder of no kind, mmdetection3d's files are reported as missing.
    kind = source.kind if source.kind != "auto" else _kind_of(root) or "mmdet3d"
    match kind:
        case "synthetic":
            size = source.train_size if split == "train" else source.val_size
            return SyntheticSource(spec, split, size, seed=source.seed, scale=source.scale, gap=source.gap)
        case "tfds":
            return TfdsSource(root, split, spec)
        case "scans":
            description = read_folder(root)
            if description.yaw_problem:
                raise InputError(f"{root / BOXES_FILE}: {description.yaw_problem}")
            _check_classes(description.classes, spec, root / BOXES_FILE)
            return ScanFolder(root, split, spec, description=description)
    infos = (source.train_infos if split == "train" else source.val_infos) or default_info_files(spec, split, root)
    wanted = [root, root / points_folder(spec), *(root / info for info in infos)]
    missing = next((path for path in wanted if not path.exists()), None)
    if missing is not None:
        prepares = ".".join(root.parts) if (root / "__main__.py").is_file() else "data.<dataset>"
        raise InputError(
            f"The data of {source.name} is not there: {missing} does not exist; expected is a folder prepared by "
            f"{preparer(spec)}, {root}/ with {', '.join(infos)} and {points_folder(spec)}/<scan>.bin, or one that "
            f"`python -m {prepares}` prepared, or scans with {BOXES_FILE} (set another one with "
            f"--config.datasets.{source.name}.root=...); --config=configs/joint.py:demo runs without data."
        )
    scans = Mmdet3dFolder(root, infos, spec)
    if split == "train":
        _check_classes(scans.classes, spec, root)
    return scans


def _check_classes(found: Sequence[str], spec: DatasetSpec, place: Path) -> None:
    """Refuse classes of which the dataset has none: their boxes would be left out, and nothing be learnt."""
    if found and not any(class_label(name, spec) >= 0 for name in found):
        raise InputError(
            f"No box in {place} is of a class of {spec.name}: there are {some(found, 6)}; "
            f"expected are {some(spec.classes, 6)}."
        )


def holds_dataset(root: Path) -> bool:
    """Return True if a folder has scans with their boxes in one of the forms that `kind` "auto" knows."""
    return _kind_of(root) is not None


def _kind_of(root: Path) -> str | None:
    if is_scan_folder(root):
        return "scans"
    if any((root / folder).exists() for folder in POINTS_FOLDERS):
        return "mmdet3d"
    return "tfds" if is_tfds(root) else None


def summed_notes(notes: Mapping[str, Mapping[str, int]]) -> str | None:
    """Return one sentence on what loading left out or repaired, by `Scan.notes` of each scan; None if nothing was."""
    total = sum(map(Counter, notes.values()), Counter[str]())
    counts = "; ".join(f"{count:,} {kind}" for kind, count in total.items())
    return f"In {len(notes)} of the scans: {counts}." if total else None


class CachedSource:
    """A source that keeps every loaded scan of another `source` in memory; several threads may read at once."""

    def __init__(self, source: ScanSource):
        self.source, self.names = source, source.names
        self._scans: dict[int, Scan] = {}
        self._locks = [threading.Lock() for _ in range(len(source))]

    def __len__(self) -> int:
        return len(self._locks)

    def __getitem__(self, index: int) -> Scan:
        """Return one scan, loaded at the first call; a scan that failed to load (`ScanError`) is tried again."""
        with self._locks[index]:
            if index not in self._scans:
                self._scans[index] = self.source[index]
            return self._scans[index]


class PermutedBoxes:
    """Scans that have the boxes and labels of another scan of their source: a control that cannot be learnt.

    The score of a detector trained on it is due to the usual places of boxes, not to the points. The permutation
    is one cycle through all scans, so that none keeps its own boxes, but for the only one of its source.
    """

    def __init__(self, source: ScanSource, seed: int):
        self.source, self.names = source, source.names
        order = np.random.default_rng(seed).permutation(len(source))
        self._donor = dict(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Scan:
        """Return one scan with another one's boxes; raise `ScanError` if one of the two cannot be used."""
        scan = self.source[index]
        try:
            donor = self.source[self._donor[index]]
        except ScanError as error:
            raise ScanError(scan.name, f"Scan {scan.name} has no boxes to take: {error}") from error
        return dataclasses.replace(scan, boxes=donor.boxes, labels=donor.labels)

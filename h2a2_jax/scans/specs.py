"""Facts of each dataset: classes, box protocol, augmentation and sampling recipe.

ScanNet, SUN RGB-D and S3DIS, the three of H2A2, have TR3D's (arXiv 2302.02858) training recipes. ARKitScenes,
MultiScan, 3RScan and ScanNet++ have those of UniDet3D (arXiv 2409.04234), which trains on them with ScanNet and S3DIS,
and passes of an epoch of our own: 15 as ScanNet, 4 through the larger ARKitScenes. `fcaf3d_protocol` gives the first
three the recipes of FCAF3D (arXiv 2112.00322). Class orders are those of the label indices in prepared mmdet3d folders,
including their spelling ("showercurtrain").
"""

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from h2a2_jax.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """Random rigid motion, mirror and scale of a scan; see `augment.augment`.

    Attributes:
        flip_x: probability of x -> -x.
        flip_y: probability of y -> -y.
        rotation: angle about z is uniform in +-rotation (rad).
        scale: uniform range of the isotropic scale factor.
        translation_std: standard deviation (m) of the normal shift, one draw per axis.
    """

    flip_x: float
    flip_y: float
    rotation: float
    scale: tuple[float, float]
    translation_std: float


@dataclass(frozen=True)
class FractionSampling:
    """Keep a uniformly drawn fraction of the points, in [low, high), without replacement."""

    low: float
    high: float


@dataclass(frozen=True)
class CountSampling:
    """Keep exactly `count` points; with replacement only if the scan has fewer."""

    count: int


Sampling = FractionSampling | CountSampling | None
"""Sampling of the points of a scan; None keeps all of them in their order."""


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset's protocol.

    Attributes:
        name: of a built-in dataset, as in `ALL_SPECS`, or of one's own.
        classes: class names; the position is the label.
        has_yaw: True if boxes turn about z, False if they are axis-aligned (yaw 0).
        label_to_level: per class, the head level that learns it: 0 (16 cm) or 1 (32 cm).
        color_scale: divisor that brings the colours of prepared files to 0-1.
        repeats: passes of one epoch through the training scans.
        augmentation: training augmentation.
        train_sampling: point sampling in training.
        test_sampling: point sampling in evaluation.
        floor: height (m) at which the network is shown the floor of a scan in another frame.
        faces_y: True if every scan is the view of a camera at the origin that looks along y.
    """

    name: str
    classes: tuple[str, ...]
    has_yaw: bool
    label_to_level: tuple[int, ...]
    color_scale: float
    repeats: int
    augmentation: Augmentation
    train_sampling: Sampling
    test_sampling: Sampling
    floor: float = 0.0
    faces_y: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def num_outputs(self) -> int:
        """Numbers the box head predicts per location: 6 (axis-aligned) or 8 (with yaw)."""
        return 8 if self.has_yaw else 6


SCANNET = DatasetSpec(
    name="scannet",
    classes=tuple(
        "cabinet bed chair sofa table door window bookshelf picture counter desk curtain refrigerator showercurtrain "
        "toilet sink bathtub garbagebin".split()
    ),
    has_yaw=False,
    label_to_level=(0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0),
    color_scale=255.0,
    repeats=15,
    augmentation=Augmentation(flip_x=0.5, flip_y=0.5, rotation=0.02, scale=(0.9, 1.1), translation_std=0.1),
    train_sampling=FractionSampling(0.33, 1.0),
    test_sampling=None,
)

SUNRGBD = DatasetSpec(
    name="sunrgbd",
    classes=("bed", "table", "sofa", "chair", "toilet", "desk", "dresser", "night_stand", "bookshelf", "bathtub"),
    has_yaw=True,
    label_to_level=(1, 1, 1, 0, 0, 1, 0, 0, 1, 0),
    color_scale=1.0,
    repeats=5,
    augmentation=Augmentation(flip_x=0.5, flip_y=0.0, rotation=0.5236, scale=(0.85, 1.15), translation_std=0.1),
    train_sampling=CountSampling(100_000),
    test_sampling=CountSampling(100_000),
    # The camera is the origin, .9 to 1.5 m above the floor. Two of the coarsest voxels (64 of 1 cm) below it, the floor
    # lies in their grid as that of the other datasets does.
    floor=-1.28,
    faces_y=True,
)

S3DIS = DatasetSpec(
    name="s3dis",
    classes=("table", "chair", "sofa", "bookcase", "board"),
    has_yaw=False,
    label_to_level=(1, 0, 1, 1, 0),
    color_scale=255.0,
    repeats=13,
    augmentation=Augmentation(flip_x=0.5, flip_y=0.5, rotation=0.0, scale=(0.95, 1.05), translation_std=0.1),
    train_sampling=CountSampling(100_000),
    test_sampling=CountSampling(100_000),
    floor=0.01,  # the lowest point lies at 0
)

_WIDE = frozenset("shelf fireplace blinds whiteboard heater rack".split()) | {"kitchen cabinet", "storage cabinet"}
"""Classes of the four below that are unknown above, and whose longer horizontal side is usually more than a metre."""


def _levels(classes: Sequence[str]) -> tuple[int, ...]:
    """Return the head level of each class of a dataset for which nobody has published levels.

    A class that ScanNet, SUN RGB-D or S3DIS has keeps the level of the first of them that has it. Any other goes to
    the 32 cm level if its longer horizontal side is usually more than a metre, which separates ScanNet's levels too.
    """
    known: dict[str, int] = {}
    for spec in (S3DIS, SUNRGBD, SCANNET):
        known |= zip(spec.classes, spec.label_to_level, strict=True)
    return tuple(known.get(name, int(name in _WIDE)) for name in classes)


def _of_unidet3d(
    name: str, classes: tuple[str, ...], *, points: int, rotation: float = 0.0, **more: Any
) -> DatasetSpec:
    """Make the spec of a dataset with what UniDet3D's recipes have in common; `points` are drawn from each scan."""
    values: dict[str, Any] = {
        "has_yaw": False,
        "label_to_level": _levels(classes),
        "color_scale": 255.0,
        "repeats": 1,
        "augmentation": Augmentation(0.5, 0.5, rotation=rotation, scale=(0.9, 1.1), translation_std=0.1),
        "train_sampling": CountSampling(points),
        "test_sampling": CountSampling(points),
    }
    return DatasetSpec(name, classes, **values | more)


ARKITSCENES = _of_unidet3d(
    "arkitscenes",
    tuple(
        "cabinet refrigerator shelf stove bed sink washer toilet bathtub oven dishwasher fireplace stool chair table "
        "tv_monitor sofa".split()
    ),
    points=100_000,
    rotation=0.5,
    has_yaw=True,
    color_scale=1.0,
    repeats=4,
    # The tablet's world begins where the tablet was first held, some 1.3 m above the floor; see SUN RGB-D.
    floor=-1.28,
)

MULTISCAN = _of_unidet3d(
    "multiscan",
    tuple(
        "door table chair cabinet window sofa microwave pillow tv_monitor curtain trash_can suitcase sink backpack bed "
        "refrigerator toilet".split()
    ),
    points=100_000,
    repeats=15,
)

RSCAN = _of_unidet3d("3rscan", (*SCANNET.classes[:-1], "otherfurniture"), points=100_000, repeats=15)

SCANNETPP = _of_unidet3d(
    "scannetpp",
    tuple(
        "table,door,ceiling lamp,cabinet,blinds,curtain,chair,storage cabinet,office chair,bookshelf,whiteboard,window,"
        "box,monitor,shelf,heater,kitchen cabinet,sofa,bed,trash can,book,plant,blanket,tv,computer tower,refrigerator,"
        "jacket,sink,bag,picture,pillow,towel,suitcase,backpack,crate,keyboard,rack,toilet,printer,poster,painting,"
        "microwave,shoes,socket,bottle,bucket,cushion,basket,shoe rack,telephone,file folder,laptop,plant pot,"
        "exhaust fan,cup,coat hanger,light switch,speaker,table lamp,kettle,smoke detector,container,power strip,"
        "slippers,paper bag,mouse,cutting board,toilet paper,paper towel,pot,clock,pan,tap,jar,soap dispenser,binder,"
        "bowl,tissue box,whiteboard eraser,toilet brush,spray bottle,headphones,stapler,marker".split(",")
    ),
    points=200_000,
    repeats=15,
)

SPECS = (SCANNET, SUNRGBD, S3DIS)
"""The three datasets of H2A2, in the order used throughout."""

UNIDET3D_SPECS = (SCANNET, S3DIS, MULTISCAN, RSCAN, SCANNETPP, ARKITSCENES)
"""The six datasets of UniDet3D, in its order."""

ALL_SPECS = (*SPECS, ARKITSCENES, MULTISCAN, RSCAN, SCANNETPP)
"""The seven built-in datasets."""

FCAF3D_RECIPES: Mapping[str, tuple[int, Augmentation]] = {
    "scannet": (10, Augmentation(0.5, 0.5, rotation=0.087266, scale=(0.9, 1.1), translation_std=0.1)),
    "sunrgbd": (3, Augmentation(0.5, 0.0, rotation=0.523599, scale=(0.85, 1.15), translation_std=0.1)),
    "s3dis": (13, Augmentation(0.5, 0.5, rotation=0.087266, scale=(0.9, 1.1), translation_std=0.1)),
}
"""Passes of an epoch and augmentation of the published FCAF3D trainings, by dataset."""


def fcaf3d_protocol(spec: DatasetSpec, recipe: str | None = None) -> DatasetSpec:
    """Return a dataset's spec with FCAF3D's recipe: 100,000 points, its augmentation and passes of an epoch.

    FCAF3D is published for ScanNet, SUN RGB-D and S3DIS; the spec of any other dataset is returned as it is.

    Args:
        spec: the dataset.
        recipe: name of the dataset whose recipe is taken; None for the spec's own.

    References:
        Rukhovich et al., FCAF3D: Fully Convolutional Anchor-Free 3D Object Detection, https://arxiv.org/abs/2112.00322;
        the values are those of mmdetection3d's configs.
    """
    name = recipe or spec.name
    if name not in FCAF3D_RECIPES:
        return spec
    repeats, augmentation = FCAF3D_RECIPES[name]
    drawn = CountSampling(100_000)
    return replace(spec, repeats=repeats, augmentation=augmentation, train_sampling=drawn, test_sampling=drawn)


MAX_NAME_BYTES = 100
"""Longest name of a dataset, in UTF-8: file systems take 255 for a file, whose name has more parts."""

_OTHER_NAMES = {
    "showercurtain": "showercurtrain",
    "showercurtrain": "showercurtain",
    "garbagebin": "trashcan",
    "trashcan": "garbagebin",
    "fridge": "refrigerator",
    "furniture": "otherfurniture",
}
"""Plain names of classes by other plain names that files have for them: 3RScan's lists say "fridge" and "furniture"."""


def dataset_spec(name: str) -> DatasetSpec:
    """Return the built-in spec of a name.

    Raises:
        InputError: for any other name.
    """
    known = {spec.name: spec for spec in ALL_SPECS}
    if name in known:
        return known[name]
    raise InputError(
        f"Unknown dataset {name!r}: use one of {', '.join(known)}, or name the classes of a dataset of your own."
    )


def class_label(name: str, spec: DatasetSpec) -> int:
    """Return the label of a class by its plain name (`plain_name`); -1 if the spec has no such class."""
    return _label_of(name, spec.classes)


def _label_of(name: str, classes: Sequence[str]) -> int:
    plain, labels = plain_name(name), {plain_name(known): label for label, known in enumerate(classes)}
    return labels.get(plain, labels.get(_OTHER_NAMES.get(plain, plain), -1))


def labels_among(names: Sequence[str], classes: Sequence[str], owner: str) -> tuple[int, ...]:
    """Return the labels of chosen classes, ascending, each once; plain spelling variants count (`class_label`).

    `owner` has the classes in the sentences of errors.

    Raises:
        InputError: there is no such class, or none is chosen.
    """
    labels = {name: _label_of(name, classes) for name in names}
    if not labels:
        raise InputError(f"No class is chosen; {owner} has {', '.join(classes)}.")
    for name, label in labels.items():
        if label < 0:
            raise _no_class(name, classes, owner)
    return tuple(sorted(set(labels.values())))


def renamed(spec: DatasetSpec, names: Mapping[str, str]) -> DatasetSpec:
    """Give classes names of one's own, for results; labels and the name of the dataset stay.

    Args:
        spec: dataset whose head predicts.
        names: new names by present ones, as in {"garbagebin": "trash can"}; plain spelling variants count.

    Raises:
        InputError: the spec has no such class, a class is renamed twice, or the names are none (`check_class_names`).
    """
    classes = list(spec.classes)
    given: dict[int, str] = {}
    for name, new in names.items():
        label = class_label(name, spec)
        if label < 0:
            raise _no_class(name, spec.classes, spec.name)
        if label in given:
            raise InputError(f"{spec.classes[label]} of {spec.name} is renamed to {given[label]!r} and to {new!r}.")
        given[label] = classes[label] = new
    check_class_names(tuple(classes), spec.name)
    return replace(spec, classes=tuple(classes))


def _no_class(name: str, classes: Sequence[str], dataset: str) -> InputError:
    """Return the error for a class that a dataset does not have, with the nearest that it has."""
    by_plain = {plain_name(known): known for known in classes}
    near = difflib.get_close_matches(plain_name(name), by_plain, 1)
    hint = f" (did you mean {by_plain[near[0]]}?)" if near else ""
    return InputError(f"{dataset} has no class {name!r}{hint}; it has {', '.join(classes)}.")


def check_class_names(classes: Sequence[str], dataset: str) -> None:
    """Check that names of classes can be told apart and written in one line.

    Raises:
        InputError: a name is empty, has line breaks or other control characters, or differs from another only in
            case, blanks, hyphens or underscores.
    """
    known: dict[str, str] = {}
    for name in classes:
        if not plain_name(name):
            raise InputError(f"dataset {dataset} has a class called {name!r}; expected is a name with a letter.")
        if _is_broken(name):
            raise InputError(f"dataset {dataset} has a class called {name!r}; expected is a name without line breaks.")
        if plain_name(name) in known:
            raise InputError(
                f"dataset {dataset} has the classes {known[plain_name(name)]!r} and {name!r}, which differ only in "
                "case, blanks, hyphens or underscores, if at all: give one of them another name."
            )
        known[plain_name(name)] = name


def check_dataset_name(name: str) -> None:
    """Check that the name of a dataset can be that of a file and be written in one line.

    Raises:
        InputError: the name is empty, longer than 100 bytes, begins with a dot or a blank or ends with one, or has
            slashes, line breaks or other control characters.
    """
    problem = ""
    if not plain_name(name):
        problem = "is empty" if not name else "has no letter and no digit"
    elif _is_broken(name):
        problem = "has a line break or another control character"
    elif any(separator in name for separator in "/\\:"):
        problem = "has a slash or a colon"
    elif name.startswith(".") or name != name.strip() or name.endswith("."):
        problem = "begins or ends with a dot or a blank"
    elif len(name.encode()) > MAX_NAME_BYTES:
        problem = f"has {len(name.encode())} bytes, more than {MAX_NAME_BYTES}"
    if problem:
        raise InputError(
            f"The name of the dataset {name[:MAX_NAME_BYTES]!r} {problem}; files are called by it: give another one."
        )


def _is_broken(name: str) -> bool:
    """Return True for a name with line breaks, other control characters, or parts that no text file can hold."""
    return any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name)


def plain_name(name: str) -> str:
    """Return a class name without case, blanks, hyphens and underscores."""
    return re.sub(r"[\s_-]", "", name.lower())


def foreign_boxes(name: str, spec: DatasetSpec) -> str:
    """Return the kind of a note (`Scan.notes`) for boxes of a class that the spec does not have."""
    return f"boxes of the class {name!r}, which {spec.name} does not have"


def own_spec(
    name: str, classes: tuple[str, ...], *, has_yaw: bool = False, large_classes: tuple[str, ...] | None = None
) -> DatasetSpec:
    """Make the spec of a dataset of one's own, with the recipe that the built-in ones share.

    Args:
        name: none of the built-in ones.
        classes: class names; the position is the label.
        has_yaw: True if boxes turn about z.
        large_classes: classes of the 32 cm level, things wider than about a metre; None: those that ScanNet, SUN RGB-D
            or S3DIS has there.

    Raises:
        InputError: the name is built in; no class, one twice; a large class is none of the classes; or a name is none
            (`check_dataset_name`, `check_class_names`).
    """
    check_dataset_name(name)
    if name in (spec.name for spec in ALL_SPECS):
        raise InputError(f"{name} is a built-in dataset, whose classes are fixed: call one of your own otherwise.")
    if not classes or len(set(classes)) < len(classes):
        raise InputError(f"dataset {name} has the classes {classes!r}; expected at least one, each once.")
    check_class_names(classes, name)
    if large_classes is None:
        known = {c for spec in SPECS for c, level in zip(spec.classes, spec.label_to_level, strict=True) if level == 1}
        large_classes = tuple(c for c in classes if c in known)
    if foreign := [c for c in large_classes if c not in classes]:
        raise InputError(f"dataset {name} has no class {foreign[0]!r}, which large_classes names; it has {classes!r}.")
    return DatasetSpec(
        name=name,
        classes=classes,
        has_yaw=has_yaw,
        label_to_level=tuple(int(c in large_classes) for c in classes),
        color_scale=1.0,
        repeats=1,
        augmentation=Augmentation(0.5, 0.5, 0.5236 if has_yaw else 0.02, (0.9, 1.1), 0.1),
        train_sampling=CountSampling(100_000),
        test_sampling=CountSampling(100_000),
    )

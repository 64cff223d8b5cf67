"""Which furniture there is, how large it is, and what stands together in a room."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.scans.synthetic import furniture, plain_furniture
from h2a2_jax.scans.synthetic.furniture import Builder, Size

Mount = Literal["wall", "free", "seat", "hung"]
"""Where a thing goes: back to a wall, anywhere, at a table, or fixed to a wall at a height."""

Scale = Literal["demo", "full"]
"""Small rooms of few and easily told classes, or rooms of the size and variety of the real data."""


@dataclass(frozen=True)
class Kind:
    """One kind of furniture.

    Attributes:
        build: makes it from primitives.
        size: mean depth, width, height (m).
        mount: where it goes.
        base: range of the height of its lower side above the floor (m).
        spread: standard deviation of the logarithm of each size.
        height_spread: that of the height where it is another, as of what people sit and work at.
        limit: how many a room has at most.
    """

    build: Builder
    size: Size
    mount: Mount
    base: tuple[float, float] = (0.0, 0.0)
    spread: float = 0.2
    limit: int = 2
    height_spread: float | None = None


# Sizes are class means of the SUN RGB-D boxes where it has the class, else chosen so that the axis-aligned boxes
# of wall-bound objects are about those of ScanNet.
KINDS: Mapping[str, Kind] = {
    "bed": Kind(furniture.bed, (2.11, 1.62, 0.93), "wall", limit=1),
    "table": Kind(furniture.table, (0.79, 1.28, 0.72), "free", spread=0.35, height_spread=0.2),
    "sofa": Kind(furniture.sofa, (0.92, 1.87, 0.85), "wall"),
    "chair": Kind(furniture.chair, (0.59, 0.55, 0.83), "seat", limit=8),
    "desk": Kind(furniture.desk, (0.70, 1.35, 0.74), "wall", limit=3),
    "toilet": Kind(furniture.toilet, (0.70, 0.45, 0.76), "wall", limit=1),
    "dresser": Kind(furniture.dresser, (0.53, 1.00, 1.17), "wall", limit=1),
    "night_stand": Kind(furniture.night_stand, (0.50, 0.63, 0.68), "wall"),
    "bookshelf": Kind(furniture.bookshelf, (0.40, 1.07, 1.69), "wall", limit=3),
    "bathtub": Kind(furniture.bathtub, (0.77, 1.40, 0.50), "wall", limit=1),
    "cabinet": Kind(furniture.cabinet, (0.50, 1.05, 0.93), "wall", spread=0.35, limit=4),
    "door": Kind(furniture.door, (0.12, 0.95, 1.90), "hung", limit=3, spread=0.1),
    "window": Kind(furniture.window, (0.12, 1.45, 1.15), "hung", (0.8, 1.0), 0.35),
    "picture": Kind(furniture.picture, (0.05, 0.60, 0.54), "hung", (1.2, 1.5), 0.35, 3),
    "counter": Kind(furniture.counter, (0.65, 2.20, 0.27), "hung", (0.75, 0.85), 0.35, 1),
    "curtain": Kind(furniture.curtain, (0.14, 1.60, 1.68), "hung", (0.3, 0.6), limit=1),
    "refrigerator": Kind(furniture.refrigerator, (0.68, 0.72, 1.50), "wall", limit=1),
    "showercurtrain": Kind(furniture.curtain, (0.14, 0.75, 1.75), "hung", (0.15, 0.3), limit=1),
    "sink": Kind(furniture.sink, (0.48, 0.54, 0.30), "hung", (0.6, 0.75), limit=1),
    "garbagebin": Kind(furniture.garbage_bin, (0.42, 0.42, 0.58), "wall", limit=3),
    "board": Kind(furniture.board, (0.10, 2.00, 1.20), "hung", (0.8, 1.0), limit=1),
    "carton": Kind(furniture.carton, (0.35, 0.4, 0.35), "free", spread=0.35, limit=3),
    "plant": Kind(furniture.plant, (0.45, 0.45, 0.9), "wall", spread=0.35, limit=2),
}

_S3DIS_SIZES: Mapping[str, Size] = {
    "chair": (0.6, 0.6, 0.8),
    "table": (0.9, 1.5, 0.75),
    "bookshelf": (0.4, 1.0, 2.0),
    "board": (0.1, 2.0, 1.2),
    "sofa": (0.9, 1.8, 0.8),
}

# Closer to the means of ScanNet's axis-aligned boxes: half the sum of depth and width, and the height.
_SCANNET_SIZES: Mapping[str, Size] = {
    "cabinet": (0.46, 0.96, 0.90),
    "bathtub": (0.70, 1.27, 0.48),
    "door": (0.12, 1.0, 1.75),
    "window": (0.12, 1.56, 1.15),
    "picture": (0.05, 0.58, 0.54),
    "counter": (0.68, 2.66, 0.27),
    "curtain": (0.16, 1.88, 1.68),
    "refrigerator": (0.62, 0.66, 1.25),
    "showercurtrain": (0.14, 0.66, 1.75),
    "garbagebin": (0.48, 0.49, 0.58),
}

_ALIASES = {"s3dis": {"bookshelf": "bookcase"}}

Weights = Mapping[str, int | float]
"""How often each kind of furniture is drawn, relative to the others."""

_BEDROOM: Weights = {
    "bed": 6, "night_stand": 3.5, "dresser": 2.5, "cabinet": 1.5, "desk": 1, "chair": 2.5, "door": 3.2, "window": 1.5,
    "picture": 1.5, "curtain": 1.5, "bookshelf": 1, "garbagebin": 1, "carton": 1, "sofa": 0.5, "table": 1.5,
}  # fmt: skip
_OFFICE: Weights = {
    "desk": 3, "chair": 9, "table": 3.5, "bookshelf": 1.5, "cabinet": 2.3, "door": 3.2, "window": 1.5,
    "garbagebin": 1.5, "picture": 0.7, "board": 1, "carton": 1, "plant": 0.5,
}  # fmt: skip
_LIVING: Weights = {
    "sofa": 4, "table": 5, "chair": 6, "bookshelf": 1.5, "cabinet": 1.7, "door": 3, "window": 1.5, "curtain": 1.5,
    "picture": 1.5, "plant": 1, "night_stand": 0.5, "carton": 0.5,
}  # fmt: skip
_KITCHEN: Weights = {
    "counter": 5, "sink": 3, "refrigerator": 4, "cabinet": 3, "table": 3.5, "chair": 7, "door": 3, "window": 1,
    "garbagebin": 1.5, "picture": 0.5,
}  # fmt: skip
_BATHROOM: Weights = {
    "toilet": 6, "sink": 5, "bathtub": 5, "showercurtrain": 5, "door": 4, "cabinet": 2.2, "garbagebin": 1.5,
    "picture": 1, "window": 0.7, "chair": 1, "curtain": 0.5,
}  # fmt: skip
_BATH_AND_BED: Weights = {**_BATHROOM, "bed": 4, "night_stand": 3, "dresser": 2.5, "chair": 5, "desk": 1, "table": 3}
_CONFERENCE: Weights = {"table": 5, "chair": 9, "board": 3, "door": 1.5, "bookshelf": 0.7, "sofa": 0.5, "window": 1}
_LOUNGE: Weights = {
    "sofa": 5,
    "table": 4,
    "chair": 5,
    "bookshelf": 1,
    "board": 1,
    "plant": 1,
    "door": 1,
    "window": 1,
}
_LIBRARY: Weights = {"bookshelf": 3.5, "table": 4, "chair": 6, "board": 1, "door": 1, "carton": 1}


@dataclass(frozen=True)
class Programme:
    """What the rooms of a dataset are like.

    Attributes:
        scale: of the rooms; "demo" also keeps simpler furniture and rules of placement.
        kinds: of furniture, by name.
        rooms: kinds of room; each scan draws one.
        objects: smallest and largest number of annotated objects to place.
        boxes: smallest and largest number of boxes of a scan; a room that shows another number is not used.
        clutter: largest number of things of no class to place as well.
        width: range of the room along x (m).
        length: range of the room along y (m).
        height: range of the ceiling (m).
    """

    scale: Scale
    kinds: Mapping[str, Kind]
    rooms: tuple[Weights, ...]
    objects: tuple[int, int]
    boxes: tuple[int, int]
    clutter: int
    width: tuple[float, float]
    length: tuple[float, float]
    height: tuple[float, float]


_DEMO_ROOMS: Mapping[str, Weights] = {
    "scannet": {"chair": 4, "table": 2.5, "sofa": 1.5, "bed": 2, "bookshelf": 1.5, "door": 2, "cabinet": 1.5},
    "sunrgbd": {"chair": 4, "table": 3, "sofa": 4, "bed": 5, "bookshelf": 2.5, "door": 0.5},
    "s3dis": {"chair": 4, "table": 2.5, "sofa": 2, "bookshelf": 2, "board": 2, "door": 0.5},
}


_ROOM = (3.0, 8.0)


def programme(spec: DatasetSpec, scale: Scale) -> Programme:
    """Returns what the rooms of a dataset are like at a scale."""
    kinds = {name: _kind_of(name, spec, scale) for name in KINDS}
    rooms: tuple[Weights, ...]
    match spec.name:
        case "scannet":
            rooms = (_BEDROOM, _OFFICE, _OFFICE, _LIVING, _KITCHEN, _BATHROOM)
            full = Programme(scale, kinds, rooms, (9, 16), (8, 16), 3, _ROOM, _ROOM, (2.4, 3.0))
        case "sunrgbd":
            rooms = (_BEDROOM, _OFFICE, _LIVING, _BATH_AND_BED)
            full = Programme(scale, kinds, rooms, (5, 10), (2, 6), 3, _ROOM, _ROOM, (2.4, 3.0))
        case _:
            rooms = (_OFFICE, _CONFERENCE, _LOUNGE, _LIBRARY)
            full = Programme(scale, kinds, rooms, (7, 14), (6, 14), 4, (3.0, 10.0), (3.0, 12.0), (2.7, 3.2))
    if scale == "full":
        return full
    # One image shows little of a narrow room: most objects would stick out of it.
    extent = (4.0, 5.5) if spec.name == "sunrgbd" else (3.0, 4.5)
    demo_rooms = (_DEMO_ROOMS[spec.name],)
    return replace(full, rooms=demo_rooms, objects=(3, 6), boxes=(1, 8), clutter=1, width=extent, length=extent)


def _kind_of(name: str, spec: DatasetSpec, scale: Scale) -> Kind:
    """A kind of furniture with its mean size and spread in a dataset."""
    kind = KINDS[name]
    if spec.name == "s3dis":
        kind = replace(kind, size=_S3DIS_SIZES.get(name, kind.size))
    if scale == "demo":
        return replace(kind, build=plain_furniture.BUILDERS.get(name, kind.build), spread=0.5 * kind.spread)
    if spec.name == "scannet":
        kind = replace(kind, size=_SCANNET_SIZES.get(name, kind.size))
    return replace(kind, spread=max(kind.spread, 0.2))


def label_of(name: str, spec: DatasetSpec) -> int:
    """Returns the label of a kind of furniture in a dataset; -1 if the dataset does not annotate it."""
    name = _ALIASES.get(spec.name, {}).get(name, name)
    return spec.classes.index(name) if name in spec.classes else -1

"""Rooms: kinds of furniture, the contents of a dataset's rooms, and where things are placed.

Furniture does not overlap; it stands along walls, at tables or freely. The order of the random draws decides the rooms:
a change gives other scans for the same seed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int32

from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.scans.synthetic import furniture, household
from h2a2_jax.scans.synthetic.furniture import Builder, Primitive, Size, Solids, join_solids, make_solids

Mount = Literal["wall", "free", "seat", "hung", "top"]
"""Place of a thing: back to a wall, anywhere, at a table, fixed to a wall at a height, or on other furniture."""

Scale = Literal["demo", "full", "varied"]
"""Small rooms of few and easily distinguished classes, rooms of the size of the real data, or those of `homes`."""

SCALES: tuple[Scale, ...] = ("full", "demo", "varied")
"""In the order of their numbers, which decide the scans together with the seed."""


@dataclass(frozen=True)
class Kind:
    """One kind of furniture.

    Attributes:
        size: mean depth, width, height (m).
        base: range of the height of the lower side above the floor (m).
        spread: standard deviation of the logarithm of each size.
        limit: largest number in a room.
        height_spread: standard deviation of the logarithm of the height; None = `spread`. Tables vary less in height.
        on: kinds that it stands on, if its place is "top".
    """

    build: Builder
    size: Size
    mount: Mount
    base: tuple[float, float] = (0.0, 0.0)
    spread: float = 0.2
    limit: int = 2
    height_spread: float | None = None
    on: tuple[str, ...] = ()


_TABLES = ("table", "desk", "counter")
_TOPS = (*_TABLES, "cabinet", "dresser")
_SURFACE = {"bed": 0.6, "sofa": 0.5}  # height of what one lies or sits on, as a share of the whole; others: 1

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
    # Only in rooms of the datasets beyond the first three.
    "stove": Kind(household.appliance, (0.62, 0.62, 0.90), "wall", spread=0.1, limit=1),
    "oven": Kind(household.appliance, (0.56, 0.60, 0.60), "hung", (0.6, 0.9), 0.1, 1),
    "washer": Kind(household.appliance, (0.60, 0.62, 0.88), "wall", spread=0.1, limit=1),
    "dishwasher": Kind(household.appliance, (0.58, 0.60, 0.82), "wall", spread=0.1, limit=1),
    "stool": Kind(household.stool, (0.40, 0.42, 0.52), "free", limit=3),
    "fireplace": Kind(household.fireplace, (0.35, 1.30, 1.10), "wall", limit=1),
    "heater": Kind(household.heater, (0.12, 1.10, 0.60), "hung", (0.1, 0.15), 0.3, 2),
    "rack": Kind(household.rack, (0.40, 1.00, 1.40), "wall", spread=0.3),
    "suitcase": Kind(household.case, (0.28, 0.45, 0.65), "wall", limit=1),
    "backpack": Kind(household.case, (0.25, 0.32, 0.45), "wall"),
    "bucket": Kind(furniture.garbage_bin, (0.30, 0.30, 0.32), "wall", limit=1),
    "kitchen cabinet": Kind(furniture.cabinet, (0.36, 1.40, 0.70), "hung", (1.35, 1.45), 0.25),
    "towel": Kind(furniture.curtain, (0.06, 0.45, 0.80), "hung", (0.7, 0.9)),
    "poster": Kind(furniture.picture, (0.03, 0.60, 0.85), "hung", (1.0, 1.3)),
    "screen": Kind(household.screen, (0.20, 0.62, 0.48), "top", limit=3, on=_TOPS),
    "microwave": Kind(household.appliance, (0.38, 0.50, 0.30), "top", limit=1, on=_TOPS),
    "printer": Kind(household.appliance, (0.42, 0.45, 0.32), "top", limit=1, on=_TOPS),
    "laptop": Kind(household.laptop, (0.26, 0.34, 0.24), "top", on=_TABLES),
    "keyboard": Kind(household.slab, (0.16, 0.44, 0.04), "top", on=_TABLES),
    "book": Kind(household.slab, (0.24, 0.18, 0.06), "top", limit=3, on=_TOPS),
    "bottle": Kind(household.bottle, (0.09, 0.09, 0.26), "top", limit=3, on=_TOPS),
    "table lamp": Kind(household.table_lamp, (0.26, 0.26, 0.45), "top", on=(*_TOPS, "night_stand")),
    "pillow": Kind(household.slab, (0.38, 0.48, 0.16), "top", limit=3, on=("bed", "sofa")),
}

_CLASS_OF: Mapping[str, Mapping[str, str]] = {
    "s3dis": {"bookshelf": "bookcase"},
    "arkitscenes": {
        "bookshelf": "shelf", "rack": "shelf", "desk": "table", "dresser": "cabinet", "night_stand": "cabinet",
        "screen": "tv_monitor",
    },
    "multiscan": {
        "desk": "table", "dresser": "cabinet", "night_stand": "cabinet", "showercurtrain": "curtain",
        "garbagebin": "trash_can", "screen": "tv_monitor",
    },
    "3rscan": {"stool": "otherfurniture", "rack": "otherfurniture"},
    "scannetpp": {
        "desk": "table", "dresser": "storage cabinet", "night_stand": "storage cabinet", "board": "whiteboard",
        "garbagebin": "trash can", "carton": "box", "screen": "monitor", "showercurtrain": "curtain",
    },
}  # fmt: skip
"""Class of a kind of furniture in a dataset that calls it otherwise, as the dataset's own lists merge classes."""

_S3DIS_SIZES: Mapping[str, Size] = {
    "chair": (0.6, 0.6, 0.8), "table": (0.9, 1.5, 0.75), "bookshelf": (0.4, 1.0, 2.0), "board": (0.1, 2.0, 1.2),
    "sofa": (0.9, 1.8, 0.8),
}  # fmt: skip

# Closer to the means of ScanNet's axis-aligned boxes: half the sum of depth and width, and the height.
_SCANNET_SIZES: Mapping[str, Size] = {
    "cabinet": (0.46, 0.96, 0.90), "bathtub": (0.70, 1.27, 0.48), "door": (0.12, 1.0, 1.75),
    "window": (0.12, 1.56, 1.15), "picture": (0.05, 0.58, 0.54), "counter": (0.68, 2.66, 0.27),
    "curtain": (0.16, 1.88, 1.68), "refrigerator": (0.62, 0.66, 1.25), "showercurtrain": (0.14, 0.66, 1.75),
    "garbagebin": (0.48, 0.49, 0.58),
}  # fmt: skip

Weights = Mapping[str, int | float]
"""Relative frequency of each kind of furniture."""

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
    "sofa": 5, "table": 4, "chair": 5, "bookshelf": 1, "board": 1, "plant": 1, "door": 1, "window": 1,
}  # fmt: skip
_LIBRARY: Weights = {"bookshelf": 3.5, "table": 4, "chair": 6, "board": 1, "door": 1, "carton": 1}
# Rooms of the other four: those above with what their classes add.
_HOME: tuple[Weights, ...] = (
    {**_BEDROOM, "screen": 1.5, "stool": 1},
    {**_LIVING, "screen": 3, "fireplace": 2.5, "stool": 2},
    {**_KITCHEN, "stove": 3, "oven": 3, "dishwasher": 3, "washer": 1.5, "stool": 3},
    {**_BATHROOM, "washer": 3},
)
_FLAT: tuple[Weights, ...] = (
    {**_BEDROOM, "pillow": 4, "backpack": 2, "suitcase": 2, "screen": 1.5},
    {**_LIVING, "pillow": 4, "screen": 3},
    {**_OFFICE, "screen": 4, "backpack": 2},
    {**_KITCHEN, "microwave": 3},
    _BATHROOM,
)
_ON_DESKS: Weights = {"screen": 4, "keyboard": 3, "laptop": 2, "book": 3, "bottle": 3, "table lamp": 1.5}
_BUILDING: tuple[Weights, ...] = (
    {**_OFFICE, **_ON_DESKS, "heater": 2, "printer": 1.5, "backpack": 1.5, "poster": 1.5, "plant": 1.5, "rack": 1},
    {**_CONFERENCE, **_ON_DESKS, "heater": 1.5, "rack": 2, "carton": 2, "bucket": 1.5},
    {**_KITCHEN, "kitchen cabinet": 4, "microwave": 3, "bottle": 3, "towel": 2, "bucket": 1, "heater": 1},
    {**_BEDROOM, "pillow": 4, "table lamp": 2, "book": 2, "suitcase": 1.5, "heater": 1.5, "poster": 1.5, "plant": 1},
    {**_BATHROOM, "towel": 4, "bucket": 2, "heater": 1.5, "bottle": 1},
)


@dataclass(frozen=True)
class Programme:
    """Sizes and contents of the rooms of a dataset.

    Attributes:
        scale: scale of the rooms; "demo" also has simpler furniture and rules of placement.
        rooms: kinds of room; each scan picks one at random.
        objects: smallest and largest number of annotated objects to place.
        boxes: smallest and largest number of boxes of a scan; a room that shows another number is not used.
        clutter: largest number of things without a class to place as well.
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
    "arkitscenes": {"chair": 3, "table": 3, "sofa": 3, "bed": 3, "bookshelf": 2, "refrigerator": 1.5, "screen": 1},
    "multiscan": {"chair": 4, "table": 3, "sofa": 2, "bed": 2, "cabinet": 1.5, "door": 2, "screen": 1},
    "3rscan": {"chair": 4, "table": 3, "sofa": 2, "bed": 2, "bookshelf": 1.5, "door": 1.5, "stool": 1},
    "scannetpp": {"chair": 4, "table": 3, "sofa": 1.5, "bookshelf": 1.5, "board": 1.5, "heater": 1, "screen": 2},
}
_ROOM = (3.0, 8.0)  # m


def programme(spec: DatasetSpec, scale: Scale) -> Programme:
    """Return sizes and contents of the rooms of a dataset at a scale."""
    kinds = {name: _kind_of(name, spec, scale) for name in KINDS}
    rooms: tuple[Weights, ...]
    match spec.name:
        case "scannet":
            rooms = (_BEDROOM, _OFFICE, _OFFICE, _LIVING, _KITCHEN, _BATHROOM)
            full = Programme(scale, kinds, rooms, (9, 16), (8, 16), 3, _ROOM, _ROOM, (2.4, 3.0))
        case "sunrgbd":
            rooms = (_BEDROOM, _OFFICE, _LIVING, _BATH_AND_BED)
            full = Programme(scale, kinds, rooms, (5, 10), (2, 6), 3, _ROOM, _ROOM, (2.4, 3.0))
        case "arkitscenes":
            full = Programme(scale, kinds, _HOME, (6, 12), (3, 12), 3, _ROOM, _ROOM, (2.4, 3.0))
        case "multiscan":
            full = Programme(scale, kinds, _FLAT, (9, 16), (6, 16), 3, _ROOM, _ROOM, (2.4, 3.0))
        case "3rscan":
            rooms = ({**_BEDROOM, "stool": 2}, _OFFICE, {**_LIVING, "stool": 2, "rack": 1}, _KITCHEN, _BATHROOM)
            full = Programme(scale, kinds, rooms, (9, 16), (6, 16), 3, _ROOM, _ROOM, (2.4, 3.0))
        case "scannetpp":
            full = Programme(scale, kinds, _BUILDING, (14, 28), (10, 28), 3, (3.0, 10.0), (3.0, 10.0), (2.5, 3.2))
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
    """Kind of furniture with its mean size and spread in a dataset."""
    kind = KINDS[name]
    if spec.name == "s3dis":
        kind = replace(kind, size=_S3DIS_SIZES.get(name, kind.size))
    if scale == "demo":
        return replace(kind, build=furniture.PLAIN_BUILDERS.get(name, kind.build), spread=0.5 * kind.spread)
    if spec.name not in ("sunrgbd", "s3dis"):
        kind = replace(kind, size=_SCANNET_SIZES.get(name, kind.size))
    return replace(kind, spread=max(kind.spread, 0.2))


def label_of(name: str, spec: DatasetSpec) -> int:
    """Return the label of a kind of furniture in a dataset; -1 if the dataset does not annotate it."""
    name = _CLASS_OF.get(spec.name, {}).get(name, name)
    return spec.classes.index(name) if name in spec.classes else -1


_TRIES = 25
_GAP = 0.04
_ALONG = math.radians(3)  # largest angle to a wall that counts as along it
_ALIGNED = 0.78  # gives four in five: some of the rest are aligned by chance, and find a place less often
_SEATED_AT = ("table", "desk")

Box = tuple[float, float, float, float, float, float, float]
"""Centre, sizes (m), yaw (rad)."""


@dataclass(frozen=True, eq=False)
class Room:
    """A furnished room, in the frame whose origin is one of its lower corners; x and y along the walls.

    Attributes:
        size: width (x), length (y), height (z) (m).
        shell_colors: colours of the walls at small and large x, at small and large y, of the floor and the ceiling.
        solids: primitives of all things, those of one object in a row; `owners` index `boxes`.
        boxes: box of every object, annotated or not; yaw is the direction of its front.
        labels: class of every object; -1 if the dataset does not annotate it.
        lamp: position of the light (m); None = evenly from above.
        plank: width (m) of the strips of the floor, which differ in brightness; 0 = one colour.
    """

    size: Float32[np.ndarray, " 3"]
    shell_colors: Float32[np.ndarray, "6 3"]
    solids: Solids
    boxes: Float32[np.ndarray, "k 7"]
    labels: Int32[np.ndarray, " k"]
    lamp: Float32[np.ndarray, " 3"] | None = None
    plank: float = 0.0

    def is_free(self, x: float, y: float, z: float, clearance: float) -> bool:
        """Return True if a point is at least `clearance` (m) away from all objects at its height."""
        for box in self.boxes.tolist():
            if box[2] + box[5] / 2 + 0.1 < z or box[2] - box[5] / 2 - 0.1 > z:
                continue
            dx, dy = x - box[0], y - box[1]
            cos, sin = math.cos(box[6]), math.sin(box[6])
            beyond_x = max(abs(dx * cos + dy * sin) - box[3] / 2, 0.0)
            beyond_y = max(abs(dy * cos - dx * sin) - box[4] / 2, 0.0)
            if math.hypot(beyond_x, beyond_y) < clearance:
                return False
        return True


def furnish_room(programme: Programme, spec: DatasetSpec, rng: np.random.Generator) -> Room:
    """Make a random room; the spec decides which objects are annotated."""
    size = (rng.uniform(*programme.width), rng.uniform(*programme.length), rng.uniform(*programme.height))
    things = []
    for name in _choose_contents(programme, spec, rng):
        depth, width, height = random_size(programme.kinds[name], programme.scale, rng)
        things.append((name, programme.kinds[name], (depth, width, min(height, size[2] - 0.1))))
    # Large fronts first, seats last: they look for a table.
    things.sort(key=lambda thing: (thing[1].mount == "seat", -thing[2][1] * thing[2][2]))

    place_others = _place_simply if programme.scale == "demo" else _place
    placed: list[tuple[str, Box]] = []
    parts: list[Solids] = []
    for name, kind, extent in things:
        place = _place_on_top if kind.mount == "top" else place_others
        box = place(name, kind, extent, size, placed, rng)
        if box is not None:
            position = np.array([box[0], box[1], box[2] - box[5] / 2])
            parts.append(make_solids(kind.build(extent, rng)).place(position, box[6], len(placed)))
            placed.append((name, box))
            if name == "counter":
                parts.append(_cupboard_below(box))
    lamp, plank = None, 0.0
    if programme.scale != "demo":
        lamp = (np.array([*rng.uniform(0.25, 0.75, 2), 0.95]) * size).astype(np.float32)
        plank = float(rng.choice([0.0, 0.15, 0.4]))
    return Room(
        size=np.array(size, np.float32),
        shell_colors=_shell_colors(rng),
        solids=join_solids([*parts, make_solids([])]),
        boxes=np.array([box for _, box in placed], np.float32).reshape(-1, 7),
        labels=np.array([label_of(name, spec) for name, _ in placed], np.int32),
        lamp=lamp,
        plank=plank,
    )


def _choose_contents(programme: Programme, spec: DatasetSpec, rng: np.random.Generator) -> list[str]:
    """Names of the annotated objects and the clutter to place, in random order."""
    weights = programme.rooms[rng.integers(len(programme.rooms))]
    wanted = int(rng.integers(programme.objects[0], programme.objects[1] + 1))
    clutter = int(rng.integers(0, programme.clutter + 1))
    names = list(weights)
    shares = np.array(list(weights.values()), float)
    counts = dict.fromkeys(names, 0)
    chosen: list[str] = []
    for index in rng.choice(len(names), 8 * wanted, p=shares / shares.sum()):
        name = names[index]
        annotated = label_of(name, spec) >= 0
        if counts[name] < programme.kinds[name].limit and (wanted if annotated else clutter) > 0:
            chosen.append(name)
            counts[name] += 1
            wanted, clutter = wanted - annotated, clutter - (not annotated)
    return chosen


def random_size(kind: Kind, scale: Scale, rng: np.random.Generator) -> Size:
    """Depth, width and height of one thing (m), log-normal."""
    if scale == "demo":
        # Heights vary less than footprints: people sit and work at one height.
        spread = np.clip(rng.normal(0.0, kind.spread, 3) * (1, 1, 0.5), -0.5, 0.5)
    else:
        sigma = np.array([kind.spread, kind.spread, kind.height_spread or kind.spread])
        spread = sigma * np.clip(rng.normal(size=3), -2.5, 2.5) - sigma**2 / 2  # keeps the mean
    depth, width, height = (np.array(kind.size) * np.exp(spread)).tolist()
    return depth, width, height


def _place_simply(
    name: str, kind: Kind, extent: Size, room: Size, placed: list[tuple[str, Box]], rng: np.random.Generator
) -> Box | None:
    """Find a free place for an object of a small room; None if there is none."""
    bottom = min(rng.uniform(*kind.base), room[2] - extent[2] - 0.05)
    for _ in range(_TRIES):
        tables = [box for name, box in placed if name in _SEATED_AT]
        if kind.mount == "seat" and tables and rng.random() < 0.75:
            x, y, yaw = _pose_at_table(tables[rng.integers(len(tables))], extent[0], rng)
        elif kind.mount in ("wall", "hung") and (kind.mount == "hung" or rng.random() < 0.9):
            x, y, yaw = pose_along_wall(extent, room, kind.mount == "hung", rng)
        else:
            margin = math.hypot(extent[0], extent[1]) / 2
            if 2 * margin >= min(room[0], room[1]):
                continue
            x, y = rng.uniform(margin, room[0] - margin), rng.uniform(margin, room[1] - margin)
            if rng.random() < 0.8:
                yaw = rng.integers(4) * math.pi / 2 + rng.uniform(-1, 1) * _ALONG
            else:
                yaw = rng.uniform(-math.pi, math.pi)
        box = (x, y, bottom + extent[2] / 2, *extent, yaw)
        if is_inside(box, room) and not any(overlap(box, other, _GAP) for _, other in placed):
            return box
    return None


def _place(
    name: str, kind: Kind, extent: Size, room: Size, placed: list[tuple[str, Box]], rng: np.random.Generator
) -> Box | None:
    """Find a free place for an object, for four in five of them along the walls; None if there is none."""
    bottom = min(rng.uniform(*kind.base), room[2] - extent[2] - 0.05)
    aligned = kind.mount == "hung" or rng.random() < _ALIGNED
    tables = [box for name, box in placed if name in _SEATED_AT]
    if aligned:
        tables = [box for box in tables if abs((box[6] + math.pi / 4) % (math.pi / 2) - math.pi / 4) <= _ALONG + 1e-9]
    taken = [_occupied_box(name, box) for name, box in placed]
    for _ in range(3 * _TRIES):
        if kind.mount == "seat" and tables and rng.random() < 0.85:
            x, y, facing = _pose_at_table(tables[rng.integers(len(tables))], extent[0], rng)
            if aligned:
                yaw = round(facing / (math.pi / 2)) * math.pi / 2 + rng.uniform(-_ALONG, _ALONG)
            else:
                yaw = rng.uniform(-math.pi, math.pi)
        elif aligned and (kind.mount == "hung" or (kind.mount == "wall" and rng.random() < 0.95)):
            x, y, yaw = pose_along_wall(extent, room, kind.mount == "hung", rng)
        else:
            x, y = rng.uniform(0.0, room[0]), rng.uniform(0.0, room[1])
            turns = int(rng.integers(4))
            yaw = turns * math.pi / 2 + rng.uniform(-_ALONG, _ALONG) if aligned else rng.uniform(-math.pi, math.pi)
        box = (x, y, bottom + extent[2] / 2, *extent, yaw)
        if is_inside(box, room) and not any(overlap(_occupied_box(name, box), other, _GAP) for other in taken):
            return box
    return None


def _place_on_top(
    name: str, kind: Kind, extent: Size, room: Size, placed: list[tuple[str, Box]], rng: np.random.Generator
) -> Box | None:
    """Find a free place on other furniture, with the front where that has it; None if there is none."""
    wide = [box for support, box in placed if support in kind.on and box[3] >= extent[0] and box[4] >= extent[1]]
    for _ in range(_TRIES if wide else 0):
        support = wide[rng.integers(len(wide))]
        spare = (support[3] - extent[0]) / 2, (support[4] - extent[1]) / 2
        # Not at the back of a bed or a sofa, which rises there.
        share = next(_SURFACE.get(name, 1.0) for name, box in placed if box is support)
        forward, aside = rng.uniform(-0.9 if share == 1 else 0.0, 0.9) * spare[0], rng.uniform(-0.9, 0.9) * spare[1]
        cos, sin = math.cos(support[6]), math.sin(support[6])
        bottom = support[2] - support[5] / 2 + share * support[5]
        x, y = support[0] + forward * cos - aside * sin, support[1] + forward * sin + aside * cos
        box = (x, y, bottom + extent[2] / 2, *extent, support[6] + rng.uniform(-2, 2) * _ALONG)
        others = (other for _, other in placed if other is not support)
        is_low = bottom + extent[2] < room[2] - 0.05
        if is_low and is_inside(box, room) and not any(overlap(box, other, 0.01) for other in others):
            return box
    return None


def rearranged(room: Room, rng: np.random.Generator) -> Room:
    """Move about half of the furniture that stands on the floor by up to 1 m: the same room at a later visit.

    Nothing moves that is fixed to a wall, stands on something or carries something, or finds no free place.
    """
    boxes, size = room.boxes.copy(), (float(room.size[0]), float(room.size[1]), float(room.size[2]))
    centers, yaws = room.solids.centers.copy(), room.solids.yaws.copy()
    for owner, (x, y, z, depth, width, height, yaw) in enumerate(room.boxes.tolist()):
        others = [tuple(box) for i, box in enumerate(boxes.tolist()) if i != owner]
        stands = abs(z - height / 2) < 1e-3 and depth > 0.2
        if (
            not stands
            or rng.random() < 0.5
            or any(overlap((x, y, z, depth, width, height, yaw), b, 0.0) for b in others)
        ):
            continue
        for _ in range(_TRIES):
            turn, shift = rng.uniform(-0.4, 0.4), rng.uniform(-1, 1, 2)
            moved = (x + float(shift[0]), y + float(shift[1]), z, depth, width, height, yaw + turn)
            if is_inside(moved, size) and not any(overlap(moved, other, _GAP) for other in others):
                boxes[owner] = moved
                own = room.solids.owners == owner
                offset = centers[own] - room.boxes[owner, :3]
                centers[own] = furniture.rotate(offset, turn) + boxes[owner, :3]
                yaws[own] += np.float32(turn)
                break
    return replace(room, boxes=boxes, solids=replace(room.solids, centers=centers, yaws=yaws))


def _occupied_box(name: str, box: Box) -> Box:
    """Box around the space that an object needs: a counter that below it, a door some to walk through it."""
    x, y, z, depth, width, height, yaw = box
    if name == "counter":
        top = z + height / 2
        return x, y, top / 2, depth, width, top, yaw
    if name == "door":
        return x + 0.2 * math.cos(yaw), y + 0.2 * math.sin(yaw), z, depth + 0.4, width, height, yaw
    return box


def pose_along_wall(extent: Size, room: Size, fixed: bool, rng: np.random.Generator) -> tuple[float, float, float]:
    """Position and yaw with the back to a wall and the front into the room; things fixed to the wall touch it."""
    wall = int(rng.integers(4))
    yaw = wall * math.pi / 2
    distance = extent[0] / 2
    if not fixed:
        turn = rng.uniform(-1, 1) * _ALONG
        yaw += turn
        distance += abs(math.sin(turn)) * extent[1] / 2 + rng.uniform(0.01, 0.08)
    along = room[1] if wall % 2 == 0 else room[0]
    half = extent[1] / 2 + 0.03
    if 2 * half >= along:
        return -1.0, -1.0, yaw  # outside of the room, so refused
    position = rng.uniform(half, along - half)
    x, y = (distance, position) if wall % 2 == 0 else (position, distance)
    if wall == 2:
        x = room[0] - distance
    elif wall == 3:
        y = room[1] - distance
    return x, y, yaw


def _pose_at_table(table: Box, depth: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """Position and yaw beside a table, facing it; the side of a desk at the wall is refused later."""
    side = int(rng.integers(4))
    reach = table[3 + side % 2] / 2 + depth / 2 + rng.uniform(0.05, 0.2)
    span = table[3 + (side + 1) % 2] / 2
    along = rng.uniform(-0.6, 0.6) * span
    angle = table[6] + side * math.pi / 2
    x = table[0] + reach * math.cos(angle) - along * math.sin(angle)
    y = table[1] + reach * math.sin(angle) + along * math.cos(angle)
    return x, y, angle + math.pi + rng.normal(0.0, 0.15)


def is_inside(box: Box, room: Size) -> bool:
    """Return True if an upright box lies within the walls of a room."""
    cos, sin = abs(math.cos(box[6])), abs(math.sin(box[6]))
    half_x, half_y = (box[3] * cos + box[4] * sin) / 2, (box[3] * sin + box[4] * cos) / 2
    slack = 1e-6
    return half_x - slack <= box[0] <= room[0] - half_x + slack and half_y - slack <= box[1] <= room[1] - half_y + slack


def overlap(one: Box, other: Box, gap: float) -> bool:
    """Return True if two upright boxes come closer than about `gap` (m): z first, then separating axes in the plane."""
    if abs(one[2] - other[2]) >= (one[5] + other[5]) / 2 + gap:
        return False
    dx, dy = other[0] - one[0], other[1] - one[1]
    if math.hypot(dx, dy) >= (math.hypot(one[3], one[4]) + math.hypot(other[3], other[4])) / 2 + gap:
        return False
    turn = other[6] - one[6]
    cos, sin = abs(math.cos(turn)), abs(math.sin(turn))
    for box, far in ((one, other), (other, one)):
        c, s = math.cos(box[6]), math.sin(box[6])
        if abs(dx * c + dy * s) >= (box[3] + far[3] * cos + far[4] * sin) / 2 + gap:
            return False
        if abs(dy * c - dx * s) >= (box[4] + far[3] * sin + far[4] * cos) / 2 + gap:
            return False
    return True


def _cupboard_below(counter: Box) -> Solids:
    """Cupboard that a counter rests on; not part of the counter's box."""
    x, y, top = counter[3] / 2 - 0.03, counter[4] / 2 - 0.02, counter[2] - counter[5] / 2
    body = make_solids([Primitive((-counter[3] / 2, -y, 0.0), (x, y, top), (0.5, 0.4, 0.3))])
    return body.place(np.array([counter[0], counter[1], 0.0]), counter[6], -1)


def _shell_colors(rng: np.random.Generator) -> np.ndarray:
    wall = rng.uniform(0.62, 0.9) + rng.uniform(-0.06, 0.06, 3)
    floors = [(0.5, 0.36, 0.24), (0.45, 0.45, 0.47), (0.62, 0.55, 0.45), (0.35, 0.25, 0.18), (0.55, 0.5, 0.5)]
    floor = np.array(floors[rng.integers(len(floors))]) * rng.uniform(0.85, 1.15)
    colors = np.stack([wall, wall, wall, wall, floor, np.full(3, 0.9)])
    return np.clip(colors, 0, 1).astype(np.float32)

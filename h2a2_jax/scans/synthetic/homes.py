"""Varied rooms: version 2 of the generator, one to four rooms of mixed use behind walls with doors.

Where `rooms` spreads separate pieces over one rectangle, here things stand together as people use them (chairs under
tables, night stands at beds, kitchens in rows), rooms have walls inside, shafts and columns, and clutter lies on, under
and beside everything. What cannot be known of a user's rooms (sizes, colours, what stands where) is drawn from wide
ranges. The order of the random draws decides the rooms: a change of it is another version.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.scans.synthetic import furniture, household
from h2a2_jax.scans.synthetic import varied_furniture as varied
from h2a2_jax.scans.synthetic.furniture import Color, Primitive, Size, Solids, join_solids, make_solids
from h2a2_jax.scans.synthetic.rooms import (
    KINDS,
    Box,
    Kind,
    Room,
    Weights,
    is_inside,
    label_of,
    overlap,
    pose_along_wall,
    random_size,
)

_one_of = varied.one_of
_CHAIRS = _one_of(furniture.chair, furniture.chair_plain, varied.folding_chair)
_SHELVES = _one_of(furniture.bookshelf, varied.open_shelf)

_CHANGES: Sequence[tuple[str, str, Mapping[str, Any]]] = (
    ("chair", "chair", {"build": _CHAIRS, "limit": 30}),
    ("office chair", "chair", {"build": varied.office_chair, "size": (0.62, 0.62, 0.95), "limit": 30}),
    ("armchair", "chair", {"build": varied.armchair, "size": (0.8, 0.78, 0.85), "mount": "free", "limit": 3}),
    ("sofa", "sofa", {"build": _one_of(furniture.sofa, varied.soft_sofa, varied.soft_sofa), "spread": 0.25}),
    ("corner sofa", "sofa", {"build": varied.corner_sofa, "size": (1.6, 2.4, 0.82), "limit": 1}),
    ("bed", "bed", {"build": _one_of(furniture.bed, varied.made_bed, varied.made_bed), "limit": 2}),
    ("table", "table", {"build": furniture.table, "limit": 6}),
    ("round table", "table", {"build": varied.round_table, "size": (0.95, 0.95, 0.73), "limit": 2}),
    ("low table", "table", {"build": varied.low_table, "size": (0.6, 1.0, 0.43), "limit": 2}),
    ("side table", "table", {"build": _one_of(varied.round_table, varied.low_table), "size": (0.45, 0.5, 0.55)}),
    ("desk", "desk", {"build": _one_of(furniture.desk, varied.desk_with_drawers), "limit": 6}),
    ("cabinet", "cabinet", {"limit": 6}),
    ("low cabinet", "cabinet", {"size": (0.45, 1.4, 0.55), "limit": 2}),
    ("wardrobe", "cabinet", {"size": (0.6, 1.2, 2.0), "limit": 2}),
    ("wall cabinet", "cabinet", {"size": (0.35, 0.9, 0.7), "mount": "hung", "base": (1.3, 1.6)}),
    ("bookshelf", "bookshelf", {"build": _SHELVES, "spread": 0.3, "limit": 8}),
    ("toilet", "toilet", {"build": _one_of(furniture.toilet, varied.soft_toilet)}),
    ("curtain", "curtain", {"size": (0.16, 1.6, 2.1), "base": (0.05, 0.5), "spread": 0.3, "limit": 3}),
    ("showercurtrain", "showercurtrain", {"size": (0.14, 0.9, 1.8)}),
    ("plant", "plant", {"build": _one_of(furniture.plant, varied.vase_plant), "mount": "free"}),
    *((name, name, {}) for name in (
        "dresser", "night_stand", "bathtub", "window", "picture", "counter", "refrigerator", "sink", "garbagebin",
        "board", "stove", "heater", "rack", "suitcase", "washer", "stool",
    )),
)  # fmt: skip
FORMS: Mapping[str, tuple[str, Kind]] = {
    name: (label, replace(KINDS[label], **changes)) for name, label, changes in _CHANGES
}
"""Forms of furniture: class (a kind of `rooms.KINDS`) and kind, which may differ from it in size and build."""

_SITTING = {"chair", "office chair", "armchair"}
_TABLES = {"table", "round table", "desk", "side table", "low table"}
_TOPS = {*_TABLES, "cabinet", "low cabinet", "dresser", "night_stand", "counter"}
_SURFACES = {**dict.fromkeys(_TOPS, 1.0), "bed": 0.55, "sofa": 0.5, "corner sofa": 0.5, "chair": 0.55, "bookshelf": 1.0}

_BEDROOM: Weights = {
    "bed": 6, "dresser": 2, "wardrobe": 2, "cabinet": 1, "desk": 1.5, "bookshelf": 1, "garbagebin": 1, "armchair": 1,
    "window": 2, "picture": 2, "curtain": 2, "low cabinet": 1, "chair": 1, "heater": 1, "suitcase": 1, "low table": 0.5,
}  # fmt: skip
_LIVING: Weights = {
    "sofa": 4, "corner sofa": 1.5, "low table": 2, "armchair": 2.5, "low cabinet": 2, "bookshelf": 2, "window": 2,
    "curtain": 2, "picture": 2.5, "plant": 2, "table": 1.5, "round table": 1, "side table": 1.5, "cabinet": 1,
    "heater": 1, "desk": 0.7,
}  # fmt: skip
_OFFICE: Weights = {
    "desk": 5, "table": 1.5, "office chair": 2, "bookshelf": 2, "cabinet": 2.5, "garbagebin": 2, "board": 1.2,
    "window": 1.5, "picture": 1, "plant": 0.7, "rack": 0.7, "wall cabinet": 0.7, "heater": 1, "armchair": 0.5,
    "sofa": 0.4, "side table": 0.5,
}  # fmt: skip
_KITCHEN: Weights = {
    "kitchen row": 7, "table": 2.5, "round table": 1.5, "chair": 1, "garbagebin": 1.5, "window": 1.5, "picture": 0.7,
    "cabinet": 1, "refrigerator": 1.5, "stool": 1, "wall cabinet": 1, "washer": 0.5,
}  # fmt: skip
_BATH: Weights = {
    "toilet": 6, "vanity": 4, "sink": 2, "bathtub": 5, "showercurtrain": 3, "garbagebin": 2, "cabinet": 1, "window": 1,
    "picture": 1, "wall cabinet": 1, "heater": 1, "washer": 0.7, "curtain": 0.5,
}  # fmt: skip
_CONFERENCE: Weights = {
    "table": 6,
    "board": 3,
    "chair": 2,
    "office chair": 2,
    "bookshelf": 1,
    "window": 1,
    "cabinet": 1,
}
_LOUNGE: Weights = {
    "sofa": 5, "corner sofa": 1, "low table": 2, "round table": 2, "table": 2, "armchair": 2, "bookshelf": 1,
    "board": 1, "plant": 1, "window": 1, "picture": 1,
}  # fmt: skip
_LIBRARY: Weights = {"bookshelf": 7, "table": 4, "chair": 3, "desk": 1, "board": 0.7, "cabinet": 0.7}
_LECTURE: Weights = {"table": 6, "chair": 6, "board": 4, "desk": 1, "window": 1, "bookshelf": 0.3}
_CORRIDOR: Weights = {"picture": 2, "bookshelf": 1, "cabinet": 1, "chair": 1, "board": 1, "garbagebin": 1, "plant": 0.7}
_STORE: Weights = {"bookshelf": 3, "rack": 2, "cabinet": 2, "garbagebin": 1, "suitcase": 1, "table": 1}

_USES: Mapping[str, tuple[tuple[float, Weights], ...]] = {
    "scannet": (
        (3, _BEDROOM), (3, _LIVING), (3, _OFFICE), (2.5, _KITCHEN), (2.5, _BATH), (1, _CONFERENCE), (0.7, _LIBRARY),
        (0.5, _CORRIDOR), (0.5, _STORE), (0.5, _LOUNGE),
    ),
    "sunrgbd": (
        (3.5, _BEDROOM), (2.5, _LIVING), (3, _OFFICE), (1, _KITCHEN), (1.5, _BATH), (1, _CONFERENCE), (0.7, _LIBRARY),
        (0.7, _LECTURE), (0.7, _LOUNGE),
    ),
    "s3dis": (
        (4, _OFFICE), (2, _CONFERENCE), (1.5, _LOUNGE), (1, _LIBRARY), (1, _LECTURE), (1, _CORRIDOR), (0.5, _STORE),
        (0.5, _KITCHEN),
    ),
}  # fmt: skip
"""Relative frequency of uses of a room by dataset."""

_SECOND: tuple[Weights, ...] = (_BEDROOM, _LIVING, _KITCHEN, _OFFICE)
"""Uses that a large room may have beside its first."""


@dataclass(frozen=True)
class Zone:
    """One room inside the walls: its corner nearest to the origin and its size along x and y (m)."""

    x: float
    y: float
    width: float
    length: float

    @property
    def area(self) -> float:
        """Floor area (m2)."""
        return self.width * self.length


@dataclass(frozen=True, eq=False)
class Home(Room):
    """A `Room` with walls inside: what stands in its zones; walls, columns and clutter have no box.

    Attributes:
        zones: the rooms between the walls.
    """

    zones: tuple[Zone, ...] = ()

    def is_clear(self, place: np.ndarray, clearance: float) -> bool:
        """Return True if a point (m) is at least `clearance` (m) away from the bounds of all primitives."""
        parts = self.solids
        local = parts.to_local(np.arange(len(parts)), np.broadcast_to(place, (len(parts), 3)))
        return not (np.abs(local) < parts.halves + np.float32(clearance)).all(axis=1).any()


@dataclass
class _Builder:
    """A home under construction: its objects and things, in its frame."""

    spec: DatasetSpec
    rng: np.random.Generator
    height: float
    scale: float
    boxes: list[Box] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    parts: list[Solids] = field(default_factory=list)

    def add(self, primitives: list[Primitive], label: str, box: Box, zone: Zone) -> None:
        """Add an object of a class (a kind of `rooms.KINDS`) whose box is given in the frame of a zone."""
        box = (box[0] + zone.x, box[1] + zone.y, *box[2:])
        base = np.array([box[0], box[1], box[2] - box[5] / 2])
        self.parts.append(make_solids(primitives).place(base, box[6], len(self.boxes)))
        self.boxes.append(box)
        self.labels.append(label_of(label, self.spec))

    def add_thing(self, primitives: list[Primitive], place: Sequence[float], yaw: float) -> None:
        """Add primitives that belong to no object, at a place (m) of the home."""
        self.parts.append(make_solids(primitives).place(np.array(place, float), yaw, -1))


def build_home(spec: DatasetSpec, rng: np.random.Generator) -> Home:
    """Make a random home for a sensor of the kind that a dataset is taken with; the spec decides what is annotated."""
    uses = _USES[spec.name]
    shares = np.array([share for share, _ in uses])
    count = int(
        rng.choice([1, 2, 3, 4], p=[0.6, 0.2, 0.13, 0.07] if spec.name == "scannet" else [0.8, 0.17, 0.03, 0.0])
    )
    area = sum(rng.uniform(6.0, 26.0) for _ in range(count))
    if spec.name == "s3dis":
        area *= 1.3
    ratio = math.exp(rng.uniform(-0.5, 0.5))
    width, length = max(math.sqrt(area * ratio), 2.2), max(math.sqrt(area / ratio), 2.2)
    height = float(rng.uniform(2.3, 3.2))
    builder = _Builder(spec, rng, height, float(np.exp(rng.normal(0.0, 0.07))))
    zones, openings = _split(Zone(0.0, 0.0, width, length), count, builder)
    for zone in zones:
        first = uses[rng.choice(len(uses), p=shares / shares.sum())][1]
        if zone.area < 6 and rng.random() < 0.7:
            first = _BATH if spec.name != "s3dis" else _STORE
        mixed = dict(first)
        while zone.area > 20 and rng.random() < 0.5:
            mixed = {**_SECOND[rng.integers(len(_SECOND))], **mixed}
        _furnish(zone, mixed, openings, builder)
    lamp = (np.array([*rng.uniform(0.2, 0.8, 2), 0.95]) * (width, length, height)).astype(np.float32)
    wall = rng.uniform(0.45, 0.97) + rng.uniform(-0.1, 0.1, 3)
    accents = np.clip(wall + rng.normal(0.0, 0.12, (4, 3)) * (rng.random((4, 1)) < 0.25), 0, 1)
    shell = np.concatenate([accents, [np.array(varied.any_color(rng)) * rng.uniform(0.6, 1.2)], [np.full(3, 0.9)]])
    return Home(
        size=np.array([width, length, height], np.float32),
        shell_colors=np.clip(shell, 0, 1).astype(np.float32),
        solids=join_solids([*builder.parts, make_solids([])]),
        boxes=np.array(builder.boxes, np.float32).reshape(-1, 7),
        labels=np.array(builder.labels, np.int32),
        lamp=lamp,
        plank=float(rng.choice([0.0, 0.0, 0.12, 0.3, 0.6])),
        zones=tuple(zones),
    )


def _split(whole: Zone, count: int, builder: _Builder) -> tuple[list[Zone], list[Box]]:
    """Divide a zone by walls with openings, the largest part first; the openings are boxes to keep clear."""
    rng = builder.rng
    zones, openings = [whole], []
    color = _wall_color(rng)
    while len(zones) < count:
        zones.sort(key=lambda zone: zone.area)
        zone = zones.pop()
        thick, share = float(rng.uniform(0.07, 0.22)), float(rng.uniform(0.3, 0.7))
        along_x = zone.width > zone.length  # the longer side is divided
        extent, across = (zone.width, zone.length) if along_x else (zone.length, zone.width)
        cut = share * extent
        gap = min(float(rng.choice([rng.uniform(0.75, 1.1), rng.uniform(1.2, 2.5)], p=[0.8, 0.2])), across - 0.4)
        start = float(rng.uniform(0.15, across - gap - 0.15))
        lintel = float(rng.uniform(1.95, 2.2)) if rng.random() < 0.85 else builder.height
        pieces = [(0.0, start, 0.0, builder.height), (start + gap, across, 0.0, builder.height)]
        pieces += [(start, start + gap, lintel, builder.height)] if lintel < builder.height - 0.05 else []
        for low, high, bottom, top in pieces:
            if high - low > 0.02:
                a, b = (cut - thick / 2, low), (cut + thick / 2, high)
                x0, y0, x1, y1 = (*a, *b) if along_x else (a[1], a[0], b[1], b[0])
                body = Primitive((x0, y0, bottom), (x1, y1, top), color)
                builder.add_thing([body], (zone.x, zone.y, 0.0), 0.0)
        middle = (cut, start + gap / 2) if along_x else (start + gap / 2, cut)
        yaw = 0.0 if along_x else math.pi / 2
        spot = (middle[0] + zone.x, middle[1] + zone.y)
        openings.append((*spot, 1.0, 1.2, gap, 2.0, yaw))
        if gap < 1.15 and rng.random() < 0.65:
            _hang_leaf(spot, yaw, gap, lintel, builder)
        if along_x:
            zones += [
                Zone(zone.x, zone.y, cut - thick / 2, zone.length),
                Zone(zone.x + cut + thick / 2, zone.y, zone.width - cut - thick / 2, zone.length),
            ]
        else:
            zones += [
                Zone(zone.x, zone.y, zone.width, cut - thick / 2),
                Zone(zone.x, zone.y + cut + thick / 2, zone.width, zone.length - cut - thick / 2),
            ]
    return zones, openings


def _hang_leaf(spot: tuple[float, float], yaw: float, gap: float, lintel: float, builder: _Builder) -> None:
    """Hang a door into an opening: closed, ajar or wide open."""
    rng = builder.rng
    swing = float(rng.choice([0.0, rng.uniform(0.2, 1.9)], p=[0.35, 0.65])) * float(rng.choice([-1.0, 1.0]))
    hinge = (spot[0] + gap / 2 * math.sin(yaw), spot[1] - gap / 2 * math.cos(yaw))
    turned = yaw + swing
    middle = (hinge[0] - gap / 2 * math.sin(turned), hinge[1] + gap / 2 * math.cos(turned))
    tall = min(lintel, builder.height) - 0.02
    size = (0.09, gap, min(tall, 2.15))
    box = (*middle, size[2] / 2, *size, turned)
    builder.add(furniture.door(size, rng), "door", box, Zone(0.0, 0.0, 0.0, 0.0))


def _wall_color(rng: np.random.Generator) -> Color:
    red, green, blue = np.clip(rng.uniform(0.5, 0.95) + rng.uniform(-0.08, 0.08, 3), 0, 1).tolist()
    return red, green, blue


@dataclass
class _Space:
    """The free space of a zone: what stands in it, in its frame."""

    zone: Zone
    room: Size
    placed: list[tuple[str, Box]] = field(default_factory=list)

    def is_free(self, name: str, box: Box, gap: float = 0.02) -> bool:
        """Return True if a box lies in the zone and touches nothing that it must not touch."""
        if not is_inside(box, self.room) or box[2] + box[5] / 2 > self.room[2]:
            return False
        for other, taken in self.placed:
            tucked = (name in _SITTING and other in _TABLES) or (other in _SITTING and name in _TABLES)
            if overlap(_shrunk(box) if tucked else box, taken, gap):
                return False
        return True


def _shrunk(box: Box) -> Box:
    """The half of a chair that a table may not touch: its back."""
    return (*box[:3], 0.45 * box[3], 0.6 * box[4], box[5], box[6])


def _furnish(zone: Zone, weights: Weights, openings: Sequence[Box], builder: _Builder) -> None:
    """Fill one zone: shafts, then groups of furniture, then clutter."""
    rng = builder.rng
    space = _Space(zone, (zone.width, zone.length, builder.height))
    for x, y, *more in openings:
        space.placed.append(("opening", (x - zone.x, y - zone.y, *more)))  # type: ignore[arg-type]
    for _ in range(int(rng.integers(0, 3)) if rng.random() < 0.4 else 0):
        _add_shaft(space, builder)
    if rng.random() < 0.75:
        _add_form("door", space, builder)
    names = list(weights)
    shares = np.array([weights[name] for name in names], float)
    wanted = int(rng.integers(2, 6) + rng.uniform(0.3, 1.0) * zone.area * 0.9)
    counts: dict[str, int] = {}
    for index in rng.choice(len(names), 2 * wanted + 4, p=shares / shares.sum()):
        name = names[index]
        if counts.get(name, 0) >= (FORMS[name][1].limit if name in FORMS else 1) or wanted <= 0:
            continue
        if (_GROUPS[name](space, builder) if name in _GROUPS else _add_form(name, space, builder)) is not None:
            counts[name] = counts.get(name, 0) + 1
            wanted -= 1
    _add_clutter(space, builder)


def _extent_of(name: str, space: _Space, builder: _Builder) -> Size:
    depth, width, height = random_size(FORMS[name][1], "full", builder.rng)
    factor = builder.scale
    return depth * factor, width * factor, min(height * factor, space.room[2] - 0.1)


def _add_form(name: str, space: _Space, builder: _Builder, extent: Size | None = None) -> Box | None:
    """Place one piece of furniture where its kind stands; None if there is no place."""
    rng = builder.rng
    if name == "door":
        label, kind = "door", replace(KINDS["door"], size=(0.1, 0.92, 2.02), spread=0.06)
        extent = random_size(kind, "full", rng)
    else:
        label, kind = FORMS[name]
    extent = extent or _extent_of(name, space, builder)
    bottom = max(min(float(rng.uniform(*kind.base)), space.room[2] - extent[2] - 0.05), 0.0)
    aligned = kind.mount == "hung" or rng.random() < 0.85
    for _ in range(20):
        at_wall = kind.mount in ("wall", "hung") and (aligned or rng.random() < 0.3)
        if at_wall or (kind.mount == "free" and rng.random() < 0.4):
            x, y, yaw = pose_along_wall(extent, space.room, kind.mount == "hung", rng)
        else:
            x, y = float(rng.uniform(0.0, space.room[0])), float(rng.uniform(0.0, space.room[1]))
            yaw = rng.integers(4) * math.pi / 2 + rng.normal(0.0, 0.05) if aligned else rng.uniform(-math.pi, math.pi)
        box = (x, y, bottom + extent[2] / 2, *extent, float(yaw))
        if space.is_free(name, _kept_clear(name, box)):
            return _put(name, label, kind, box, space, builder)
    return None


def _put(name: str, label: str, kind: Kind, box: Box, space: _Space, builder: _Builder) -> Box:
    builder.add(kind.build(box[3:6], builder.rng), label, box, space.zone)
    space.placed.append((name, _kept_clear(name, box)))
    return box


def _kept_clear(name: str, box: Box) -> Box:
    """Box of the space that a thing needs: a door some to walk through it, a worktop all below it."""
    x, y, z, depth, width, height, yaw = box
    if name == "door":
        return x + 0.25 * math.cos(yaw), y + 0.25 * math.sin(yaw), z, depth + 0.5, width, height, yaw
    return box


def _beside(anchor: Box, name: str, extent: Size, dx: float, dy: float, turn: float, space: _Space, builder: _Builder,
            bottom: float = 0.0) -> Box | None:  # fmt: skip
    """Place a thing at an offset (m) from the middle of another, in its axes; None if it does not fit."""
    label, kind = FORMS[name]
    cos, sin = math.cos(anchor[6]), math.sin(anchor[6])
    x, y = anchor[0] + dx * cos - dy * sin, anchor[1] + dx * sin + dy * cos
    box = (x, y, bottom + extent[2] / 2, *extent, anchor[6] + turn)
    if not space.is_free(name, box, 0.0):
        return None
    return _put(name, label, kind, box, space, builder)


def _bed_group(space: _Space, builder: _Builder) -> Box | None:
    """A bed with night stands at its head."""
    bed = _add_form("bed", space, builder)
    rng = builder.rng
    if bed is None:
        return None
    for side in (-1, 1):
        if rng.random() < 0.55:
            extent = _extent_of("night_stand", space, builder)
            dy = side * (bed[4] / 2 + extent[1] / 2 + rng.uniform(0.02, 0.2))
            dx = -(bed[3] - extent[0]) / 2 + rng.uniform(0.0, 0.15)
            _beside(bed, "night_stand", extent, dx, dy, rng.normal(0.0, 0.05), space, builder)
    return bed


def _sofa_group(form: str) -> Callable[[_Space, _Builder], Box | None]:
    """A sofa, often with a low table in front of it."""

    def place(space: _Space, builder: _Builder) -> Box | None:
        sofa = _add_form(form, space, builder)
        rng = builder.rng
        if sofa and rng.random() < 0.6:
            name = "low table" if rng.random() < 0.75 else "round table"
            extent = _extent_of(name, space, builder)
            dx = sofa[3] / 2 + extent[0] / 2 + rng.uniform(0.15, 0.6)
            _beside(sofa, name, extent, dx, rng.uniform(-0.3, 0.3), rng.normal(0.0, 0.1), space, builder)
        return sofa

    return place


def _desk_group(space: _Space, builder: _Builder) -> Box | None:
    """A desk with a chair before it."""
    desk = _add_form("desk", space, builder)
    rng = builder.rng
    if desk and rng.random() < 0.85:
        name = "office chair" if rng.random() < 0.65 else "chair"
        extent = _extent_of(name, space, builder)
        dx = desk[3] / 2 + extent[0] / 2 + rng.uniform(-0.35, 0.4)
        turn = math.pi + rng.normal(0.0, 0.5 if name == "office chair" else 0.2)
        _beside(desk, name, extent, dx, rng.uniform(-0.25, 0.25) * desk[4], turn, space, builder)
    return desk


def _table_group(form: str) -> Callable[[_Space, _Builder], Box | None]:
    """A table with chairs of one kind along its sides, tucked under it or pulled out."""

    def place(space: _Space, builder: _Builder) -> Box | None:
        rng = builder.rng
        extent = _extent_of(form, space, builder)
        if form == "table" and space.zone.area > 14 and rng.random() < 0.35:  # to sit at with many
            extent = (extent[0] * rng.uniform(1.0, 1.8), extent[1] * rng.uniform(1.2, 2.5), extent[2])
        table = _add_form(form, space, builder, extent)
        if table is None or rng.random() < 0.2:
            return table
        name = "office chair" if rng.random() < 0.3 else "chair"
        chair, filled = _extent_of(name, space, builder), rng.uniform(0.4, 1.0)
        for side in range(4):
            reach, span = table[3 + side % 2] / 2, table[3 + (side + 1) % 2]
            seats = max(int(span / max(chair[1] + 0.05, 0.5)), 1 if span > 0.6 else 0)
            for seat in range(seats):
                if rng.random() > filled:
                    continue
                along = ((seat + 0.5) / seats - 0.5) * span + rng.normal(0.0, 0.05)
                out = reach + chair[0] / 2 + rng.uniform(-0.3, 0.25)
                angle = side * math.pi / 2
                dx = out * math.cos(angle) - along * math.sin(angle)
                dy = out * math.sin(angle) + along * math.cos(angle)
                _beside(table, name, chair, dx, dy, angle + math.pi + rng.normal(0.0, 0.2), space, builder)
        return table

    return place


def _kitchen_row(space: _Space, builder: _Builder) -> Box | None:
    """Cabinets in a row under a worktop with a sink, a stove, cabinets above, a refrigerator at an end."""
    rng = builder.rng
    deep, top = float(rng.uniform(0.55, 0.68)), float(rng.uniform(0.83, 0.95))
    splash = float(rng.choice([rng.uniform(0.03, 0.06), rng.uniform(0.1, 0.3)]))
    for _ in range(20):
        wide = float(rng.uniform(1.2, max(min(4.0, 0.9 * max(space.room[:2])), 1.3)))
        x, y, yaw = pose_along_wall((deep, wide, top), space.room, True, rng)
        whole = (x, y, top / 2, deep, wide, top, yaw)
        if space.is_free("kitchen row", whole):
            break
    else:
        return None
    wood = varied.any_color(rng)
    worktop = (x, y, top - 0.04 + splash / 2, deep, wide, splash, yaw)
    slab = [Primitive((-deep / 2, -wide / 2, 0.0), (deep / 2, wide / 2, 0.04), varied.any_color(rng))]
    if splash > 0.08:
        slab.append(Primitive((-deep / 2, -wide / 2, 0.0), (-deep / 2 + 0.02, wide / 2, splash), slab[0].color))
    builder.add(slab, "counter", worktop, space.zone)
    space.placed.append(("kitchen row", whole))
    space.placed.append(("counter", worktop))

    def unit(name: str, dy: float, size: Size, bottom: float, parts: list[Primitive], forward: float = 0.0) -> None:
        px, py = x + forward * math.cos(yaw) - dy * math.sin(yaw), y + forward * math.sin(yaw) + dy * math.cos(yaw)
        box = (px, py, bottom + size[2] / 2, *size, yaw)
        if name:
            builder.add(parts, name, box, space.zone)
        else:
            builder.add_thing(parts, (px + space.zone.x, py + space.zone.y, bottom), yaw)

    edges = [-wide / 2]
    run = wide if rng.random() < 0.5 else rng.uniform(0.5, 1.2)
    while edges[-1] < wide / 2 - 0.05:
        edges.append(min(edges[-1] + run, wide / 2))
    for low, high in pairwise(edges):
        size = (deep - 0.03, high - low, top - 0.045)
        if high - low < 0.8 and rng.random() < 0.2:
            unit("", (low + high) / 2, size, 0.0, household.appliance(size, rng), -0.015)
        else:
            unit("cabinet", (low + high) / 2, size, 0.0, _painted(furniture.cabinet(size, rng), wood), -0.015)
    if rng.random() < 0.75:
        size = (0.42, float(rng.uniform(0.4, 0.75)), float(rng.uniform(0.18, 0.3)))
        dy = float(rng.uniform(-1, 1)) * max(wide / 2 - size[1] / 2 - 0.05, 0.0)
        unit("sink", dy, size, top - 0.5 * size[2], furniture.sink(size, rng))
    if rng.random() < 0.5:
        size = (deep - 0.1, 0.58, 0.02)
        unit("", float(rng.uniform(-0.3, 0.3)) * wide, size, top, [
            Primitive((-size[0] / 2, -0.29, 0.0), (size[0] / 2, 0.29, 0.02), furniture.DARK)])  # fmt: skip
    if rng.random() < 0.65:
        tall, bottom = float(rng.uniform(0.5, 0.9)), float(rng.uniform(1.3, 1.5))
        tall = min(tall, space.room[2] - bottom - 0.02)
        shares = edges if rng.random() < 0.6 else [-wide / 2, wide / 2]
        for low, high in pairwise(shares):
            if rng.random() < 0.85:
                size = (0.34, high - low, tall)
                parts = _painted(furniture.cabinet(size, rng), wood)
                unit("cabinet", (low + high) / 2, size, bottom, parts, -(deep - 0.34) / 2)
    if rng.random() < 0.65:
        size = _extent_of("refrigerator", space, builder)
        dy = float(rng.choice([-1.0, 1.0])) * (wide / 2 + size[1] / 2 + 0.03)
        _beside(whole, "refrigerator", size, (size[0] - deep) / 2 + 0.01, dy, 0.0, space, builder)
    return whole


def _painted(parts: list[Primitive], color: Color) -> list[Primitive]:
    """The same body in another colour: what is not metal takes it, shaded as before."""
    base = parts[1].color
    mean = sum(base) / 3
    return [
        part
        if part.color == furniture.METAL
        else part._replace(color=furniture.shade(color, sum(part.color) / 3 / mean))
        for part in parts
    ]


def _vanity(space: _Space, builder: _Builder) -> Box | None:
    """A basin on a cabinet."""
    rng = builder.rng
    size = (float(rng.uniform(0.42, 0.55)), float(rng.uniform(0.5, 1.2)), float(rng.uniform(0.7, 0.85)))
    box = _add_form("cabinet", space, builder, size)
    if box is None:
        return None
    label, kind = FORMS["sink"]
    basin = (size[0] * 0.9, min(size[1] * 0.9, 0.6), float(rng.uniform(0.2, 0.32)))
    above = (box[0], box[1], size[2] + basin[2] / 2 - 0.08, *basin, box[6])
    builder.add(kind.build(basin, rng), label, above, space.zone)
    return box


def _bath_group(space: _Space, builder: _Builder) -> Box | None:
    """A bathtub, often with a curtain along its open side."""
    rng = builder.rng
    tub = _add_form("bathtub", space, builder)
    if tub and rng.random() < 0.5:
        wide, tall = float(rng.uniform(0.3, 1.0)) * tub[4], float(rng.uniform(1.4, 1.9))
        size, label = (0.14, wide, tall), FORMS["showercurtrain"][0]
        side = float(rng.choice([-1.0, 1.0])) * (tub[4] - wide) / 2
        cos, sin = math.cos(tub[6]), math.sin(tub[6])
        dx = tub[3] / 2 - 0.03
        bottom = min(float(rng.uniform(0.1, 0.4)), space.room[2] - tall - 0.05)
        place = (tub[0] + dx * cos - side * sin, tub[1] + dx * sin + side * cos, bottom + tall / 2)
        builder.add(furniture.curtain(size, rng), label, (*place, *size, tub[6]), space.zone)
    return tub


_GROUPS: Mapping[str, Callable[[_Space, _Builder], Box | None]] = {
    "bed": _bed_group,
    "sofa": _sofa_group("sofa"),
    "corner sofa": _sofa_group("corner sofa"),
    "desk": _desk_group,
    "table": _table_group("table"),
    "round table": _table_group("round table"),
    "kitchen row": _kitchen_row,
    "vanity": _vanity,
    "bathtub": _bath_group,
}
"""Furniture that comes with other furniture."""


def _add_shaft(space: _Space, builder: _Builder) -> None:
    """Add a column in a corner or along a wall, from the floor to the ceiling or half way up."""
    rng = builder.rng
    a, b = rng.uniform(0.2, min(1.4, 0.4 * space.room[0])), rng.uniform(0.2, min(1.4, 0.4 * space.room[1]))
    x = a / 2 if rng.random() < 0.5 else space.room[0] - a / 2
    y = b / 2 if rng.random() < 0.5 else float(rng.uniform(b / 2, space.room[1] - b / 2))
    tall = space.room[2] - 0.005 if rng.random() < 0.7 else float(rng.uniform(0.8, 2.0))
    box = (float(x), float(y), tall / 2, float(a), float(b), tall, 0.0)
    if space.is_free("shaft", box):
        space.placed.append(("shaft", box))
        body = Primitive((-a / 2, -b / 2, 0.0), (a / 2, b / 2, tall), _wall_color(rng))
        builder.add_thing([body], (x + space.zone.x, y + space.zone.y, 0.0), 0.0)


_Choices = tuple[tuple[float, furniture.Builder, Size], ...]
"""Share, builder and mean size of things of no class."""

_SMALL: _Choices = (
    (5.0, varied.heap, (0.22, 0.25, 0.15)),
    (3.0, varied.pile, (0.22, 0.3, 0.07)),
    (1.5, household.bottle, (0.09, 0.09, 0.25)),
    (1.5, varied.television, (0.2, 0.55, 0.45)),
    (1.0, household.table_lamp, (0.26, 0.26, 0.45)),
    (1.0, household.laptop, (0.26, 0.34, 0.24)),
    (1.0, varied.vase_plant, (0.2, 0.2, 0.35)),
    (1.5, furniture.carton, (0.25, 0.3, 0.2)),
)
_SOFT: _Choices = (
    (4.0, varied.heap, (0.4, 0.45, 0.15)),
    (1.0, furniture.carton, (0.3, 0.4, 0.25)),
    (1.0, varied.pile, (0.22, 0.3, 0.05)),
)
_FLOOR: _Choices = (
    (5.0, varied.heap, (0.4, 0.45, 0.35)),
    (2.0, furniture.carton, (0.4, 0.45, 0.35)),
    (1.0, varied.floor_lamp, (0.35, 0.35, 1.6)),
    (0.7, varied.bicycle, (0.5, 1.6, 1.0)),
    (1.0, household.case, (0.28, 0.42, 0.55)),
    (1.0, varied.pillar, (0.4, 0.5, 1.1)),
    (1.0, varied.vase_plant, (0.5, 0.5, 0.9)),
    (0.7, household.stool, (0.4, 0.4, 0.5)),
    (0.7, varied.heap, (0.25, 0.3, 0.1)),
)
_WALL: _Choices = (
    (2.0, varied.open_shelf, (0.22, 0.9, 0.5)),
    (1.5, varied.television, (0.08, 1.0, 0.6)),
    (2.0, household.heater, (0.12, 1.0, 0.6)),
    (2.0, varied.heap, (0.15, 0.4, 0.6)),
    (1.0, varied.pillar, (0.12, 0.12, 1.5)),
    (1.0, furniture.picture, (0.04, 0.3, 0.25)),
)


def _draw(choices: _Choices, rng: np.random.Generator) -> tuple[furniture.Builder, Size]:
    shares = np.array([share for share, _, _ in choices])
    _, build, mean = choices[rng.choice(len(choices), p=shares / shares.sum())]
    depth, width, height = (np.array(mean) * np.exp(np.clip(rng.normal(0.0, 0.35, 3), -0.8, 0.8))).tolist()
    return build, (depth, width, height)


def _add_clutter(space: _Space, builder: _Builder) -> None:
    """Add things of no class: on furniture, on and along the floor, on walls. Tidy rooms have little of it."""
    rng, zone = builder.rng, space.zone
    mess = float(rng.gamma(1.8, 0.85))
    for name, box in [pair for pair in space.placed if pair[0] in _SURFACES]:
        level = box[2] - box[5] / 2 + _SURFACES[name] * box[5]
        for _ in range(min(int(rng.poisson(mess * 2.4 * min(box[3] * box[4], 2.0))), 10)):
            build, size = _draw(_SMALL if _SURFACES[name] == 1.0 else _SOFT, rng)
            spare = max(box[3] - size[0], 0.0) / 2, max(box[4] - size[1], 0.0) / 2
            forward, aside = rng.uniform(-1, 1) * spare[0], rng.uniform(-1, 1) * spare[1]
            cos, sin = math.cos(box[6]), math.sin(box[6])
            if level + size[2] < space.room[2] and size[0] < box[3] + 0.1 and size[1] < box[4] + 0.1:
                place = (box[0] + forward * cos - aside * sin, box[1] + forward * sin + aside * cos)
                builder.add_thing(
                    build(size, rng), (place[0] + zone.x, place[1] + zone.y, level), box[6] + rng.normal(0.0, 0.5)
                )
    for _ in range(min(int(rng.poisson(mess * 0.35 * zone.area)), 20)):
        build, size = _draw(_FLOOR, rng)
        if rng.random() < 0.5:
            x, y, yaw = pose_along_wall(size, space.room, False, rng)
        else:
            x, y, yaw = (float(rng.uniform(0, e)) for e in (*space.room[:2], 2 * math.pi))
        box = (x, y, size[2] / 2, *size, yaw)
        if space.is_free("thing", box, 0.0):
            space.placed.append(("thing", box))
            builder.add_thing(build(size, rng), (x + zone.x, y + zone.y, 0.0), yaw)
    for _ in range(int(rng.poisson(1.2 + 0.6 * mess))):
        build, size = _draw(_WALL, rng)
        bottom = float(rng.uniform(0.1, max(0.2, space.room[2] - size[2] - 0.1)))
        x, y, yaw = pose_along_wall(size, space.room, True, rng)
        box = (x, y, bottom + size[2] / 2, *size, yaw)
        if bottom + size[2] < space.room[2] and space.is_free("thing", box, 0.0):
            space.placed.append(("thing", box))
            builder.add_thing(build(size, rng), (x + zone.x, y + zone.y, bottom), yaw)
    if rng.random() < 0.5:  # a rug
        a, b = rng.uniform(0.3, 0.8) * space.room[0], rng.uniform(0.3, 0.8) * space.room[1]
        x, y = rng.uniform(a / 2, space.room[0] - a / 2), rng.uniform(b / 2, space.room[1] - b / 2)
        rug = Primitive((-a / 2, -b / 2, 0.0), (a / 2, b / 2, 0.015), varied.any_color(rng), bool(rng.random() < 0.2))
        builder.add_thing([rug], (x + zone.x, y + zone.y, 0.0), 0.0)

"""Rooms: a shell and furniture that does not overlap, placed along walls, at tables or freely."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.scans.synthetic.catalogue import Kind, Programme, label_of
from h2a2_jax.scans.synthetic.shapes import Primitive, Solids, joined, solids

_TRIES = 25
_GAP = 0.04
_ALONG = math.radians(3)  # what counts as along a wall
_ALIGNED = 0.78  # a little of the rest is so by chance, and finds a place less often
_SEATED_AT = ("table", "desk")

Box = tuple[float, float, float, float, float, float, float]
"""Centre, sizes (m), yaw (rad)."""


@dataclass(frozen=True, eq=False)
class Room:
    """A furnished room, in the frame whose origin is one of its lower corners; x and y along the walls.

    Attributes:
        size: width (x), length (y), height (z) (m).
        shell_colors: of the walls at small and large x, at small and large y, the floor and the ceiling.
        solids: primitives of all things, those of one object in a row; `owners` index `boxes`.
        boxes: the box of every object, annotated or not; yaw is the direction its front looks to.
        labels: class of every object; -1 if the dataset does not annotate it.
        lamp: where the light comes from (m); None = evenly from above.
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
        """Tells whether a point is at least `clearance` (m) from all objects that reach up to its height."""
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


def furnished_room(programme: Programme, spec: DatasetSpec, rng: np.random.Generator) -> Room:
    """Draws a room.

    Args:
        programme: sizes and contents.
        spec: the dataset, which decides what is annotated.
        rng: source of randomness.
    """
    size = (rng.uniform(*programme.width), rng.uniform(*programme.length), rng.uniform(*programme.height))
    chosen = _draw_contents(programme, spec, rng)
    drawn = []
    for name in chosen:
        depth, width, height = _draw_size(programme.kinds[name], programme, rng)
        drawn.append((name, programme.kinds[name], (depth, width, min(height, size[2] - 0.1))))
    # Large fronts first, seats last: they look for a table.
    drawn.sort(key=lambda item: (item[1].mount == "seat", -item[2][1] * item[2][2]))

    place = _place_simply if programme.scale == "demo" else _place
    placed: list[tuple[str, Box]] = []
    parts: list[Solids] = []
    for name, kind, extent in drawn:
        box = place(name, kind, extent, size, placed, rng)
        if box is not None:
            position = np.array([box[0], box[1], box[2] - box[5] / 2])
            parts.append(solids(kind.build(extent, rng)).placed(position, box[6], len(placed)))
            placed.append((name, box))
            if name == "counter":
                parts.append(_cupboard_under(box))
    lamp, plank = None, 0.0
    if programme.scale != "demo":
        lamp = (np.array([*rng.uniform(0.25, 0.75, 2), 0.95]) * size).astype(np.float32)
        plank = float(rng.choice([0.0, 0.15, 0.4]))
    return Room(
        size=np.array(size, np.float32),
        shell_colors=_shell_colors(rng),
        solids=joined([*parts, solids([])]),
        boxes=np.array([box for _, box in placed], np.float32).reshape(-1, 7),
        labels=np.array([label_of(name, spec) for name, _ in placed], np.int32),
        lamp=lamp,
        plank=plank,
    )


def _draw_contents(programme: Programme, spec: DatasetSpec, rng: np.random.Generator) -> list[str]:
    """Names of what the room should hold: annotated objects, then clutter."""
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


def _draw_size(kind: Kind, programme: Programme, rng: np.random.Generator) -> tuple[float, float, float]:
    """Depth, width and height of one thing (m), log-normal."""
    if programme.scale == "demo":
        # Heights vary less than footprints: people sit and work at one height.
        spread = np.clip(rng.normal(0.0, kind.spread, 3) * (1, 1, 0.5), -0.5, 0.5)
    else:
        sigma = np.array([kind.spread, kind.spread, kind.height_spread or kind.spread])
        spread = sigma * np.clip(rng.normal(size=3), -2.5, 2.5) - sigma**2 / 2  # keeps the mean
    depth, width, height = (np.array(kind.size) * np.exp(spread)).tolist()
    return depth, width, height


def _place_simply(
    name: str,
    kind: Kind,
    extent: tuple[float, float, float],
    room: tuple[float, float, float],
    placed: list[tuple[str, Box]],
    rng: np.random.Generator,
) -> Box | None:
    """Finds a free place for an object of a small room; None if there is none."""
    bottom = rng.uniform(*kind.base)
    bottom = min(bottom, room[2] - extent[2] - 0.05)
    for _ in range(_TRIES):
        tables = [box for name, box in placed if name in _SEATED_AT]
        if kind.mount == "seat" and tables and rng.random() < 0.75:
            x, y, yaw = _at_table(tables[rng.integers(len(tables))], extent[0], rng)
        elif kind.mount in ("wall", "hung") and (kind.mount == "hung" or rng.random() < 0.9):
            x, y, yaw = _along_wall(extent, room, kind.mount == "hung", rng)
        else:
            margin = math.hypot(extent[0], extent[1]) / 2
            if 2 * margin >= min(room[0], room[1]):
                continue
            x, y = rng.uniform(margin, room[0] - margin), rng.uniform(margin, room[1] - margin)
            yaw = _roughly_along_walls(rng)
        box = (x, y, bottom + extent[2] / 2, *extent, yaw)
        if _inside(box, room) and not any(overlap(box, other, _GAP) for _, other in placed):
            return box
    return None


def _place(
    name: str,
    kind: Kind,
    extent: tuple[float, float, float],
    room: tuple[float, float, float],
    placed: list[tuple[str, Box]],
    rng: np.random.Generator,
) -> Box | None:
    """Finds a free place for an object, four in five of them along the walls; None if there is none."""
    bottom = min(rng.uniform(*kind.base), room[2] - extent[2] - 0.05)
    aligned = kind.mount == "hung" or rng.random() < _ALIGNED
    tables = [box for name, box in placed if name in _SEATED_AT and (not aligned or _is_aligned(box))]
    taken = [_kept_free(name, box) for name, box in placed]
    for _ in range(3 * _TRIES):
        if kind.mount == "seat" and tables and rng.random() < 0.85:
            x, y, facing = _at_table(tables[rng.integers(len(tables))], extent[0], rng)
            if aligned:
                yaw = round(facing / (math.pi / 2)) * math.pi / 2 + rng.uniform(-_ALONG, _ALONG)
            else:
                yaw = rng.uniform(-math.pi, math.pi)
        elif aligned and (kind.mount == "hung" or (kind.mount == "wall" and rng.random() < 0.95)):
            x, y, yaw = _along_wall(extent, room, kind.mount == "hung", rng)
        else:
            x, y = rng.uniform(0.0, room[0]), rng.uniform(0.0, room[1])
            turns = int(rng.integers(4))
            yaw = turns * math.pi / 2 + rng.uniform(-_ALONG, _ALONG) if aligned else rng.uniform(-math.pi, math.pi)
        box = (x, y, bottom + extent[2] / 2, *extent, yaw)
        if _inside(box, room) and not any(overlap(_kept_free(name, box), other, _GAP) for other in taken):
            return box
    return None


def _is_aligned(box: Box) -> bool:
    """Whether a box stands along the walls."""
    return abs((box[6] + math.pi / 4) % (math.pi / 2) - math.pi / 4) <= _ALONG + 1e-9


def _kept_free(name: str, box: Box) -> Box:
    """What an object needs for itself: a counter the space below it, a door that it can be walked to."""
    x, y, z, depth, width, height, yaw = box
    if name == "counter":
        top = z + height / 2
        return x, y, top / 2, depth, width, top, yaw
    if name == "door":
        return x + 0.2 * math.cos(yaw), y + 0.2 * math.sin(yaw), z, depth + 0.4, width, height, yaw
    return box


def _roughly_along_walls(rng: np.random.Generator) -> float:
    """A yaw along one of the four walls within 3 degrees (80 %), else any."""
    if rng.random() < 0.8:
        return rng.integers(4) * math.pi / 2 + rng.uniform(-1, 1) * math.radians(3)
    return rng.uniform(-math.pi, math.pi)


def _along_wall(
    extent: tuple[float, float, float], room: tuple[float, float, float], fixed: bool, rng: np.random.Generator
) -> tuple[float, float, float]:
    """A place with the back to a wall and the front into the room; things fixed to the wall touch it."""
    wall = int(rng.integers(4))
    yaw = wall * math.pi / 2
    distance = extent[0] / 2
    if not fixed:
        turn = rng.uniform(-1, 1) * math.radians(3)
        yaw += turn
        distance += abs(math.sin(turn)) * extent[1] / 2 + rng.uniform(0.01, 0.08)
    along = room[1] if wall % 2 == 0 else room[0]
    half = extent[1] / 2 + 0.03
    if 2 * half >= along:
        return -1.0, -1.0, yaw
    position = rng.uniform(half, along - half)
    match wall:
        case 0:
            return distance, position, yaw
        case 1:
            return position, distance, yaw
        case 2:
            return room[0] - distance, position, yaw
        case _:
            return position, room[1] - distance, yaw


def _at_table(table: Box, depth: float, rng: np.random.Generator) -> tuple[float, float, float]:
    """A place beside a table, looking at it; at a desk (deep side at a wall) the wall side fails later."""
    side = int(rng.integers(4))
    reach = table[3 + side % 2] / 2 + depth / 2 + rng.uniform(0.05, 0.2)
    span = table[3 + (side + 1) % 2] / 2
    along = rng.uniform(-0.6, 0.6) * span
    angle = table[6] + side * math.pi / 2
    x = table[0] + reach * math.cos(angle) - along * math.sin(angle)
    y = table[1] + reach * math.sin(angle) + along * math.cos(angle)
    return x, y, angle + math.pi + rng.normal(0.0, 0.15)


def _inside(box: Box, room: tuple[float, float, float]) -> bool:
    cos, sin = abs(math.cos(box[6])), abs(math.sin(box[6]))
    half_x, half_y = (box[3] * cos + box[4] * sin) / 2, (box[3] * sin + box[4] * cos) / 2
    slack = 1e-6
    return half_x - slack <= box[0] <= room[0] - half_x + slack and half_y - slack <= box[1] <= room[1] - half_y + slack


def overlap(one: Box, other: Box, gap: float) -> bool:
    """Tells whether two upright boxes come closer than about `gap` (m); separating axes in the plane, then z."""
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


def _cupboard_under(counter: Box) -> Solids:
    """What a counter rests on; its own thing, not part of the counter's box."""
    x, y, top = counter[3] / 2 - 0.03, counter[4] / 2 - 0.02, counter[2] - counter[5] / 2
    body = solids([Primitive((-counter[3] / 2, -y, 0.0), (x, y, top), (0.5, 0.4, 0.3))])
    return body.placed(np.array([counter[0], counter[1], 0.0]), counter[6], -1)


def _shell_colors(rng: np.random.Generator) -> np.ndarray:
    wall = rng.uniform(0.62, 0.9) + rng.uniform(-0.06, 0.06, 3)
    floors = [(0.5, 0.36, 0.24), (0.45, 0.45, 0.47), (0.62, 0.55, 0.45), (0.35, 0.25, 0.18), (0.55, 0.5, 0.5)]
    floor = np.array(floors[rng.integers(len(floors))]) * rng.uniform(0.85, 1.15)
    colors = np.stack([wall, wall, wall, wall, floor, np.full(3, 0.9)])
    return np.clip(colors, 0, 1).astype(np.float32)

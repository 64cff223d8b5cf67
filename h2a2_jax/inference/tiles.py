"""Large scans in tiles: cut a scan into overlapping parts at full resolution, and join the boxes found in them.

The plane is cut into square cores, and the cores of a building into storeys, each at its own floors: those of a tilted
scan, or of a house with half-storeys, differ from core to core. A tile is a core with a margin around it, so that
objects near the edge of a core are seen whole. A box belongs to the tile whose core holds its centre. The centres that
two tiles give to one object may lie on either side of a seam: both tiles keep boxes up to `SLACK` beyond their core,
and of boxes of one class that overlap across a seam one is left.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Int

from h2a2_jax.boxes.nms import Detections, overlaps_of_pairs
from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats import Thinning
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.surfaces import cell_points, find_floor, slab_shares

CORE = 10.0
"""Length (m) of the sides of a core."""
MARGIN = 2.0
"""Width (m) of what a tile sees around its core: half of the largest furniture, and its surroundings."""
SLACK = 0.4
"""Distance (m) up to which a box that lies outside its core is compared with those of the neighbouring tile."""
DENSITY = 10_000
"""Points a square metre of floor, beyond which points of a tile are drawn: what the densest training scans have."""

TILED_ABOVE = 500_000
"""Points above which a scan is cut into tiles."""

Tiling = float | Literal["auto", "off"]
"""Length of the sides of cores (m) for every scan; "auto" cuts scans of many points into cores of 10 m, "off" none."""

_SEAM_IOU = 0.25  # of footprints; two views of an object that is cut differently overlap less than two of a whole one
_NEAR_FLOOR = 0.05  # m
_STOREY = 2.2  # m, the least height of a storey
_SLAB = 0.8  # m, the largest thickness of a floor with the ceiling below it
_SLAB_SIDE = 0.5  # of the largest plane of a slab; a floor has it, the tops of tables do not
_HOLLOW = 0.3  # of the usual share of points at a height; in a slab are fewer, between a floor and a bed are walls
_ABOVE = 0.4, 4.0  # m above a floor stand things, walls and a ceiling, and nothing above the ceiling of a last storey
_COVERED = 0.25  # of the area of a floor has something above it
_COLUMN = 0.5  # m
_FLOOR_SHARE = 0.03  # of the points of a storey lie in its floor
_BELOW_FLOOR = 0.1  # m
_AREA_CELL = 0.25  # m
_FEWEST = 30  # points of a core; fewer are no object, and lidars see such dust through windows far away
_MOST_FOR_FLOORS = 500_000  # points of a tile


class Tile(NamedTuple):
    """A part of a scan.

    Attributes:
        rows: rows of the points in the core and its margin.
        low: lowest x, y, z of the core (m), -inf at the edge of the scan.
        high: highest x, y, z, which belong to the next core; inf at the edge.
    """

    rows: Int[np.ndarray, " k"]
    low: Float[np.ndarray, " 3"]
    high: Float[np.ndarray, " 3"]


@dataclass(frozen=True)
class TileGrid:
    """Sizes of the tiles.

    Attributes:
        core: length of the sides of a core (m), a multiple of the margin.
        margin: width of the margin (m).
    """

    core: float = CORE
    margin: float = MARGIN


def checked_tiling(tile: Any, name: str) -> Tiling:
    """Return a tiling as it is, or of its text; raise InputError, with the name of the argument, for what is none."""
    if isinstance(tile, str) and tile in ("auto", "off"):
        return cast(Tiling, tile)
    try:
        core = float(tile)
    except (TypeError, ValueError):
        core = 0.0
    if not 2 * MARGIN <= core <= 100:
        raise InputError(
            f"{name} is {tile!r}; expected is auto, off or the sides of tiles in metres, {2 * MARGIN:g} to 100."
        )
    return core


def tiles_for(points: int, tile: Tiling) -> TileGrid | None:
    """Return the tiles for a scan of a number of points; None for one pass of the network."""
    if tile == "off" or (tile == "auto" and points <= TILED_ABOVE):
        return None
    return TileGrid() if tile == "auto" else TileGrid(core=tile)


def cut_tiles(scan: Scan, grid: TileGrid = TileGrid()) -> list[Tile]:
    """Cut a scan (m, z up) into tiles, row by row; cores of fewer than 30 points, which show no object, make none.

    Every point belongs to exactly one core, and may be in the margins of others. A tile holds points of one storey.
    """
    points = scan.points
    if not len(points):
        return []
    has_storeys = len(storey_floors(points)) > 1
    across = max(1, round(grid.core / grid.margin))  # cells, of the size of the margin, along a core
    lowest = points[:, :2].min(axis=0)
    columns, lines = (1 + np.floor((points[:, :2].max(axis=0) - lowest) / grid.margin).astype(int)).tolist()
    cells = columns * np.floor((points[:, 1] - lowest[1]) / grid.margin).astype(np.int32)
    cells += np.floor((points[:, 0] - lowest[0]) / grid.margin).astype(np.int32)
    order = np.argsort(cells, kind="stable")
    starts = np.searchsorted(cells, np.arange(lines * columns + 1), sorter=order)

    def rows_of(line: int, column: int, around: int) -> np.ndarray:
        """Rows of the points of a core and of some cells around it."""
        first, last = max(column - around, 0), min(column + across + around, columns)
        bands = range(max(line - around, 0), min(line + across + around, lines))
        return np.concatenate([order[starts[band * columns + first] : starts[band * columns + last]] for band in bands])

    tiles = []
    for line, column in itertools.product(range(0, lines, across), range(0, columns, across)):
        core = rows_of(line, column, 0)
        if len(core) < _FEWEST:
            continue
        rows = np.sort(rows_of(line, column, 1))
        near, far = (
            lowest.astype(np.float64) + grid.margin * np.array(place)
            for place in ((column, line), (column + across, line + across))
        )
        low = np.where([column > 0, line > 0], near, -math.inf)
        high = np.where([column + across < columns, line + across < lines], far, math.inf)
        edges = _storey_edges(points[rows]) if has_storeys else [-math.inf, math.inf]
        for bottom, top in itertools.pairwise(edges):
            if np.count_nonzero(_between(points[core, 2], bottom, top)) >= _FEWEST:
                tile = rows[_between(points[rows, 2], bottom, top)]
                tiles.append(Tile(tile, np.append(low, bottom), np.append(high, top)))
    return tiles


def _storey_edges(points: Float[np.ndarray, "m 3"]) -> list[float]:
    """Heights between which the storeys of a tile lie."""
    floors = storey_floors(points[:: 1 + len(points) // _MOST_FOR_FLOORS])
    return [-math.inf, *(floor - _BELOW_FLOOR for floor in floors[1:]), math.inf]


def _between(heights: Float[np.ndarray, " m"], bottom: float, top: float) -> Bool[np.ndarray, " m"]:
    return (heights >= bottom) & (heights < top)


def storey_floors(points: Float[np.ndarray, "m 3"]) -> list[float]:
    """Find the heights (m, rising) of the floors of a building; of one storey, or where none is clear, a single one.

    A floor is a plane at least 2.2 m above the one below, with something above it; of a ceiling and the floor on top of
    it, at most .8 m apart, the floor counts.
    """
    some = cell_points(points[:: max(1, len(points) // 2_000_000)], most=200_000)
    lowest = float(np.percentile(some[:, 2], 0.5))
    first = find_floor(points)
    floors = [lowest if first is None else first]
    places, shares = slab_shares(some[:, 2])
    is_peak = np.array([share >= shares[max(i - 3, 0) : i + 4].max() for i, share in enumerate(shares)])
    storeys = max(1.0, float(np.ptp(np.percentile(some[:, 2], [0.5, 99.5]))) / 3)
    large = np.flatnonzero(is_peak & (shares > _FLOOR_SHARE / storeys) & (places > floors[0] + _STOREY))
    columns = np.unique(np.floor(some[:, :2] / _COLUMN), axis=0, return_inverse=True)[1].reshape(-1)
    covered = [i for i in large if _covered_share(some[:, 2], columns, places[i]) > _COVERED]
    candidates, areas = places[covered], shares[covered]
    while (higher := candidates > floors[-1] + _STOREY).any():
        slab = higher & (candidates < candidates[higher][0] + _SLAB)
        sides = candidates[slab & (areas >= _SLAB_SIDE * areas[slab].max())]
        floors.append(float([side for side in sides if _is_hollow(places, shares, sides[0], side)][-1]))
    return floors


def _is_hollow(places: Float[np.ndarray, " k"], shares: Float[np.ndarray, " k"], low: float, high: float) -> bool:
    """Return True if the space between two planes shows next to no points, or is too thin to tell."""
    between = shares[(places > low + 2 * _NEAR_FLOOR) & (places < high - 2 * _NEAR_FLOOR)]
    return len(between) == 0 or float(np.median(between)) < _HOLLOW * float(np.median(shares))


def _covered_share(heights: Float[np.ndarray, " m"], columns: Int[np.ndarray, " m"], height: float) -> float:
    """Share of the columns of a plane that have points above it; of points by their heights and columns."""
    plane = np.unique(columns[np.abs(heights - height) < _NEAR_FLOOR])
    above = columns[(heights > height + _ABOVE[0]) & (heights < height + _ABOVE[1])]
    return float(np.isin(plane, above).mean()) if len(plane) else 0.0


def thin_evenly(scan: Scan, most: int) -> Scan:
    """Thin a scan of more points to one at random out of each of `most` equal runs, the same ones each time."""
    rows = Thinning(most).rows(len(scan.points))
    return scan if rows is None else replace(scan, points=scan.points[rows], colors=scan.colors[rows])


def tile_scan(scan: Scan, tile: Tile, floor: float | None) -> tuple[Scan, float]:
    """Make a scan of the points of a tile; returns it with the height (m) by which it was lowered.

    Points are drawn where there are more than `DENSITY` a square metre of floor, the same ones each time. Where `floor`
    is given, the tile's own floor, if it is found, is brought to that height.
    """
    rows = tile.rows
    cells = np.floor(scan.points[rows, :2] / _AREA_CELL).astype(np.int64)
    area = len(np.unique(cells[:, 0] * (1 << 32) + cells[:, 1])) * _AREA_CELL**2
    most = max(1, int(DENSITY * area))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
    points, lowered = scan.points[rows], 0.0
    if floor is not None:
        found = find_floor(points)
        if found is not None and abs(found - floor) > _NEAR_FLOOR:
            lowered = found - floor
            points = points - np.array([0, 0, lowered], np.float32)
    return replace(scan, points=points, colors=scan.colors[rows]), lowered


def boxes_of_tile(found: Detections, tile: Tile, lowered: float) -> Detections:
    """Raise the boxes of a tile again, and keep those whose centre lies in its core, or at most `SLACK` beyond."""
    boxes = found.boxes.copy()
    boxes[:, 2] += np.float32(lowered)
    # Storeys are apart by a slab of concrete: they have no slack, which a lamp and a carpet would be told apart by.
    slack = np.array([SLACK, SLACK, 0])
    near = ((boxes[:, :3] >= tile.low - slack) & (boxes[:, :3] < tile.high + slack)).all(axis=1)
    return Detections(boxes[near], found.scores[near], found.labels[near])


def join_tiles(parts: Sequence[Detections], tiles: Sequence[Tile]) -> Detections:
    """Join the boxes of the tiles (`boxes_of_tile`), best first; one object at a seam is one box.

    Of two boxes of one class from different tiles that overlap, that in its own core is kept; of two such, or of none,
    the better one.
    """
    boxes, scores, labels = (
        np.concatenate([np.zeros((0, *shape), dtype), *(getattr(part, name) for part in parts)])
        for name, shape, dtype in (("boxes", (7,), np.float32), ("scores", (), np.float32), ("labels", (), np.int32))
    )
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    low, high = (np.array([getattr(tile, side) for tile in tiles]).reshape(-1, 3)[owner] for side in ("low", "high"))
    is_inside = ((boxes[:, :3] >= low) & (boxes[:, :3] < high)).all(axis=1)
    order = np.lexsort([-scores, ~is_inside])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    pairs = _pairs_across_seams(boxes, labels, owner)
    kept = np.ones(len(boxes), bool)
    for first, second in sorted(pairs, key=lambda pair: (min(rank[list(pair)]), max(rank[list(pair)]))):
        better, worse = (first, second) if rank[first] < rank[second] else (second, first)
        if kept[better]:
            kept[worse] = False
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    return Detections(boxes[rows], scores[rows], labels[rows])


def _pairs_across_seams(
    boxes: Float[np.ndarray, "n 7"], labels: Int[np.ndarray, " n"], owner: Int[np.ndarray, " n"]
) -> list[tuple[int, int]]:
    """Pairs of boxes of one class from different tiles that stand in one place."""
    from scipy.spatial import cKDTree  # takes .2 s, for large scans alone

    if len(boxes) < 2:
        return []
    # Boxes whose footprints share a quarter of their union have centres nearer than the longest of them is.
    near = cKDTree(boxes[:, :2]).query_pairs(2 * (MARGIN + SLACK), output_type="ndarray")
    first, second = near.T
    heights = np.abs(boxes[first, 2] - boxes[second, 2]) < (boxes[first, 5] + boxes[second, 5]) / 2
    apart = (labels[first] == labels[second]) & (owner[first] != owner[second]) & heights
    first, second = first[apart], second[apart]
    overlaps = overlaps_of_pairs(boxes[first], boxes[second])
    return list(zip(first[overlaps > _SEAM_IOU].tolist(), second[overlaps > _SEAM_IOU].tolist(), strict=True))

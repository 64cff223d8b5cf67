"""Tiles of large scans: every point in one core, every object once, floors of storeys."""

import math

import numpy as np
import pytest

from h2a2_jax.boxes.nms import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.inference.tiles import (
    DENSITY,
    MARGIN,
    SLACK,
    Tile,
    TileGrid,
    boxes_of_tile,
    checked_tiling,
    cut_tiles,
    join_tiles,
    storey_floors,
    thin_evenly,
    tile_scan,
    tiles_for,
)
from h2a2_jax.scans.scan import Scan
from tests.inference.tiny import room


def scan_of(points: np.ndarray) -> Scan:
    points = points.astype(np.float32)
    return Scan("hall", points, np.zeros_like(points), np.zeros((0, 7), np.float32), np.zeros(0, np.int32))


def hall(length: float = 30.0, width: float = 17.0, points: int = 20_000) -> Scan:
    rng = np.random.default_rng(0)
    return scan_of(rng.random((points, 3)) * (length, width, 2.5) + (-4, 100, 0))


def in_core(points: np.ndarray, tile: Tile) -> np.ndarray:
    return ((points >= tile.low) & (points < tile.high)).all(axis=1)


def test_every_point_is_in_one_core_and_its_tile_has_what_is_around():
    scan = hall()
    tiles = cut_tiles(scan)
    assert len(tiles) == 3 * 2
    counts = np.zeros(len(scan.points), int)
    for tile in tiles:
        inside = in_core(scan.points, tile)
        counts[inside] += 1
        assert set(np.flatnonzero(inside)) <= set(tile.rows)
        around = ((scan.points >= tile.low - 0.99 * MARGIN) & (scan.points < tile.high + 0.99 * MARGIN)).all(axis=1)
        assert set(np.flatnonzero(around)) <= set(tile.rows)
        assert (np.diff(tile.rows) > 0).all()
    assert (counts == 1).all()


def test_cores_at_the_edge_are_open_and_empty_ones_make_no_tile():
    scan = hall()
    gap = (scan.points[:, 0] < 5.9) | (scan.points[:, 0] > 16.1)
    tiles = cut_tiles(scan_of(scan.points[gap]))
    assert len(tiles) == 2 * 2
    assert tiles[0].low.tolist() == [-math.inf] * 3 and tiles[-1].high.tolist() == [math.inf] * 3
    assert cut_tiles(scan_of(np.zeros((0, 3)))) == []
    assert len(cut_tiles(room("small", 500, 1.2))) == 1


def test_sides_of_tiles_can_be_chosen():
    assert len(cut_tiles(hall(), TileGrid(core=6.0))) == 5 * 3
    assert tiles_for(500_000, "auto") is None and tiles_for(500_001, "auto") == TileGrid()
    assert tiles_for(10**8, "off") is None and tiles_for(10, 6.0) == TileGrid(core=6.0)
    assert checked_tiling("12", "--tile") == 12.0 and checked_tiling("off", "--tile") == "off"
    for wrong in ("1", "nan", "large", 1000.0):
        with pytest.raises(InputError, match=r"tile is .*; expected is auto, off or the sides"):
            checked_tiling(wrong, "tile")


def building() -> Scan:
    """Three storeys, each with floor, ceiling, walls and a table; slabs of 30 cm."""
    rng = np.random.default_rng(1)
    parts = []
    for storey in range(3):
        base = 3.1 * storey
        for height, share in ((0.0, 6000), (2.8, 6000), (0.75, 600)):
            plane = rng.random((share, 3)) * (12, 8, 0.01)
            parts.append(plane + np.array([0, 0, base + height]))
        parts.append(rng.random((6000, 3)) * (0.02, 8, 2.8) + np.array([0, 0, base]))
        parts.append(rng.random((6000, 3)) * (12, 0.02, 2.8) + np.array([0, 0, base]))
    return scan_of(np.concatenate(parts))


def test_storeys_are_cut_at_their_floors():
    scan = building()
    assert storey_floors(scan.points) == pytest.approx([0, 3.1, 6.2], abs=0.04)
    tiles = cut_tiles(scan, TileGrid(core=20.0))
    assert len(tiles) == 3
    for storey, tile in enumerate(tiles):
        heights = scan.points[tile.rows, 2]
        assert heights.min() > 3.1 * storey - 0.35 and heights.max() < 3.1 * storey + 3.0
    part, lowered = tile_scan(scan, tiles[2], floor=0.01)
    assert lowered == pytest.approx(6.2, abs=0.04) and abs(part.points[:, 2].min()) < 0.35
    assert tile_scan(scan, tiles[2], floor=None)[1] == 0


@pytest.mark.parametrize(("tops", "height"), [(2500, 0.75), (8000, 0.5)])
def test_the_tops_of_tables_and_beds_are_no_floor_where_no_ceiling_is_seen(tops, height):
    rng = np.random.default_rng(4)
    storey = [rng.random((9000, 3)) * (12, 8, 0.01), rng.random((6000, 3)) * (12, 0.02, 2.4)]
    storey += [rng.random((tops, 3)) * (6, 5, 0.01) + np.array([3, 2, height])]
    points = np.concatenate([part + np.array([0, 0, base]) for base in (0, 3, 6) for part in storey])
    assert storey_floors(points.astype(np.float32)) == pytest.approx([0, 3, 6], abs=0.04)


@pytest.mark.parametrize("ceiling", [True, False])
def test_a_room_is_one_storey(ceiling):
    points = building().points
    assert storey_floors(points[points[:, 2] < (2.9 if ceiling else 2.7)]) == pytest.approx([0], abs=0.04)


def test_a_floor_that_climbs_is_cut_into_no_storeys():
    """By half a metre every 14 m, and in one plane: nothing that stands on it is cut through."""
    rng = np.random.default_rng(2)
    for climb in (lambda x: np.floor(x / 14) / 2, lambda x: 0.06 * x):
        floor = rng.random((60_000, 3)) * (84, 12, 0.01)
        walls = rng.random((40_000, 3)) * (84, 0.02, 2.6)
        points = np.concatenate([floor, floor + np.array([0, 0, 2.6]), walls])
        points[:, 2] += climb(points[:, 0])
        tiles = cut_tiles(scan_of(points))
        assert all((tile.low[2], tile.high[2]) == (-math.inf, math.inf) for tile in tiles) and len(tiles) == 9 * 2


def test_dust_far_away_makes_no_tiles():
    rng = np.random.default_rng(3)
    scan = hall()
    dust = rng.uniform(-200, 200, (2000, 3)) * (1, 1, 0.05)
    tiles = cut_tiles(scan_of(np.concatenate([scan.points, dust])))
    assert len(tiles) <= 4 * 3
    assert len(set(np.concatenate([tile.rows for tile in tiles])) & set(range(len(scan.points)))) == len(scan.points)
    assert cut_tiles(scan_of(dust[:20])) == []


def test_dense_tiles_are_drawn_to_the_density_of_training():
    rng = np.random.default_rng(0)
    dense = scan_of(rng.random((60_000, 3)) * (1.0, 1.0, 0.01))
    (tile,) = cut_tiles(dense)
    part, _ = tile_scan(dense, tile, None)
    assert DENSITY <= len(part.points) <= 1.6 * DENSITY  # cells at the edge count whole
    again, _ = tile_scan(dense, tile, None)
    np.testing.assert_array_equal(part.points, again.points)
    thin = thin_evenly(dense, 1000)
    assert len(thin.points) == len(thin.colors) == 1000 and thin_evenly(thin, 1000) is thin


def found(*rows: tuple[float, ...]) -> Detections:
    """Boxes of x, score, label, and a length of 1 m unless there is a fourth number."""
    boxes = np.array([[x, 0, 0.5, *more, 1, 1, 0] if more else [x, 0, 0.5, 1, 1, 1, 0] for x, _, _, *more in rows])
    scores, labels = (np.array([row[i] for row in rows]) for i in (1, 2))
    return Detections(boxes.reshape(-1, 7).astype(np.float32), scores.astype(np.float32), labels.astype(np.int32))


LEFT = Tile(np.zeros(0, np.int64), np.full(3, -math.inf), np.array([10, math.inf, math.inf]))
RIGHT = Tile(np.zeros(0, np.int64), np.array([10, -math.inf, -math.inf]), np.full(3, math.inf))


def test_a_box_belongs_to_the_tile_that_holds_its_centre():
    both = found((9.0, 0.9, 1), (9.9, 0.8, 1), (10.3, 0.7, 1), (11.0, 0.6, 1))
    assert boxes_of_tile(both, LEFT, 0.0).boxes[:, 0] == pytest.approx([9.0, 9.9, 10.3])
    assert boxes_of_tile(both, RIGHT, 0.0).boxes[:, 0] == pytest.approx([9.9, 10.3, 11.0])
    assert boxes_of_tile(both, RIGHT, 3.0).boxes[:, 2] == pytest.approx(3.5)
    assert SLACK < 0.9


@pytest.mark.parametrize(("left", "right", "expected"), [(9.9, 10.1, 10.1), (9.95, 9.9, 9.95), (10.1, 9.9, 9.9)])
def test_an_object_at_a_seam_is_one_box(left, right, expected):
    """Whatever side of the seam the tiles see its centre on; that of the tile's own core is kept, else the better."""
    joined = join_tiles([found((left, 0.5, 1)), found((right, 0.9, 1))], [LEFT, RIGHT])
    assert len(joined) == 1
    assert joined.boxes[0, 0] == pytest.approx(expected)


def test_boxes_of_other_classes_of_one_tile_or_apart_stay():
    joined = join_tiles(
        [found((9.9, 0.5, 1), (9.8, 0.4, 1), (3.0, 0.95, 0)), found((10.0, 0.7, 2), (12.0, 0.6, 1))], [LEFT, RIGHT]
    )
    assert joined.scores == pytest.approx([0.95, 0.7, 0.6, 0.5, 0.4])
    assert joined.labels.tolist() == [0, 2, 1, 1, 1]
    assert len(join_tiles([], [])) == 0

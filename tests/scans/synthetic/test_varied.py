import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import points_in_box, validate_scan
from h2a2_jax.scans.specs import ARKITSCENES, SCANNET, SPECS, SUNRGBD
from h2a2_jax.scans.synthetic import SyntheticSource, homes, varied_sensors
from h2a2_jax.scans.synthetic.furniture import Primitive, make_solids
from h2a2_jax.scans.synthetic.homes import FORMS, Home, Zone, build_home
from h2a2_jax.scans.synthetic.raycast import SphericalGrid, look
from h2a2_jax.scans.synthetic.rooms import KINDS, Room, label_of, overlap

each_dataset = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
SIZE = np.array([6.0, 8.0, 2.8], np.float32)


@pytest.fixture(scope="module")
def built():
    """A few homes of each dataset."""
    return {spec.name: [build_home(spec, np.random.default_rng(seed)) for seed in range(12)] for spec in SPECS}


@pytest.fixture(scope="module")
def scans():
    """A few scans of each dataset."""
    return {
        spec.name: [SyntheticSource(spec, "train", 4, scale="varied")[index] for index in range(4)] for spec in SPECS
    }


def test_an_ellipsoid_is_hit_on_its_surface_with_normals_that_look_out():
    ball = make_solids([Primitive((-0.5, -0.8, 0.0), (0.5, 0.8, 1.2), (0.5, 0.1, 0.1), is_ball=True)])
    parts = ball.place(np.array([3.0, 4.0, 0.4]), 0.6, 0)
    room = Room(SIZE, np.full((6, 3), 0.5, np.float32), parts, np.zeros((1, 7), np.float32), np.zeros(1, np.int32))
    grid = SphericalGrid(np.array([1.0, 3.0, 1.3], np.float32), 80, 160, (-1.2, 1.2), np.random.default_rng(0))
    view = look(room, grid)
    on = view.owners == 0
    points, normals = view.points[on], view.normals[on]
    local = parts.to_local(np.zeros(len(points), int), points) / parts.halves[0]
    assert len(points) > 100
    np.testing.assert_allclose(np.linalg.norm(local, axis=1), 1, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert (np.einsum("ij,ij->i", normals, points - grid.origin) < 0).all()  # the near side alone is seen
    step = parts.to_local(np.zeros(len(points), int), points + 0.01 * normals) / parts.halves[0]
    assert (np.linalg.norm(step, axis=1) > 1).all()


@pytest.mark.parametrize("name", FORMS)
def test_forms_fill_their_size(name):
    label, kind = FORMS[name]
    rng = np.random.default_rng(1)
    assert label in KINDS
    for _ in range(6):
        size = tuple((np.array(kind.size) * np.exp(rng.normal(0, 0.15, 3))).tolist())
        parts = make_solids(kind.build(size, rng))
        cos, sin = np.abs(np.cos(parts.yaws)), np.abs(np.sin(parts.yaws))
        half = parts.boxes[:, 3:6] / 2
        reach = np.stack([half[:, 0] * cos + half[:, 1] * sin, half[:, 0] * sin + half[:, 1] * cos, half[:, 2]], axis=1)
        low, high = (parts.centers - reach).min(axis=0), (parts.centers + reach).max(axis=0)
        np.testing.assert_allclose(high - low, size, rtol=0.12, atol=0.02)
        assert low[2] >= -2e-3 and (parts.halves > 0).all()


@each_dataset
def test_every_class_stands_somewhere(spec):
    names = {name for _, use in homes._USES[spec.name] for name in use} | {
        "counter",
        "sink",
        "door",
        "night_stand",
        "chair",
    }
    made = {label_of(FORMS[name][0], spec) for name in names if name in FORMS} | {label_of("door", spec)}
    assert made - {-1} == set(range(spec.num_classes))


@each_dataset
def test_furniture_stands_in_its_zone_and_walls_leave_a_way(spec, built):
    assert {len(home.zones) for home in built[spec.name]} >= {1, 2}
    for home in built[spec.name]:
        assert len(home.labels) == len(home.boxes) and home.solids.owners.max(initial=-1) < len(home.boxes)
        assert sum(zone.area for zone in home.zones) <= home.size[0] * home.size[1] + 1e-3
        for zone in home.zones:
            assert zone.width > 0.3 and zone.length > 0.3
        low = home.boxes[:, 2] - home.boxes[:, 5] / 2
        assert (low > -0.01).all() and (home.boxes[:, 2] + home.boxes[:, 5] / 2 <= home.size[2] + 1e-3).all()
        inside = (home.boxes[:, :2] > -0.6) & (home.boxes[:, :2] < home.size[:2] + 0.6)  # doors swing
        assert inside.all()


def test_beds_and_cabinets_do_not_stand_in_one_another(built):
    pairs = 0
    for home in built["scannet"]:
        large = [tuple(box) for box, label in zip(home.boxes.tolist(), home.labels.tolist(), strict=True)
                 if SCANNET.classes[label] in ("bed", "sofa", "bathtub", "bookshelf")]  # fmt: skip
        for index, one in enumerate(large):
            for other in large[:index]:
                pairs += 1
                assert not overlap(one, other, -0.01)
    assert pairs > 5


def test_a_sensor_stands_clear_of_everything(built):
    found = 0
    for seed, home in enumerate(built["scannet"]):
        rng = np.random.default_rng(seed)
        for zone in home.zones:
            place = varied_sensors._station(home, zone, (1.1, 1.8), rng)
            if place is not None:
                found += 1
                assert home.is_clear(place, 0.03)
                assert zone.x < place[0] < zone.x + zone.width and zone.y < place[1] < zone.y + zone.length
    assert found > 10


def test_nothing_is_clear_inside_a_wall():
    wall = make_solids([Primitive((2.0, 0.0, 0.0), (2.2, 4.0, 2.5), (0.5, 0.5, 0.5))])
    home = Home(SIZE, np.full((6, 3), 0.5, np.float32), wall, np.zeros((0, 7), np.float32), np.zeros(0, np.int32),
                zones=(Zone(0.0, 0.0, 6.0, 8.0),))  # fmt: skip
    assert not home.is_clear(np.array([2.1, 1.0, 1.0], np.float32), 0.0)
    assert not home.is_clear(np.array([2.3, 1.0, 1.0], np.float32), 0.2)
    assert home.is_clear(np.array([2.5, 1.0, 1.0], np.float32), 0.2)


@each_dataset
def test_scans_are_valid_and_the_same_again(spec, scans):
    again = SyntheticSource(spec, "train", 900, scale="varied")[2]
    for field in ("points", "colors", "boxes", "labels"):
        np.testing.assert_array_equal(getattr(again, field), getattr(scans[spec.name][2], field))
    for scan in scans[spec.name]:
        assert validate_scan(scan, spec.num_classes) == []
        assert 5_000 <= len(scan.points) <= 120_000 and len(scan.boxes) >= 1
        assert scan.points.dtype == scan.colors.dtype == np.float32
        if spec.has_yaw:
            continue
        for box in scan.boxes:
            assert points_in_box(scan.points, box).sum() >= 29


def test_a_view_of_a_camera_looks_along_y_from_above_its_floor(scans):
    for scan in scans["sunrgbd"]:
        assert np.percentile(scan.points[:, 1], 1) > 0.3
        assert -2.1 < np.percentile(scan.points[:, 2], 0.5) < 0.5


def test_varied_rooms_of_other_datasets_and_gaps_are_refused():
    with pytest.raises(
        InputError, match="Varied rooms of arkitscenes at gap 1 were asked for; there are those of scannet"
    ):
        SyntheticSource(ARKITSCENES, "train", 1, scale="varied")
    with pytest.raises(InputError, match=r"Varied rooms of sunrgbd at gap 0.5"):
        SyntheticSource(SUNRGBD, "train", 1, scale="varied", gap=0.5)

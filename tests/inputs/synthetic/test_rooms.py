import math

import numpy as np
import pytest

from h2a2_jax.inputs.specs import SPECS, SUNRGBD
from h2a2_jax.inputs.synthetic.catalogue import programme
from h2a2_jax.inputs.synthetic.rooms import furnished_room, overlap
from h2a2_jax.inputs.synthetic.shapes import corners


def random_boxes(rng, count):
    spread = np.concatenate([rng.uniform(-1, 1, (count, 3)), rng.uniform(0.2, 1.5, (count, 3))], axis=1)
    return np.concatenate([spread, rng.uniform(-math.pi, math.pi, (count, 1))], axis=1)


def test_overlap_agrees_with_sampling():
    rng = np.random.default_rng(0)
    inside = rng.uniform(-0.5, 0.5, (4000, 3))
    decided = 0
    for one, other in zip(random_boxes(rng, 200), random_boxes(rng, 200), strict=True):
        cos, sin = math.cos(one[6]), math.sin(one[6])
        points = (inside * one[3:6]) @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + one[:3]
        offset = points - other[:3]
        cos, sin = math.cos(other[6]), math.sin(other[6])
        local = np.stack(
            [offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin, offset[:, 2]]
        )
        shared = (np.abs(local) < other[3:6, None] / 2).all(axis=0).mean()
        if shared > 0:
            assert overlap(tuple(one.tolist()), tuple(other.tolist()), 0.0)
            decided += 1
        elif overlap(tuple(one.tolist()), tuple(other.tolist()), -0.15):
            pytest.fail("boxes that share more than a rim share no sample")
    assert decided > 30


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("scale", ["demo", "full"])
def test_objects_stand_apart_and_inside_the_room(spec, scale):
    for seed in range(8):
        room = furnished_room(programme(spec, scale), spec, np.random.default_rng(seed))
        boxes = [tuple(box) for box in room.boxes.tolist()]
        for index, box in enumerate(boxes):
            assert not any(overlap(box, other, 0.0) for other in boxes[:index])
        reach = corners(room.boxes)
        assert reach.min() > -1e-3
        assert (reach.max(axis=(0, 1)) < room.size + 1e-3).all()
        assert (room.labels >= 0).sum() >= 2


def test_solids_of_an_object_are_in_a_row_and_in_its_box():
    room = furnished_room(programme(SUNRGBD, "full"), SUNRGBD, np.random.default_rng(1))
    parts = room.solids
    owners = parts.owners[parts.owners >= 0]
    assert (np.diff(owners) >= 0).all() and set(owners.tolist()) == set(range(len(room.boxes)))
    own = parts.owners >= 0
    box = room.boxes[parts.owners[own]]
    offset = parts.centers[own] - box[:, :3]
    cos, sin = np.cos(box[:, 6]), np.sin(box[:, 6])
    local = np.stack(
        [offset[:, 0] * cos + offset[:, 1] * sin, offset[:, 1] * cos - offset[:, 0] * sin, offset[:, 2]], 1
    )
    assert (np.abs(local) + parts.boxes[own, 3:6] / 2 <= box[:, 3:6] / 2 + 2e-3).all()


def test_most_furniture_stands_along_the_walls():
    turns = []
    for seed in range(40):
        room = furnished_room(programme(SUNRGBD, "full"), SUNRGBD, np.random.default_rng(seed))
        turns += [((yaw + math.pi / 4) % (math.pi / 2)) - math.pi / 4 for yaw in room.boxes[:, 6].tolist()]
    aligned = np.mean(np.abs(turns) < math.radians(3.1))
    assert 0.55 < aligned < 0.95


def test_free_space_is_measured_from_box_faces():
    room = furnished_room(programme(SUNRGBD, "demo"), SUNRGBD, np.random.default_rng(0))
    x, y, z, depth, _, _, yaw = room.boxes[0].tolist()
    assert not room.is_free(x, y, z, 0.01)
    alone = type(room)(room.size, room.shell_colors, room.solids, room.boxes[:1], room.labels[:1])
    beyond = depth / 2 + 0.3
    x, y = x + beyond * math.cos(yaw), y + beyond * math.sin(yaw)
    assert alone.is_free(x, y, z, 0.29) and not alone.is_free(x, y, z, 0.31)

import math
from collections import Counter

import numpy as np
import pytest

from h2a2_jax.scans.specs import SCANNET, SPECS, SUNRGBD
from h2a2_jax.scans.synthetic.furniture import corners
from h2a2_jax.scans.synthetic.rooms import furnish_room, label_of, overlap, programme


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
        room = furnish_room(programme(spec, scale), spec, np.random.default_rng(seed))
        boxes = [tuple(box) for box in room.boxes.tolist()]
        for index, box in enumerate(boxes):
            assert not any(overlap(box, other, 0.0) for other in boxes[:index])
        reach = corners(room.boxes)
        assert reach.min() > -1e-3
        assert (reach.max(axis=(0, 1)) < room.size + 1e-3).all()
        assert (room.labels >= 0).sum() >= 2


def test_solids_of_an_object_are_in_a_row_and_in_its_box():
    room = furnish_room(programme(SUNRGBD, "full"), SUNRGBD, np.random.default_rng(1))
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


@pytest.fixture(scope="module")
def rooms():
    """50 rooms of full scale per dataset."""
    plans = {spec: programme(spec, "full") for spec in SPECS}
    return {
        spec.name: [furnish_room(plan, spec, np.random.default_rng([seed, 5])) for seed in range(50)]
        for spec, plan in plans.items()
    }


@pytest.fixture(scope="module")
def placed(rooms):
    """Names, boxes and kinds of all annotated things in them."""
    found = {}
    for spec in SPECS:
        kinds = {label_of(name, spec): kind for name, kind in programme(spec, "full").kinds.items()}
        found[spec.name] = [
            (spec.classes[label], box, kinds[label])
            for room in rooms[spec.name]
            for box, label in zip(room.boxes, room.labels.tolist(), strict=True)
            if label >= 0
        ]
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_four_in_five_things_stand_along_the_walls_and_the_others_anyhow(spec, placed):
    yaws = np.array([box[6] for _, box, kind in placed[spec.name] if kind.mount != "hung"])
    turns = np.abs((yaws + math.pi / 4) % (math.pi / 2) - math.pi / 4)
    assert abs(np.mean(turns < math.radians(3.01)) - 0.8) < 0.06
    others = turns[turns > math.radians(3.01)]
    histogram = np.histogram(others, 4, (math.radians(3), math.pi / 4))[0] / len(others)
    assert histogram.min() > 0.12 and histogram.max() < 0.4
    hung = [box[6] % (math.pi / 2) for _, box, kind in placed[spec.name] if kind.mount == "hung"]
    np.testing.assert_allclose(np.minimum(hung, math.pi / 2 - np.array(hung)), 0, atol=1e-6)


def test_class_frequencies_follow_scannet(placed):
    counts = Counter(name for name, _, _ in placed["scannet"])
    names = [name for name, _ in counts.most_common(4)]
    assert names[:2] == ["chair", "door"] and set(names[2:]) == {"cabinet", "table"}
    assert 0.2 < counts["chair"] / counts.total() < 0.35


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_class_occurs_and_chairs_most(spec, placed):
    counts = Counter(name for name, _, _ in placed[spec.name])
    assert set(counts) == set(spec.classes)
    assert counts.most_common(1)[0][0] == "chair"
    if spec.name != "scannet":
        assert counts.most_common(2)[1][0] == "table"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_sizes_are_log_normal_about_their_means(spec, placed):
    """Only small things: large ones find a place less often where they are larger yet."""
    kinds = {name: kind for name, _, kind in placed[spec.name]}
    assert kinds["table"].spread == 0.35 and kinds["chair"].spread == 0.2
    sizes = np.array([box[3:6] for name, box, _ in placed[spec.name] if name == "chair"])
    logs = np.log(sizes / kinds["chair"].size)
    np.testing.assert_allclose(sizes.mean(axis=0), kinds["chair"].size, rtol=0.05)
    np.testing.assert_allclose(logs.std(axis=0), 0.2, atol=0.025)
    np.testing.assert_allclose(logs.mean(axis=0), -0.02, atol=0.03)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_rooms_are_of_the_dataset_s_size(spec, rooms):
    sizes = np.array([room.size for room in rooms[spec.name]])
    low, high = sizes.min(axis=0), sizes.max(axis=0)
    least, most = ((3, 3, 2.7), (10, 12, 3.2)) if spec.name == "s3dis" else ((3, 3, 2.4), (8, 8, 3.0))
    assert (low >= least).all() and (high <= most).all()
    assert (low < np.array(least) + 0.15 * (np.array(most) - least)).all()
    assert (high > np.array(most) - 0.15 * (np.array(most) - least)).all()


def test_nothing_stands_in_the_cupboard_below_a_counter_or_right_before_a_door(rooms):
    kept_free = 0
    for room in rooms["scannet"]:
        names = [SCANNET.classes[label] if label >= 0 else "" for label in room.labels.tolist()]
        boxes = [tuple(box) for box in room.boxes.tolist()]
        for index, name in enumerate(names):
            x, y, z, depth, width, height, yaw = boxes[index]
            if name == "counter":
                top = z + height / 2
                room_below = (x, y, top / 2, depth, width, top, yaw)
            elif name == "door":
                room_below = (x + 0.2 * math.cos(yaw), y + 0.2 * math.sin(yaw), z, depth + 0.4, width, height, yaw)
            else:
                continue
            kept_free += 1
            assert not any(overlap(room_below, other, -1e-4) for other in boxes[:index] + boxes[index + 1 :])
    assert kept_free > 30


def test_free_space_is_measured_from_box_faces():
    room = furnish_room(programme(SUNRGBD, "demo"), SUNRGBD, np.random.default_rng(0))
    x, y, z, depth, _, _, yaw = room.boxes[0].tolist()
    assert not room.is_free(x, y, z, 0.01)
    alone = type(room)(room.size, room.shell_colors, room.solids, room.boxes[:1], room.labels[:1])
    beyond = depth / 2 + 0.3
    x, y = x + beyond * math.cos(yaw), y + beyond * math.sin(yaw)
    assert alone.is_free(x, y, z, 0.29) and not alone.is_free(x, y, z, 0.31)

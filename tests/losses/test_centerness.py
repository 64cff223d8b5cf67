import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from h2a2_jax.boxes import axis_aligned_iou, decode_faces, face_distances, rotated_iou
from h2a2_jax.losses import assign_by_centerness, centerness, centerness_loss, sigmoid_focal_loss

SCANS, LEVELS, CLASSES, GRID = 3, 4, 5, 0.25
assign = jax.jit(assign_by_centerness, static_argnames=("assign_threshold", "center_threshold"))


def transcribed(locations, scan, level, boxes, box_labels, assign_threshold, center_threshold):
    """The published rule in numpy, one scan and one box at a time."""
    labels, chosen, central = np.full(len(scan), -1), np.full(len(scan), -1), np.full(len(scan), -1, np.float32)
    smallest = np.full(len(scan), np.inf, np.float32)
    for s, g in np.argwhere(box_labels >= 0):
        rows, box = np.flatnonzero(scan == s), boxes[s, g]
        x, y, z = (locations[rows] - box[:3]).T
        cos, sin = np.cos(box[6]), np.sin(box[6])
        offset = np.stack([x * cos + y * sin, y * cos - x * sin, z], axis=1)
        low, high = box[3:6] / 2 + offset, box[3:6] / 2 - offset
        inside = (low > 0).all(axis=1) & (high > 0).all(axis=1)
        counts = np.bincount(level[rows][inside], minlength=LEVELS)
        few = np.flatnonzero(counts < assign_threshold)
        wanted = max(few[0] - 1, 0) if len(few) else LEVELS - 1
        ratio = np.minimum(low, high) / np.maximum(low, high)
        value = np.full(len(rows), -1, np.float32)
        asked = inside & (level[rows] == wanted)
        value[asked] = np.sqrt(ratio[asked, 0] * ratio[asked, 1] * ratio[asked, 2])
        edge = np.sort(value)[-min(center_threshold + 1, len(value))] if len(value) else 0
        volume = box[3] * box[4] * box[5]
        taken = rows[asked & (value > edge) & (volume < smallest[rows])]
        smallest[taken], labels[taken], chosen[taken] = volume, box_labels[s, g], g
        central[taken] = value[np.searchsorted(rows, taken)]
    return labels, chosen, central


def make_batch(seed=0, locations=(400, 150, 60, 20), boxes=6, padding=3, on_grid=False, scans=SCANS):
    """Locations, finest level first, in each scan by scan, padding behind each level; and boxes."""
    rng = np.random.default_rng(seed)
    scan = [np.append(np.sort(rng.integers(0, scans, n)), [scans] * padding) for n in locations]
    n = sum(map(len, scan))
    place = rng.integers(-8, 8, (n, 3)) * GRID if on_grid else rng.uniform(-2, 2, (n, 3))
    table = rng.uniform([-2, -2, -2, 0.4, 0.4, 0.4, -3], [2, 2, 2, 3, 3, 3, 3], (scans, boxes, 7))
    if on_grid:
        table = np.round(table / GRID) * GRID
        table[..., 6] = 0
    return {
        "locations": place.astype(np.float32),
        "scan": np.concatenate(scan).astype(np.int32),
        "level": np.repeat(np.arange(LEVELS), [len(part) for part in scan]).astype(np.int32),
        "boxes": table.astype(np.float32),
        "box_labels": rng.integers(-1, CLASSES, (scans, boxes)).astype(np.int32),
    }


def assert_assigned_as_transcribed(batch, **thresholds):
    found = assign(**batch, **thresholds)
    labels, box, central = transcribed(**batch, **thresholds)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.box, box)
    scan, of_box, slot = np.nonzero(found.positive)
    rows = np.asarray(found.candidates)[scan, of_box, slot]
    assert sorted(rows) == list(np.flatnonzero(labels >= 0))
    np.testing.assert_array_equal(box[rows], of_box)
    np.testing.assert_allclose(np.asarray(found.centerness)[scan, of_box, slot], central[rows], rtol=1e-6)
    return labels


@pytest.mark.parametrize("on_grid", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_assigns_by_the_published_rule(seed, on_grid):
    # On a grid centerness ties, among locations of a box and between boxes, and locations lie on faces.
    batch = make_batch(seed, on_grid=on_grid)
    labels = assert_assigned_as_transcribed(batch, assign_threshold=9, center_threshold=6)
    assert np.sum(labels >= 0) > 20


def test_of_equal_boxes_the_first_wins():
    batch = make_batch(1, on_grid=True)
    batch["boxes"][:, 1::2] = batch["boxes"][:, 0::2]
    batch["box_labels"][:] = np.arange(6) % CLASSES
    labels = assert_assigned_as_transcribed(batch, assign_threshold=9, center_threshold=6)
    assert set(labels[labels >= 0]) <= {0, 2, 4}


@pytest.mark.parametrize("counts", [(3, 2, 1, 0), (0, 6, 0, 0), (2, 2, 2, 1), (7, 0, 0, 0), (1, 0, 0, 0)])
def test_scans_of_few_locations(counts):
    # With no more than center_threshold locations in the scan, the least central of them all drops out.
    batch = make_batch(2, locations=counts, padding=2, scans=1)
    batch["locations"] *= 0.1
    batch["boxes"][:] = np.array([0, 0, 0, 3, 3, 3, 0]) * np.linspace(1, 0.5, 6)[:, None]
    batch["box_labels"][:] = np.arange(6) % CLASSES
    assert_assigned_as_transcribed(batch, assign_threshold=1, center_threshold=6)


def test_many_locations_of_one_scan_take_several_chunks():
    batch = make_batch(3, locations=(1500, 0, 700, 9), boxes=2, scans=1)
    batch["box_labels"][:] = 1
    batch["boxes"][0, 0, 3:6] = 4
    assert_assigned_as_transcribed(batch, assign_threshold=9, center_threshold=6)


def test_padding_of_locations_and_boxes_changes_no_target():
    batch, padded = (make_batch(4, padding=padding) for padding in (0, 40))
    is_location = padded["scan"] < SCANS
    for name in ("locations", "scan", "level"):
        padded[name][is_location] = batch[name]
    padded["locations"][~is_location] = np.nan
    padded["boxes"] = np.pad(batch["boxes"], ((0, 0), (0, 3), (0, 0)))
    padded["box_labels"] = np.pad(batch["box_labels"], ((0, 0), (0, 3)), constant_values=-1)
    expected, found = assign(**batch), assign(**padded)
    np.testing.assert_array_equal(np.asarray(found.labels)[is_location], expected.labels)
    np.testing.assert_array_equal(np.asarray(found.box)[is_location], expected.box)
    assert np.all(np.asarray(found.labels)[~is_location] == -1)


@pytest.mark.parametrize(("locations", "scans", "boxes"), [(0, 2, 3), (5, 2, 0), (5, 0, 0)])
def test_empty_batches_are_all_background(locations, scans, boxes):
    found = assign_by_centerness(
        np.zeros((locations, 3), np.float32),
        np.zeros(locations, np.int32),
        np.zeros(locations, np.int32),
        np.zeros((scans, boxes, 7), np.float32),
        np.zeros((scans, boxes), np.int32),
    )
    assert np.all(np.asarray(found.labels) == -1) and not np.any(found.positive)
    assert found.candidates.shape == found.centerness.shape == (scans, boxes, 18)


def test_centerness_of_a_box():
    box = np.array([1, 0, 0, 2, 4, 2, 0], np.float32)
    places = np.array([[1, 0, 0], [0.5, 1, 0], [0, 0, 0], [1, 0, 3]], np.float32)
    np.testing.assert_allclose(centerness(face_distances(places, box)), [1, 1 / 3, -1, -1], rtol=1e-6)


def with_outputs(batch, has_yaw, seed=0):
    rng, n = np.random.default_rng(seed), len(batch["scan"])
    return {
        **batch,
        "regression": np.concatenate([rng.uniform(0.1, 1.5, (n, 6)), rng.normal(0, 0.5, (n, 2))], 1).astype(np.float32),
        "logits": rng.normal(0, 2, (n, CLASSES)).astype(np.float32),
        "center_logits": rng.normal(0, 2, n).astype(np.float32),
        "class_mask": np.ones(CLASSES, bool),
        "has_yaw": np.asarray(has_yaw),
        "is_scan": np.ones(len(batch["boxes"]), bool),
    }


OUTPUTS = ("regression", "logits", "center_logits")


@jax.jit
def loss_and_gradient(batch):
    def total(outputs):
        loss = centerness_loss(**{**batch, **outputs}, assign_threshold=9, center_threshold=6)
        return loss.total, loss

    (_, loss), gradient = jax.value_and_grad(total, has_aux=True)({name: batch[name] for name in OUTPUTS})
    return loss, gradient


@pytest.mark.parametrize("has_yaw", [False, True])
def test_loss_is_the_mean_over_scans_of_the_published_terms(has_yaw):
    batch = with_outputs(make_batch(5), has_yaw)
    batch["box_labels"][1] = -1
    loss, _ = loss_and_gradient(batch)
    targets = assign(
        *(batch[name] for name in ("locations", "scan", "level", "boxes", "box_labels")),
        assign_threshold=9,
        center_threshold=6,
    )
    terms = np.zeros((SCANS, 3))
    for scan in range(SCANS):
        rows = np.flatnonzero(batch["scan"] == scan)
        found = rows[np.asarray(targets.labels)[rows] >= 0]
        focal = sigmoid_focal_loss(batch["logits"][rows], np.asarray(targets.labels)[rows])
        terms[scan, 0] = np.sum(focal) / max(len(found), 1)
        if scan == 1:
            assert len(found) == 0
            continue
        boxes = batch["boxes"][scan, np.asarray(targets.box)[found]]
        target = np.asarray(centerness(face_distances(batch["locations"][found], boxes)))
        logit = batch["center_logits"][found]
        terms[scan, 1] = np.mean(np.log1p(np.exp(-np.abs(logit))) + np.maximum(logit, 0) - target * logit)
        outputs = batch["regression"][found] if has_yaw else batch["regression"][found, :6]
        iou = (rotated_iou if has_yaw else axis_aligned_iou)(decode_faces(batch["locations"][found], outputs), boxes)
        terms[scan, 2] = np.sum(target * (1 - iou)) / np.sum(target)
    assert loss.num_positives == np.sum(np.asarray(targets.labels) >= 0) > 20
    found = [loss.classification, loss.centerness, loss.box]
    np.testing.assert_allclose(found, terms.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(loss.total, sum(found), rtol=1e-6)


def test_padding_contributes_neither_loss_nor_gradient():
    # Of one program: boxes with and without yaw in a batch padded in rows, boxes, classes, outputs and scans.
    for has_yaw in (False, True):
        batch = with_outputs(make_batch(6, padding=30), has_yaw)
        batch["box_labels"][:, 4:] = -1
        batch["is_scan"][2] = batch["class_mask"][4] = False
        batch["box_labels"] = np.minimum(batch["box_labels"], CLASSES - 2)
        expected, gradient = loss_and_gradient(batch)
        padding = (batch["scan"] >= 2)[:, None]
        other = {name: value.copy() for name, value in batch.items()}
        for name in OUTPUTS:
            other[name] = np.where(padding if batch[name].ndim == 2 else padding[:, 0], np.float32(1e3), batch[name])
        other["logits"][:, 4] = -1e3
        other["boxes"][:, 4:] = 0
        if not has_yaw:
            other["regression"][:, 6:] = 1e4
        loss, other_gradient = loss_and_gradient(other)
        np.testing.assert_array_equal(jax.tree.leaves(loss), jax.tree.leaves(expected))
        for name in OUTPUTS:
            np.testing.assert_array_equal(other_gradient[name], gradient[name])
            assert not np.any(gradient[name][batch["scan"] >= 2]) and np.any(gradient[name])
        assert not np.any(gradient["logits"][:, 4])
        assert has_yaw == bool(np.any(gradient["regression"][:, 6:]))


@pytest.mark.parametrize("has_yaw", [False, True])
def test_without_positives_only_classification_is_left(has_yaw):
    batch = with_outputs(make_batch(7), has_yaw)
    batch["box_labels"][:] = -1
    loss, gradient = loss_and_gradient(batch)
    assert loss.num_positives == 0 and loss.box == 0 and loss.centerness == 0 and loss.classification > 0
    assert not np.any(gradient["regression"]) and not np.any(gradient["center_logits"])
    assert np.all(np.isfinite(gradient["logits"]))


@pytest.mark.parametrize("has_yaw", [False, True])
def test_gradient_is_finite_without_angle_and_for_perfect_predictions(has_yaw):
    batch = with_outputs(make_batch(8), has_yaw)
    batch["boxes"][..., 6] = 0
    batch["boxes"][..., 3:6] = 2
    batch["regression"][:] = [1, 1, 1, 1, 1, 1, 0, 0]
    batch["locations"][:3] = batch["boxes"][0, :3, :3]
    loss, gradient = loss_and_gradient(batch)
    assert loss.num_positives > 0
    for value in (*jax.tree.leaves(loss), *gradient.values()):
        assert np.all(np.isfinite(value))


def test_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        batch = with_outputs(make_batch(9), True)
        batch = {name: v.astype(np.float64) if v.dtype == np.float32 else v for name, v in batch.items()}
        _, gradient = loss_and_gradient(batch)
        rng, step = np.random.default_rng(4), 1e-6
        for name in OUTPUTS:
            direction = rng.normal(size=batch[name].shape)
            up, down = (
                loss_and_gradient({**batch, name: batch[name] + sign * step * direction})[0].total for sign in (1, -1)
            )
            slope = (up - down) / (2 * step)
            np.testing.assert_allclose(np.sum(gradient[name] * direction), slope, rtol=1e-5)


def test_spread_over_replicas_losses_sum_to_the_whole():
    batch = with_outputs(make_batch(10, scans=4), True)
    whole, whole_gradient = loss_and_gradient(batch)
    # Scans 0 and 1 on one replica, 2 and 3 on the other; the rows of the other replica's scans are padding.
    split = {name: np.stack([batch[name]] * 2) for name in (*OUTPUTS, "locations", "level")}
    scan = batch["scan"]
    split["scan"] = np.stack([np.where(scan < 2, scan, 2), np.where((scan >= 2) & (scan < 4), scan - 2, 2)])
    split |= {name: batch[name].reshape(2, 2, *batch[name].shape[1:]) for name in ("boxes", "box_labels", "is_scan")}
    common = {name: batch[name] for name in ("class_mask", "has_yaw")}

    def replica(split):
        local = jax.tree.map(lambda x: x[0], split)

        def total(outputs):
            loss = centerness_loss(
                **{**local, **common, **outputs}, axis_name="replica", assign_threshold=9, center_threshold=6
            )
            return loss.total, loss

        (_, loss), gradient = jax.value_and_grad(total, has_aux=True)({name: local[name] for name in OUTPUTS})
        return jax.tree.map(lambda x: x[None], (loss, gradient))

    mesh = jax.make_mesh((2,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
    loss, gradient = jax.jit(jax.shard_map(replica, mesh=mesh, in_specs=P("replica"), out_specs=P("replica")))(split)
    np.testing.assert_array_equal(loss.num_positives, [whole.num_positives] * 2)
    for name in ("box", "classification", "centerness"):
        np.testing.assert_allclose(jnp.sum(getattr(loss, name)), getattr(whole, name), rtol=1e-5)
    for name, value in whole_gradient.items():
        np.testing.assert_allclose(jnp.sum(gradient[name], axis=0), value, atol=1e-7)

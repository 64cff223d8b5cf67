import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from h2a2_jax.boxes import decode_boxes
from h2a2_jax.losses import assign, axis_aligned_diou_loss, detection_loss, rotated_diou_loss, sigmoid_focal_loss

SCANS, CLASSES = 4, 5


def make_batch(seed=0, locations=240, boxes=3):
    rng = np.random.default_rng(seed)
    regression = rng.normal(0, 0.3, (locations, 8))
    regression[:, 3:6] = np.exp(regression[:, 3:6])
    return {
        "locations": rng.uniform(-2, 2, (locations, 3)).astype(np.float32),
        "scan": np.sort(rng.integers(0, SCANS, locations)).astype(np.int32),
        "level": rng.integers(0, 2, locations).astype(np.int32),
        "regression": regression.astype(np.float32),
        "logits": rng.normal(0, 2, (locations, CLASSES)).astype(np.float32),
        "boxes": rng.uniform([-2, -2, -2, 0.3, 0.3, 0.3, -3], [2, 2, 2, 2, 2, 2, 3], (SCANS, boxes, 7)).astype(
            np.float32
        ),
        "box_labels": rng.integers(-1, CLASSES, (SCANS, boxes)).astype(np.int32),
        "label_to_level": np.array([0, 1, 0, 1, 1], np.int32),
        "class_mask": np.ones(CLASSES, bool),
        "has_yaw": np.asarray(True),
    }


@jax.jit
def loss_and_gradient(batch):
    def total(outputs):
        loss = detection_loss(**{**batch, **outputs})
        return loss.total, loss

    outputs = {name: batch[name] for name in ("regression", "logits")}
    (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(outputs)
    return loss, gradient


@pytest.mark.parametrize("has_yaw", [False, True])
def test_equals_the_loss_over_all_locations(has_yaw):
    batch = {**make_batch(), "has_yaw": np.asarray(has_yaw)}
    loss, _ = loss_and_gradient(batch)
    targets = assign(*(batch[n] for n in ("locations", "scan", "level", "boxes", "box_labels", "label_to_level")))
    found = np.flatnonzero(targets.labels >= 0)
    outputs = batch["regression"][found] if has_yaw else batch["regression"][found, :6]
    predicted = decode_boxes(batch["locations"][found], outputs)
    pair_loss = rotated_diou_loss if has_yaw else axis_aligned_diou_loss
    expected = pair_loss(predicted, batch["boxes"][batch["scan"][found], np.asarray(targets.box)[found]])
    assert loss.num_positives == len(found) > 0
    np.testing.assert_allclose(loss.box, np.mean(expected), rtol=1e-5)
    focal = np.sum(sigmoid_focal_loss(batch["logits"], targets.labels)) / len(found)
    np.testing.assert_allclose(loss.classification, focal, rtol=1e-5)


@pytest.mark.parametrize("has_yaw", [False, True])
def test_padding_contributes_nothing(has_yaw):
    batch = {**make_batch(), "has_yaw": np.asarray(has_yaw)}
    if not has_yaw:
        batch["regression"][:, 6:] = 0
    loss, gradient = loss_and_gradient(batch)
    rows, junk = 60, 1e3

    def pad(name, width, value):
        return np.pad(batch[name], width, constant_values=value)

    padded = {
        **batch,
        "locations": pad("locations", ((0, rows), (0, 0)), 0),
        "scan": pad("scan", (0, rows), SCANS),
        "level": pad("level", (0, rows), 0),
        "regression": pad("regression", ((0, rows), (0, 0)), junk),
        "logits": pad("logits", ((0, rows), (0, 3)), junk),
        "boxes": pad("boxes", ((0, 0), (0, 2), (0, 0)), 0),
        "box_labels": pad("box_labels", ((0, 0), (0, 2)), -1),
        "label_to_level": pad("label_to_level", (0, 3), 0),
        "class_mask": pad("class_mask", (0, 3), False),
    }
    padded_loss, padded_gradient = loss_and_gradient(padded)
    np.testing.assert_allclose(jax.tree.leaves(padded_loss), jax.tree.leaves(loss), rtol=1e-6)
    for name, value in gradient.items():
        inside = padded_gradient[name][: len(value), : value.shape[1]]
        np.testing.assert_allclose(inside, value, atol=1e-6)
        assert not np.any(padded_gradient[name][len(value) :]) and not np.any(
            padded_gradient[name][:, value.shape[1] :]
        )


@pytest.mark.parametrize("has_yaw", [False, True])
@pytest.mark.parametrize("boxes", [0, 3])
def test_no_positive_is_no_box_loss_and_no_nan(has_yaw, boxes):
    batch = {**make_batch(boxes=boxes), "has_yaw": np.asarray(has_yaw)}
    batch["box_labels"][:] = -1
    batch["regression"][:] = 0
    loss, gradient = loss_and_gradient(batch)
    assert loss.num_positives == 0 and loss.box == 0
    assert np.isfinite(loss.classification) and loss.classification > 0
    assert not np.any(gradient["regression"])
    assert np.all(np.isfinite(gradient["logits"]))


@pytest.mark.parametrize("has_yaw", [False, True])
def test_gradient_is_finite_at_zero_angle_and_for_perfect_predictions(has_yaw):
    batch = {**make_batch(), "has_yaw": np.asarray(has_yaw)}
    batch["boxes"][..., 6] = 0
    batch["locations"][:3] = batch["boxes"][0, :, :3]
    batch["regression"][:] = [0, 0, 0, 1, 1, 1, 0, 0]
    batch["boxes"][..., 3:6] = 1
    loss, gradient = loss_and_gradient(batch)
    assert loss.num_positives > 0
    for value in (*jax.tree.leaves(loss), *gradient.values()):
        assert np.all(np.isfinite(value))


def test_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        batch = {name: v.astype(np.float64) if v.dtype == np.float32 else v for name, v in make_batch().items()}
        _, gradient = loss_and_gradient(batch)
        rng, step = np.random.default_rng(4), 1e-6
        for name in ("regression", "logits"):
            direction = rng.normal(size=batch[name].shape)
            up, down = (
                loss_and_gradient({**batch, name: batch[name] + sign * step * direction})[0].total for sign in (1, -1)
            )
            slope = (up - down) / (2 * step)
            np.testing.assert_allclose(np.sum(gradient[name] * direction), slope, rtol=1e-5)


def test_spread_over_replicas_losses_and_gradients_sum_to_the_whole():
    batch = make_batch()
    order = np.argsort(batch["scan"] % 2, kind="stable")
    for name in ("locations", "scan", "level", "regression", "logits"):
        batch[name] = batch[name][order]
    count = int(np.sum(batch["scan"] % 2 == 0))
    whole, whole_gradient = loss_and_gradient(batch)
    length = max(count, len(order) - count)

    def halve(rows, fill=0):
        parts = [rows[:count], rows[count:]]
        width = [(0, 0)] * (rows.ndim - 1)
        return np.stack([np.pad(part, [(0, length - len(part)), *width], constant_values=fill) for part in parts])

    split = {name: halve(batch[name]) for name in ("locations", "level", "regression", "logits")}
    split["scan"] = halve(np.where(batch["scan"] < SCANS, batch["scan"] // 2, 0), fill=SCANS // 2)
    split |= {name: np.stack([batch[name][0::2], batch[name][1::2]]) for name in ("boxes", "box_labels")}
    common = {name: batch[name] for name in ("label_to_level", "class_mask", "has_yaw")}

    def replica(split):
        local = jax.tree.map(lambda x: x[0], split)

        def total(outputs):
            loss = detection_loss(**{**local, **common, **outputs}, axis_name="replica")
            return loss.total, loss

        outputs = {name: local[name] for name in ("regression", "logits")}
        (_, loss), gradient = jax.value_and_grad(total, has_aux=True)(outputs)
        return jax.tree.map(lambda x: x[None], ((loss.box, loss.classification), loss.num_positives, gradient))

    mesh = jax.make_mesh((2,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
    terms, positives, gradient = jax.jit(
        jax.shard_map(replica, mesh=mesh, in_specs=P("replica"), out_specs=P("replica"))
    )(split)
    np.testing.assert_array_equal(positives, [whole.num_positives] * 2)
    np.testing.assert_allclose(jnp.sum(terms[0]), whole.box, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(terms[1]), whole.classification, rtol=1e-5)
    for name, value in whole_gradient.items():
        parts = np.concatenate([gradient[name][0][:count], gradient[name][1][: len(order) - count]])
        np.testing.assert_allclose(parts, value, atol=1e-6)

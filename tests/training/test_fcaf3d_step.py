"""FCAF3D in the joint step: six scans on 1, 3 and 6 devices give the same gradients, statistics and losses."""

from functools import cache

import jax
import numpy as np
import optax
import pytest

from h2a2_jax.balancers.ngh import norm_gradient_harmonization
from h2a2_jax.balancers.packing import unpack
from h2a2_jax.checkpoint.train_state import create_state, place_state
from h2a2_jax.distributed import train_mesh
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.training.step import make_train_step
from tests.models.scenes import FCAF3D_MODEL
from tests.training.configs import joint_config
from tests.training.test_step import (
    SCANS,
    UNEQUAL,
    assert_close,
    batch_for,
    double_detector,
    double_precision,  # noqa: F401 (a fixture that applies here too)
    named,
)

THRESHOLD = 0.9
DETECTOR = {
    name: getattr(FCAF3D_MODEL, name) for name in ("kind", "prune_threshold", "assign_threshold", "center_threshold")
}
OPTIMIZER = optax.adamw(1e-3, weight_decay=1e-4)


@cache
def after_a_step(devices, unequal=False):
    mesh = train_mesh(3, jax.devices()[:devices])
    balancer = norm_gradient_harmonization(3, THRESHOLD, axis_name="dataset")
    graph, state = create_state(double_detector(selection=None, **DETECTOR), OPTIMIZER, balancer, kind=lambda _: "any")
    step = make_train_step(graph, state, joint_config(SPECS), OPTIMIZER, balancer, mesh, keep_gradients=True)
    batch = batch_for(mesh, UNEQUAL if unequal else SCANS, model=FCAF3D_MODEL)
    return unpack(jax.device_get(step(place_state(state, mesh), batch)))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [3, 6])
@pytest.mark.parametrize("unequal", [False, True])
def test_devices_give_the_same_step(devices, unequal):
    (state, metrics), (one_state, one) = after_a_step(devices, unequal), after_a_step(1, unequal)
    for ours, theirs in zip(metrics.gradients, one.gradients, strict=True):
        assert_close(ours, theirs)
    for part in ("box_loss", "class_loss", "centerness_loss", "gradient_norm"):
        np.testing.assert_allclose(getattr(metrics, part), getattr(one, part), rtol=1e-6, err_msg=part)
    assert (metrics.num_positives == one.num_positives).all() and (one.num_positives > 0).sum() >= 2
    assert_close(state.stats, one_state.stats)
    assert (metrics.overflow == 0).all() and (one.overflow == 0).all()


def test_every_parameter_of_the_heads_learns_from_its_dataset():
    metrics = after_a_step(1)[1]
    gradients, has_boxes = named(metrics.gradients[1]), np.asarray(metrics.num_positives) > 0
    assert has_boxes[:2].all()
    for part in ("center_kernel", "box_kernel", "class_kernel", "class_bias", "scales"):
        (value,) = (value for name, value in gradients.items() if part in name)
        learns = np.abs(value).reshape(3, -1).max(1) > 0
        assert (learns == (has_boxes | part.startswith("class"))).all(), part
    (boxes,) = (value for name, value in gradients.items() if "box_kernel" in name)
    assert (boxes[0, :, 6:] == 0).all() and (boxes[1, :, 6:] != 0).any()  # ScanNet's have no yaw

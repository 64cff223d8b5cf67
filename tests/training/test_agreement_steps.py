"""Agreement over many training steps: the same on any devices, resumed to the bit, and with a way back."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.planted import (
    BASIC,
    DATASETS,
    Layer,
    Row,
    Settings,
    experiment,
    joint_batch,
    make_batch,
    plant,
    squared_error,
)  # fmt: skip
from h2a2_jax.balancers import build_balancer
from h2a2_jax.balancers.packing import pack_like, unpack
from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.checkpoint.train_state import create_state, place_state
from h2a2_jax.config import ExperimentConfig, SourceConfig, TrainConfig
from h2a2_jax.distributed import DATASET, train_mesh
from h2a2_jax.layers import SelectionConfig
from h2a2_jax.layers.agreement import FEWEST
from h2a2_jax.models import DetectorConfig
from h2a2_jax.optimizer import build_optimizer, learning_rate
from h2a2_jax.training.step import Sizes, make_train_step

SETTINGS = Settings(channels=3, sites=60, noise=0.1, steps=130)
SCANS, SEED = 6, 3
CONFIG = experiment(Row(BASIC), SCANS, 2, SEED, SETTINGS)
PLANTED = plant(SEED, SCANS, 1.0, SETTINGS)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@cache
def parts(devices: int) -> tuple[Any, Any, Any]:
    """Mesh, first state and compiled step."""
    model = Layer(BASIC, SETTINGS.channels, nnx.Rngs(SEED))
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(float), nnx.state(model)))
    optimizer = build_optimizer(
        CONFIG.optim, learning_rate(CONFIG.optim, steps_per_epoch=1, total_steps=SETTINGS.steps)
    )
    balancer = build_balancer(CONFIG.harmonize, len(DATASETS), DATASET, SEED)
    mesh = train_mesh(len(DATASETS), jax.devices()[:devices])
    graph, state = create_state(model, optimizer, balancer, kind=lambda name: name.rsplit(".", 1)[-1])
    step = make_train_step(graph, state, CONFIG, optimizer, balancer, mesh, scans=(SCANS,) * 3, objective=squared_error)
    return mesh, state, step


def batch_of(number: int, replicas: int) -> Any:
    """Two scans of each dataset, on one replica or one on each of two."""
    scans = [[of[(2 * number + i) % SCANS] for i in range(2)] for of in PLANTED.training]
    rows = 2 // replicas
    shards = [
        joint_batch([make_batch(chosen[r * rows : (r + 1) * rows], noisy=True) for chosen in scans])
        for r in range(replicas)
    ]
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *shards)
    return jax.tree.map(lambda leaf: leaf.astype(float) if leaf.dtype == np.float32 else leaf, batch)


def train(devices: int, first: int, last: int, state: Any = None) -> tuple[Any, np.ndarray]:
    """State after steps first .. last - 1, and gamma of each step [T, D, V]."""
    mesh, start, step = parts(devices)
    state, gamma = place_state(start, mesh) if state is None else state, []
    for number in range(first, last):
        state, metrics = step(state, batch_of(number, mesh.shape["replica"]))
        gamma.append(metrics.selection["layer"].gamma)
    return jax.device_get(state), np.stack(gamma)


@cache
def whole(devices: int) -> tuple[Any, np.ndarray]:
    return train(devices, 0, SETTINGS.steps)


def test_the_statistics_are_those_of_the_gradients_and_both_kernels_are_explored():
    state, gamma = whole(1)
    weight = state.agreement["27x3x3"].weight[:, 0]
    shared = (gamma == 1).sum(0)
    np.testing.assert_allclose(weight, 1 - 0.98**shared, rtol=1e-9)
    f = unpack(state.stats)["conv"]["disagreement"][...]
    assert (f == f[0]).all() and (f[0] != 1).all()
    # The datasets' kernels differ here, and F finds where.
    assert f[0][~PLANTED.is_shared].mean() > 2 * f[0][PLANTED.is_shared].mean()
    assert (gamma[:FEWEST].mean((0, 1)) > 0.8).all()
    late = gamma[FEWEST + 5 :]
    assert late[..., ~PLANTED.is_shared].mean() < 0.6 < late[..., PLANTED.is_shared].mean()
    # Offsets that part go on being measured.
    assert ((late == 1).any(0)).all()


@pytest.mark.parametrize("devices", [3, 6])
def test_all_devices_agree(devices: int):
    (ours, gamma), (theirs, expected) = whole(devices), whole(1)
    np.testing.assert_array_equal(gamma, expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def test_offsets_that_are_shared_have_equal_kernels_and_others_have_parted():
    state, _ = whole(1)
    f = np.asarray(unpack(state.stats)["conv"]["disagreement"][0])
    prior = np.asarray(unpack(state.shared)["conv"]["prior"][...])
    logit = prior + BASIC.agreement_sharpness * np.log(BASIC.agreement_threshold / f)
    shared = np.asarray(unpack(state.shared)["conv"]["shared"][...])
    exclusive = np.asarray(unpack(state.exclusive)["conv"]["exclusive"][...])
    follows = (exclusive == shared).all((-2, -1)).all(0)
    np.testing.assert_array_equal(follows, logit >= 0)
    assert 3 < follows.sum() < 24


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path):
    mesh, start, _ = parts(3)
    stopped, _ = train(3, 0, 60)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(60, unpack(stopped), CONFIG, DATASETS)
        store.wait()
        like = place_state(unpack(jax.device_get(start)), mesh)
        restored = store.restore_state(60, like, DATASETS)
    assert restored.agreement["27x3x3"].mean.shape == (3, 1, 27, 3, 3)
    state, _ = train(3, 60, SETTINGS.steps, place_state(pack_like(start, jax.device_get(restored)), mesh))
    jax.tree.map(np.testing.assert_array_equal, state, whole(3)[0])


def test_a_batch_that_is_not_finite_or_absent_is_not_observed():
    mesh, _, step = parts(1)
    before, _ = train(1, 0, 2)
    bad = batch_of(2, 1)
    bad.targets[1] = np.nan
    after, _ = step(place_state(before, mesh), bad)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.agreement), before.agreement)
    absent = batch_of(2, 1)
    absent.present[2] = False
    after = jax.device_get(step(place_state(before, mesh), absent)[0])
    moved = (after.agreement["27x3x3"].weight != before.agreement["27x3x3"].weight).any((1, 2))
    assert moved.tolist() == [True, True, False]


def test_a_way_back_offsets_whose_datasets_come_to_agree_are_shared_again():
    mesh, start, step = parts(1)
    state = place_state(start, mesh)
    agreeing = plant(SEED, SCANS, 0.0, SETTINGS)
    history = []
    for number in range(400):
        source = PLANTED if number < 130 else agreeing
        scans = [[of[(2 * number + i) % SCANS] for i in range(2)] for of in source.training]
        batch = joint_batch([make_batch(chosen, noisy=False) for chosen in scans])
        batch = jax.tree.map(lambda leaf: leaf.astype(float) if leaf.dtype == np.float32 else leaf, batch)
        state, metrics = step(state, batch)
        history.append(metrics.selection["layer"].alpha[0])
    alpha = np.asarray(jnp.stack(history))
    left = alpha[129] < 0.5
    assert left.sum() > 5
    assert (alpha[-1][left] > 0.5).mean() > 0.7


def test_an_augmented_scan_counts_for_several():
    sources = [SourceConfig("scannet", kind="synthetic", batch_size=2), SourceConfig("s3dis", kind="synthetic")]
    plain = replace(sources[1], augment=False)
    model = DetectorConfig(selection=SelectionConfig(agreement_views=3.0))
    config = ExperimentConfig((sources[0], plain), model=model, train=TrainConfig(batch_size=8))
    sizes = Sizes.of(config, (10, 20))
    assert sizes.batch.tolist() == [2, 8] and sizes.scans.tolist() == [30, 20]
    assert Sizes.of(config, None).scans.tolist() == [np.inf, np.inf]

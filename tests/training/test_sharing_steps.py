"""A step with prompts, adapters and exclusive kernels: the same on one device and, recomputing, on three."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks.planted import Batch, joint_batch, squared_error
from h2a2_jax.balancers.ngh import norm_gradient_harmonization
from h2a2_jax.checkpoint.train_state import create_state, place_state
from h2a2_jax.config import TrainConfig
from h2a2_jax.distributed import train_mesh
from h2a2_jax.layers import ForwardContext, PromptNorm, ResidualBlock
from h2a2_jax.layers.context import call_block
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.sparse import SparseTensor, pad_map, pad_sites, submanifold_neighbors
from h2a2_jax.training.step import make_train_step
from tests.sparse.transcription import random_sites
from tests.training.configs import joint_config
from tests.training.test_step import assert_close, named

CHANNELS = 4


class Blocks(nnx.Module):
    """A block with prompts and adapters, and one with exclusive kernels."""

    def __init__(self, rngs: nnx.Rngs):
        def block(kernels: Any) -> ResidualBlock:
            return ResidualBlock(
                CHANNELS, CHANNELS, kernels=kernels, num_datasets=3, rngs=rngs,
                norm=lambda channels, **options: PromptNorm(channels, embedding_dim=3, **options),
            )  # fmt: skip

        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (3, 3)), dataset_axis=0)
        self.blocks = nnx.List([block("adapted"), block("exclusive")])

    def __call__(self, batch: Batch, context: ForwardContext) -> jax.Array:
        assert context.dataset is not None
        context = replace(context, embedding=context.dataset.pick(self.embedding[...]))
        x = SparseTensor(batch.features, batch.kernel_map.inputs)
        for block in self.blocks:
            x = call_block(block, context, x, batch.kernel_map)
        return x.features


def scans_of(dataset: int) -> Batch:
    found, rng = random_sites((20 + dataset, 15), seed=dataset), np.random.default_rng(dataset)
    sites = pad_sites(found, 48)
    features, targets = rng.normal(size=(2, 48, CHANNELS)).astype(np.float32)
    keep = np.asarray(sites.valid)[:, None]
    kernel_map = pad_map(submanifold_neighbors(found, 3), sites, sites)
    return Batch(features * keep, kernel_map, targets * keep, np.ones((), bool))


def after_a_step(devices: int) -> Any:
    """State and metrics after a step from the same start."""
    model, rng = Blocks(nnx.Rngs(0)), np.random.default_rng(0)
    params = nnx.state(model, nnx.Param)
    # Nothing starts at zero.
    nnx.update(model, jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(p.dtype), params))
    mesh, optimizer = train_mesh(3, jax.devices()[:devices]), optax.sgd(0.1)
    balancer = norm_gradient_harmonization(3, 0.8, axis_name="dataset")
    graph, state = create_state(model, optimizer, balancer, kind=lambda _: "any")
    config = joint_config(SPECS, TrainConfig(rematerialize=devices > 1))
    step = make_train_step(
        graph, state, config, optimizer, balancer, mesh, keep_gradients=True, objective=squared_error
    )
    return jax.device_get(step(place_state(state, mesh), joint_batch([scans_of(d) for d in range(3)])))


def test_gradients_are_the_same_on_three_devices():
    (state, metrics), (one_state, one) = after_a_step(3), after_a_step(1)
    for ours, theirs in zip(metrics.gradients, one.gradients, strict=True):
        assert_close(ours, theirs)
    assert_close((state.stats, state.shared, state.exclusive), (one_state.stats, one_state.shared, one_state.exclusive))
    shared, own = map(named, one.gradients)
    assert all(value.any() for value in shared.values())
    assert sum("prompt" in name for name in shared) == 8
    assert sum("adapter" in name for name in own) == 2 and sum("kernel" in name for name in own) == 2
    for value in own.values():  # of each dataset
        assert np.abs(value.reshape(3, -1)).max(1).min() > 0

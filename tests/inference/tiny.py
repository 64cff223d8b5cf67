"""A tiny detector with random weights, and scans for it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from h2a2_jax.checkpoint.train_state import head_configs
from h2a2_jax.layers.kernel_selection import READING_0_1_0, SelectionConfig
from h2a2_jax.models import TR3D, DetectorConfig
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import S3DIS, SUNRGBD

SPECS = (SUNRGBD, S3DIS)
TINY = DetectorConfig(
    depth=10,
    stem_channels=4,
    stage_channels=(4, 4, 4, 4),
    neck_channels=4,
    selection=SelectionConfig(
        **READING_0_1_0,
        projection_dim=2,
        embedding_dim=4,
        hidden=4,
        exclusive_init="independent",
    ),
)


def room(name: str, points: int, extent: float) -> Scan:
    """Points on a floor and in a few heaps, with one box."""
    rng = np.random.default_rng(len(name) + points)
    floor = rng.random((points // 2, 3)) * (extent, extent, 0.02)
    heaps = rng.random((4, 3)) * (extent, extent, 1)
    heap = heaps[rng.integers(0, 4, points - points // 2)] + 0.2 * rng.standard_normal((points - points // 2, 3))
    xyz = np.concatenate([floor, heap]).astype(np.float32)
    box = np.array([[*heaps[0], 0.5, 0.5, 0.5, 0]], np.float32)
    return Scan(name, xyz, rng.random(xyz.shape, np.float32), box, np.zeros(1, np.int32))


def random_detector(config: DetectorConfig = TINY) -> TR3D:
    """Random weights that make scores differ."""
    shapes = nnx.eval_shape(lambda: TR3D(config, head_configs(SPECS, config), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        place = jax.tree_util.keystr(path)
        fan_in = np.prod(leaf.shape[-3:-1]) if leaf.ndim >= 3 and "heads" not in place else 16
        values = rng.standard_normal(leaf.shape) / fan_in**0.5
        if "class_bias" in place:
            values -= 2
        if "'scale'" in place or "'var'" in place:
            values = 0.5 + np.abs(values)
        return jnp.asarray(values.astype(leaf.dtype))

    graph, state = nnx.split(shapes)
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))

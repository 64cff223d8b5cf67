"""A tree of small parameters, gradients for it, and a mesh of devices that datasets are spread over."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from h2a2_jax.balancers.packing import Packing

SHAPES = {
    "backbone": {
        "stem": {"conv": {"kernel": (3, 50)}, "norm": {"scale": (7,), "bias": (7,)}},
        "stages": [{"conv": {"kernel": (4, 40)}, "gate": {"bias": ()}}, {"conv": {"kernel": (2, 3)}}],
    },
    "head": {"weight": (5, 3)},
}


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def random_tree(datasets: int, seed: int = 0) -> Any:
    """Gradients of the shapes, of lengths from .1 to 10."""
    random = np.random.default_rng(seed)
    lengths = 10 ** random.uniform(-1, 1, datasets)

    def draw(shape: tuple[int, ...]) -> jax.Array:
        values = random.normal(size=(datasets, *shape)) * lengths.reshape(-1, *[1] * len(shape))
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


PARAMETERS = jax.tree.map(lambda leaf: leaf[0], random_tree(1))
PACKING = Packing.of(PARAMETERS, lambda name: None if name.startswith("head") else name.rpartition(".")[2])


def mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("dataset",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

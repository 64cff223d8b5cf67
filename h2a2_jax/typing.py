"""Array types shared by the whole package."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""An array on the host or on a device."""

Leaf = Any
"""A data field of a pytree dataclass: an array in use, but anything at all while JAX maps over the tree."""


Schedule = Literal["step", "cosine", "constant"]
"""Of a learning rate."""


def static_field(**kwargs: Any) -> Any:
    """A field of a pytree dataclass that belongs to its structure: hashable, the same in every trace."""
    return dataclasses.field(metadata={"static": True}, **kwargs)

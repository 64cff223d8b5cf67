"""Array types shared by the whole package."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""An array on the host or on a device."""

Leaf = Any
"""Type of a data field of a pytree dataclass: an array in use, any object while JAX maps over the tree."""


Schedule = Literal["step", "cosine", "constant"]
"""Schedule of the learning rate."""


def static_field(**kwargs: Any) -> Any:
    """Declare a field that belongs to the structure of a pytree dataclass: hashable, equal in every trace."""
    return dataclasses.field(metadata={"static": True}, **kwargs)

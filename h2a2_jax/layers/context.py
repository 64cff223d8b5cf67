"""What a layer is told about the forward pass it is in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from h2a2_jax.sparse.conv import Algorithm
from h2a2_jax.typing import Leaf, static_field

AxisName = str | tuple[str, ...] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DatasetContext:
    """Which dataset's exclusive parameters and statistics a pass uses.

    Attributes:
        weights: float32 [D], one-hot for a dataset; 1/D each runs a scan of an unseen dataset on the mean of the
            embeddings, exclusive kernels and statistics.
        kernels: "selected" by each scan's structure, or "shared" everywhere (gamma = 1) (static).
    """

    weights: Leaf
    kernels: Literal["selected", "shared"] = static_field(default="selected")

    @classmethod
    def one(cls, dataset: int, num_datasets: int) -> "DatasetContext":
        """The context of one dataset."""
        return cls(jax.nn.one_hot(dataset, num_datasets))

    @classmethod
    def mean(cls, num_datasets: int, kernels: Literal["selected", "shared"] = "selected") -> "DatasetContext":
        """The mean of all datasets."""
        return cls(jnp.full(num_datasets, 1 / num_datasets), kernels)

    def pick(self, exclusive: Float[Array, "d *p"]) -> Float[Array, "*p"]:
        """The weighted sum over the leading dataset axis of exclusive values."""
        return jnp.tensordot(jnp.asarray(self.weights, exclusive.dtype), exclusive, 1)


@dataclass(frozen=True)
class ForwardContext:
    """How a forward pass runs; passed through a network unchanged.

    Attributes:
        dataset: whose parameters and statistics.
        embedding: float [d], that dataset's embedding, for layers with kernel selection.
        training: batch statistics instead of running ones, which are updated.
        axis_name: mesh axis over which one dataset's scans are spread (its replicas); batch statistics are summed over
            it.
        algorithm: of the sparse convolutions.
        dtype: compute type of the products, None for the features' own.
        precision: of the products.
        tap: called with (name, value) for every named intermediate value, to look inside; values are tracers under jit.
    """

    dataset: DatasetContext
    embedding: Float[Array, " d"] | None = None
    training: bool = False
    axis_name: AxisName = None
    algorithm: Algorithm = "auto"
    dtype: Any = None
    precision: Any = None
    tap: Callable[[str, Any], None] | None = None

    def record(self, name: str, value: Any) -> None:
        """Hand a named intermediate value to the tap, if there is one."""
        if self.tap is not None:
            self.tap(name, value)

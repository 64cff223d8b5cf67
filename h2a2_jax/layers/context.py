"""What a layer is told about the forward pass it is in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

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
        index: int32 [], the dataset of one-hot weights, whose values are then sliced and not summed; or None.
    """

    weights: Leaf
    kernels: Literal["selected", "shared"] = static_field(default="selected")
    index: Leaf = None

    @classmethod
    def one(cls, dataset: int | Int[Array, ""], num_datasets: int) -> "DatasetContext":
        """The context of one dataset."""
        return cls(jax.nn.one_hot(dataset, num_datasets), index=jnp.asarray(dataset, jnp.int32))

    @classmethod
    def mean(cls, num_datasets: int, kernels: Literal["selected", "shared"] = "selected") -> "DatasetContext":
        """The mean of all datasets."""
        return cls(jnp.full(num_datasets, 1 / num_datasets), kernels)

    def pick(self, exclusive: Float[Array, "d *p"]) -> Float[Array, "*p"]:
        """The dataset's own values of exclusive ones with a leading dataset axis, or their weighted sum.

        Raises:
            ValueError: the values are of another number of datasets.
        """
        count, own = len(exclusive), len(self.weights)
        if count != own:
            raise ValueError(f"parameters of {count} datasets, a context of {own}: give both the same num_datasets.")
        if count == 1:
            return exclusive[0]
        if self.index is not None:
            return lax.dynamic_index_in_dim(exclusive, self.index, keepdims=False)
        # In full precision: an accelerator would round the parameters.
        return jnp.tensordot(jnp.asarray(self.weights, exclusive.dtype), exclusive, 1, precision=lax.Precision.HIGHEST)


def parameter(value: Float[Array, "*p"], exclusive: bool) -> nnx.Param:
    """A parameter that datasets share, or one with a leading dataset axis, marked as such."""
    return nnx.Param(value, dataset_axis=0) if exclusive else nnx.Param(value)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["dataset", "embedding"],
    meta_fields=["training", "axis_name", "algorithm", "dtype", "precision", "rematerialize", "tap"],
)
@dataclass(frozen=True)
class ForwardContext:
    """How a forward pass runs; passed through a network unchanged.

    `ForwardContext(training=True)` is all that training on one dataset takes; a layer that is given none evaluates.

    Attributes:
        dataset: whose parameters and statistics; None in a network of one dataset, or for the mean of all.
        embedding: float [d], that dataset's embedding, for layers with kernel selection; [B, d] where scans have their
            own.
        training: batch statistics instead of running ones, which are updated.
        axis_name: mesh axis over which one dataset's scans are spread (its replicas); batch statistics are summed over
            it.
        algorithm: of the sparse convolutions.
        dtype: compute type of the products, None for the features' own. A detector casts its features to it where they
            enter, and every layer returns the type that it is given: with bfloat16 what is kept for the backward pass
            is bfloat16. Parameters, their gradients, sums, statistics, what selects kernels and predictions stay
            float32.
        precision: of the products.
        rematerialize: whether a detector that trains keeps no more than the inputs of its residual blocks and of the
            steps of its neck for the backward pass, which then runs each of them a second time: less memory, and near
            one more forward pass of time. Losses and gradients are the same.
        tap: called with (name, value) for every named intermediate value, to look inside; values are tracers under jit.
    """

    dataset: DatasetContext | None = None
    embedding: Leaf = None
    training: bool = False
    axis_name: AxisName = None
    algorithm: Algorithm = "auto"
    dtype: Any = None
    precision: Any = None
    rematerialize: bool = False
    tap: Callable[[str, Any], None] | None = None

    def dataset_of(self, num_datasets: int) -> DatasetContext:
        """The dataset of the pass for a layer that knows so many; without one their mean.

        Raises:
            ValueError: training needs to know which of several datasets the batch is from.
        """
        if self.dataset is not None:
            return self.dataset
        if self.training and num_datasets > 1:
            raise ValueError(
                f"a layer of {num_datasets} datasets trains on one at a time: give the context dataset="
                "DatasetContext.one(...)."
            )
        return DatasetContext.mean(num_datasets)

    def record(self, name: str, value: Any) -> None:
        """Hand a named intermediate value to the tap, if there is one."""
        if self.tap is not None:
            self.tap(name, value)

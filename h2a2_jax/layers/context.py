"""Settings of a forward pass: dataset, training or evaluation, algorithms, types, rematerialisation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from h2a2_jax.sparse.conv import Algorithm
from h2a2_jax.sparse.xla_cpu import recompute
from h2a2_jax.typing import Leaf, static_field

AxisName = str | tuple[str, ...] | None
"""Mesh axis or axes of a collective; None for one device."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DatasetContext:
    """The dataset whose exclusive parameters and statistics a pass uses, or the mean of all.

    Attributes:
        weights: float32 [D], one-hot for a dataset; 1/D each runs a scan of an unseen dataset on the mean of the
            embeddings, exclusive kernels and statistics.
        kernels: "selected" by each scan's structure, or "shared" everywhere (gamma = 1) (static).
        index: int32 [], the dataset of one-hot weights, whose values are then sliced instead of summed; or None.
    """

    weights: Leaf
    kernels: Literal["selected", "shared"] = static_field(default="selected")
    index: Leaf = None

    @classmethod
    def one(cls, dataset: int | Int[Array, ""], num_datasets: int) -> "DatasetContext":
        """The context of one dataset.

        Raises:
            ValueError: there is no such dataset.
        """
        if not isinstance(dataset, jax.Array) and not 0 <= dataset < num_datasets:
            raise ValueError(f"dataset is {dataset}; expected one of 0..{num_datasets - 1}.")
        return cls(jax.nn.one_hot(dataset, num_datasets), index=jnp.asarray(dataset, jnp.int32))

    @classmethod
    def mean(cls, num_datasets: int, kernels: Literal["selected", "shared"] = "selected") -> "DatasetContext":
        """The mean of all datasets."""
        return cls(jnp.full(num_datasets, 1 / num_datasets), kernels)

    def pick(self, exclusive: Float[Array, "d *p"]) -> Float[Array, "*p"]:
        """The dataset's values among exclusive ones with a leading dataset axis, or the weighted sum of all.

        Raises:
            ValueError: the values are of another number of datasets.
        """
        count, known = len(exclusive), len(self.weights)
        if count != known:
            raise ValueError(f"parameters of {count} datasets, a context of {known}: give both the same num_datasets.")
        if count == 1:
            return exclusive[0]
        if self.index is not None:
            return lax.dynamic_index_in_dim(exclusive, self.index, keepdims=False)
        # In full precision: an accelerator would round the parameters.
        return jnp.tensordot(jnp.asarray(self.weights, exclusive.dtype), exclusive, 1, precision=lax.Precision.HIGHEST)


def parameter(value: Float[Array, "*p"], exclusive: bool) -> nnx.Param:
    """A parameter that datasets share, or one with a leading dataset axis, marked as such."""
    return nnx.Param(value, dataset_axis=0) if exclusive else nnx.Param(value)


Initializer = Callable[[PRNGKeyArray, tuple[int, ...], Any], Array]
"""Initial values of a parameter, init(key, shape, dtype), as those of `jax.nn.initializers`."""


def draw(init: Initializer, rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any, datasets: int | None = None) -> Array:
    """Initial values of one parameter; for each of several datasets drawn apart, [D, *shape].

    Drawn apart, because an initialiser would count the axis of datasets as part of a kernel's receptive field.
    """
    if datasets is None:
        return init(rngs.params(), shape, dtype)
    return jnp.stack([init(key, shape, dtype) for key in jax.random.split(rngs.params(), datasets)])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["dataset", "embedding", "step"],
    meta_fields=["training", "axis_name", "algorithm", "dtype", "precision", "rematerialize", "tap"],
)
@dataclass(frozen=True)
class ForwardContext:
    """Settings of a forward pass, passed through a network unchanged.

    `ForwardContext(training=True)` is all that training on one dataset takes. A layer without a context does as
    `model.train()` and `model.eval()` have set it, and evaluates where neither was called. `docs/layers.md` trains with
    it.

    Attributes:
        dataset: dataset whose parameters and statistics are used; None in a network of one dataset, or for the mean of
            all.
        embedding: float [d], embedding of the dataset, for layers with kernel selection; [B, d] for one per scan.
        step: int32 [], number of the training step, with which kernel selection explores both kernels of an offset;
            None for the choices of prediction.
        training: if True, batch norms use the statistics of the batch instead of the running ones, and update these; if
            False, they use the running ones; None leaves it to each layer's `use_running_average`.
        axis_name: mesh axis over which one dataset's scans are spread (its replicas); batch statistics are summed over
            it.
        algorithm: algorithm of the sparse convolutions (`sparse.convolve`).
        dtype: compute type of the products, None for that of the features. A detector casts its features to it where
            they enter, and every layer returns the type of its input: with bfloat16, the values kept for the backward
            pass are bfloat16. Parameters, their gradients, sums, statistics, the choice of kernels and predictions stay
            float32.
        precision: precision of the products, as in `jax.lax.dot_general`.
        rematerialize: if True, a detector that trains keeps no more than the inputs of its residual blocks and of the
            steps of its neck for the backward pass, which then runs each of them a second time: less memory, and near
            one more forward pass of time. Losses and gradients are the same.
        tap: called with (name, value) for every named intermediate value, to look inside; values are tracers under jit.
    """

    dataset: DatasetContext | None = None
    embedding: Leaf = None
    step: Leaf = None
    training: bool | None = None
    axis_name: AxisName = None
    algorithm: Algorithm = "auto"
    dtype: Any = None
    precision: Any = None
    rematerialize: bool = False
    tap: Callable[[str, Any], None] | None = None

    def dataset_of(self, num_datasets: int) -> DatasetContext:
        """The dataset of the pass, for a layer of `num_datasets` datasets; the mean of all if the context names none.

        Raises:
            ValueError: training on several datasets, and the context names none.
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


def is_training(module: nnx.Module, context: ForwardContext | None) -> bool:
    """Return True if a pass trains a module: as the context says, else if one of its layers is set to train."""
    if context is not None and context.training is not None:
        return context.training
    return any(not getattr(part, "use_running_average", True) for _, part in nnx.iter_modules(module))


def call_block(block: nnx.Module, context: ForwardContext | None, *arguments: Any, **options: Any) -> Any:
    """Call block(*arguments, context=context, **options); recompute it for the gradient in training, if asked.

    The block's batch statistics are updated, and the context's tap sees what the block records, once in either case.

    Args:
        block: module whose call takes pytrees of arrays and a `context`, and returns a pytree.
        context: context of the pass.
        arguments: positional arguments of the block.
        options: keyword arguments of the block.
    """
    call: Callable[..., Any] = block  # type: ignore[assignment]
    if context is None or not (context.rematerialize and is_training(block, context)):
        return call(*arguments, context=context, **options)
    graph, params, stats = nnx.split(block, nnx.Param, ...)  # type: ignore[misc]
    names: list[str] = []

    def run(params: nnx.State, stats: nnx.State, inner: ForwardContext, arguments: Sequence, options: dict) -> tuple:
        recorded: list[tuple[str, Any]] = []
        tap = None if context.tap is None else lambda name, value: recorded.append((name, value))
        copy = nnx.merge(graph, params, stats, copy=True)
        out = copy(*arguments, context=replace(inner, tap=tap), **options)
        names[:] = [name for name, _ in recorded]
        return out, [value for _, value in recorded], nnx.state(copy, nnx.Not(nnx.Param))

    out, values, stats = recompute(run, params, stats, replace(context, tap=None), arguments, options)
    nnx.update(block, stats)
    for name, value in zip(names, values, strict=True):
        context.record(name, value)
    return out

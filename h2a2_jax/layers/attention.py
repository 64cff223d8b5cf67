"""Attention of each site over the neighbours that a kernel map brings it."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from h2a2_jax.layers.checks import check_channels, check_context, check_input, check_tensor
from h2a2_jax.layers.context import ForwardContext, Initializer
from h2a2_jax.layers.sparse_conv import SparseConv, output_sites, size_per_axis
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.sites import PerAxis, SparseTensor, check_same_sites
from h2a2_jax.sparse.xla_cpu import zeros_varying_as


def masked_softmax(scores: Float[Array, "v n h"], exists: Bool[Array, "v n"]) -> Float[Array, "v n h"]:
    """Softmax over the first axis, over those that exist; zero where none does."""
    mask = exists[:, :, None]
    most = lax.stop_gradient(jnp.where(mask, scores, -jnp.inf).max(0))
    powers = jnp.where(mask, jnp.exp(jnp.where(mask, scores - most, 0)), 0)
    return powers / jnp.where(exists.any(0)[:, None], powers.sum(0), 1)


def attend(
    queries: Float[Array, "n_out h d"],
    keys: Float[Array, "n_in h d"],
    values: Float[Array, "n_in h d"],
    position: Float[Array, "v h"],
    kernel_map: KernelMap,
) -> Float[Array, "n_out h d"]:
    """Mean of the neighbours' values, weighted by softmax_k(q . k / sqrt(d) + position_k).

    Two passes over the offsets, one for the weights [V, N_out, H] and one for the sum: no array holds the neighbours'
    features of all offsets, in the derivatives neither.

    Args:
        queries: rows of the output sites, by head.
        keys: rows of the input sites; those of padding are never read.
        values: rows of the input sites.
        position: bias of each offset and head.
        kernel_map: map of any kind.

    Returns:
        Rows of the output sites; zero where a site has no neighbour, and on padding.
    """
    neighbors = jnp.asarray(kernel_map.neighbors)
    exists = neighbors < kernel_map.in_capacity

    def rows_of(rows: Array, neighbor: Array) -> Array:
        return rows.at[neighbor].get(mode="fill", fill_value=0)

    @jax.checkpoint
    def score(neighbor: Array, bias: Array) -> Array:
        return (queries * rows_of(keys, neighbor)).sum(-1) / math.sqrt(queries.shape[-1]) + bias

    @jax.checkpoint
    def weigh(neighbor: Array, weights: Array) -> Array:
        return weights[..., None] * rows_of(values, neighbor)

    scores = lax.map(lambda offset: score(*offset), (neighbors, position))
    weights = masked_softmax(scores, exists)
    zeros = zeros_varying_as(queries.shape, values.dtype, (weights, values))
    return lax.scan(lambda total, offset: (total + weigh(*offset), None), zeros, (neighbors, weights))[0]


class NeighborAttention(nnx.Module):
    """Multi-head attention over the neighbours of a map: of each output site over the input sites under the kernel.

    On a submanifold map a site attends to the sites around it, itself included; with `queries` on the coarse sites of a
    strided map it is a pooling by attention. The keys have no bias: it would cancel in the softmax.

    Attributes:
        query: projection [C, C] of the output sites' features.
        key: projection of the input sites' features.
        value: projection of the input sites' features.
        out: projection of the heads' outputs.
        position: [V, H], bias of each offset and head, zero at first.
        kernel_size: size of the kernel along each axis.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 4,
        kernel_size: PerAxis = 3,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        """Build the projections.

        Args:
            channels: channels C of inputs and output.
            num_heads: number H of heads; divides C.
            kernel_size: size of the kernel, that of the map; for the map of K neighbours of any kind, (K, 1, 1).
            use_bias: if True, queries, values and output have a bias.
            dtype: compute type of the projections; None for that of the context, else that of the features. Scores,
                softmax and sums are at least float32.
            param_dtype: type of the parameters.
            precision: precision of the projections; None for that of the context.
            kernel_init: function of (key, shape, dtype) for the projections, [1, C, C]; None for normal
                values of variance 1 / C.
            bias_init: the same for the biases, [C]; None for zeros.
            rngs: random streams.

        Raises:
            ValueError: the heads do not divide the channels.
        """
        if channels % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide {channels} channels; give a divisor.")
        self.num_heads, self.kernel_size = num_heads, size_per_axis(kernel_size)
        project = partial(
            SparseConv, channels, channels, 1, dtype=dtype, param_dtype=param_dtype, precision=precision,
            kernel_init=kernel_init or nnx.initializers.lecun_normal(), bias_init=bias_init, rngs=rngs,
        )  # fmt: skip
        self.query, self.key = project(use_bias=use_bias), project()
        self.value, self.out = project(use_bias=use_bias), project(use_bias=use_bias)
        self.position = nnx.Param(jnp.zeros((math.prod(self.kernel_size), num_heads), param_dtype))

    def __call__(
        self,
        x: SparseTensor,
        kernel_map: KernelMap,
        context: ForwardContext | None = None,
        *,
        queries: SparseTensor | None = None,
    ) -> SparseTensor:
        """Attend to the neighbours.

        Args:
            x: features [N_in, C] on the map's input sites.
            kernel_map: map with as many offsets as the kernel.
            context: context of the pass: compute type and precision where the layer has none.
            queries: features [N_out, C] on the map's output sites; None where these are the input sites, for x.

        Returns:
            Features [N_out, C] on the map's output sites, in the type of x; zero where a site has no neighbour.

        Raises:
            ValueError: map or queries do not fit, or an argument is of another kind.
        """
        name, channels = type(self).__name__, self.query.kernel.shape[-1]
        check_context(name, context)
        check_input(name, x, kernel_map, (len(self.position), channels, channels), self.kernel_size)
        if queries is None:
            check_same_sites(f"{name} was given no queries, and a map", kernel_map.inputs, kernel_map.outputs)
            queries = x
        else:
            check_tensor(name, queries)
            check_channels(name, queries, channels)
            check_same_sites(f"{name} was given queries and a map", queries.sites, kernel_map.outputs)
        wide = jnp.promote_types(x.features.dtype, jnp.float32)

        def heads(projection: SparseConv, rows: SparseTensor) -> Array:
            y = projection(rows, None, context).features
            return y.reshape(len(y), self.num_heads, -1).astype(wide)

        y = attend(
            heads(self.query, queries), heads(self.key, x), heads(self.value, x), self.position[...].astype(wide),
            kernel_map,
        )  # fmt: skip
        sites = output_sites(x, kernel_map)
        out = self.out(SparseTensor(y.reshape(len(y), channels).astype(x.features.dtype), sites), None, context)
        reached = (jnp.asarray(kernel_map.neighbors) < kernel_map.in_capacity).any(0)
        return out.with_features(jnp.where(reached[:, None], out.features, 0))

"""Structure-aware kernel selection (SF-KS, H²A²): per kernel offset a shared kernel or the dataset's own.

    alpha   = sigmoid(O)                                     offset validity prior
    beta_j  = (1 + mean_n cos(A x_n, P_j)) / 2               structural consistency posterior of a scan
    gamma_j = 1[alpha_j * beta_j >= tau]                     straight-through gradient
    W_j     = gamma_j W_shared_j + (1 - gamma_j) W_exclusive_j

The functions are the method; the module holds the parameters and calls them.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from h2a2_jax.layers.context import ForwardContext
from h2a2_jax.layers.conv import check_input, kaiming_fan_out
from h2a2_jax.layers.modulation import LinearModulation
from h2a2_jax.sparse.conv import convolve
from h2a2_jax.sparse.grid import Size3, size3
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.pool import global_pool
from h2a2_jax.sparse.tensor import SparseTensor


@dataclass(frozen=True)
class KernelSelection:
    """How kernels are selected; each field is a point that the paper leaves open.

    Attributes:
        tau: threshold of alpha * beta. At 0.25 with O = 0 near half the offsets start on each side, so both kernels
            train.
        prior_init: O at the start.
        consistency: "half_cosine" (1 + cos) / 2, or "relu_cosine" max(cos, 0).
        straight_through: gradient of the binarisation: "sigmoid", that of sigmoid((alpha * beta - tau) / temperature),
            or "identity".
        temperature: of that sigmoid.
        projection_dim: width of the structural features A x.
        exclusive_init: "independent" of the shared kernel, or a "copy" of it.
        embedding_dim: width of a dataset's embedding.
        hidden: width of the MLPs of modulation and gate.
    """

    tau: float = 0.25
    prior_init: float = 0.0
    consistency: Literal["half_cosine", "relu_cosine"] = "half_cosine"
    straight_through: Literal["sigmoid", "identity"] = "sigmoid"
    temperature: float = 0.1
    projection_dim: int = 32
    exclusive_init: Literal["independent", "copy"] = "independent"
    embedding_dim: int = 64
    hidden: int = 64


def unit_rows(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Rows over their length; zero rows stay zero, with a zero gradient in place of 0/0."""
    return x * lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def structural_consistency(
    x: SparseTensor,
    projection: Float[Array, "c p"],
    prototypes: Float[Array, "v p"],
    kind: Literal["half_cosine", "relu_cosine"] = "half_cosine",
) -> Float[Array, "b v"]:
    """beta: how well each offset's prototype agrees with a scan's structural features, in [0, 1].

    The mean over sites commutes with the dot product: the unit vectors A x / |A x| are pooled once per scan, then
    compared with each unit prototype. In float32 at least, products included: accelerators multiply in fewer bits by
    default, and a threshold follows.
    """
    features = x.features.astype(jnp.promote_types(x.features.dtype, jnp.float32))
    exact = lax.Precision.HIGHEST
    pooled = global_pool(x.with_features(unit_rows(jnp.matmul(features, projection, precision=exact))))
    cosine = jnp.matmul(pooled, unit_rows(prototypes).T, precision=exact)
    return (1 + cosine) / 2 if kind == "half_cosine" else jax.nn.relu(cosine)


def binarize(
    score: Float[Array, "*s"],
    tau: float,
    straight_through: Literal["sigmoid", "identity"] = "sigmoid",
    temperature: float = 0.1,
) -> Float[Array, "*s"]:
    """1 where score >= tau, else 0; the gradient is that of a smooth surrogate of the step."""
    surrogate = jax.nn.sigmoid((score - tau) / temperature) if straight_through == "sigmoid" else score
    # In brackets, for (1 + s) - s is not always 1.
    return (score >= tau).astype(score.dtype) + (surrogate - lax.stop_gradient(surrogate))


class SelectiveConv(nnx.Module):
    """Sparse convolution with TLM on its input and a kernel selected per scan and offset.

    Attributes:
        shared: [V, Cin, Cout].
        exclusive: [D, V, Cin, Cout], exclusive to each dataset.
        prior: O, [V].
        projection: A, [Cin, p].
        prototypes: P, [V, p].
        modulation: TLM.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size3 = 3,
        *,
        num_datasets: int = 1,
        selection: KernelSelection | None = None,
        name: str = "selective_conv",
        rngs: nnx.Rngs,
    ):
        """Args: `name` under which gamma, alpha and beta are handed to the tap of a forward pass."""
        self.selection = selection or KernelSelection()
        self.name = name
        s, volume = self.selection, math.prod(size3(kernel_size))
        kernel = (volume, in_channels, out_channels)
        self.shared = nnx.Param(kaiming_fan_out(rngs.params(), kernel))
        own = (
            jnp.broadcast_to(self.shared[...], (num_datasets, *kernel))
            if s.exclusive_init == "copy"
            else kaiming_fan_out(rngs.params(), (num_datasets, *kernel))
        )
        self.exclusive = nnx.Param(own, dataset_axis=0)
        self.prior = nnx.Param(jnp.full(volume, s.prior_init, jnp.float32))
        projection = jax.random.normal(rngs.params(), (in_channels, s.projection_dim))
        self.projection = nnx.Param(projection / in_channels**0.5)
        self.prototypes = nnx.Param(jax.random.normal(rngs.params(), (volume, s.projection_dim)))
        self.modulation = LinearModulation(in_channels, embedding_dim=s.embedding_dim, hidden=s.hidden, rngs=rngs)

    def __call__(self, x: SparseTensor, kernel_map: KernelMap, context: ForwardContext | None = None) -> SparseTensor:
        """Convolve onto the map's output sites.

        Args:
            x: on the map's input sites.
            kernel_map: with as many offsets as the kernel has slices.
            context: must carry the dataset's embedding, and the dataset where there are several.

        Raises:
            ValueError: the context has no embedding, or no dataset in training; the map does not fit.
        """
        if context is None or context.embedding is None:
            raise ValueError("kernel selection needs context.embedding, the embedding [d] of the dataset.")
        check_input(self.name, x, kernel_map, self.shared.shape)
        dataset = context.dataset_of(self.exclusive.shape[0])
        x = self.modulation(x, context.embedding)
        gamma = self.select(x, context)
        if dataset.kernels == "shared":
            kernels, chosen = self.shared[...][None], {}
        else:
            kernels = jnp.stack([self.shared[...], dataset.pick(self.exclusive[...])])
            chosen = {"gamma": gamma, "scan_set": jnp.ones(gamma.shape[0], jnp.int32)}
        y = convolve(
            x.features,
            kernels,
            kernel_map,
            algorithm=context.algorithm,
            dtype=context.dtype,
            precision=context.precision,
            **chosen,
        )
        return SparseTensor(y, kernel_map.outputs)

    def select(self, x: SparseTensor, context: ForwardContext) -> Float[Array, "b v"]:
        """Returns gamma of each scan and offset for modulated input x."""
        s = self.selection
        alpha = jax.nn.sigmoid(self.prior[...])
        beta = structural_consistency(x, self.projection[...], self.prototypes[...], s.consistency)
        gamma = binarize(alpha * beta, s.tau, s.straight_through, s.temperature)
        if context.dataset is not None and context.dataset.kernels == "shared":
            gamma = jnp.ones_like(gamma)
        for part, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            context.record(f"{self.name}.{part}", value)
        return gamma

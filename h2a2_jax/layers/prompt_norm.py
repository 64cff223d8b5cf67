"""Prompt-driven normalisation: batch norm whose scale and shift follow from the dataset's embedding.

    s, t = W silu(E_k) + b                           E_k: embedding of dataset k, exclusive; W, b: shared
    y    = (1 + s) * BN_k(x) + t                     BN_k: statistics of dataset k, one scale and bias for all

PDNorm of Point Prompt Training (Wu et al., "Towards Large-scale 3D Representation Learning with Multi-dataset Point
Prompt Training", CVPR 2024). There each dataset has a norm of its own, with a scale and a bias, in front of the map,
and the prompt is 256 wide. Here the norms of the datasets differ by their statistics alone, so that all that tells
datasets apart behind them comes from the prompt; `BatchNorm(exclusive_affine=True)` is the other half of PDNorm. W and
b start at zero here, which the authors' code has as an option.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from h2a2_jax.layers.checks import check_context
from h2a2_jax.layers.context import DatasetContext, ForwardContext, Initializer
from h2a2_jax.layers.modulation import modulate
from h2a2_jax.layers.norm import BatchNorm
from h2a2_jax.sparse.sites import SparseTensor


class PromptNorm(BatchNorm):
    """Batch norm with a scale and a shift that a linear map reads from the dataset's embedding; starts as `BatchNorm`.

    Attributes:
        prompt: the map W [d, 2 C] and b [2 C] of silu(embedding) to (s, t), which datasets share.
    """

    def __init__(
        self,
        channels: int,
        *,
        embedding_dim: int = 64,
        num_datasets: int = 1,
        eps: float = 1e-5,
        momentum: float = 0.9,
        shared_statistics: bool = False,
        use_running_average: bool = True,
        param_dtype: Any = jnp.float32,
        scale_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Build a batch norm with a shared scale and bias, and the map, which starts at zero.

        Args:
            channels: number C of channels.
            embedding_dim: width d of the embedding.
            num_datasets: number D of datasets.
            eps: added to variances.
            momentum: weight of the old running statistics, as in `BatchNorm`.
            shared_statistics: if True, every batch enters the running statistics of all datasets.
            use_running_average: if False, the layer trains where no context says otherwise.
            param_dtype: type of scale and bias, and of the map.
            scale_init: as in `BatchNorm`.
            bias_init: the same for the bias.
            rngs: random streams; read by `scale_init` and `bias_init` alone.

        Raises:
            ValueError: as `BatchNorm`.
        """
        super().__init__(
            channels, num_datasets=num_datasets, eps=eps, momentum=momentum, shared_statistics=shared_statistics,
            use_running_average=use_running_average, param_dtype=param_dtype, scale_init=scale_init,
            bias_init=bias_init, rngs=rngs,
        )  # fmt: skip
        zeros = nnx.initializers.zeros_init()
        # With random streams of its own, which it does not read: all other layers start as without prompts.
        self.prompt = nnx.Linear(
            embedding_dim, 2 * channels, kernel_init=zeros, bias_init=zeros, param_dtype=param_dtype, rngs=nnx.Rngs(0)
        )

    def factors(self, embedding: Float[Array, "*b d"]) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"]]:
        """1 + s and t of an embedding, or of one per scan."""
        s, t = jnp.split(self.prompt(jax.nn.silu(embedding)), 2, axis=-1)
        return 1 + s, t

    def affine(
        self, dataset: DatasetContext, embedding: Float[Array, "*b d"] | None = None
    ) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """Scale and bias of an embedding [d]; those in front of the prompt without one, or with one per scan."""
        scale, bias = super().affine(dataset)
        if embedding is None or embedding.ndim > 1:
            return scale, bias
        factor, shift = self.factors(embedding)
        return scale * factor, bias * factor + shift

    def __call__(self, x: SparseTensor, context: ForwardContext | None = None) -> SparseTensor:
        """Normalise as `BatchNorm`, then scale and shift by the prompt.

        Args:
            x: features [N, C] and sites.
            context: context of the pass, with the dataset's embedding [d], or one per scan [B, d].

        Raises:
            ValueError: the context has no embedding, or one of another width; or as `BatchNorm`.
        """
        check_context("PromptNorm", context)
        if context is None or context.embedding is None:
            raise ValueError("PromptNorm needs context.embedding, the embedding [d] of the dataset.")
        width, expected = context.embedding.shape[-1], self.prompt.in_features
        if width != expected:
            raise ValueError(
                f"PromptNorm takes embeddings of {expected} numbers, given {width}: build it with "
                f"embedding_dim={width}."
            )
        y = super().__call__(x, context)
        return y if context.embedding.ndim == 1 else modulate(y, *self.factors(context.embedding))

"""MinkResNet: the residual backbone on sparse voxels (TR3D, FCAF3D)."""

from dataclasses import replace
from functools import partial
from typing import Any

from flax import nnx

from h2a2_jax.layers import (
    ConvNorm,
    EmbeddingMLP,
    ForwardContext,
    InstanceNorm,
    ResidualBlock,
    SparseConv,
    global_pool,
    relu,
)
from h2a2_jax.layers.context import call_block
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.maps import BackbonePlan
from h2a2_jax.sparse import SparseTensor, max_pool


class Stem(ConvNorm):
    """3^3 stride-2 convolution, norm, ReLU, 2^3 max pool: 1 -> 4 voxels."""

    def __init__(self, config: DetectorConfig, num_datasets: int, *, rngs: nnx.Rngs):
        """Build the stem with the widths of the config."""
        exclusive_to = num_datasets if config.kernels_in(0) == "exclusive" else None
        super().__init__(
            config.in_channels, config.stem_channels, conv=partial(SparseConv, exclusive_to=exclusive_to),
            norm=config.norm_in(0), selection=config.selection_in("stem"), num_datasets=num_datasets, name="stem",
            rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: SparseTensor, plan: BackbonePlan, context: ForwardContext) -> SparseTensor:  # type: ignore[override]
        """Features on voxels of stride 1 to features on sites of stride 4."""
        y = self.conv(x, plan.stem, context)
        context.record("conv1", y)
        return _pool(self.normalize(y, context), plan, context)


class InstanceStem(nnx.Module):
    """The stem of FCAF3D: `Stem` with instance norm in place of batch norm; all datasets share it.

    Attributes:
        conv: 3^3 stride-2 convolution.
        norm: instance norm, each scan over its own sites.
    """

    def __init__(self, config: DetectorConfig, *, rngs: nnx.Rngs):
        """Build the stem with the widths of the config."""
        self.conv = SparseConv(config.in_channels, config.stem_channels, rngs=rngs)
        self.norm = InstanceNorm(config.stem_channels, eps=1e-8)  # that of MinkowskiEngine

    def __call__(self, x: SparseTensor, plan: BackbonePlan, context: ForwardContext) -> SparseTensor:
        """Features on voxels of stride 1 to features on sites of stride 4."""
        y = self.conv(x, plan.stem, context)
        context.record("conv1", y)
        return _pool(self.norm(y, context), plan, context)


def _pool(y: SparseTensor, plan: BackbonePlan, context: ForwardContext) -> SparseTensor:
    """ReLU and 2^3 max pool of the normalised features of a stem."""
    y = relu(y)
    context.record("stem", y)
    y = SparseTensor(max_pool(y.features, plan.pool), plan.pool.outputs)
    context.record("maxpool", y)
    return y


class MinkResNet(nnx.Module):
    """Stem and four residual stages, each halving the resolution: features at 8, 16, 32, 64 voxels.

    Attributes:
        stem: `InstanceStem` for a config of kind "fcaf3d", else `Stem`.
        scan_embedding: MLP from a scan's mean features behind the stem to a residual of its dataset's embedding; None
            without `SelectionConfig.scan_embedding`.
    """

    def __init__(self, config: DetectorConfig, num_datasets: int, *, rngs: nnx.Rngs):
        """Build the layers of the config; parameters are random from `rngs.params`."""
        selection = config.selection
        self.stem: Any = (
            InstanceStem(config, rngs=rngs) if config.kind == "fcaf3d" else Stem(config, num_datasets, rngs=rngs)
        )
        self.scan_embedding = (
            EmbeddingMLP(config.stem_channels, selection.hidden, selection.embedding_dim, rngs=rngs)
            if selection is not None and selection.scan_embedding
            else None
        )
        stages, width = [], config.stem_channels
        for s, (blocks, channels) in enumerate(zip(config.stage_blocks, config.stage_channels, strict=True)):
            stage = []
            for b in range(blocks):
                stage.append(
                    ResidualBlock(
                        width, channels, downsample=b == 0, norm=config.norm_in(s + 1),
                        kernels=config.kernels_in(s + 1), selection=config.selection_in("residual"),
                        num_datasets=num_datasets, name=f"layer{s + 1}_{b}", rngs=rngs,
                    )
                )  # fmt: skip
                width = channels
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)

    def __call__(
        self, x: SparseTensor, plan: BackbonePlan, context: ForwardContext
    ) -> tuple[list[SparseTensor], ForwardContext]:
        """Features of the four stages, finest first, and the context of the layers that follow the stem.

        Args:
            x: features [N, Cin] (colour) on the voxels of the plan.
            plan: maps of the batch.
            context: context of the pass; its tap gets conv1, stem, maxpool, layer<s>_<b>_downsample, layer<s>_<b> and
                layer<s>.
        """
        y, outputs = self.stem(x, plan, context), []
        if self.scan_embedding is not None:
            residual = self.scan_embedding(global_pool(y))
            context = replace(context, embedding=context.embedding + residual)
        for s, (stage, maps) in enumerate(zip(self.stages, plan.stages, strict=True)):
            for b, block in enumerate(stage):
                strided = {"down_map": maps.down, "skip_map": maps.skip} if b == 0 else {}
                y = call_block(block, context, y, maps.residual, **strided)
                context.record(f"layer{s + 1}_{b}", y)
            context.record(f"layer{s + 1}", y)
            outputs.append(y)
        return outputs, context

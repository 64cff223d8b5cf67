"""The neck of FCAF3D: generative transposed convolutions down to the finest stage, pruned by the heads' scores."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from h2a2_jax.layers import ConvNorm, ForwardContext, SparseConv, SparseConvTranspose, activate
from h2a2_jax.layers.context import call_block
from h2a2_jax.layers.sparse_conv import uniform_fan_in
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.fcaf3d_maps import NUM_PRUNED, ChildMaps, FCAF3DPlan
from h2a2_jax.sparse import KernelMap, SparseTensor, interpolate_sites, keep_highest, prune, union_add
from h2a2_jax.sparse.tensors import take_rows


def _elu(x: SparseTensor) -> SparseTensor:
    return activate(x, jax.nn.elu)


def _conv_norm(config: DetectorConfig, num_datasets: int, kind: type[ConvNorm], rngs: nnx.Rngs) -> partial[ConvNorm]:
    """A 3^3 convolution of the neck with its norm, for given channels."""
    exclusive_to = num_datasets if config.neck == "exclusive" else None
    conv = partial(SparseConv, exclusive_to=exclusive_to, kernel_init=uniform_fan_in)
    return partial(kind, conv=conv, norm=config.neck_norm, num_datasets=num_datasets, rngs=rngs)


class UpBlock(nnx.Module):
    """From the sites of a level to all of their children: 2^3 generative convolution, norm, ELU, 3^3, norm, ELU.

    Attributes:
        generate: generative transposed convolution and norm.
        conv: 3^3 convolution on the children and norm.
    """

    def __init__(
        self, in_channels: int, out_channels: int, level: int, config: DetectorConfig, num_datasets: int,
        *, rngs: nnx.Rngs,
    ):  # fmt: skip
        """Build the block.

        Args:
            in_channels: channels of the coarser level.
            out_channels: channels of the children.
            level: level of the children, 0 for the finest; it names the values of the tap.
            config: architecture.
            num_datasets: number of datasets.
            rngs: random streams.
        """
        self.level = level
        exclusive_to = num_datasets if config.neck == "exclusive" else None
        self.generate = ConvNorm(
            in_channels, out_channels, 2, conv=partial(SparseConvTranspose, exclusive_to=exclusive_to),
            norm=config.neck_norm, num_datasets=num_datasets, rngs=rngs,
        )  # fmt: skip
        self.conv = _conv_norm(config, num_datasets, ConvNorm, rngs)(out_channels, out_channels)

    def __call__(self, x: SparseTensor, maps: ChildMaps, context: ForwardContext) -> SparseTensor:
        """Features [N, Cin] of a level to those [M, Cout] of its children."""
        name = f"up_block_{self.level + 1}"
        y = self.generate.conv(x, maps.generate, context)
        context.record(f"{name}_transposed", y)
        y = _elu(self.conv(_elu(self.generate.normalize(y, context)), maps.conv, context))
        context.record(name, y)
        return y


class OutBlock(ConvNorm):
    """3^3 convolution, norm and ELU: the features of a level that the heads read."""

    def __call__(
        self, x: SparseTensor, kernel_map: KernelMap | None = None, context: ForwardContext | None = None
    ) -> SparseTensor:
        """Features [N, Cin] to features [N, C] on the same sites."""
        return _elu(super().__call__(x, kernel_map, context))


class PrunedNeck(nnx.Module):
    """Levels 3 to 0 at 64, 32, 16 and 8 voxels; `FCAF3D` calls `grow` and `read` level by level, coarsest first.

    Attributes:
        ups: blocks onto the levels 0, 1 and 2.
        outs: blocks of the levels 0 to 3 that the heads read.
    """

    def __init__(self, config: DetectorConfig, num_datasets: int, *, rngs: nnx.Rngs):
        """Build the layers with the widths of the config."""
        widths = config.stage_channels
        self.ups = nnx.List(
            [
                UpBlock(widths[level + 1], widths[level], level, config, num_datasets, rngs=rngs)
                for level in range(NUM_PRUNED)
            ]
        )
        build = _conv_norm(config, num_datasets, OutBlock, rngs)
        self.outs = nnx.List([build(width, config.neck_channels) for width in widths])

    def convolutions(self) -> list[ConvNorm]:
        """Parts that may select their kernels: none."""
        return []

    def grow(
        self,
        x: SparseTensor,
        stage: SparseTensor,
        scores: SparseTensor,
        level: int,
        plan: FCAF3DPlan,
        context: ForwardContext,
    ) -> tuple[SparseTensor, KernelMap, Int[Array, ""]]:
        """Grow a level from the coarser one, and prune it.

        Args:
            x: features of level + 1.
            stage: features of the backbone at `level`.
            scores: scores [N, 1] at the sites of `x`; no gradient.
            level: level 0 to 2.
            plan: maps of the batch.
            context: context of the pass; its tap gets up_block_<level + 1>_transposed, up_block_<level + 1>,
                union_<level> and pruned_<level>, and where the plan may prune, scores_<level> [N] and kept_<level>
                [N].

        Returns:
            Features of the level; the 3^3 map of its sites; overflow int32 [], the number of sites that the capacities
            have no place for.
        """
        channels = stage.features.shape[1]
        maps, overflow = plan.child_maps(level, x.sites, channels)
        up = call_block(self.ups[level], context, x, maps)
        kernel_map: KernelMap | None = None
        if maps.stage_rows is None:
            y, lost = union_add(stage, up, up.sites.capacity)
            overflow += lost
        else:
            restored = take_rows(stage.features, jnp.asarray(maps.stage_rows), distinct=True)
            y, kernel_map = up.with_features(up.features + restored), maps.conv
        context.record(f"union_{level}", y)
        if plan.prunes(level):
            score = interpolate_sites(scores, y.sites)[:, 0]
            keep = keep_highest(score, y.sites, plan.prune_threshold)
            context.record(f"scores_{level}", score)
            context.record(f"kept_{level}", keep)
            # The capacity suffices: no more than the threshold of each scan is kept.
            y, _ = prune(y, keep, plan.kept(level), name=f"prune({y.sites.identity})")
            kernel_map = None
        context.record(f"pruned_{level}", y)
        return y, kernel_map or plan.conv_map(y.sites, channels), overflow

    def read(self, x: SparseTensor, kernel_map: KernelMap, level: int, context: ForwardContext) -> SparseTensor:
        """Features of a level that the heads read; the tap gets out_block_<level>."""
        y = call_block(self.outs[level], context, x, kernel_map)
        context.record(f"out_block_{level}", y)
        return y

"""The neck of TR3D: generative transposed convolution upwards, sum with the backbone's features, convolution."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from h2a2_jax.layers import ConvNorm, ForwardContext, SparseConv, SparseConvTranspose, relu
from h2a2_jax.layers.context import call_block
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.maps import DetectorPlan, UpMaps
from h2a2_jax.sparse import SparseTensor


class UpStep(nnx.Module):
    """One step up: generate children, unite with a stage, lateral convolution (carried on), output convolution."""

    def __init__(
        self, in_channels: int, stage_channels: int, level: int, config: DetectorConfig, num_datasets: int,
        *, rngs: nnx.Rngs,
    ):  # fmt: skip
        """Build one step.

        Args:
            in_channels: channels of the coarser level.
            stage_channels: channels of the backbone's stage that the step unites with.
            level: number of the step, 0 for the finest; it names the values of the tap.
            config: architecture.
            num_datasets: number of datasets.
            rngs: random streams.
        """
        self.level = level
        exclusive_to = num_datasets if config.neck == "exclusive" else None

        def part(inputs: int, outputs: int, conv: type[SparseConv], name: str, select: bool) -> ConvNorm:
            return ConvNorm(
                inputs, outputs, conv=partial(conv, exclusive_to=exclusive_to), norm=config.neck_norm,
                selection=config.selection_in("neck") if select else None, num_datasets=num_datasets,
                name=f"neck{level}.{name}", rngs=rngs,
            )  # fmt: skip

        self.up = part(in_channels, stage_channels, SparseConvTranspose, "up", False)
        self.lateral = part(stage_channels, stage_channels, SparseConv, "lateral", True)
        self.out = part(stage_channels, config.neck_channels, SparseConv, "out", True)

    def __call__(
        self, x: SparseTensor, stage: SparseTensor, maps: UpMaps, context: ForwardContext
    ) -> tuple[SparseTensor, SparseTensor]:
        """Features for the next step and features for the head, both on the union of children and stage."""
        up = relu(self.up(x, maps.generate, context))
        context.record(f"up_block_{self.level + 1}", up)
        united = _rows(up.features, maps.children_rows) + _rows(stage.features, maps.stage_rows)
        y = SparseTensor(united, maps.lateral.inputs)
        context.record(f"union_{self.level}", y)
        y = relu(self.lateral(y, maps.lateral, context))
        context.record(f"lateral_block_{self.level}", y)
        out = relu(self.out(y, maps.lateral, context))
        context.record(f"out_block_{self.level}", out)
        return y, out


def _rows(features: Float[Array, "n c"], rows: object) -> Float[Array, "m c"]:
    """Rows by index, each at most once; zero for an index past the end.

    The indices past the end are made distinct too: an accelerator then adds the gradient without atomics.
    """
    index = jnp.asarray(rows)
    index = jnp.where(index < len(features), index, len(features) + jnp.arange(len(index)))
    return features.at[index].get(mode="fill", fill_value=0, unique_indices=True)


class Neck(nnx.Module):
    """From 64 voxels up to 32 and 16."""

    def __init__(self, config: DetectorConfig, num_datasets: int, *, rngs: nnx.Rngs):
        """Build both steps with the widths of the config."""
        channels = config.stage_channels
        self.steps = nnx.List(
            [
                UpStep(channels[3], channels[2], 1, config, num_datasets, rngs=rngs),
                UpStep(channels[2], channels[1], 0, config, num_datasets, rngs=rngs),
            ]
        )

    def convolutions(self) -> list[ConvNorm]:
        """Parts that may select their kernels, in the order of the forward pass."""
        return [part for step in self.steps for part in (step.lateral, step.out)]

    def __call__(self, stages: list[SparseTensor], plan: DetectorPlan, context: ForwardContext) -> list[SparseTensor]:
        """Features at 16 and 32 voxels, finest first, from the backbone's four stages."""
        x, outputs = stages[-1], []
        for step, stage, maps in zip(self.steps, stages[-2:0:-1], plan.ups, strict=True):
            x, out = call_block(step, context, x, stage, maps)
            outputs.append(out)
        return outputs[::-1]

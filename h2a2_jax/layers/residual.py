"""Residual block of sparse convolutions, plain or with kernel selection."""

from flax import nnx

from h2a2_jax.layers.channel_gate import ChannelGate
from h2a2_jax.layers.context import ForwardContext
from h2a2_jax.layers.conv import SparseConv
from h2a2_jax.layers.functional import add, relu
from h2a2_jax.layers.kernel_selection import KernelSelection, SelectiveConv
from h2a2_jax.layers.norm import BatchNorm
from h2a2_jax.sparse.grid import Size3
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.tensor import SparseTensor


class ConvNorm(nnx.Module):
    """Convolution, batch norm and, with kernel selection, the channel gate after the norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size3 = 3,
        *,
        conv: type[SparseConv] = SparseConv,
        selection: KernelSelection | None = None,
        num_datasets: int = 1,
        name: str = "conv",
        rngs: nnx.Rngs,
    ):
        """With `selection` the convolution is a `SelectiveConv`, else of class `conv`."""
        self.conv: SparseConv | SelectiveConv = (
            conv(in_channels, out_channels, kernel_size, rngs=rngs)
            if selection is None
            else SelectiveConv(
                in_channels, out_channels, kernel_size,
                num_datasets=num_datasets, selection=selection, name=name, rngs=rngs,
            )
        )  # fmt: skip
        self.gate = (
            None
            if selection is None
            else ChannelGate(out_channels, embedding_dim=selection.embedding_dim, hidden=selection.hidden, rngs=rngs)
        )
        self.norm = BatchNorm(out_channels, num_datasets=num_datasets)

    def __call__(
        self, x: SparseTensor, kernel_map: KernelMap | None = None, context: ForwardContext | None = None
    ) -> SparseTensor:
        """Apply onto the map's output sites; no activation.

        Args:
            x: on the map's input sites.
            kernel_map: of the convolution; None for a kernel of one slice.
            context: of the pass; left out, the layer evaluates.

        Raises:
            ValueError: as the convolution and the norm.
        """
        y = self.norm(self.conv(x, kernel_map, context), context)  # type: ignore[arg-type]
        if self.gate is not None and context is not None and context.embedding is not None:
            y = self.gate(y, context.embedding)
        return y


class ResidualBlock(nnx.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + skip(x)), the basic block of ResNet-18 and -34.

    The skip is the identity, or a 1^3 convolution and norm where the stride or the width changes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        downsample: bool = False,
        selection: KernelSelection | None = None,
        num_datasets: int = 1,
        name: str = "block",
        rngs: nnx.Rngs,
    ):
        """Args: `downsample` makes the first convolution and the skip strided."""
        self.name = name
        shared = {"selection": selection, "num_datasets": num_datasets, "rngs": rngs}
        self.first = ConvNorm(in_channels, out_channels, name=f"{name}.conv1", **shared)  # type: ignore[arg-type]
        self.second = ConvNorm(out_channels, out_channels, name=f"{name}.conv2", **shared)  # type: ignore[arg-type]
        self.downsample = downsample
        self.skip = (
            ConvNorm(in_channels, out_channels, 1, num_datasets=num_datasets, rngs=rngs)
            if downsample or in_channels != out_channels
            else None
        )

    def __call__(
        self,
        x: SparseTensor,
        residual_map: KernelMap,
        context: ForwardContext | None = None,
        *,
        down_map: KernelMap | None = None,
        skip_map: KernelMap | None = None,
    ) -> SparseTensor:
        """Apply the block.

        Args:
            x: input.
            residual_map: 3^3 submanifold map of the output sites.
            context: of the pass; left out, the block evaluates.
            down_map: 3^3 strided map onto the output sites, for a block that downsamples.
            skip_map: 1^3 strided lookup of the output sites, likewise.

        Raises:
            ValueError: a block that downsamples was given no strided maps.
        """
        if self.downsample and (down_map is None or skip_map is None):
            raise ValueError(f"{self.name} downsamples: it needs down_map and skip_map.")
        skip = x
        if self.skip is not None:
            skip = self.skip(x, skip_map, context)
            if context is not None:
                context.record(f"{self.name}_downsample", skip)
        y = relu(self.first(x, residual_map if down_map is None else down_map, context))
        y = self.second(y, residual_map, context)
        return relu(add(y, skip))

"""Residual block of sparse convolutions, plain or with kernel selection."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from flax import nnx

from h2a2_jax.layers.adapter_conv import AdapterConv
from h2a2_jax.layers.channel_gate import ChannelGate
from h2a2_jax.layers.context import ForwardContext
from h2a2_jax.layers.functional import add, relu
from h2a2_jax.layers.kernel_selection import SelectionConfig, SelectiveConv
from h2a2_jax.layers.norm import BatchNorm
from h2a2_jax.layers.sparse_conv import SparseConv
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.sites import PerAxis, SparseTensor


class ConvNorm(nnx.Module):
    """Convolution, batch norm and, with kernel selection, the channel gate after the norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: PerAxis = 3,
        *,
        conv: Callable[..., SparseConv] = SparseConv,
        norm: Callable[..., BatchNorm] = BatchNorm,
        selection: SelectionConfig | None = None,
        num_datasets: int = 1,
        name: str = "conv",
        rngs: nnx.Rngs,
    ):
        """With `selection` the convolution is a `SelectiveConv`, else one built by `conv`.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            kernel_size: size of the kernel.
            conv: class of the convolution, or a partial of it, as `partial(SparseConv, exclusive_to=3)`.
            norm: class of the norm, or a partial of it, as `partial(BatchNorm, eps=1e-3)`.
            selection: how kernels are selected; None for one kernel everywhere.
            num_datasets: number D of datasets.
            name: name under which a selection reaches the tap.
            rngs: random streams.
        """
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
            else ChannelGate(
                out_channels, embedding_dim=selection.embedding_dim, hidden=selection.hidden,
                start=selection.embedding_start, rngs=rngs,
            )
        )  # fmt: skip
        self.gate_first = selection is not None and selection.gate == "before_norm"
        self.norm = norm(out_channels, num_datasets=num_datasets, rngs=rngs)

    def __call__(
        self, x: SparseTensor, kernel_map: KernelMap | None = None, context: ForwardContext | None = None
    ) -> SparseTensor:
        """Apply onto the map's output sites; no activation.

        Args:
            x: features [N_in, Cin] on the map's input sites.
            kernel_map: map of the convolution; None for a kernel of one slice.
            context: context of the pass; without it the layer evaluates.

        Returns:
            Features [N_out, Cout] on the map's output sites, in the type of x.

        Raises:
            ValueError: as the convolution and the norm.
        """
        return self.normalize(self.conv(x, kernel_map, context), context)  # type: ignore[arg-type]

    def normalize(self, y: SparseTensor, context: ForwardContext | None = None) -> SparseTensor:
        """Apply norm and gate to the convolution's output."""
        if self.gate is None or context is None or context.embedding is None:
            return self.norm(y, context)
        if self.gate_first:
            return self.norm(self.gate(y, context.embedding), context)
        return self.gate(self.norm(y, context), context.embedding)


class ResidualBlock(nnx.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + skip(x)), the basic block of ResNet-18 and -34 (He et al. 2016).

    The skip is the identity, or a 1^3 convolution and norm where the stride or the width changes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        downsample: bool = False,
        norm: Callable[..., BatchNorm] = BatchNorm,
        kernels: Literal["shared", "adapted", "exclusive"] = "shared",
        selection: SelectionConfig | None = None,
        num_datasets: int = 1,
        name: str = "block",
        rngs: nnx.Rngs,
    ):
        """Layers start as those of `ConvNorm`.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            downsample: if True, the first convolution and the skip are strided.
            norm: class of the norms, or a partial of it.
            kernels: kernels without selection: "shared" by the datasets; "adapted", shared with a residual adapter of
                each dataset at the submanifold 3^3 convolutions (`AdapterConv`); or "exclusive" to each, skip included.
            selection: how the 3^3 convolutions select kernels; None for one kernel everywhere.
            num_datasets: number D of datasets.
            name: name of the block for the tap.
            rngs: random streams.

        Raises:
            ValueError: `kernels` is none of these words, or not "shared" and `selection` is given.
        """
        if kernels not in ("shared", "adapted", "exclusive"):
            raise ValueError(f"kernels is {kernels!r}; expected one of shared, adapted, exclusive.")
        if selection is not None and kernels != "shared":
            raise ValueError(
                f"{name} was given selection and kernels={kernels!r}: selection has a kernel of each dataset, leave "
                "one of the two out."
            )
        self.name, self.downsample = name, downsample
        build = partial(ConvNorm, norm=norm, num_datasets=num_datasets, rngs=rngs)
        own, adapted = partial(SparseConv, exclusive_to=num_datasets), partial(AdapterConv, num_datasets=num_datasets)
        conv: Callable[..., SparseConv] = own if kernels == "exclusive" else SparseConv
        same: Callable[..., SparseConv] = adapted if kernels == "adapted" else conv
        self.first = build(
            in_channels, out_channels, conv=conv if downsample else same, selection=selection, name=f"{name}.conv1"
        )
        self.second = build(out_channels, out_channels, conv=same, selection=selection, name=f"{name}.conv2")
        self.skip = (
            build(in_channels, out_channels, 1, conv=conv) if downsample or in_channels != out_channels else None
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
            x: features [N_in, Cin].
            residual_map: 3^3 submanifold map of the output sites.
            context: context of the pass; without it the block evaluates.
            down_map: 3^3 strided map onto the output sites, for a block that downsamples.
            skip_map: 1^3 strided lookup of the output sites, for a block that downsamples.

        Returns:
            Features [N_out, Cout] on the output sites, in the type of x.

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

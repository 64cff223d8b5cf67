"""Folding: everything in a trained detector that depends on the dataset alone is computed once.

Modulation, gates, prompts, adapters and exclusive kernels follow from the dataset, and in evaluation a batch norm is an
affine map of each channel. So `conv(x * phi + theta)`, norm and gate become a convolution with other kernels and a
bias:

    y = (1 + g) * norm(conv(x'))  =  conv(x') with kernels W * scale and bias;    x' = x * phi + theta

phi and theta themselves stay an affine map in front of the convolution: theta reaches an output once for each neighbour
that is there, and the selection reads x'. The kernel of an offset is still selected for each scan. With embeddings of
scans (`SelectionConfig.scan_embedding`) modulation, prompts and gates depend on the scan and are not folded.
"""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array

from h2a2_jax.layers import (
    ChannelGate,
    ConvNorm,
    DatasetContext,
    ForwardContext,
    LinearModulation,
    PromptNorm,
    SelectiveConv,
)
from h2a2_jax.layers.checks import check_input
from h2a2_jax.layers.context import parameter
from h2a2_jax.layers.kernel_selection import SelectionConfig, Structure, select_kernels
from h2a2_jax.layers.modulation import modulate
from h2a2_jax.layers.sparse_conv import mix_channels
from h2a2_jax.models import DetectorNetwork, HeadChoice
from h2a2_jax.models.backbone import Stem
from h2a2_jax.models.head import NUM_OUTPUTS, DatasetHeads, UnionHead
from h2a2_jax.sparse import KernelMap, SparseTensor, convolve


def fold(model: DetectorNetwork, dataset: DatasetContext, head: int) -> DetectorNetwork:
    """A detector of one dataset that predicts what `model` does in evaluation, up to rounding.

    Its parameters are copies and its dataset axes have one entry; it cannot be trained. Running it needs a context of
    one dataset, which may ask for shared kernels only if `dataset` does.

    Args:
        model: trained model; it is not changed.
        dataset: dataset (or mean) whose embedding, exclusive kernels and statistics are used; selection of kernels.
        head: index of the dataset whose head predicts, or whose columns of one label space do.
    """
    one, columns = model.heads_config[head], model.heads_config[head].columns
    wanted = DatasetContext.one(head, len(model.heads_config)) if columns is None else jnp.array(columns, jnp.int32)
    folded = folded_parameters(model, dataset, wanted)
    folded.heads_config = (replace(one, columns=None),)
    return folded


def folded_parameters(model: DetectorNetwork, dataset: DatasetContext, head: HeadChoice) -> DetectorNetwork:
    """`fold` inside jit, where datasets and columns are traced; the heads_config is that of the first dataset.

    The folded detector has a head of its own, also where the model has one label space.
    """
    per_scan = model.backbone.scan_embedding is not None
    embedding = None if model.embedding is None else dataset.pick(model.embedding[...])
    folded = nnx.clone(model)
    for _, module in list(nnx.iter_modules(folded)):
        if isinstance(module, ConvNorm):
            kept = FoldedConv(module, dataset, embedding, per_scan)
            module.conv, module.norm, module.gate = kept, Identity(), None  # type: ignore[assignment]
    folded.embedding = parameter(embedding[None], exclusive=True) if per_scan and embedding is not None else None
    folded.heads_config = tuple(replace(one, columns=None) for one in model.heads_config[:1])
    folded.heads = _fold_head(model.heads, head)
    return folded


def _fold_head(heads: nnx.Module, wanted: HeadChoice) -> nnx.Module:
    """The head of one dataset, or of columns of one label space."""
    if isinstance(heads, UnionHead):
        assert not isinstance(wanted, DatasetContext)
        values = [heads.box_kernel[...], heads.box_bias[...], *heads.class_columns(wanted)]
        folded: nnx.Module = DatasetHeads(len(values[0]), (values[-1].size,), (NUM_OUTPUTS,), rngs=nnx.Rngs(0))
        named = dict(zip(("box_kernel", "box_bias", "class_kernel", "class_bias"), values, strict=True))
    else:
        assert isinstance(wanted, DatasetContext)
        folded = nnx.clone(heads)
        named = {name: wanted.pick(part[...]) for name, part in vars(heads).items() if isinstance(part, nnx.Param)}
    for name, value in named.items():
        setattr(folded, name, parameter(value[None], exclusive=True))
    return folded


class Identity(nnx.Module):
    """Stands in for a module that was folded into its neighbour."""

    def __call__(self, x: SparseTensor, context: ForwardContext | None = None) -> SparseTensor:
        """The input."""
        return x


class FoldedConv(nnx.Module):
    """Modulation, convolution, batch norm and gate of one dataset.

    Attributes:
        kernels: [1, V, Cin, Cout], or shared and exclusive ones [2, V, Cin, Cout].
        bias: [Cout].
        phi: [Cin], with theta the modulation of the input; None where there is none.
        theta: [Cin].
        alpha: [V]; kernels are selected by it, the projection A [Cin, p], the prototypes P [V, p] and
            the centre [V] of the cosines.
        modulation: the modulation of the input where it depends on the scan, else None.
        gate: the gate of the output where it depends on the scan, else None.
        norm: the norm whose prompt depends on the scan, else None.
    """

    def __init__(self, part: ConvNorm, dataset: DatasetContext, embedding: Array | None, per_scan: bool):
        """Fold a part of a trained detector.

        The embedding [d] is that of the dataset, None in a detector without embeddings; `per_scan` says that scans have
        embeddings of their own.
        """
        conv, varies = part.conv, False
        phi: Array | None = None
        theta: Array | None = None
        gate_factor: Array | None = None
        structure: Structure | None = None
        if isinstance(conv, SelectiveConv):
            assert embedding is not None and part.gate is not None
            kernels = conv.kernels(dataset)
            structure = conv.structure(dataset) if len(kernels) > 1 else None
            # The stem selects before a scan has an embedding of its own.
            varies = per_scan and conv.name != "stem"
            if not varies:
                phi, theta = conv.modulation.factors(embedding)
                gate_factor = part.gate.factor(embedding)
        else:
            kernels = conv.kernel_of(ForwardContext(dataset))[None]
        # The norm of the stem, too, reads the embedding of the dataset alone.
        prompted = per_scan and isinstance(part.norm, PromptNorm) and not isinstance(part, Stem)
        scale, bias = part.norm.affine(dataset, None if prompted else embedding)
        mean, var = part.norm.running(dataset)
        factor = scale * lax.rsqrt(var + part.norm.eps)
        shift = bias - mean * factor
        if gate_factor is not None:
            factor = factor * gate_factor
            shift = shift if part.gate_first else shift * gate_factor

        self.name: str = getattr(conv, "name", "convolution")
        self.selection: SelectionConfig | None = getattr(conv, "selection", None) if structure is not None else None
        self.kernels, self.bias = nnx.Param(kernels * factor), nnx.Param(shift)
        self.phi, self.theta = _param(phi), _param(theta)
        self.alpha, self.projection, self.prototypes = map(_param, structure[:3] if structure else (None,) * 3)
        self.center = _param(structure.center if structure else None)
        self.modulation: LinearModulation | None = getattr(conv, "modulation", None) if varies else None
        self.gate: ChannelGate | None = part.gate if varies else None
        self.gate_first = part.gate_first
        self.norm: PromptNorm | None = part.norm if prompted else None  # type: ignore[assignment]

    def __call__(
        self, x: SparseTensor, kernel_map: KernelMap | None = None, context: ForwardContext | None = None
    ) -> SparseTensor:
        """Apply onto the map's output sites; without a map, the kernel has one slice.

        Raises:
            ValueError: the map does not fit.
        """
        context = context or ForwardContext()
        if self.modulation is not None:
            modulated = self.modulation(x, context.embedding)
        elif self.phi is None or self.theta is None:
            modulated = x
        else:
            modulated = modulate(x, self.phi[...], self.theta[...])
        if kernel_map is None:
            y = mix_channels(modulated, self.kernels[0], self.name, context.dtype, context.precision)
            sites = x.sites
        else:
            check_input(self.name, x, kernel_map, self.kernels.shape[1:])
            y = convolve(
                modulated.features,
                self.kernels[...],
                kernel_map,
                gamma=self._gamma(x, modulated, kernel_map, context),
                algorithm=context.algorithm,
                dtype=context.dtype,
                precision=context.precision,
            )
            sites = kernel_map.outputs
        if self.gate is not None and self.gate_first:
            y = self.gate(SparseTensor(y, sites), context.embedding).features
        out = SparseTensor(jnp.where(sites.valid[:, None], y + self.bias[...].astype(y.dtype), 0), sites)
        if self.norm is not None:
            out = modulate(out, *self.norm.factors(context.embedding))
        return out if self.gate is None or self.gate_first else self.gate(out, context.embedding)

    def _gamma(
        self, x: SparseTensor, modulated: SparseTensor, kernel_map: KernelMap, context: ForwardContext
    ) -> Array | None:
        if self.selection is None or self.alpha is None or self.projection is None or self.prototypes is None:
            return None
        center = None if self.center is None else self.center[...]
        structure = Structure(self.alpha[...], self.projection[...], self.prototypes[...], center)
        seen = modulated if self.selection.structural_features == "modulated" else x
        return select_kernels(seen, kernel_map, structure, self.selection, context, self.name)[0]


def _param(value: Array | None) -> nnx.Param | None:
    return None if value is None else nnx.Param(value)

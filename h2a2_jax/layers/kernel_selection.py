"""Structure-aware kernel selection (SF-KS, H²A²): per kernel offset the shared kernel or that of the dataset.

    alpha   = sigmoid(O)                                     offset validity prior
    beta_j  = (1 + mean_n cos(A x_n, P_j)) / 2               structural consistency posterior of a scan
    gamma_j = 1[alpha_j * beta_j >= tau]                     straight-through gradient
    W_j     = gamma_j W_shared_j + (1 - gamma_j) W_exclusive_j

The functions are the method; the module holds the parameters and calls them.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from h2a2_jax.layers.checks import check_context, check_input
from h2a2_jax.layers.context import AxisName, DatasetContext, ForwardContext, Initializer, draw, parameter
from h2a2_jax.layers.modulation import LinearModulation, Start
from h2a2_jax.layers.sparse_conv import kaiming_fan_out, output_sites, size_per_axis
from h2a2_jax.sparse.conv import convolve
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.pool import global_pool, scan_sum
from h2a2_jax.sparse.sites import PerAxis, SparseTensor
from h2a2_jax.sparse.xla_cpu import recompute_if_narrow

Part = Literal["residual", "stem", "neck"]
Scope = Literal["scan", "batch"]


@dataclass(frozen=True)
class SelectionConfig:
    """Options of kernel selection; each field is a point that the paper leaves open.

    Attributes:
        kernels: kernels that the layers use: "selected" ones, an offset at a time; or, to tell what selection adds to
            modulation and gate, the "shared" ones or the dataset's "exclusive" ones at every offset. Then O, A and P
            and the other kernels are there, so that all three start from the same values, but have no effect.
        convolutions: convolutions of a detector that select their kernels: the 3^3 ones of the "residual" stages ("in
            the backbone"), of the "stem", and those of the "neck" on the sites of a level (not the generative ones).
        scope: sites that share one choice: those of a "scan", so that a prediction does not depend on the other scans
            of its batch, or those of a whole "batch" (on all replicas of the dataset).
        structural_features: features that A projects: the "modulated" ones, or the convolution's "input" before
            modulation.
        structure_parameters: O, A and P are "shared" by the datasets (global statistics), or "exclusive" to each.
        tau: threshold of alpha * beta. At 0.25 with O = 0 near half the offsets start on each side, so both kernels
            train.
        prior_init: initial value of O.
        consistency: "half_cosine" (1 + cos) / 2, or "relu_cosine" max(cos, 0).
        straight_through: gradient of the binarisation: "sigmoid", that of sigmoid((alpha * beta - tau) / temperature),
            or "identity".
        temperature: temperature of the sigmoid of `straight_through`.
        projection_dim: width of the structural features A x.
        exclusive_init: initial exclusive kernels: a "copy" of the shared one, so that a choice matters as far as the
            two have parted, and a detector loaded from one without selection starts with equal outputs; or one that is
            "independent" of it.
        embedding_dim: width of a dataset's embedding.
        hidden: width of the hidden layers of the MLPs of modulation and gate.
        embedding_start: initial last layers of these MLPs: "zero", so that modulation is the identity and the gate one
            half, or "random".
        gate: position of the channel gate. "after_norm": behind the batch norm that follows the convolution.
            "before_norm": on the convolution's output, as the paper's text may be read; the gate depends on the dataset
            only, so the norm with that dataset's own batch statistics takes it out again, in training exactly but for
            the norm's eps, and neither it nor its gradient does anything.
        scan_embedding: if True, each scan adds a residual to the dataset's embedding, computed from its mean features
            behind the stem; the residual starts at zero. Modulation and gate then depend on the scan.
    """

    kernels: Literal["selected", "shared", "exclusive"] = "selected"
    convolutions: tuple[Part, ...] = ("residual",)
    scope: Scope = "scan"
    structural_features: Literal["modulated", "input"] = "modulated"
    structure_parameters: Literal["shared", "exclusive"] = "shared"
    tau: float = 0.25
    prior_init: float = 0.0
    consistency: Literal["half_cosine", "relu_cosine"] = "half_cosine"
    straight_through: Literal["sigmoid", "identity"] = "sigmoid"
    temperature: float = 0.1
    projection_dim: int = 32
    exclusive_init: Literal["copy", "independent"] = "copy"
    embedding_dim: int = 64
    hidden: int = 64
    embedding_start: Start = "zero"
    gate: Literal["after_norm", "before_norm"] = "after_norm"
    scan_embedding: bool = False


def unit_rows(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Divide rows by their length; zero rows stay zero, with a zero gradient in place of 0/0."""
    return x * lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def structural_consistency(
    x: SparseTensor,
    projection: Float[Array, "c p"],
    prototypes: Float[Array, "v p"],
    kind: Literal["half_cosine", "relu_cosine"] = "half_cosine",
    scope: Scope = "scan",
    axis_name: AxisName = None,
) -> Float[Array, "b v"]:
    """beta, the agreement of each offset's prototype with a scan's structural features, in [0, 1].

    The mean over sites commutes with the dot product: the unit vectors A x / |A x| are pooled once per scan, then
    compared with each unit prototype. In float32 at least, products included: accelerators multiply in fewer bits by
    default, and a threshold follows.

    Args:
        x: features [N, Cin] on sites.
        projection: A.
        prototypes: P.
        kind: similarity, as `SelectionConfig.consistency`.
        scope: "scan", or "batch" for the mean over the sites of all scans, on all devices along `axis_name`, which is
            then the same for each scan.
        axis_name: mesh axis of the devices that share a "batch".

    Returns:
        A row for each scan, a column for each offset; float32 at least.
    """
    exact = lax.Precision.HIGHEST

    def pool(x: SparseTensor, projection: Array) -> Array:
        # Values on padding must not reach the gradient of the projection.
        features = jnp.where(x.sites.valid[:, None], x.features, 0)
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        units = x.with_features(unit_rows(jnp.matmul(features, projection, precision=exact)))
        return global_pool(units) if scope == "scan" else _batch_mean(units, axis_name)

    _check_option("kind", kind, ("half_cosine", "relu_cosine"))
    _check_option("scope", scope, ("scan", "batch"))
    pooled = recompute_if_narrow(pool, x, projection)
    cosine = jnp.matmul(pooled, unit_rows(prototypes).T, precision=exact)
    return (1 + cosine) / 2 if kind == "half_cosine" else jax.nn.relu(cosine)


def _check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(options)}.")


def _batch_mean(x: SparseTensor, axis_name: AxisName) -> Float[Array, "b c"]:
    total, count = scan_sum(x.features, x.sites).sum(0), x.sites.valid.sum()
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return jnp.broadcast_to(total / jnp.maximum(count, 1), (x.sites.num_scans, total.shape[0]))


def binarize(
    score: Float[Array, "*s"],
    tau: float,
    straight_through: Literal["sigmoid", "identity"] = "sigmoid",
    temperature: float = 0.1,
) -> Float[Array, "*s"]:
    """1 where score >= tau, else 0; the gradient is that of a smooth surrogate of the step.

    Args:
        score: alpha * beta, of any shape.
        tau: threshold.
        straight_through: gradient: "sigmoid", that of sigmoid((score - tau) / temperature), or "identity".
        temperature: temperature of the sigmoid.

    Returns:
        0 and 1 in the type and shape of the score.

    Raises:
        ValueError: there is no such gradient.
    """
    _check_option("straight_through", straight_through, ("sigmoid", "identity"))
    surrogate = jax.nn.sigmoid((score - tau) / temperature) if straight_through == "sigmoid" else score
    # In brackets, because (1 + s) - s is not always 1.
    return (score >= tau).astype(score.dtype) + (surrogate - lax.stop_gradient(surrogate))


class Structure(NamedTuple):
    """Parameters of a selection, with which each scan is compared.

    Attributes:
        alpha: validity prior of each offset, in (0, 1).
        projection: A, of features to structural features.
        prototypes: P, one structural feature per offset.
    """

    alpha: Float[Array, " v"]
    projection: Float[Array, "c p"]
    prototypes: Float[Array, "v p"]


def select_kernels(
    x: SparseTensor, structure: Structure, selection: SelectionConfig, context: ForwardContext, name: str
) -> Float[Array, "b v"]:
    """Compute gamma of each scan and offset; 1 everywhere if the context's dataset takes shared kernels only.

    alpha, beta and gamma go to the context's tap as `<name>.alpha` and so on.
    """
    alpha, projection, prototypes = structure
    beta = structural_consistency(x, projection, prototypes, selection.consistency, selection.scope, context.axis_name)
    gamma = binarize(alpha * beta, selection.tau, selection.straight_through, selection.temperature)
    if context.dataset is not None and context.dataset.kernels == "shared":
        gamma = jnp.ones_like(gamma)
    for part, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        context.record(f"{name}.{part}", value)
    return gamma


class SelectiveConv(nnx.Module):
    """Sparse convolution with TLM on its input and a kernel selected per scan and offset (H²A², SF-KS).

    Attributes:
        shared: [V, Cin, Cout], the kernel that datasets share.
        exclusive: [D, V, Cin, Cout], the kernel of each dataset.
        prior: O, [V]; [D, V] with exclusive structure parameters.
        projection: A, [Cin, p]; [D, Cin, p] with exclusive structure parameters.
        prototypes: P, [V, p]; [D, V, p] with exclusive structure parameters.
        modulation: TLM.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: PerAxis = 3,
        *,
        num_datasets: int = 1,
        selection: SelectionConfig | None = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        name: str = "selective_conv",
        rngs: nnx.Rngs,
    ):
        """A and P start normal, O at `selection.prior_init`; these are float32.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            kernel_size: size of the kernel, that of the map.
            num_datasets: number D of datasets.
            selection: how kernels are selected; None for the defaults.
            param_dtype: type of the kernels.
            kernel_init: function of (key, shape, dtype) with the shape [V, Cin, Cout], called for the shared kernel and
                for each dataset's "independent" one; None for normal values of variance 2 / (V * Cout).
            name: name under which alpha, beta and gamma reach the tap of a forward pass.
            rngs: random streams.

        Raises:
            ValueError: the kernel size is no size.
        """
        self.selection = selection or SelectionConfig()
        self.name = name
        self.kernel_size = size_per_axis(kernel_size)
        s, volume = self.selection, math.prod(self.kernel_size)
        kernel = (volume, in_channels, out_channels)
        self.shared = nnx.Param(draw(kernel_init or kaiming_fan_out, rngs, kernel, param_dtype))
        if s.exclusive_init == "copy":
            exclusive = jnp.broadcast_to(self.shared[...], (num_datasets, *kernel))
        elif kernel_init is None:
            exclusive = kaiming_fan_out(rngs.params(), (num_datasets, *kernel), param_dtype)
        else:
            exclusive = draw(kernel_init, rngs, kernel, param_dtype, num_datasets)
        self.exclusive = nnx.Param(exclusive, dataset_axis=0)
        by_dataset = s.structure_parameters == "exclusive"
        each = (num_datasets,) if by_dataset else ()
        self.prior = parameter(jnp.full((*each, volume), s.prior_init, jnp.float32), by_dataset)
        projection = jax.random.normal(rngs.params(), (*each, in_channels, s.projection_dim))
        self.projection = parameter(projection / in_channels**0.5, by_dataset)
        self.prototypes = parameter(jax.random.normal(rngs.params(), (*each, volume, s.projection_dim)), by_dataset)
        self.modulation = LinearModulation(
            in_channels, embedding_dim=s.embedding_dim, hidden=s.hidden, start=s.embedding_start, rngs=rngs
        )

    def __call__(self, x: SparseTensor, kernel_map: KernelMap, context: ForwardContext | None = None) -> SparseTensor:
        """Convolve onto the map's output sites.

        Args:
            x: features [N_in, Cin] on the map's input sites.
            kernel_map: map with as many offsets as the kernel has slices.
            context: context of the pass; must hold the dataset's embedding, and the dataset where there are several.

        Returns:
            Features [N_out, Cout] on the map's output sites, in the type of x.

        Raises:
            ValueError: the context has no embedding, or no dataset in training; the map does not fit, or an argument is
                of another kind.
        """
        check_context(self.name, context)
        if context is None or context.embedding is None:
            raise ValueError("kernel selection needs context.embedding, the embedding [d] of the dataset.")
        check_input(self.name, x, kernel_map, self.shared.shape, self.kernel_size)
        dataset = context.dataset_of(self.exclusive.shape[0])
        modulated = self.modulation(x, context.embedding)
        gamma = None
        if self.selection.kernels == "selected":
            seen = modulated if self.selection.structural_features == "modulated" else x
            gamma = select_kernels(seen, self.structure(dataset), self.selection, context, self.name)
        stack = self.kernels(dataset)
        y = convolve(
            modulated.features,
            stack,
            kernel_map,
            gamma=gamma if len(stack) > 1 else None,
            algorithm=context.algorithm,
            dtype=context.dtype,
            precision=context.precision,
        )
        return SparseTensor(y, output_sites(x, kernel_map))

    def kernels(self, dataset: DatasetContext) -> Float[Array, "s v c_in c_out"]:
        """Stack to select from: the shared kernel and that of the dataset, or one of them alone."""
        if "shared" in (dataset.kernels, self.selection.kernels):
            return self.shared[...][None]
        exclusive = dataset.pick(self.exclusive[...])
        return exclusive[None] if self.selection.kernels == "exclusive" else jnp.stack([self.shared[...], exclusive])

    def structure(self, dataset: DatasetContext) -> Structure:
        """alpha, A and P of a dataset."""
        parts = (self.prior[...], self.projection[...], self.prototypes[...])
        if self.selection.structure_parameters == "exclusive":
            parts = (dataset.pick(parts[0]), dataset.pick(parts[1]), dataset.pick(parts[2]))
        prior, projection, prototypes = parts
        return Structure(jax.nn.sigmoid(prior), projection, prototypes)

"""Structure-aware kernel selection (SF-KS, H²A²): per kernel offset the shared kernel or that of the dataset.

    alpha   = sigmoid(O + agreement of the datasets)         offset validity prior, long-term statistics
    beta_j  = (1 + mean_n cos(A x_n, P_j) - centre_j) / 2    structural consistency posterior of a scan
    gamma_j = 1[alpha_j * beta_j >= tau]                     straight-through gradient
    W_j     = gamma_j W_shared_j + (1 - gamma_j) W_exclusive_j

The functions are the method; the module holds the parameters and calls them. `h2a2_jax.layers.agreement` has the
agreement, which a training step measures.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from h2a2_jax.layers.agreement import explored_threshold, prior_logit
from h2a2_jax.layers.checks import check_context, check_input
from h2a2_jax.layers.context import (
    AxisName,
    DatasetContext,
    ForwardContext,
    Initializer,
    draw,
    is_training,
    parameter,
)
from h2a2_jax.layers.modulation import LinearModulation, Start
from h2a2_jax.layers.sparse_conv import kaiming_fan_out, output_sites, size_per_axis
from h2a2_jax.sparse.conv import convolve
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.pool import global_pool, scan_sum, sites_per_scan
from h2a2_jax.sparse.sites import PerAxis, Sites, SparseTensor
from h2a2_jax.sparse.xla_cpu import recompute_if_narrow

Part = Literal["residual", "stem", "neck"]
Scope = Literal["scan", "batch"]
Consistency = Literal["centered_cosine", "half_cosine", "relu_cosine"]
_CENTER_RATE = 0.1


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
        prior: alpha is sigmoid(O + the log of how well the datasets' gradients agree at the offset), "agreement", so
            that offsets are shared until the datasets are seen to want different kernels; or it is "learned",
            sigmoid(O) with O moved by the gradient of the choice alone. That gradient is the loss's along
            W_shared - W_exclusive, which vanishes where both are trained: the choices stay those of the first step.
        agreement_threshold: disagreement F at which the agreement adds nothing to O. At 2, a kernel from one dataset's
            scans errs as much as one from all of them.
        agreement_sharpness: weight of log(threshold / F); alpha is 0.94 at F = 1, and 0.06 at F = 4.
        agreement_decay: decay of the moving averages of the gradients, in steps.
        agreement_views: different scans for which an augmented one counts, in telling by how much the gradients of a
            dataset may differ by chance: its augmentation is drawn anew in each epoch. Scans that are not augmented
            count once.
        exploration: least share of the training steps in which an offset takes the shared kernel, whatever its alpha;
            in these, agreement is measured.
        tau: threshold of alpha * beta; at 0.25 with beta near one half, offsets are shared from alpha = 1/2 on.
        prior_init: initial value of O.
        consistency: "half_cosine" (1 + cos) / 2; "relu_cosine" max(cos, 0); or "centered_cosine",
            (1 + cos - centre) / 2 with the dataset's running mean of the cosine as centre. Averaged over a scan, the
            cosines with random prototypes differ by offset far more than by scan; without a centre, that decides.
        pooling: sites over which the cosine of an offset is averaged: all "sites" of the scan; or the output sites,
            with the features found at that offset of each and zero where nothing is, so that missing support lowers
            beta ("pairs").
        prototypes: P is "learned", or follows from the "kernels": A times the mean over outputs of the shared slice,
            the input to which the offset responds; no gradient reaches the kernels through P.
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
    prior: Literal["agreement", "learned"] = "agreement"
    agreement_threshold: float = 2.0
    agreement_sharpness: float = 4.0
    agreement_decay: float = 0.98
    agreement_views: float = 4.0
    exploration: float = 0.125
    tau: float = 0.25
    prior_init: float = 0.0
    consistency: Consistency = "centered_cosine"
    pooling: Literal["sites", "pairs"] = "sites"
    prototypes: Literal["learned", "kernels"] = "learned"
    straight_through: Literal["sigmoid", "identity"] = "sigmoid"
    temperature: float = 0.1
    projection_dim: int = 32
    exclusive_init: Literal["copy", "independent"] = "copy"
    embedding_dim: int = 64
    hidden: int = 64
    embedding_start: Start = "zero"
    gate: Literal["after_norm", "before_norm"] = "after_norm"
    scan_embedding: bool = False


READING_0_1_0: Mapping[str, Any] = {"prior": "learned", "consistency": "half_cosine"}
"""Fields of `SelectionConfig` with the values of version 0.1.0, where the defaults are others now."""


def unit_rows(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Divide rows by their length; zero rows stay zero, with a zero gradient in place of 0/0."""
    return x * lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def structural_cosine(
    x: SparseTensor,
    projection: Float[Array, "c p"],
    prototypes: Float[Array, "v p"],
    kernel_map: KernelMap | None = None,
    scope: Scope = "scan",
    axis_name: AxisName = None,
) -> Float[Array, "b v"]:
    """Mean over a scan's sites of cos(A x, P_j), for each offset j.

    The mean over sites commutes with the dot product: the unit vectors A x / |A x| are pooled once per scan, then
    compared with each unit prototype. In float32 at least, products included: accelerators multiply in fewer bits by
    default, and a threshold follows.

    Args:
        x: features [N, Cin] on sites.
        projection: A.
        prototypes: P.
        kernel_map: map of the convolution, for the mean over the output sites of the cosine at the neighbour of each
            offset, zero where there is none; None for the mean over all sites of x.
        scope: "scan", or "batch" for the mean over the sites of all scans, on all devices along `axis_name`, which is
            then the same for each scan.
        axis_name: mesh axis of the devices that share a "batch".

    Returns:
        A row for each scan, a column for each offset; float32 at least.
    """
    exact = lax.Precision.HIGHEST
    directions = unit_rows(prototypes).T

    def pool(x: SparseTensor, projection: Array, directions: Array) -> Array:
        # Values on padding must not reach the gradient of the projection.
        features = jnp.where(x.sites.valid[:, None], x.features, 0)
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        units = unit_rows(jnp.matmul(features, projection, precision=exact))
        if kernel_map is None:
            return jnp.matmul(_mean(x.with_features(units), scope, axis_name), directions, precision=exact)
        cosines = jnp.matmul(units, directions, precision=exact)
        found = _at_neighbors(cosines, kernel_map)
        return _mean(SparseTensor(found, output_sites(x, kernel_map)), scope, axis_name)

    _check_option("scope", scope, ("scan", "batch"))
    return recompute_if_narrow(pool, x, projection, directions)


def structural_consistency(
    x: SparseTensor,
    projection: Float[Array, "c p"],
    prototypes: Float[Array, "v p"],
    kind: Consistency = "half_cosine",
    scope: Scope = "scan",
    axis_name: AxisName = None,
    *,
    kernel_map: KernelMap | None = None,
    center: Float[Array, " v"] | None = None,
) -> Float[Array, "b v"]:
    """beta, the agreement of each offset's prototype with a scan's structural features, in [0, 1].

    Arguments and result are those of `structural_cosine`; `kind` is the `consistency` of `SelectionConfig`, and
    `center` the mean cosine of each offset, for the centered one.
    """
    return consistency_of(structural_cosine(x, projection, prototypes, kernel_map, scope, axis_name), kind, center)


def consistency_of(
    cosine: Float[Array, "b v"], kind: Consistency, center: Float[Array, " v"] | None = None
) -> Float[Array, "b v"]:
    """Posterior beta of the cosines of scans and offsets, by `SelectionConfig.consistency`; no centre is zero."""
    _check_option("kind", kind, ("centered_cosine", "half_cosine", "relu_cosine"))
    if kind == "relu_cosine":
        return jax.nn.relu(cosine)
    if kind == "centered_cosine" and center is not None:
        return jnp.clip((1 + cosine - center) / 2, 0, 1)
    return (1 + cosine) / 2


def _at_neighbors(values: Float[Array, "n_in v"], kernel_map: KernelMap) -> Float[Array, "n_out v"]:
    """Column j of the neighbour of each output at offset j; zero where it has none."""
    rows = jnp.asarray(kernel_map.neighbors)
    return values.at[rows.T, jnp.arange(rows.shape[0])].get(mode="fill", fill_value=0)


def _check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(options)}.")


def _mean(x: SparseTensor, scope: Scope, axis_name: AxisName) -> Float[Array, "b c"]:
    """Mean over the sites of each scan, or of the whole batch."""
    if scope == "scan":
        return global_pool(x)
    total, count = scan_sum(x.features, x.sites).sum(0), x.sites.valid.sum()
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return jnp.broadcast_to(total / jnp.maximum(count, 1), (x.sites.num_scans, total.shape[0]))


def binarize(
    score: Float[Array, "*s"],
    tau: float | Float[Array, "*t"],
    straight_through: Literal["sigmoid", "identity"] = "sigmoid",
    temperature: float = 0.1,
) -> Float[Array, "*s"]:
    """1 where score >= tau, else 0; the gradient is that of a smooth surrogate of the step.

    Args:
        score: alpha * beta, of any shape.
        tau: threshold, or one for each score.
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
        center: mean cosine of each offset, for the centered consistency, else None.
    """

    alpha: Float[Array, " v"]
    projection: Float[Array, "c p"]
    prototypes: Float[Array, "v p"]
    center: Float[Array, " v"] | None = None


def select_kernels(
    x: SparseTensor,
    kernel_map: KernelMap,
    structure: Structure,
    selection: SelectionConfig,
    context: ForwardContext,
    name: str,
) -> tuple[Float[Array, "b v"], Float[Array, "b v"]]:
    """Compute gamma of each scan and offset, and the cosines behind it.

    gamma is 1 everywhere if the context's dataset takes shared kernels only. With `context.step` and the prior
    "agreement" the choices explore (`agreement.explored_threshold`). alpha, beta and gamma go to the context's tap as
    `<name>.alpha` and so on.
    """
    pairs = kernel_map if selection.pooling == "pairs" else None
    cosine = structural_cosine(x, structure.projection, structure.prototypes, pairs, selection.scope, context.axis_name)
    beta = consistency_of(cosine, selection.consistency, structure.center)
    tau: float | Array = selection.tau
    if selection.prior == "agreement" and context.step is not None:
        tau = explored_threshold(selection.tau, context.step, beta.shape[1], name, selection.exploration)
    gamma = binarize(structure.alpha * beta, tau, selection.straight_through, selection.temperature)
    if context.dataset is not None and context.dataset.kernels == "shared":
        gamma = jnp.ones_like(gamma)
    for part, value in (("alpha", structure.alpha), ("beta", beta), ("gamma", gamma)):
        context.record(f"{name}.{part}", value)
    return gamma, cosine


class SelectiveConv(nnx.Module):
    """Sparse convolution with TLM on its input and a kernel selected per scan and offset (H²A², SF-KS).

    Attributes:
        shared: [V, Cin, Cout], the kernel that datasets share.
        exclusive: [D, V, Cin, Cout], the kernel of each dataset.
        prior: O, [V]; [D, V] with exclusive structure parameters.
        projection: A, [Cin, p]; [D, Cin, p] with exclusive structure parameters.
        prototypes: P, [V, p]; [D, V, p] with exclusive structure parameters; None where P follows from the kernels.
        disagreement: F of each offset, [D, V] with equal rows, 1 at the start; None without the prior "agreement".
        center: running mean of each dataset's cosines, [D, V]; None unless the consistency is centered.
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
        prototypes = jax.random.normal(rngs.params(), (*each, volume, s.projection_dim))
        self.prototypes = parameter(prototypes, by_dataset) if s.prototypes == "learned" else None
        by_offset = (num_datasets, volume)
        measures = s.kernels == "selected" and s.prior == "agreement"
        self.disagreement = nnx.BatchStat(jnp.ones(by_offset), dataset_axis=0) if measures else None
        is_centered = s.kernels == "selected" and s.consistency == "centered_cosine"
        self.center = nnx.BatchStat(jnp.zeros(by_offset), dataset_axis=0) if is_centered else None
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
            structure = self.structure(dataset)
            gamma, cosine = select_kernels(seen, kernel_map, structure, self.selection, context, self.name)
            if self.center is not None and is_training(self, context):
                self._move_center(cosine, output_sites(seen, kernel_map), context)
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
        """Stack to select from: the shared kernel and that of the dataset, or one of them alone.

        Where alpha prefers the shared kernel by the prior "agreement", that is the dataset's kernel too: the datasets
        have not parted.
        """
        if "shared" in (dataset.kernels, self.selection.kernels):
            return self.shared[...][None]
        exclusive = dataset.pick(self.exclusive[...])
        if self.disagreement is not None:
            follows = self._prior_logit(dataset) >= 0
            exclusive = jnp.where(follows[:, None, None], self.shared[...], exclusive)
        return exclusive[None] if self.selection.kernels == "exclusive" else jnp.stack([self.shared[...], exclusive])

    def structure(self, dataset: DatasetContext) -> Structure:
        """alpha, A, P and centre of a dataset."""
        projection = self._of_structure(self.projection, dataset)
        if self.prototypes is not None:
            prototypes = self._of_structure(self.prototypes, dataset)
        else:
            shared = lax.stop_gradient(self.shared[...])
            responses = shared.mean(-1).astype(projection.dtype)
            prototypes = jnp.matmul(responses, projection, precision=lax.Precision.HIGHEST)
        center = None if self.center is None else dataset.pick(self.center[...])
        return Structure(jax.nn.sigmoid(self._prior_logit(dataset)), projection, prototypes, center)

    def _of_structure(self, value: nnx.Param, dataset: DatasetContext) -> Array:
        return dataset.pick(value[...]) if self.selection.structure_parameters == "exclusive" else value[...]

    def _prior_logit(self, dataset: DatasetContext) -> Float[Array, " v"]:
        """Logit of alpha."""
        logit, s = self._of_structure(self.prior, dataset), self.selection
        if self.disagreement is None:
            return logit
        return prior_logit(logit, dataset.pick(self.disagreement[...]), s.agreement_threshold, s.agreement_sharpness)

    def _move_center(self, cosine: Float[Array, "b v"], sites: Sites, context: ForwardContext) -> None:
        """Move the running mean of the cosines towards that of the batch, over all of the dataset's devices."""
        assert self.center is not None
        real = (sites_per_scan(sites) > 0)[:, None]
        total, count = jnp.where(real, lax.stop_gradient(cosine), 0).sum(0), real.sum()
        if context.axis_name is not None:
            total, count = lax.psum((total, count), context.axis_name)
        own = context.dataset_of(len(self.center[...])).weights[:, None]
        rate = jnp.where(count > 0, _CENTER_RATE, 0.0) * own
        self.center[...] += rate * (total / jnp.maximum(count, 1) - self.center[...])

"""Interface of a detector: its network, and the functions that the rest of the package calls beside it.

Training, prediction, evaluation, conversion and the report know a detector by two things: its network, a
`DetectorNetwork`, and its `DetectorKind`, which has the sites and maps of a batch, loss, boxes, and the names of
published weights. TR3D (`models.tr3d`) and FCAF3D (`models.fcaf3d`) are such kinds; docs/detectors.md says how to add a
third.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from h2a2_jax.layers import DatasetContext, ForwardContext, SelectiveConv
from h2a2_jax.losses import DetectionLoss
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.models.backbone import MinkResNet
from h2a2_jax.sparse import Sites, SiteSet, SparseTensor
from h2a2_jax.typing import AnyArray


@dataclass(frozen=True)
class HeadConfig:
    """Outputs of the head of a dataset.

    Attributes:
        dataset: name of the dataset.
        num_classes: number of classes.
        num_outputs: 6 for axis-aligned boxes, 8 for boxes with yaw.
        columns: columns of the dataset's classes in the union of all; None where it has a head of its own.
    """

    dataset: str
    num_classes: int
    num_outputs: int
    columns: tuple[int, ...] | None = None


HeadChoice = DatasetContext | Int[AnyArray, " k"] | None
"""Outputs wanted of a detector: the dataset whose head predicts, or columns of the union of classes, int32 [K]."""


class Predictions(NamedTuple):
    """Outputs of a head at every location of all levels, finest first, padding included.

    Attributes:
        locations: float32 [N, 3], metres: the corner of a location's voxel, without a half-voxel shift.
        scan: int32 [N], scan of each location; num_scans on padding.
        level: int32 [N], 0 for the finest: of TR3D 0 and 1 for strides of 16 and 32 voxels, of FCAF3D 0 to 3 for 8 to
            64.
        boxes: float32 [N, 8], box outputs: columns 0:6 in metres, for `decode_boxes` (TR3D, columns 3:6 exp()-ed
            extents) or `decode_faces` (FCAF3D, columns 0:6 exp()-ed distances to the faces); columns 6:8 for the yaw.
        logits: float32 [N, K], class scores before the sigmoid.
        centerness: float32 [N], FCAF3D: centerness before the sigmoid; None for TR3D.
        overflow: int32 [], FCAF3D: sites that the capacities of the plan had no place for; None for TR3D.
    """

    locations: Float[Array, "n 3"]
    scan: Int[Array, " n"]
    level: Int[Array, " n"]
    boxes: Float[Array, "n 8"]
    logits: Float[Array, "n k"]
    centerness: Float[Array, " n"] | None = None
    overflow: Int[Array, ""] | None = None

    def valid(self, num_scans: int) -> Bool[Array, " n"]:
        """True for the rows that are locations."""
        return self.scan < num_scans


class Targets(NamedTuple):
    """Facts of each dataset that its loss needs, with a leading dataset axis D; a loss takes those of one, without it.

    Attributes:
        label_to_level: int32 [D, K], level of TR3D's head that learns a class.
        class_mask: bool [D, K], False on padded classes.
        has_yaw: bool [D], True if the boxes of the dataset turn about z.
        columns: int32 [D, K], columns of the classes in one label space; None where each dataset has its head.
    """

    label_to_level: Int[Array, "*d k"]
    class_mask: Bool[Array, "*d k"]
    has_yaw: Bool[Array, "*d"]
    columns: Int[Array, "*d k"] | None = None


class DetectorNetwork(nnx.Module):
    """Network of a detector: a backbone of `MinkResNet`, a neck, and heads by dataset.

    A parameter with a leading dataset axis says so in its metadata (`dataset_axis=0`). Convolutions with their norms
    are `ConvNorm`s, which folding replaces. All other layers of backbone and neck must be the same for all datasets.
    Every parameter of separate heads must have the dataset axis, of which folding takes one entry.

    Attributes:
        config: architecture.
        heads_config: outputs of each dataset's head, in the order of the dataset axis.
        embedding: [D, d], embedding of each dataset, read by the layers with kernel selection and by prompt-driven
            norms; None without either.
        backbone: stem and stages.
        neck: layers between the stages and the heads.
        heads: layers that predict at the locations.
    """

    heads_config: tuple[HeadConfig, ...]

    def __init__(self, config: DetectorConfig, heads: Sequence[HeadConfig], *, rngs: nnx.Rngs):
        """Build the layers of the config; parameters are random from `rngs.params`.

        Args:
            config: architecture.
            heads: outputs of each dataset's head, in the order of the dataset axis.
            rngs: random streams.
        """
        self.config = config
        self.heads_config = tuple(heads)
        count, selection = len(heads), config.selection
        embedding = None if selection is None else _embeddings(count, selection.embedding_dim, rngs)
        self.backbone: Any = MinkResNet(config, count, rngs=rngs)
        self.neck: Any = self.build_neck(rngs)
        self.heads: Any = self.build_heads(rngs)
        if embedding is None and config.norm_affine == "prompt":
            # Drawn last: with prompts alone, all layers start as in the network of the same seed without.
            embedding = _embeddings(count, config.prompt_dim, rngs)
        self.embedding = embedding

    def build_neck(self, rngs: nnx.Rngs) -> nnx.Module:
        """Build the neck of `self.config`, for as many datasets as `self.heads_config` has heads."""
        raise NotImplementedError

    def build_heads(self, rngs: nnx.Rngs) -> nnx.Module:
        """Build the heads of `self.heads_config`."""
        raise NotImplementedError

    def __call__(
        self, features: Float[Array, "n c"], plan: Any, context: ForwardContext, head: HeadChoice = None
    ) -> Predictions:
        """Predict at every location of a batch of scans.

        Scans of a dataset that was not trained on need three choices: the dataset of classes and box parameters
        (`head`); the dataset of embedding, statistics and exclusive kernels, or the mean of all (`context.dataset`);
        and kernels selected by structure, or shared ones everywhere (`context.dataset.kernels`).

        Args:
            features: colour of the voxels, rows of `plan.voxels`.
            plan: sites and maps of the batch, as the kind pads them.
            context: context of the pass; its embedding is set here, and its compute type becomes that of all features.
            head: dataset whose head predicts, None for that of the context; of a detector with one label space the
                columns of the classes, None for all of them.
        """
        raise NotImplementedError

    def stages(
        self, features: Float[Array, "n c"], plan: Any, context: ForwardContext
    ) -> tuple[list[SparseTensor], DatasetContext, ForwardContext]:
        """Features of the backbone's stages, finest first; dataset of the pass; context of the layers that follow."""
        dataset = context.dataset_of(len(self.heads_config))
        if self.embedding is not None:
            context = replace(context, embedding=dataset.pick(self.embedding[...]))
        # Cast once: every layer returns the type of the features that it is given.
        x = SparseTensor(jnp.asarray(features, context.dtype), plan.voxels)
        stages, context = self.backbone(x, plan, context)
        return stages, dataset, context

    def locations(self, sites: Sites, level: int) -> tuple[Array, Array, Array]:
        """Locations, scans and levels of the sites of a level, as `Predictions` has them."""
        locations, scan = jnp.asarray(sites.coords)[:, 1:].astype(jnp.float32), jnp.asarray(sites.scan)
        return locations * self.config.voxel_size, scan, jnp.full(len(scan), level, jnp.int32)


@runtime_checkable
class Tables(Protocol):
    """Exact host tables of one batch, before padding."""

    @property
    def voxels(self) -> SiteSet:
        """Sites of the input."""

    @property
    def sizes(self) -> Any:
        """Sites of every level, as `DetectorKind.sizes` counts them."""


@dataclass(frozen=True)
class WeightSlot:
    """Place of a published parameter in a detector here.

    Attributes:
        variable: Flax variable that holds the parameter.
        index: index of the parameter in the variable; () for all of it.
        shape: published shape, which may have further axes of length 1.
    """

    variable: nnx.Variable
    index: tuple[Any, ...]
    shape: tuple[int, ...]


@runtime_checkable
class DetectorKind(Protocol):
    """A kind of detector: functions beside its network, without a state.

    Attributes:
        title: name of the detector in texts.
        levels: class of the named tuples of int with the sites, or the capacities, of every level: `voxels` first, and
            a method `fits(capacities)`.
        least: smallest capacities of a scan in prediction, so that a scan of a few points does not set those of all
            scans that follow.
    """

    title: str
    levels: Any
    least: Any

    def check(self, config: DetectorConfig) -> None:
        """Refuse options that the kind does not have.

        Raises:
            InputError: the config asks for one.
        """

    def build(self, config: DetectorConfig, heads: Any, *, rngs: nnx.Rngs) -> DetectorNetwork:
        """Build the network with random parameters; `heads` has a `HeadConfig` for each dataset, in their order."""

    def sizes(self, voxels: SiteSet, config: DetectorConfig) -> Any:
        """Number of sites of every level (`levels`), without a table; upper bounds where they depend on features.

        The sizes of a batch are the sums of those of its scans. The voxels are sites of stride 1.
        """

    def tables(self, voxels: SiteSet, config: DetectorConfig) -> Tables:
        """Every table that depends on the voxels alone; its `sizes` are those of `sizes`."""

    def fits(self, tables: Any, capacities: Any, layout: Any) -> bool:
        """Return True if the layout has places for every map at the capacities; one of machine "any" always has."""

    def pad(self, tables: Any, capacities: Any, layout: Any) -> Any:
        """The plan of a batch in the shape of a bucket, a pytree of numpy arrays with `voxels`, padded `Sites`.

        Plans of the same capacities and layout have the same structure, for they are stacked.

        Raises:
            InputError: a level does not fit its capacity.
            ValueError: the tables do not fit the layout.
        """

    def loss(
        self,
        out: Predictions,
        boxes: Float[AnyArray, "b g 7"],
        labels: Int[AnyArray, "b g"],
        targets: Targets,
        voxels: Sites,
        config: DetectorConfig,
        axis_name: Any = None,
    ) -> DetectionLoss:
        """Loss of one dataset's scans on this device, inside jit.

        Args:
            out: predictions of the network.
            boxes: ground-truth boxes, padded to g per scan: centre, sizes (m), yaw (rad).
            labels: class of each box, -1 for padding.
            targets: facts of the dataset, without the dataset axis.
            voxels: sites of the input, by which a scan without points is known.
            config: architecture.
            axis_name: mesh axis or axes over which the dataset's scans are spread. Counts by which terms are divided
                are summed over them, the loss is not: the caller sums the gradients.
        """

    def detect(
        self,
        out: Predictions,
        num_scans: int,
        *,
        rotated: bool,
        score_threshold: Float[AnyArray, ""],
        iou_threshold: Float[AnyArray, ""],
    ) -> tuple[Float[Array, "b k 7"], Float[Array, "b k"], Int32[Array, "b k"], Int32[Array, " b"]]:
        """Boxes of each scan, inside jit.

        Args:
            out: predictions, with as many columns of boxes and logits as the dataset has outputs and classes.
            num_scans: number of scans b of the batch; static.
            rotated: True if yaw counts; static.
            score_threshold: a box must score more than this in a class to be detected as that class.
            iou_threshold: overlap of footprints above which the box of lower score of a class is dropped.

        Returns:
            Boxes (centre, sizes in m, yaw in rad), scores, labels, and the number of them in each scan; behind that
            number rows are padding.
        """

    def support(self, tables: Any, layer: str) -> Float[np.ndarray, " v"]:
        """Share of the output sites of a layer with kernel selection that have a neighbour at each offset."""

    def slots(self, model: Any, dataset: int = 0) -> dict[str, WeightSlot]:
        """Places of every published parameter and running statistic by name; those of one dataset, by its index."""

    def published(self, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Weights by their present published names, old ones renamed; None if they are not of this kind."""

    def config_of(self, state: Mapping[str, np.ndarray]) -> DetectorConfig:
        """The architecture of published weights, by their names and shapes.

        Raises:
            InputError: there is no such backbone, or one of other blocks or another depth.
        """


def _embeddings(num_datasets: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """Normal embeddings [D, d] of the datasets."""
    return nnx.Param(jax.random.normal(rngs.params(), (num_datasets, width)), dataset_axis=0)


def selective_layers(network: DetectorNetwork) -> dict[str, SelectiveConv]:
    """Layers with kernel selection, by name, in the order of the forward pass."""
    blocks = (block for stage in network.backbone.stages for block in stage)
    parts = [network.backbone.stem, *(part for block in blocks for part in (block.first, block.second))]
    parts += network.neck.convolutions()
    return {part.conv.name: part.conv for part in parts if isinstance(part.conv, SelectiveConv)}

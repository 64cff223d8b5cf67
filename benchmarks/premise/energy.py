"""Response energy of the offsets of a convolution, and how it correlates between detectors.

    E[c, j] = mean over sites n of class c whose neighbour m at offset j exists of |x_m W_j|^2

The energy is the part of a layer's response that comes through each offset where the surface is a plane, an edge or a
corner. The mean is over existing neighbours only, because their existence is geometry and not learnt.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int
from scipy.stats import pearsonr, spearmanr

from benchmarks.premise.site_classes import SITE_CLASSES, classify_sites
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.batching import ScanBatch
from h2a2_jax.models import DetectorNetwork, DetectorPlan
from h2a2_jax.models.backbone import MinkResNet
from h2a2_jax.report.observation import PaddedShape, with_progress
from h2a2_jax.sparse import NeighborTable, SparseTensor

VOLUME = 27
CENTRE = VOLUME // 2
GROUPS = ("all", *SITE_CLASSES)
"""Rows of an energy profile: all sites, then those of each class."""


@dataclass
class EnergySums:
    """Sums of response energies over scans, by group of sites and offset.

    Attributes:
        total: [5, 27], sums of |x W_j|^2.
        count: [5, 27], pairs summed.
    """

    total: np.ndarray = field(default_factory=lambda: np.zeros((len(GROUPS), VOLUME)))
    count: np.ndarray = field(default_factory=lambda: np.zeros((len(GROUPS), VOLUME), np.int64))

    def add(
        self,
        energies: Float[np.ndarray, "27 n_in"],
        neighbors: Int[np.ndarray, "27 n_out"],
        classes: Int[np.ndarray, " n_out"],
    ) -> None:
        """Add a scan.

        Args:
            energies: |x_m W_j|^2 of every input row m and offset j.
            neighbors: Input row at each offset of each output row, -1 where there is none.
            classes: Classes of the output rows (`classify_sites`).
        """
        exists = neighbors >= 0
        found = np.where(exists, np.take_along_axis(energies.astype(np.float64), np.maximum(neighbors, 0), 1), 0)
        for g in range(len(GROUPS)):
            chosen = slice(None) if g == 0 else classes == g - 1
            self.total[g] += found[:, chosen].sum(1)
            self.count[g] += exists[:, chosen].sum(1)

    def profile(self, fewest: int = 10) -> Float[np.ndarray, "5 27"]:
        """Mean energy of each offset over the sum of the means; NaN where there are fewer than `fewest` pairs."""
        mean = np.where(self.count >= fewest, self.total / np.maximum(self.count, 1), np.nan)
        with np.errstate(invalid="ignore"):
            whole = np.nansum(mean, 1, keepdims=True)
            return mean / np.where(whole > 0, whole, np.nan)


class Correlation(NamedTuple):
    """Correlation of two energy profiles over the offsets that both have.

    Attributes:
        pearson: Linear correlation.
        spearman: Rank correlation.
    """

    pearson: float
    spearman: float


def correlate(
    a: Float[np.ndarray, " 27"], b: Float[np.ndarray, " 27"], with_centre: bool = True, fewest: int = 13
) -> Correlation:
    """Correlation of two profiles over offsets.

    Args:
        a: Profile; NaN where unknown.
        b: Another profile.
        with_centre: Include the centre offset, which dominates.
        fewest: Smallest number of offsets that both must know.

    Returns:
        NaN where fewer offsets are known, or one profile is constant.
    """
    known = np.isfinite(a) & np.isfinite(b)
    known[CENTRE] &= with_centre
    if known.sum() < fewest or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return Correlation(float("nan"), float("nan"))
    return Correlation(float(pearsonr(a[known], b[known])[0]), float(spearmanr(a[known], b[known])[0]))


PAIR_KINDS = (
    "trained, same start",
    "trained, other start",
    "same dataset, trained, other start",
    "untrained, same start",
    "untrained, other start",
)
"""Kinds of pairs of detectors; the last two are the controls, the third bounds what can be expected."""


@dataclass(frozen=True)
class Measured:
    """Profiles of one detector.

    Attributes:
        dataset: Dataset that it was trained on and whose scans it ran on.
        start: Seed of its first parameters; equal seeds are equal kernels.
        trained: False for a detector with its first parameters.
        profiles: Energy profiles [5, 27] by layer.
    """

    dataset: str
    start: int
    trained: bool
    profiles: dict[str, Float[np.ndarray, "5 27"]]


def pair_kind(a: Measured, b: Measured) -> str | None:
    """The kind of a pair, of `PAIR_KINDS`; None for pairs that are not compared."""
    if a.trained != b.trained or (a.dataset == b.dataset and (a.start == b.start or not a.trained)):
        return None
    if a.dataset == b.dataset:
        return PAIR_KINDS[2]
    return f"{'trained' if a.trained else 'untrained'}, {'same' if a.start == b.start else 'other'} start"


def correlations(measured: Sequence[Measured], with_centre: bool) -> dict[str, Float[np.ndarray, "l 5 2"]]:
    """By kind of pair, the mean correlation (Pearson, Spearman) over its pairs, by layer and group of sites.

    NaN where no pair has one; kinds without a pair are left out.
    """
    found: dict[str, list[np.ndarray]] = {}
    for a, b in itertools.combinations(measured, 2):
        kind = pair_kind(a, b)
        if kind is None:
            continue
        rows = [
            [correlate(a.profiles[layer][g], b.profiles[layer][g], with_centre) for g in range(len(GROUPS))]
            for layer in a.profiles
        ]
        found.setdefault(kind, []).append(np.array(rows))
    return {kind: _nanmean(np.stack(found[kind]), 0) for kind in PAIR_KINDS if kind in found}


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(axis), known.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


class EnergyProbe:
    """Response energies of the 3^3 residual convolutions of plain detectors of one dataset.

    Detectors of one architecture share the compiled program.

    Args:
        shape: Padded shape that holds every scan.
    """

    def __init__(self, shape: PaddedShape):
        self._shape = shape
        self._forward = jax.jit(_energy_pass, static_argnums=0)

    def measure(self, model: DetectorNetwork, batches: Sequence[ScanBatch], what: str) -> dict[str, EnergySums]:
        """Sums over scans, by layer in the order of the forward pass.

        Args:
            model: Detector of one dataset, without kernel selection.
            batches: Batches of one scan each.
            what: Title of the progress bar.
        """
        graph, state = nnx.split(model.backbone)
        sums: dict[str, EnergySums] = {}
        for batch in with_progress(batches, what, len(batches)):
            energies = jax.device_get(self._forward(graph, state, *self._shape.pad(batch)))
            classes = [classify_sites(residual.outputs) for _, _, residual in batch.tables.stages]
            for layer, stage, table in _layers(model.backbone, batch.tables.stages):
                sums.setdefault(layer, EnergySums()).add(
                    energies[layer][:, : len(table.inputs)], table.rows, classes[stage]
                )
        return sums


def site_class_counts(batches: Sequence[ScanBatch]) -> np.ndarray:
    """Number of sites of each stage and class, [4, 4]."""
    counts = np.zeros((4, len(SITE_CLASSES)), np.int64)
    for batch in batches:
        for s, (_, _, residual) in enumerate(batch.tables.stages):
            counts[s] += np.bincount(classify_sites(residual.outputs), minlength=len(SITE_CLASSES))
    return counts


def _layers(
    backbone: MinkResNet, tables: Sequence[tuple[NeighborTable, NeighborTable, NeighborTable]]
) -> Iterator[tuple[str, int, NeighborTable]]:
    """(name, stage, neighbours) of every 3^3 residual convolution."""
    for s, (stage, (down, _, residual)) in enumerate(zip(backbone.stages, tables, strict=True)):
        for b in range(len(stage)):
            yield f"layer{s + 1}_{b}.conv1", s, down if b == 0 else residual
            yield f"layer{s + 1}_{b}.conv2", s, residual


def _energy_pass(
    graph: nnx.GraphDef, state: nnx.State, features: Float[Array, "n c"], plan: DetectorPlan
) -> dict[str, Float[Array, "27 m"]]:
    """|x_m W_j|^2 of every residual convolution, offset j and input row m, by layer."""
    backbone = nnx.merge(graph, state)
    context = ForwardContext(DatasetContext(jnp.ones(1)), training=False)
    energies: dict[str, Array] = {}
    y = backbone.stem(SparseTensor(features, plan.voxels), plan, context)
    for s, (stage, maps) in enumerate(zip(backbone.stages, plan.stages, strict=True)):
        for b, block in enumerate(stage):
            strided = {"down_map": maps.down, "skip_map": maps.skip} if b == 0 else {}
            middle = jax.nn.relu(block.first(y, maps.down if b == 0 else maps.residual, context).features)
            for part, conv, x in (("conv1", block.first.conv, y.features), ("conv2", block.second.conv, middle)):
                energies[f"layer{s + 1}_{b}.{part}"] = offset_energies(x, conv.kernel[...])
            y = block(y, maps.residual, context, **strided)
    return energies


def offset_energies(x: Float[Array, "m c_in"], kernel: Float[Array, "v c_in c_out"]) -> Float[Array, "v m"]:
    """|x_m W_j|^2 of every row m and offset j."""
    return lax.map(lambda w: jnp.square(x @ w).sum(-1), kernel)

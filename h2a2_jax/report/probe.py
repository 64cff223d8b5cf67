"""Runs detectors on a few validation scans and keeps what the report looks at."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float
from tqdm import tqdm

from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.predictor import prepare
from h2a2_jax.layers import DatasetContext, ForwardContext, SparseConv
from h2a2_jax.loader.batching import ScanBatch, collate
from h2a2_jax.models import TR3D, DetectorConfig, DetectorPlan, LevelSizes, PlanLayout, fits_layout, pad_plan
from h2a2_jax.models.backbone import MinkResNet
from h2a2_jax.report.energy import EnergySums
from h2a2_jax.report.geometry import SITE_CLASSES, classify_sites
from h2a2_jax.scans.scan import ScanSource, load_or_skip
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.sparse import NeighborTable, SparseTensor

T = TypeVar("T")


def with_progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yields items, with how many are done and the time left on standard error."""
    yield from tqdm(items, desc=what, total=total, unit="scan", mininterval=progress_interval())


def load_batches(source: ScanSource, spec: DatasetSpec, count: int, voxel_size: float) -> list[ScanBatch]:
    """Up to `count` scans spread over a source, each a batch of its own, drawn by the test protocol.

    Scans that cannot be used, or are empty, are passed over.

    Raises:
        InputError: none can be used.
    """
    indices = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)).tolist()
    batches = []
    for scan in with_progress(load_or_skip(source, {}, indices), f"{spec.name}: loading", len(indices)):
        if len(scan.points):
            try:
                batches.append(collate([prepare(scan, spec)], voxel_size))
            except InputError:
                continue
    if not batches:
        raise InputError(f"None of the validation scans of {spec.name} can be used: check its data.")
    return batches


@dataclass(frozen=True)
class Shape:
    """One padded shape for all scans of a report, so that a detector is compiled once."""

    capacities: LevelSizes
    layout: PlanLayout

    @classmethod
    def of(cls, batches: Sequence[ScanBatch], config: DetectorConfig) -> "Shape":
        """The smallest that holds every scan."""
        capacities = LevelSizes(*(max(1, *sizes) for sizes in zip(*(b.tables.sizes for b in batches), strict=True)))
        layout = PlanLayout.of(config)
        if not all(fits_layout(batch.tables, capacities, layout) for batch in batches):
            layout = replace(layout, machine="any")
        return cls(capacities, layout)

    def pad(self, batch: ScanBatch) -> tuple[np.ndarray, DetectorPlan]:
        """Features and plan of a batch."""
        plan = pad_plan(batch.tables, self.capacities, self.layout)
        return sparse.pad_rows(batch.features, self.capacities.voxels), plan


@dataclass(frozen=True)
class LayerSelection:
    """Kernel selection of a layer on validation scans.

    Attributes:
        alpha: [D, V], by dataset.
        beta: [D][S, V], by dataset and scan.
        gamma: [D][S, V], 1 for the shared kernel.
    """

    alpha: Float[np.ndarray, "d v"]
    beta: list[np.ndarray]
    gamma: list[np.ndarray]

    @property
    def shared_share(self) -> Float[np.ndarray, "d v"]:
        """Share of scans that take the shared kernel."""
        return np.stack([scans.mean(0) for scans in self.gamma])


def observe_selection(model: TR3D, batches: Sequence[Sequence[ScanBatch]]) -> dict[str, LayerSelection]:
    """alpha, beta and gamma of each layer with 3^3 kernel selection, as the detector predicts.

    Args:
        model: trained.
        batches: of each dataset, in the order of the dataset axis, one scan each.

    Returns:
        By layer, in the order of the forward pass; empty for a detector without kernel selection.
    """
    shape = Shape.of([batch for own in batches for batch in own], model.config)
    graph, state = nnx.split(model)
    order: list[str] = []
    forward = jax.jit(partial(_selection_pass, graph, order))
    seen: list[list[dict[str, np.ndarray]]] = []
    names = [head.dataset for head in model.heads_config]
    for d, own in enumerate(batches):
        weights = jnp.asarray(np.eye(len(batches), dtype=np.float32)[d])
        runs = with_progress(own, f"{names[d]}: kernel selection", len(own))
        seen.append([jax.device_get(forward(state, *shape.pad(batch), weights)) for batch in runs])
    layers = [name.removesuffix(".gamma") for name in order if name.endswith(".gamma")]
    return {
        layer: LayerSelection(
            np.stack([scans[0][f"{layer}.alpha"] for scans in seen]),
            *([np.concatenate([s[f"{layer}.{part}"] for s in scans]) for scans in seen] for part in ("beta", "gamma")),
        )
        for layer in layers
    }


def _selection_pass(
    graph: nnx.GraphDef,
    order: list[str],
    state: nnx.State,
    features: Float[Array, "n c"],
    plan: DetectorPlan,
    weights: Float[Array, " d"],
) -> dict[str, Array]:
    seen: dict[str, Array] = {}

    def tap(name: str, value: Any) -> None:
        if name.endswith((".alpha", ".beta", ".gamma")):
            seen[name] = value

    context = ForwardContext(DatasetContext(weights), training=False, tap=tap)
    nnx.merge(graph, state)(features, plan, context)
    order[:] = list(seen)  # a dict comes back from jit with its keys sorted
    return seen


class EnergyProbe:
    """Response energies of the 3^3 residual convolutions of plain detectors of one dataset.

    Detectors of one architecture share what is compiled.
    """

    def __init__(self, shape: Shape):
        """Args: `shape` that holds every scan to come."""
        self._shape = shape
        self._forward = jax.jit(_energy_pass, static_argnums=0)

    def measure(self, model: TR3D, batches: Sequence[ScanBatch], what: str) -> dict[str, EnergySums]:
        """Sums over scans, by layer in the order of the forward pass.

        Args:
            model: of one dataset, without kernel selection.
            batches: one scan each.
            what: to show with the progress.
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
                energies[f"layer{s + 1}_{b}.{part}"] = offset_energies(x, _kernel(conv))
            y = block(y, maps.residual, context, **strided)
    return energies


def offset_energies(x: Float[Array, "m c_in"], kernel: Float[Array, "v c_in c_out"]) -> Float[Array, "v m"]:
    """|x_m W_j|^2 of every row m and offset j."""
    return lax.map(lambda w: jnp.square(x @ w).sum(-1), kernel)


def _kernel(conv: SparseConv) -> Float[Array, "v c_in c_out"]:
    return conv.kernel[...]

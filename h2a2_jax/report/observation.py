"""Kernel selection of a detector on validation scans, each scan a batch of its own."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from h2a2_jax import sparse
from h2a2_jax.errors import InputError
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.predictor import prepare
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.batching import ScanBatch, collate
from h2a2_jax.models import DetectorConfig, DetectorNetwork, PlanLayout, kind_of, selective_layers
from h2a2_jax.scans.scan import ScanSource, load_or_skip
from h2a2_jax.scans.specs import DatasetSpec

T = TypeVar("T")


def with_progress(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yield items, with a progress bar on standard error."""
    yield from tqdm(items, desc=title, total=total, unit="scan", mininterval=progress_interval())


def load_batches(source: ScanSource, spec: DatasetSpec, count: int, model: DetectorConfig) -> list[ScanBatch]:
    """Up to `count` scans spread over a source, each a batch of its own, sampled by the test protocol.

    Empty scans and scans that cannot be used are left out.

    Raises:
        InputError: no scan can be used.
    """
    indices = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)).tolist()
    batches = []
    for scan in with_progress(load_or_skip(source, {}, indices), f"{spec.name}: loading", len(indices)):
        if len(scan.points):
            try:
                batches.append(collate([prepare(scan, spec)], model))
            except InputError:
                continue
    if not batches:
        raise InputError(f"None of the validation scans of {spec.name} can be used: check its data.")
    return batches


@dataclass(frozen=True)
class PaddedShape:
    """One padded shape for many scans, so that a detector is compiled once.

    `capacities` are the numbers of sites of every level after padding.
    """

    capacities: Any
    layout: PlanLayout

    @classmethod
    def of(cls, batches: Sequence[ScanBatch], config: DetectorConfig) -> "PaddedShape":
        """The smallest shape that holds every scan."""
        kind, layout = kind_of(config), PlanLayout.of(config)
        each = zip(*(batch.tables.sizes for batch in batches), strict=True)
        capacities = kind.levels(*(max(1, *sizes) for sizes in each))
        if not all(kind.fits(batch.tables, capacities, layout) for batch in batches):
            layout = replace(layout, machine="any")  # lists of one machine may not fit scans of other sizes
        return cls(capacities, layout)

    def pad(self, batch: ScanBatch) -> tuple[np.ndarray, Any]:
        """Features and plan of a batch."""
        plan = kind_of(self.layout.model).pad(batch.tables, self.capacities, self.layout)
        return sparse.pad_rows(batch.features, self.capacities.voxels), plan


@dataclass(frozen=True)
class LayerSelection:
    """Kernel selection of a layer on validation scans.

    Attributes:
        alpha: Offset validity prior [D, V], by dataset.
        beta: Structural consistency, for each dataset [S, V] by scan.
        gamma: Selection, for each dataset [S, V] by scan; 1 for the shared kernel.
        support: Share of the output sites that have a neighbour at the offset [D, V], mean over scans.
        gradients: F [V], disagreement of the datasets' gradients at the offset; None without the prior "agreement".
    """

    alpha: Float[np.ndarray, "d v"]
    beta: list[np.ndarray]
    gamma: list[np.ndarray]
    support: Float[np.ndarray, "d v"]
    gradients: Float[np.ndarray, " v"] | None

    @property
    def shared_share(self) -> Float[np.ndarray, "d v"]:
        """Share of the scans that take the shared kernel, by dataset and offset."""
        return np.stack([scans.mean(0) for scans in self.gamma])


def observe_selection(model: DetectorNetwork, batches: Sequence[Sequence[ScanBatch]]) -> dict[str, LayerSelection]:
    """alpha, beta, gamma, support and F of each layer with 3^3 kernel selection, as the detector predicts.

    Batches have one scan each and are grouped by dataset, in the order of the dataset axis. The layers are in the order
    of the forward pass; a detector without kernel selection has none.
    """
    kind, shape = kind_of(model.config), PaddedShape.of([batch for own in batches for batch in own], model.config)
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
    measured = {name: layer.disagreement for name, layer in selective_layers(model).items()}

    def by_scan(layer: str, part: str) -> list[np.ndarray]:
        return [np.concatenate([s[f"{layer}.{part}"] for s in scans]) for scans in seen]

    return {
        layer: LayerSelection(
            alpha=np.stack([scans[0][f"{layer}.alpha"] for scans in seen]),
            beta=by_scan(layer, "beta"),
            gamma=by_scan(layer, "gamma"),
            support=np.stack([np.mean([kind.support(batch.tables, layer) for batch in own], 0) for own in batches]),
            gradients=None if (f := measured[layer]) is None else np.asarray(f[...][0], np.float64),
        )
        for layer in layers
    }


def _selection_pass(
    graph: nnx.GraphDef,
    order: list[str],
    state: nnx.State,
    features: Float[Array, "n c"],
    plan: Any,
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

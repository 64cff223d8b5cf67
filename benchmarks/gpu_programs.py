"""Programs that are estimated for a GPU (`gpu_aot`) and timed on one (`gpu`): evaluation and a step of training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.convolution import Layer, detector_layers
from benchmarks.detector import WIDTHS
from benchmarks.scans import load_points
from h2a2_jax import sparse
from h2a2_jax.inference.folding import fold
from h2a2_jax.layers import DatasetContext, ForwardContext, SelectionConfig
from h2a2_jax.models import (
    TR3D,
    DetectorConfig,
    DetectorNetwork,
    DetectorPlan,
    HeadConfig,
    PlanLayout,
    detector_tables,
    fits_layout,
    pad_plan,
)
from h2a2_jax.sparse.conv_parts import Algorithm

NO_LISTS = ("implicit", "im2col", "gather", "segment_sum")
"""Algorithms that read the neighbours alone."""


@dataclass(frozen=True)
class Case:
    """A detector on a batch of copies of one scan.

    Attributes:
        scan: name of the scan.
        config: architecture.
        plan: maps of the batch (numpy arrays).
        layers: convolutions of the detector.
    """

    scan: str
    config: DetectorConfig
    plan: DetectorPlan
    layers: list[Layer]

    @classmethod
    def of(cls, scan: Path | None, batch: int, model: str, width: str, algorithm: Algorithm) -> "Case":
        """The case of a scan file, or of a procedural room.

        Args:
            scan: as in `load_points`.
            batch: number of copies.
            model: "tr3d" or "sfks".
            width: name of a width of `benchmarks.detector`.
            algorithm: algorithm of the convolutions; it decides which lists the maps carry.

        Raises:
            InputError: the scan cannot be read.
        """
        config = DetectorConfig(**WIDTHS[width], selection=SelectionConfig() if model == "sfks" else None)
        name, points = load_points(scan)
        tables = detector_tables(sparse.voxelize([points] * batch, config.voxel_size).sites)
        capacities = sparse.BucketLadder(tables.sizes).capacities(0)
        layout = PlanLayout.of(config, "gpu" if algorithm in NO_LISTS else "accelerator")
        if not fits_layout(tables, capacities, layout):
            layout = PlanLayout.of(config, "any")
        plan = pad_plan(tables, capacities, layout)
        return cls(name, config, plan, list(detector_layers(config, tables, plan)))

    @property
    def flops(self) -> float:
        """Operations of one forward pass over the pairs there are."""
        return sum(layer.flops * layer.times for layer in self.layers)

    def program(self, kind: str, dtype: str, algorithm: Algorithm) -> tuple[Callable[..., Any], Callable[[], tuple]]:
        """A program and a function that makes its arguments but for the plan; the plan is its last argument.

        Args:
            kind: "evaluate", the detector of one dataset with everything folded that depends on the dataset alone; or
                "step", a training step with AdamW that returns the new state in the place of its first arguments.
            dtype: "bfloat16"; "tf32", float32 with products as the machine takes them by default; or "float32", whose
                products are float32 too.
            algorithm: algorithm of the convolutions.
        """
        one = DatasetContext.one(0, 1)
        context = partial(
            ForwardContext,
            one,
            dtype=jnp.bfloat16 if dtype == "bfloat16" else None,
            algorithm=algorithm,
            precision=jax.lax.Precision.HIGHEST if dtype == "float32" else None,
        )

        def make() -> DetectorNetwork:
            return TR3D(self.config, [HeadConfig("scan", 18, 6)], rngs=nnx.Rngs(0))

        shape = self.plan.voxels.capacity, self.config.in_channels
        if kind == "evaluate":

            def folded() -> DetectorNetwork:
                return fold(make(), one, 0)

            graph = nnx.graphdef(nnx.eval_shape(folded))

            def evaluate(state: Any, features: Any, plan: Any) -> Any:
                return nnx.merge(graph, state)(features, plan, context())

            return evaluate, lambda: (nnx.state(folded()), jax.random.uniform(jax.random.key(0), shape))
        graph = nnx.split(nnx.eval_shape(make), nnx.Param, ...)[0]
        optimizer = optax.adamw(1e-3)

        def loss(params: Any, rest: Any, features: Any, plan: Any) -> Any:
            out = nnx.merge(graph, params, rest, copy=True)(features, plan, context(training=True))
            return (out.logits**2).mean() + (out.boxes**2).mean()

        def step(state: Any, rest: Any, features: Any, plan: Any) -> Any:
            params, moments = state
            value, grads = jax.value_and_grad(loss)(params, rest, features, plan)
            updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), value

        def arguments() -> tuple:
            params, rest = nnx.state(make(), nnx.Param, ...)
            return (params, optimizer.init(params)), rest, jax.random.uniform(jax.random.key(0), shape)

        return step, arguments

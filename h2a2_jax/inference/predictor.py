"""Boxes of scans from a trained detector."""

import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from h2a2_jax import sparse
from h2a2_jax.boxes.codec import ROTATED_CHANNELS
from h2a2_jax.boxes.nms import Detections, detections_from_predictions
from h2a2_jax.errors import InputError
from h2a2_jax.inference.folding import folded_parameters
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.augment import sample_points
from h2a2_jax.loader.batching import BucketLadder, collate
from h2a2_jax.models import TR3D, DetectorPlan, LevelSizes, PlanLayout, Predictions, fits_layout, pad_plan
from h2a2_jax.scans.scan import Scan, ScanError
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.typing import AnyArray

_RATIO = 1.5
_RUNGS_BELOW = 2
_SMALLEST = LevelSizes(2048, 2048, 2048, 1024, 512, 256, 128, 512, 4096)
"""Least capacities of one scan: a first scan of a few points must not set the proportions of all that follow."""


class Predictor:
    """Runs a detector on scans; its running statistics are used, nothing in it changes.

    What depends on the dataset alone is computed once (`folding`). Of scans that no dataset of the model stands for one
    chooses whose head predicts (the dataset that `predict` is given), whose embedding, statistics and exclusive kernels
    are used (`conditioning`), and whether kernels are selected or the shared ones everywhere (`kernels`).

    Each number of scans in a pass has its own ladder of padded shapes, set by the first pass: that one is two buckets
    up, so that smaller scans have smaller shapes. A shape is compiled when it is first needed. No scan is ever cropped.
    """

    def __init__(
        self,
        model: TR3D,
        specs: Sequence[DatasetSpec],
        *,
        score_threshold: float = 0.01,
        iou_threshold: float = 0.5,
        conditioning: str = "own",
        kernels: Literal["selected", "shared"] = "selected",
        folded: bool = True,
    ):
        """Takes over a model.

        Args:
            model: trained.
            specs: of its datasets, in the order of its dataset axis.
            score_threshold: lowest score of a box.
            iou_threshold: bird's-eye-view IoU above which the lower score of a class is suppressed.
            conditioning: "own": of the dataset whose head predicts; the name of another one; or "mean", of all.
            kernels: "selected" by each scan's structure, or "shared" everywhere.
            folded: whether what depends on the dataset alone is computed once; the results are equal up to rounding.

        Raises:
            ValueError: the specs are not those of the model.
            InputError: the model was not trained on the dataset that conditions it.
        """
        given, expected = [spec.name for spec in specs], [head.dataset for head in model.heads_config]
        if given != expected:
            raise ValueError(f"specs are those of {', '.join(given)}; the model expects {', '.join(expected)}.")
        self.specs = tuple(specs)
        self._thresholds = np.array(score_threshold, np.float32), np.array(iou_threshold, np.float32)
        self._voxel_size = model.config.voxel_size
        self._layout = PlanLayout.of(model.config)
        self._kernels = kernels
        self._conditioning = conditioning
        if conditioning not in ("own", "mean"):
            self._index(conditioning)
        graph, state = nnx.split(model)
        self._state = jax.tree.map(jnp.asarray, state)
        # One program serves all datasets: folded detectors differ in their parameters only.
        self._fold = jax.jit(partial(_fold, graph)) if folded else None
        if folded:
            graph = nnx.graphdef(nnx.eval_shape(partial(_folded, graph), self._state, *self._contexts(0)))
        self._forward = jax.jit(partial(_forward, graph))
        self._folded_states: dict[int, nnx.State] = {}
        self._ladders: dict[int, BucketLadder] = {}
        self._lock = threading.Lock()

    def spec(self, dataset: str) -> DatasetSpec:
        """The spec of one of the model's datasets.

        Raises:
            InputError: the model was not trained on it.
        """
        return self.specs[self._index(dataset)]

    def take_over(self, model: TR3D) -> None:
        """Go on with the parameters of another model of the same structure, for which nothing is compiled anew.

        Args:
            model: trained.

        Raises:
            ValueError: its structure is another one.
        """
        state = jax.tree.map(jnp.asarray, nnx.split(model)[1])
        if jax.tree.structure(state) != jax.tree.structure(self._state):  # type: ignore[operator]
            raise ValueError("the model has other parameters than the predictor was made for: make another predictor.")
        with self._lock:
            self._state, self._folded_states = state, {}

    @property
    def bucket_bases(self) -> dict[int, LevelSizes]:
        """The lowest padded shape by number of scans in a pass, as scans set it."""
        with self._lock:
            return {count: ladder.base for count, ladder in self._ladders.items()}

    def set_bucket_bases(self, bases: Mapping[int, LevelSizes]) -> None:
        """Take the padded shapes of another predictor (`bucket_bases`), so that the same programs are compiled."""
        with self._lock:
            self._ladders |= {count: BucketLadder(base, _RATIO) for count, base in bases.items()}

    def predict(self, scans: Sequence[Scan], dataset: str, seconds: dict[str, float] | None = None) -> list[Detections]:
        """Boxes of scans, in one pass; those of one do not depend on the others.

        May be called from several threads.

        Args:
            scans: as they are to be seen: `prepare` draws their points as the dataset's protocol says.
            dataset: whose head, statistics and exclusive kernels are used.
            seconds: what the pass takes is added here: "maps" (voxels, kernel maps, padding), "network", "boxes"
                (decoding, suppression).

        Returns:
            For each scan its boxes, in the frame of its points; none for a scan without points.

        Raises:
            InputError: the model was not trained on the dataset.
            ScanError: a coordinate is not finite, or farther from the origin than voxels reach.
        """
        index = self._index(dataset)
        if not scans:
            return []
        times = [time.perf_counter()]
        try:
            batch = collate(scans, self._voxel_size)
        except InputError:
            for scan in scans:
                self._check(scan)
            raise
        capacities = self._capacities(batch.tables.sizes, len(scans))
        layout = self._layout
        if not fits_layout(batch.tables, capacities, layout):
            layout = replace(layout, machine="any")
        plan = pad_plan(batch.tables, capacities, layout)
        features = sparse.pad_rows(batch.features, capacities.voxels)
        parameters = self._parameters(index)
        times.append(time.perf_counter())
        out = jax.block_until_ready(self._forward(*parameters, features, plan))
        times.append(time.perf_counter())
        spec = self.specs[index]
        found = _detect(
            out, *self._thresholds, num_scans=len(scans), classes=spec.num_classes, outputs=spec.num_outputs
        )
        boxes, scores, labels, counts = map(np.asarray, found)
        detections = [
            Detections(boxes[i, :count].copy(), scores[i, :count].copy(), labels[i, :count].copy())
            for i, count in enumerate(counts)
        ]
        times.append(time.perf_counter())
        if seconds is not None:
            for stage, taken in zip(("maps", "network", "boxes"), np.diff(times).tolist(), strict=True):
                seconds[stage] = seconds.get(stage, 0.0) + taken
        return detections

    def _contexts(self, head: int) -> tuple[DatasetContext, DatasetContext]:
        """What conditions the network, and whose head predicts."""
        count = len(self.specs)
        heads = DatasetContext.one(head, count)
        if self._conditioning == "mean":
            return DatasetContext.mean(count, self._kernels), heads
        own = head if self._conditioning == "own" else self._index(self._conditioning)
        return replace(DatasetContext.one(own, count), kernels=self._kernels), heads

    def _parameters(self, head: int) -> tuple[nnx.State, tuple[DatasetContext, DatasetContext]]:
        """Parameters and contexts of a pass; folded ones are kept."""
        contexts = self._contexts(head)
        if self._fold is None:
            return self._state, contexts
        with self._lock:
            if head not in self._folded_states:
                self._folded_states[head] = self._fold(self._state, *contexts)
        only = DatasetContext(jnp.ones(1), self._kernels)
        return self._folded_states[head], (only, only)

    def _capacities(self, sizes: LevelSizes, count: int) -> LevelSizes:
        with self._lock:
            if count not in self._ladders:
                base = [
                    max(count * least, int(np.ceil(size / _RATIO**_RUNGS_BELOW)))
                    for size, least in zip(sizes, _SMALLEST, strict=True)
                ]
                self._ladders[count] = BucketLadder(LevelSizes(*base), _RATIO)
            ladder = self._ladders[count]
        bucket = ladder.bucket(sizes)
        assert bucket is not None  # without a limit there is always one
        return ladder.capacities(bucket)

    def _index(self, dataset: str) -> int:
        names = [spec.name for spec in self.specs]
        if dataset not in names:
            raise InputError(f"The model was trained on {', '.join(names)}, not on {dataset!r}: choose one of them.")
        return names.index(dataset)

    def _check(self, scan: Scan) -> None:
        try:
            sparse.voxelize([scan.points], self._voxel_size)
        except InputError as error:
            raise ScanError(scan.name, f"Scan {scan.name} cannot be used: {error}") from error


def prepare(scan: Scan, spec: DatasetSpec, draw: int = 0) -> Scan:
    """Draws a scan's points as the dataset's test protocol says.

    Args:
        scan: all its points.
        spec: of the dataset whose head is to predict.
        draw: number of the drawing; the same scan gets the same points in the same one.
    """
    if not len(scan.points):
        return scan
    seed = zlib.crc32(scan.name.encode())
    return sample_points(scan, spec.test_sampling, np.random.default_rng(seed if draw == 0 else (seed, draw)))


@partial(jax.jit, static_argnames=("num_scans", "classes", "outputs"))
def _detect(
    out: Predictions,
    score_threshold: Float[AnyArray, ""],
    iou_threshold: Float[AnyArray, ""],
    *,
    num_scans: int,
    classes: int,
    outputs: int,
) -> tuple[Float[Array, "b k 7"], Float[Array, "b k"], Int32[Array, "b k"], Int32[Array, " b"]]:
    """Boxes, scores, labels of each scan, and how many they are."""
    detect = partial(
        detections_from_predictions,
        locations=out.locations,
        outputs=out.boxes[:, :outputs],
        logits=out.logits[:, :classes],
        rotated=outputs == ROTATED_CHANNELS,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
    )
    return jax.vmap(lambda scan: detect(valid=out.scan == scan))(jnp.arange(num_scans))


def _fold(graph: nnx.GraphDef, state: nnx.State, dataset: DatasetContext, head: DatasetContext) -> nnx.State:
    return nnx.state(_folded(graph, state, dataset, head))


def _folded(graph: nnx.GraphDef, state: nnx.State, dataset: DatasetContext, head: DatasetContext) -> TR3D:
    return folded_parameters(nnx.merge(graph, state), dataset, head)


def _forward(
    graph: nnx.GraphDef,
    state: nnx.State,
    contexts: tuple[DatasetContext, DatasetContext],
    features: Float[Array, "n c"],
    plan: DetectorPlan,
) -> Predictions:
    dataset, head = contexts
    return nnx.merge(graph, state)(features, plan, ForwardContext(dataset, training=False), head)

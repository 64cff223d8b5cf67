"""Boxes of scans from a trained detector, and the padded shapes that a run remembers for later processes."""

import contextlib
import itertools
import json
import os
import threading
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32
from tqdm import tqdm

from h2a2_jax import sparse
from h2a2_jax.boxes.codec import ROTATED_CHANNELS
from h2a2_jax.boxes.nms import Detections, detections_from_predictions
from h2a2_jax.compilation import use_compilation_cache
from h2a2_jax.config import EvalConfig
from h2a2_jax.errors import InputError
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.folding import folded_parameters
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.augment import sample_points
from h2a2_jax.loader.batching import BucketLadder, collate
from h2a2_jax.models import TR3D, DetectorPlan, LevelSizes, PlanLayout, Predictions, fits_layout, pad_plan
from h2a2_jax.scans.scan import Scan, ScanError, ScanSource, load_or_skip
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.sparse.xla_cpu import compiler_options
from h2a2_jax.typing import AnyArray

_RATIO = 1.5
"""Capacity of a bucket over that of the next lower one."""
_BUCKETS_BELOW = 2
"""Buckets below that of the first scan, for smaller scans."""
_SMALLEST = LevelSizes(2048, 2048, 2048, 1024, 512, 256, 128, 512, 4096)
"""Least capacities of one scan: a first scan of a few points must not set the proportions of all that follow."""


@runtime_checkable
class Predicts(Protocol):
    """Anything that finds boxes in scans, such as `Predictor`."""

    def predict(self, scans: Sequence[Scan], dataset: str) -> list[Detections]:
        """Boxes of each scan, in the frame of its points."""


class Predictor:
    """Runs a detector on scans; its running statistics are used, nothing in it changes.

    Everything that depends on the dataset alone is computed once (`folding`). For scans that no dataset of the model
    stands for, three things can be chosen: whose head predicts (the dataset that `predict` is given), whose embedding,
    statistics and exclusive kernels are used (`conditioning`), and whether kernels are selected or the shared ones are
    used everywhere (`kernels`).

    Each number of scans in a pass has its own ladder of padded shapes. The first pass sets it and takes the third
    bucket, so that smaller scans have smaller shapes. A shape is compiled when it is first needed. No scan is ever
    cropped.

    Attributes:
        specs: the datasets of the model, in the order of its dataset axis.
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
        """Take over a trained model; the thresholds and choices are those of `Detector.restore`.

        The specs are in the order of the model's dataset axis. With or without `folded`, results are equal up to
        rounding.

        Raises:
            ValueError: the specs are not those of the model.
            InputError: the model was not trained on the dataset that conditions it.
        """
        given, expected = [spec.name for spec in specs], [head.dataset for head in model.heads_config]
        if given != expected:
            raise ValueError(f"specs are those of {', '.join(given)}; the model expects {', '.join(expected)}.")
        self.specs = tuple(specs)
        self._thresholds = np.array(score_threshold, np.float32), np.array(iou_threshold, np.float32)
        self._voxel_size, self._layout = model.config.voxel_size, PlanLayout.of(model.config)
        self._kernels, self._conditioning = kernels, conditioning
        if conditioning not in ("own", "mean"):
            self._index(conditioning)
        graph, state = nnx.split(model)
        self._state = jax.tree.map(jnp.asarray, state)
        self._fold = None
        if folded:
            # One program serves all datasets: folded detectors differ in their parameters only.
            self._fold = jax.jit(partial(_fold, graph))
            graph = nnx.graphdef(nnx.eval_shape(partial(_fold_model, graph), self._state, *self._contexts(0)))
        self._forward = jax.jit(partial(_forward, graph), compiler_options=compiler_options())
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
        """Replace the parameters by those of another model of the same structure; nothing is compiled anew.

        Raises:
            ValueError: the structure is another one.
        """
        state = jax.tree.map(jnp.asarray, nnx.split(model)[1])
        if jax.tree.structure(state) != jax.tree.structure(self._state):  # type: ignore[operator]
            raise ValueError("the model has other parameters than the predictor was made for: make another predictor.")
        with self._lock:
            self._state, self._folded_states = state, {}

    @property
    def bucket_bases(self) -> dict[int, LevelSizes]:
        """The lowest padded shape of each ladder, by number of scans in a pass."""
        with self._lock:
            return {count: ladder.base for count, ladder in self._ladders.items()}

    def set_bucket_bases(self, bases: Mapping[int, LevelSizes]) -> None:
        """Take the padded shapes of another predictor (`bucket_bases`), so that the same programs are compiled."""
        with self._lock:
            self._ladders |= {count: BucketLadder(base, _RATIO) for count, base in bases.items()}

    def predict(self, scans: Sequence[Scan], dataset: str, seconds: dict[str, float] | None = None) -> list[Detections]:
        """Boxes of scans by the head of a dataset, in one pass; those of a scan do not depend on the other scans.

        All points of the scans are used: `prepare` draws points as the dataset's protocol says. The time of the pass is
        added to `seconds` by stage: "maps" (voxels, kernel maps, padding), "network", "boxes" (decoding, suppression).
        May be called from several threads.

        Returns:
            The boxes of each scan, in the frame of its points; none for a scan without points.

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
            for scan in scans:  # find the scan that is to blame
                try:
                    sparse.voxelize([scan.points], self._voxel_size)
                except InputError as error:
                    raise ScanError(scan.name, f"Scan {scan.name} cannot be used: {error}") from error
            raise
        capacities = self._capacities(batch.tables.sizes, len(scans))
        fits = fits_layout(batch.tables, capacities, self._layout)
        layout = self._layout if fits else replace(self._layout, machine="any")
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
        """Contexts of the dataset that conditions the network and of that whose head predicts."""
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
                lowest = np.ceil(np.array(sizes) / _RATIO**_BUCKETS_BELOW).astype(int)
                base = np.maximum(count * np.array(_SMALLEST), lowest).tolist()
                self._ladders[count] = BucketLadder(LevelSizes(*base), _RATIO)
            ladder = self._ladders[count]
        bucket = ladder.bucket(sizes)
        assert bucket is not None  # a ladder without a limit always has one
        return ladder.capacities(bucket)

    def _index(self, dataset: str) -> int:
        names = [spec.name for spec in self.specs]
        if dataset not in names:
            raise InputError(f"The model was trained on {', '.join(names)}, not on {dataset!r}: choose one of them.")
        return names.index(dataset)


def build_predictor(model: TR3D, specs: Sequence[DatasetSpec], config: EvalConfig) -> Predictor:
    """Build the predictor of a config; `Predictor` has the other arguments and the errors."""
    return Predictor(
        model,
        specs,
        score_threshold=config.score_threshold,
        iou_threshold=config.iou_threshold,
        conditioning=config.conditioning,
        kernels=config.kernels,
    )


def prepare(scan: Scan, spec: DatasetSpec, draw: int = 0) -> Scan:
    """Draw a scan's points as the dataset's test protocol says; the same ones whenever `draw` is the same number."""
    if not len(scan.points):
        return scan
    seed = zlib.crc32(scan.name.encode())
    return sample_points(scan, spec.test_sampling, np.random.default_rng(seed if draw == 0 else (seed, draw)))


def predict_scans(
    predictor: Predicts,
    source: ScanSource,
    spec: DatasetSpec,
    skipped: dict[str, str],
    notes: dict[str, Mapping[str, int]] | None = None,
    *,
    batch_size: int = 1,
    head: str | None = None,
    draw: int = 0,
    progress: bool = True,
) -> Iterator[tuple[Scan, Scan, Detections]]:
    """Predict every scan of a source, one batch in memory at a time; scans that cannot be used are left out.

    By the name of the scan, `skipped` is filled with the reason for each that is left out, and `notes` with counts of
    points and boxes that loading left out or repaired. Points are drawn by the test protocol of `spec`, the dataset of
    the scans, whose head predicts unless another one is named. Progress is shown on standard error.

    Yields:
        Each scan that can be used: with all its points, with the points drawn, and its boxes.
    """
    head = head or spec.name
    title = spec.name if head == spec.name else f"{spec.name}, head of {head}"
    loaded, done = load_or_skip(source, skipped), 0
    with tqdm(total=len(source), desc=title, unit="scan", disable=not progress, mininterval=progress_interval()) as bar:
        while batch := list(itertools.islice(loaded, batch_size)):
            if notes is not None:
                notes |= {scan.name: scan.notes for scan in batch if scan.notes}
            usable, found = [(scan, prepare(scan, spec, draw)) for scan in batch], list[Detections]()
            while usable and not found:
                try:
                    found = predictor.predict([drawn for _, drawn in usable], head)
                except ScanError as error:
                    skipped[error.scan] = str(error)
                    usable = [(scan, drawn) for scan, drawn in usable if scan.name != error.scan]
            for (scan, drawn), boxes in zip(usable, found, strict=True):
                yield scan, drawn, boxes
            done += len(usable)
            bar.update(done + len(skipped) - bar.n)
        bar.update(len(source) - bar.n)


def skipped_lines(skipped: Mapping[str, str]) -> list[str]:
    """Lines to print on scans that were left out: one a scan with the reason, and one with their number."""
    lines = [f"Skipped {name}: {reason}" for name, reason in skipped.items()]
    return [*lines, f"{len(skipped)} scan(s) skipped."] if lines else []


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
    """Boxes, scores and labels of each scan, and their number."""
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
    return nnx.state(_fold_model(graph, state, dataset, head))


def _fold_model(graph: nnx.GraphDef, state: nnx.State, dataset: DatasetContext, head: DatasetContext) -> TR3D:
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


_VERSION = 1
_WRITING = threading.Lock()


@dataclass(frozen=True)
class BucketFile:
    """Lowest shapes of the ladders, by number of scans in a pass, in <folder>/buckets.json.

    The first scan sets a ladder. The file gives later processes the same shapes, and so the programs that JAX's
    compilation cache in the same folder holds. It is a cache: a file that cannot be read counts as none.
    """

    path: Path

    @classmethod
    def open(cls, folder: Path) -> "BucketFile":
        """The file of a folder, which becomes JAX's compilation cache for this process.

        Raises:
            InputError: the folder cannot be made or written to.
        """
        use_compilation_cache(folder)
        return cls(folder / "buckets.json")

    def read(self) -> dict[int, LevelSizes]:
        """The stored shapes; none if there is no such file, it is damaged or of another version."""
        try:
            stored = json.loads(self.path.read_text())
            if stored["version"] != _VERSION:
                return {}
            bases = {int(count): LevelSizes(*map(int, base)) for count, base in stored["bases"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {count: base for count, base in bases.items() if count > 0 and min(base) > 0}

    def write(self, bases: Mapping[int, LevelSizes]) -> None:
        """Store shapes; those that another process stored for other numbers of scans stay.

        A full disk or a folder that is gone is a warning: neither is a reason to lose the boxes just found.
        """
        temporary = self.path.with_suffix(f".{os.getpid()}")
        with _WRITING:  # the name of the temporary file is the same in all threads of a process
            bases = self.read() | dict(bases)
            document = {"version": _VERSION, "bases": {str(count): list(base) for count, base in bases.items()}}
            try:
                temporary.write_text(json.dumps(document))
                temporary.replace(self.path)
            except OSError as error:
                warnings.warn(f"The cache {self.path} cannot be written ({error.strerror}).", stacklevel=2)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()

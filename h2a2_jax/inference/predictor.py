"""Boxes of scans from a trained detector."""

import itertools
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32
from tqdm import tqdm

from h2a2_jax import sparse
from h2a2_jax.boxes.codec import ROTATED_CHANNELS
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.checkpoint.store import StoredDetector
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.compilation import Say
from h2a2_jax.config import EvalConfig
from h2a2_jax.errors import InputError
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.folding import folded_parameters
from h2a2_jax.inference.programs import ProgramStore
from h2a2_jax.layers import DatasetContext, ForwardContext
from h2a2_jax.loader.augment import sample_points
from h2a2_jax.loader.batching import BucketLadder, collate
from h2a2_jax.models import KINDS, DetectorNetwork, HeadChoice, PlanLayout, Predictions, kind_of
from h2a2_jax.models.head import outputs_of_union, padded_columns
from h2a2_jax.scans.label_space import union_spec
from h2a2_jax.scans.scan import Scan, ScanError, ScanSource, load_or_skip
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.sparse.xla_cpu import compiler_options
from h2a2_jax.typing import AnyArray

Program = Callable[..., Any]
"""A compiled function of arrays."""
Arrays = dict[str, Any]
"""Arrays of a detector by path."""
Choices = tuple[DatasetContext, Any]
"""The dataset that conditions a network, and the `HeadChoice` that predicts, in numpy."""

_RATIO = 1.5
"""Capacity of a bucket over that of the next lower one."""
_BUCKETS_BELOW = 2
"""Buckets below that of the first scan, for smaller scans."""


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
    used everywhere (`kernels`). A detector with one label space has one head more, "union", for every class of it; the
    mean over the datasets conditions it, unless another conditioning is named.

    Each number of scans in a pass has its own ladder of padded shapes. The first pass sets it and takes the third
    bucket, so that smaller scans have smaller shapes. A shape is compiled when it is first needed. No scan is ever
    cropped.

    Attributes:
        specs: the datasets of the model, in the order of its dataset axis.
        heads: the specs that a head predicts: those of the datasets, and the union of one label space.
    """

    def __init__(
        self,
        model: DetectorNetwork | StoredDetector,
        specs: Sequence[DatasetSpec],
        *,
        score_threshold: float = 0.01,
        iou_threshold: float = 0.5,
        conditioning: str = "own",
        kernels: Literal["selected", "shared"] = "selected",
        folded: bool = True,
        cache: Path | None = None,
        say: Say = warnings.warn,
    ):
        """Take over a trained model; the thresholds and choices are those of `Detector.restore`.

        The specs are in the order of the model's dataset axis. With or without `folded`, results are equal up to
        rounding. A stored detector is built only if a program has to be compiled. `cache` is a folder for compiled
        programs (`h2a2_jax.compilation.private_folder`); None keeps them in memory alone. `say` is told what is wrong
        with that folder.

        Raises:
            ValueError: the specs are not those of the model.
            InputError: the model was not trained on the dataset that conditions it.
        """
        heads = model.heads if isinstance(model, StoredDetector) else model.heads_config
        config = model.config.model if isinstance(model, StoredDetector) else model.config
        given, expected = [spec.name for spec in specs], [head.dataset for head in heads]
        if given != expected:
            raise ValueError(f"specs are those of {', '.join(given)}; the model expects {', '.join(expected)}.")
        self.specs = self.heads = tuple(specs)
        self._columns: Int32[np.ndarray, "h k"] | None = None
        columns = [head.columns for head in heads if head.columns is not None]
        if columns:
            union = union_spec(self.specs, columns)
            self.heads = (*self.specs, union)
            self._columns = padded_columns([*columns, range(union.num_classes)])
        self._thresholds = np.array(score_threshold, np.float32), np.array(iou_threshold, np.float32)
        self._model, self._kind, self._layout = config, kind_of(config), PlanLayout.of(config)
        self._kernels, self._conditioning = kernels, conditioning
        if conditioning not in ("own", "mean", *expected):
            raise InputError(
                f"The model was trained on {', '.join(expected)}, not on {conditioning!r}: choose one of them to "
                "condition it."
            )
        self._parts = _Parts(model, self._choices(0))
        self._arrays = _arrays_of(model)
        self._store = None
        if cache is not None:
            self._store = ProgramStore(cache, repr((config, tuple(heads))), self._kind.levels, say)
        # One program serves all datasets: folded detectors differ in their parameters only.
        self._fold = self._program(self._parts.fold, "fold") if folded else None
        self._forward = self._program(partial(self._parts.forward, folded), f"forward_{folded}")
        self._detections: dict[tuple[str, int, int, int, bool], Program] = {}
        self._folded_states: dict[int, Arrays] = {}
        self._stored_bases = {} if self._store is None else self._store.read_bases()
        self._ladders = {count: BucketLadder(base, _RATIO) for count, base in self._stored_bases.items()}
        self._lock = threading.Lock()

    def spec(self, dataset: str) -> DatasetSpec:
        """The spec of one of the heads.

        Raises:
            InputError: the model has no such head.
        """
        return self.heads[self._index(dataset)]

    def check_weights(self) -> None:
        """Load or compile the program that every pass begins with, which needs weights that fit the architecture.

        Raises:
            InputError: a stored detector has arrays of other shapes than its config.
        """
        self._parameters(0)

    def take_over(self, model: DetectorNetwork) -> None:
        """Replace the parameters by those of another model of the same structure; nothing is compiled anew.

        Raises:
            ValueError: the structure is another one.
        """
        arrays = _arrays_of(model)
        if {name: jnp.shape(a) for name, a in arrays.items()} != {n: jnp.shape(a) for n, a in self._arrays.items()}:
            raise ValueError("the model has other parameters than the predictor was made for: make another predictor.")
        with self._lock:
            self._arrays, self._folded_states = arrays, {}

    @property
    def bucket_bases(self) -> dict[int, Any]:
        """The lowest padded shape of each ladder, by number of scans in a pass."""
        with self._lock:
            return {count: ladder.base for count, ladder in self._ladders.items()}

    def set_bucket_bases(self, bases: Mapping[int, Any]) -> None:
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
            InputError: the model was not trained on the dataset, or the network had no place for all its sites.
            ScanError: a coordinate is not finite, or farther from the origin than voxels reach.
        """
        self._index(dataset)
        return self.run(self.plan(scans, seconds), dataset, seconds) if scans else []

    def plan(self, scans: Sequence[Scan], seconds: dict[str, float] | None = None) -> "PlannedPass":
        """Make the voxels and padded maps of a pass for `run`: on the host, beside another pass that runs.

        Raises:
            ScanError: a coordinate is not finite, or farther from the origin than voxels reach.
        """
        started = time.perf_counter()
        try:
            batch = collate(scans, self._model)
        except InputError:
            for scan in scans:  # find the scan that is to blame
                try:
                    sparse.voxelize([scan.points], self._model.voxel_size)
                except InputError as error:
                    raise ScanError(scan.name, f"Scan {scan.name} cannot be used: {error}") from error
            raise
        capacities = self._capacities(batch.tables.sizes, len(scans))
        fits = self._kind.fits(batch.tables, capacities, self._layout)
        layout = self._layout if fits else replace(self._layout, machine="any")
        plan = self._kind.pad(batch.tables, capacities, layout)
        features = sparse.pad_rows(batch.features, capacities.voxels)
        _add_time(seconds, "maps", started)
        return PlannedPass(len(scans), features, plan)

    def run(self, planned: "PlannedPass", dataset: str, seconds: dict[str, float] | None = None) -> list[Detections]:
        """Run the network on a planned pass, by the head of a dataset; the rest is as in `predict`."""
        index, started = self._index(dataset), time.perf_counter()
        parameters = self._parameters(index)
        out = jax.block_until_ready(self._forward(*parameters, planned.features, planned.plan))
        if out.overflow is not None and (lost := int(out.overflow)):
            raise InputError(
                f"{lost} sites had no place in the network at the padded shape {planned.plan.voxels.capacity} voxels: "
                "predict fewer scans in one pass, or make a predictor whose first pass has the largest scan."
            )
        _add_time(seconds, "network", started)
        started, spec = time.perf_counter(), self.heads[index]
        found = self._detect(planned.scans, spec)(out, *self._thresholds)
        boxes, scores, labels, counts = map(np.asarray, found)
        detections = [
            Detections(boxes[i, :count].copy(), scores[i, :count].copy(), labels[i, :count].copy())
            for i, count in enumerate(counts)
        ]
        _add_time(seconds, "boxes", started)
        if self._store is not None and (bases := self.bucket_bases) != self._stored_bases:
            self._stored_bases = bases
            self._store.write_bases(bases)
        return detections

    def _program(self, function: Program, name: str) -> Program:
        if self._store is not None:
            return self._store.keep(function, name)
        return jax.jit(function, compiler_options=compiler_options())

    def _detect(self, scans: int, spec: DatasetSpec) -> Program:
        form = self._model.kind, scans, spec.num_classes, spec.num_outputs, self._columns is not None
        static = dict(zip(("kind", "num_scans", "classes", "outputs", "of_union"), form, strict=True))
        if self._store is None:
            return partial(_detect, **static)
        with self._lock:
            if form not in self._detections:
                self._detections[form] = self._store.keep(partial(_detect, **static), f"detect_{form}")
            return self._detections[form]

    def _choices(self, head: int) -> Choices:
        """The dataset that conditions the network, and the head that predicts, or its columns."""
        count = len(self.specs)
        wanted = _one(head, count) if self._columns is None else self._columns[head]
        own = head if self._conditioning == "own" else None
        if self._conditioning == "mean" or own == count:
            return DatasetContext(np.full(count, 1 / count, np.float32), self._kernels), wanted
        own = self._index(self._conditioning) if own is None else own
        return replace(_one(own, count), kernels=self._kernels), wanted

    def _parameters(self, head: int) -> tuple[Arrays, Choices]:
        """Parameters and choices of a pass; folded ones are kept."""
        choices = self._choices(head)
        if self._fold is None:
            return self._arrays, choices
        with self._lock:
            if head not in self._folded_states:
                self._folded_states[head] = self._fold(self._arrays, *choices)
        only = DatasetContext(np.ones(1, np.float32), self._kernels)
        return self._folded_states[head], (only, only)

    def _capacities(self, sizes: Any, count: int) -> Any:
        with self._lock:
            if count not in self._ladders:
                lowest = np.ceil(np.array(sizes) / _RATIO**_BUCKETS_BELOW).astype(int)
                base = np.maximum(count * np.array(self._kind.least), lowest).tolist()
                self._ladders[count] = BucketLadder(self._kind.levels(*base), _RATIO)
            ladder = self._ladders[count]
        bucket = ladder.bucket(sizes)
        assert bucket is not None  # a ladder without a limit always has one
        return ladder.capacities(bucket)

    def _index(self, dataset: str) -> int:
        names = [spec.name for spec in self.heads]
        if dataset not in names:
            raise InputError(f"The model predicts as {', '.join(names)}, not as {dataset!r}: choose one of them.")
        return names.index(dataset)


def build_predictor(
    model: DetectorNetwork | StoredDetector,
    specs: Sequence[DatasetSpec],
    config: EvalConfig,
    cache: Path | None = None,
    say: Say = warnings.warn,
) -> Predictor:
    """Build the predictor of a config; `Predictor` has the other arguments and the errors."""
    return Predictor(
        model,
        specs,
        score_threshold=config.score_threshold,
        iou_threshold=config.iou_threshold,
        conditioning=config.conditioning,
        kernels=config.kernels,
        cache=cache,
        say=say,
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


@partial(jax.jit, static_argnames=("kind", "num_scans", "classes", "outputs", "of_union"))
def _detect(
    out: Predictions,
    score_threshold: Float[AnyArray, ""],
    iou_threshold: Float[AnyArray, ""],
    *,
    kind: str,
    num_scans: int,
    classes: int,
    outputs: int,
    of_union: bool,
) -> tuple[Float[Array, "b k 7"], Float[Array, "b k"], Int32[Array, "b k"], Int32[Array, " b"]]:
    """Boxes, scores and labels of each scan, and their number."""
    boxes = outputs_of_union(out.boxes, outputs == ROTATED_CHANNELS) if of_union else out.boxes
    return KINDS[kind].detect(
        out._replace(boxes=boxes[:, :outputs], logits=out.logits[:, :classes]),
        num_scans,
        rotated=outputs == ROTATED_CHANNELS,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
    )


@dataclass(frozen=True)
class PlannedPass:
    """Scans of one pass as the network takes them.

    Attributes:
        scans: number of scans.
        features: float32 [N, 3], colours of the voxels, padded.
        plan: their sites and maps, padded.
    """

    scans: int
    features: Float[np.ndarray, "n 3"]
    plan: Any


class _Parts:
    """The parts of a detector that are no arrays, made when a program is traced: with stored programs, never."""

    def __init__(self, model: DetectorNetwork | StoredDetector, choices: Choices):
        self._choices = choices  # of any head
        if isinstance(model, StoredDetector):
            self._shapes = model.shapes
        else:
            graph, state = nnx.split(model)
            self._whole = graph, jax.eval_shape(lambda state: state, state)

    @cached_property
    def _whole(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(self._shapes())

    @cached_property
    def _folded(self) -> tuple[nnx.GraphDef, nnx.State]:
        graph, shapes = self._whole
        return nnx.split(nnx.eval_shape(lambda s: folded_parameters(nnx.merge(graph, s), *self._choices), shapes))

    def fold(self, arrays: Arrays, dataset: DatasetContext, head: HeadChoice) -> Arrays:
        """Arrays of the folded detector."""
        return _arrays_of(folded_parameters(_merge(self._whole, arrays), dataset, head))

    def forward(
        self,
        folded: bool,
        arrays: Arrays,
        choices: Choices,
        features: Float[Array, "n c"],
        plan: Any,
    ) -> Predictions:
        """Predictions of the detector, or of the folded one, with its arrays."""
        dataset, head = choices
        model = _merge(self._folded if folded else self._whole, arrays)
        return model(features, plan, ForwardContext(dataset, training=False), head)


def _merge(parts: tuple[nnx.GraphDef, nnx.State], arrays: Arrays) -> DetectorNetwork:
    graph, shapes = parts
    leaves = [arrays[name] for name in flat_names(shapes)]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(shapes), leaves))


def _arrays_of(model: DetectorNetwork | StoredDetector) -> Arrays:
    """Parameters and statistics of a detector by path."""
    if isinstance(model, StoredDetector):
        return jax.device_put({name: array for part in model.parts for name, array in part.items()})
    state = nnx.state(model)
    return dict(zip(flat_names(state), jax.tree.leaves(state), strict=True))


def _one(dataset: int, count: int) -> DatasetContext:
    """`DatasetContext.one` in numpy, for which nothing is compiled."""
    return DatasetContext(np.eye(count, dtype=np.float32)[dataset], index=np.asarray(dataset, np.int32))


def _add_time(seconds: dict[str, float] | None, stage: str, started: float) -> None:
    if seconds is not None:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started

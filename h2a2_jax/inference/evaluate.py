"""Average precision of a detector over a source of scans."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from h2a2_jax.boxes.detections import Detections
from h2a2_jax.evaluation import (
    IOU_THRESHOLDS,
    Evaluation,
    GroundTruth,
    distance_from,
    evaluate_detections,
    scan_origin,
)
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.cross import CommonClasses
from h2a2_jax.inference.predictor import Predictor, prepare
from h2a2_jax.inference.test_time import Predicts
from h2a2_jax.inputs.drawing import Log
from h2a2_jax.inputs.scan import Scan, ScanError, ScanSource, load_or_skip
from h2a2_jax.inputs.specs import DatasetSpec
from h2a2_jax.models import Detector


@dataclass(frozen=True)
class EvalConfig:
    """How a detector is evaluated.

    Attributes:
        iou_thresholds: volume IoU that a hit must exceed, one average precision each.
        score_threshold: lowest score of a box.
        iou_threshold: bird's-eye-view IoU above which the lower score of a class is suppressed.
        batch_size: scans in one forward pass.
        conditioning: whose embedding, statistics and exclusive kernels a dataset's scans are seen with: its "own",
            those of another dataset by name, or the "mean" of all, as for data that no dataset stands for.
        kernels: "selected" by each scan's structure, or "shared" everywhere.
    """

    iou_thresholds: tuple[float, ...] = IOU_THRESHOLDS
    score_threshold: float = 0.01
    iou_threshold: float = 0.5
    batch_size: int = 1
    conditioning: str = "own"
    kernels: Literal["selected", "shared"] = "selected"


def build_predictor(model: Detector, specs: Sequence[DatasetSpec], config: EvalConfig) -> Predictor:
    """The predictor of a config; see `Predictor` for what is raised."""
    return Predictor(
        model,
        specs,
        score_threshold=config.score_threshold,
        iou_threshold=config.iou_threshold,
        conditioning=config.conditioning,
        kernels=config.kernels,
    )


@dataclass(frozen=True)
class EvalRequest:
    """What is evaluated, beside the validation scans of all datasets as a config describes them.

    Attributes:
        split: of the scans.
        dataset: the one whose head and scans are evaluated; None: each.
        data: folder of scans that is evaluated instead of the dataset's own; of any kind that a config may name.
        tta: test-time augmentation: "flip_x", "flip_y", "scales", "turns" (`test_time.views`).
        cross: whether heads are evaluated on the scans of the other datasets too, over the classes of both.
        output: folder of the results; None: the workdir, or a folder in it if anything else is asked for.
        step: of the checkpoint; None: the last.
    """

    split: Literal["train", "val"] = "val"
    dataset: str | None = None
    data: str | None = None
    tta: tuple[str, ...] = ()
    cross: bool = False
    output: Path | None = None
    step: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether this is what training evaluates at its end."""
        return self == EvalRequest(output=self.output)

    def to_dict(self) -> dict[str, Any]:
        """What differs from a plain evaluation and the split, for JSON."""
        choices = {"dataset": self.dataset, "data": self.data, "tta": list(self.tta), "step": self.step}
        return {"split": self.split, **{name: value for name, value in choices.items() if value}}


@dataclass
class Found:
    """Boxes of the scans of a source that can be used, in their order, and what is there.

    Attributes:
        detections: boxes found.
        truth: boxes annotated.
        origins: x, y of each scan that distances are measured from.
        log: by scan, why others were left out (`Log.skipped`) and what of these was (`Log.notes`).
    """

    detections: list[Detections] = field(default_factory=list)
    truth: list[GroundTruth] = field(default_factory=list)
    origins: list[np.ndarray] = field(default_factory=list)
    log: Log = field(default_factory=Log)

    def evaluate(self, spec: DatasetSpec, iou_thresholds: Sequence[float]) -> Evaluation:
        """Scores, by the protocol of the dataset of the scans."""
        return self._evaluate(self.detections, self.truth, spec.classes, spec, iou_thresholds)

    def evaluate_common(self, common: CommonClasses, iou_thresholds: Sequence[float]) -> Evaluation:
        """Scores of another dataset's head over the classes that both have."""
        detections = [common.detections(found) for found in self.detections]
        truth = [common.truth(there) for there in self.truth]
        return self._evaluate(detections, truth, common.names, common.data, iou_thresholds)

    def _evaluate(
        self,
        detections: Sequence[Detections],
        truth: Sequence[GroundTruth],
        classes: Sequence[str],
        spec: DatasetSpec,
        iou_thresholds: Sequence[float],
    ) -> Evaluation:
        return evaluate_detections(
            detections,
            truth,
            classes,
            iou_thresholds,
            rotated=spec.has_yaw,
            origins=np.array(self.origins, np.float64).reshape(-1, 2),
            measured_from=distance_from(spec.name),
        )


def predict_source(
    predictor: Predicts,
    source: ScanSource,
    spec: DatasetSpec,
    batch_size: int = 1,
    progress: bool = True,
    *,
    head: str | None = None,
    draw: int = 0,
) -> Found:
    """Predicts every scan of a source; those that cannot be used are left out and named.

    Args:
        predictor: see `build_predictor`.
        source: of annotated scans.
        spec: of their dataset, by whose test protocol points are drawn.
        batch_size: scans in a pass.
        progress: whether to show scans done and time left on standard error.
        head: dataset whose head predicts; None: that of the scans.
        draw: number of the drawing of points.
    """
    found = Found()
    head = head or spec.name
    title = spec.name if head == spec.name else f"{spec.name}, head of {head}"
    with tqdm(total=len(source), desc=title, unit="scan", disable=not progress, mininterval=progress_interval()) as bar:
        for chunk in _chunks(load_or_skip(source, found.log.skipped), batch_size):
            found.log.notes |= {scan.name: scan.notes for scan in chunk if scan.notes}
            drawn = [prepare(scan, spec, draw) for scan in chunk]
            used, boxes = _predict_usable(predictor, drawn, head, found.log.skipped)
            found.detections += boxes
            found.truth += [GroundTruth(s.boxes[s.labels >= 0], s.labels[s.labels >= 0]) for s in used]
            found.origins += [scan_origin(s.points, distance_from(spec.name)) for s in used]
            bar.update(len(found.detections) + len(found.log.skipped) - bar.n)
        bar.update(len(source) - bar.n)
    return found


def evaluate_source(
    predictor: Predicts,
    source: ScanSource,
    spec: DatasetSpec,
    eval_config: EvalConfig | None = None,
    progress: bool = True,
    *,
    draw: int = 0,
) -> tuple[Evaluation, list[Detections], Log]:
    """Predicts every scan of a source and scores the boxes against its annotation.

    Points are drawn by the dataset's test protocol. Scans that cannot be used are left out of the score and named.

    Args:
        predictor: see `build_predictor`.
        source: of annotated scans.
        spec: of their dataset.
        eval_config: IoU thresholds and scans in a pass.
        progress: whether to show scans done and time left on standard error.
        draw: number of the drawing of points.

    Returns:
        The scores; boxes of the scans that were used, in their order; by scan, why scans were left out (`Log.skipped`)
        and what of the others was (`Log.notes`).
    """
    config = eval_config or EvalConfig()
    found = predict_source(predictor, source, spec, config.batch_size, progress, draw=draw)
    return found.evaluate(spec, config.iou_thresholds), found.detections, found.log


def _predict_usable(
    predictor: Predicts, scans: list[Scan], head: str, skipped: dict[str, str]
) -> tuple[list[Scan], list[Detections]]:
    """Boxes of the scans that can be used, and these scans."""
    while scans:
        try:
            return scans, predictor.predict(scans, head)
        except ScanError as error:
            skipped[error.scan] = str(error)
            scans = [scan for scan in scans if scan.name != error.scan]
    return [], []


def _chunks(scans: Iterable[Scan], size: int) -> Iterator[list[Scan]]:
    chunk: list[Scan] = []
    for scan in scans:
        chunk.append(scan)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

"""Average precision of a detector over a source of scans."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from h2a2_jax.boxes.detections import Detections
from h2a2_jax.evaluation import IOU_THRESHOLDS, Evaluation, GroundTruth, evaluate_detections
from h2a2_jax.inference.predictor import Predictor, prepare
from h2a2_jax.inputs.drawing import Log
from h2a2_jax.inputs.scan import Scan, ScanError, ScanSource, load_or_skip
from h2a2_jax.inputs.specs import DatasetSpec
from h2a2_jax.models import Detector

_SECONDS_BETWEEN_LOG_LINES = 30


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


def evaluate_source(
    predictor: Predictor,
    source: ScanSource,
    spec: DatasetSpec,
    eval_config: EvalConfig | None = None,
    progress: bool = True,
) -> tuple[Evaluation, list[Detections], Log]:
    """Predicts every scan of a source and scores the boxes against its annotation.

    Points are drawn by the dataset's test protocol. Scans that cannot be used are left out of the score and named.

    Args:
        predictor: see `build_predictor`.
        source: of annotated scans.
        spec: of their dataset.
        eval_config: IoU thresholds and scans in a pass.
        progress: whether to show scans done and time left on standard error.

    Returns:
        The scores; boxes of the scans that were used, in their order; by scan, why scans were left out (`Log.skipped`)
        and what of the others was (`Log.notes`).
    """
    eval_config = eval_config or EvalConfig()
    detections: list[Detections] = []
    truth: list[GroundTruth] = []
    log = Log()
    interval = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LOG_LINES
    with tqdm(total=len(source), desc=spec.name, unit="scan", disable=not progress, mininterval=interval) as bar:
        for chunk in _chunks(load_or_skip(source, log.skipped), eval_config.batch_size):
            log.notes |= {scan.name: scan.notes for scan in chunk if scan.notes}
            used, found = _predict_usable(predictor, [prepare(scan, spec) for scan in chunk], spec, log.skipped)
            detections += found
            truth += [GroundTruth(s.boxes[s.labels >= 0], s.labels[s.labels >= 0]) for s in used]
            bar.update(len(detections) + len(log.skipped) - bar.n)
        bar.update(len(source) - bar.n)
    scores = evaluate_detections(detections, truth, spec.classes, eval_config.iou_thresholds, rotated=spec.has_yaw)
    return scores, detections, log


def _predict_usable(
    predictor: Predictor, scans: list[Scan], spec: DatasetSpec, skipped: dict[str, str]
) -> tuple[list[Scan], list[Detections]]:
    """Boxes of the scans that can be used, and these scans."""
    while scans:
        try:
            return scans, predictor.predict(scans, spec.name)
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

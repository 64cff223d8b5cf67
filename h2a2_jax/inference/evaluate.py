"""Average precision of a detector over a source of scans."""

from dataclasses import dataclass

from h2a2_jax.evaluation import IOU_THRESHOLDS


@dataclass(frozen=True)
class EvalConfig:
    """How a detector is evaluated.

    Attributes:
        iou_thresholds: volume IoU that a hit must exceed, one average precision each.
        score_threshold: lowest score of a box.
        iou_threshold: bird's-eye-view IoU above which the lower score of a class is suppressed.
        batch_size: scans in one forward pass.
    """

    iou_thresholds: tuple[float, ...] = IOU_THRESHOLDS
    score_threshold: float = 0.01
    iou_threshold: float = 0.5
    batch_size: int = 1

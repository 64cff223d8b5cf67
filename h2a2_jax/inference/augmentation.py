"""Test-time augmentation: a scan is predicted mirrored, scaled or turned as well, and the boxes of all views are fused.

Every view is predicted by itself and its boxes are transformed back to the scan's own frame. Then boxes of one class
whose footprints overlap are fused, best first; of each view the best-scoring one counts. Centre, size and yaw are the
mean weighted by score; the score is the mean over all views, a view that misses the object counting 0 (weighted boxes
fusion, Solovyev et al., arXiv 1910.13302).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from h2a2_jax.boxes.nms import Detections, overlap_matrix
from h2a2_jax.errors import InputError
from h2a2_jax.inference.predictor import Predicts
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import Augmentation, DatasetSpec

SCALES = (0.95, 1.05)
"""Scales of the scaled views."""


@dataclasses.dataclass(frozen=True)
class View:
    """A transform of a scan about the origin of its frame.

    The scan is mirrored first (`flip_x`: x -> -x), then turned by 0 to 3 quarter turns counter-clockwise about z, then
    scaled.
    """

    flip_x: bool = False
    flip_y: bool = False
    quarter_turns: int = 0
    scale: float = 1.0

    @property
    def matrix(self) -> Float[np.ndarray, "3 3"]:
        """The transform from the scan's frame to the view's; only the scale rounds."""
        turn = np.linalg.matrix_power(np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]), self.quarter_turns)
        mirror = np.diag([-1 if self.flip_x else 1, -1 if self.flip_y else 1, 1])
        return self.scale * (turn @ mirror).astype(np.float64)

    def transform_scan(self, scan: Scan) -> Scan:
        """The scan in the view's frame; its boxes are not transformed."""
        motion = np.eye(4)
        motion[:3, :3] = self.matrix
        # einsum: each sum has one term that is not 0, so that mirroring and turning round nothing.
        points = np.einsum("mj,ij->mi", scan.points, self.matrix.astype(np.float32))
        return dataclasses.replace(scan, points=points, transform=(motion @ scan.transform).astype(np.float32))

    def restore_boxes(self, boxes: Float[np.ndarray, "n 7"], *, has_yaw: bool) -> Float[np.ndarray, "n 7"]:
        """Boxes of the view in the scan's frame; without yaw, a quarter turn swaps their sizes and yaw stays 0."""
        result = boxes.astype(np.float64)
        result[:, :3] = result[:, :3] @ np.linalg.inv(self.matrix).T
        result[:, 3:6] /= self.scale
        if has_yaw:
            yaw = result[:, 6] - self.quarter_turns * math.pi / 2
            yaw = -yaw if self.flip_y else yaw
            yaw = math.pi - yaw if self.flip_x else yaw
            # Only where it is out of range, for taking a remainder rounds.
            out = (yaw < -math.pi) | (yaw >= math.pi)
            result[:, 6] = np.where(out, (yaw + math.pi) % (2 * math.pi) - math.pi, yaw)
        elif self.quarter_turns % 2:
            result[:, [3, 4]] = result[:, [4, 3]]
        return result.astype(boxes.dtype)


def views(names: Sequence[str], augmentation: Augmentation | None = None) -> tuple[View, ...]:
    """The views of some augmentations; the first is the scan without any.

    Args:
        names: some of "flip_x", "flip_y" (both: mirrored in both ways too), "scales" (`SCALES`) and "turns" (by 90, 180
            and 270 degrees).
        augmentation: augmentation of training. Mirrors that it lacks are left out, and turns where it lacks one of the
            two mirrors: scans of one camera, as SUN RGB-D's, are never seen from behind.

    Raises:
        InputError: a name is none of these.
    """
    unknown = [name for name in names if name not in ("flip_x", "flip_y", "scales", "turns")]
    if unknown:
        raise InputError(f"There is no test-time augmentation {unknown[0]!r}: use flip_x, flip_y, scales, turns.")
    if augmentation is not None:
        trained = {"flip_x": augmentation.flip_x > 0, "flip_y": augmentation.flip_y > 0}
        names = [name for name in names if trained.get(name, name != "turns" or all(trained.values()))]
    flips = itertools.product(*((False, True) if name in names else (False,) for name in ("flip_x", "flip_y")))
    scales = SCALES if "scales" in names else ()
    # Half a turn equals both mirrors.
    both = {"flip_x", "flip_y"} <= {*names}
    turns = () if "turns" not in names else (1, 3) if both else (1, 2, 3)
    return (
        *(View(flip_x=x, flip_y=y) for x, y in flips),
        *(View(scale=scale) for scale in scales),
        *(View(quarter_turns=count) for count in turns),
    )


class TestTimeAugmented:
    """A predictor that fuses the boxes of several views of each scan."""

    __test__ = False  # pytest takes it for a test by its name

    def __init__(
        self, predictor: Predicts, names: Sequence[str], specs: Sequence[DatasetSpec], iou_threshold: float = 0.5
    ):
        """Wrap a predictor of one view; arguments and errors as of `views` and `fuse`.

        The views of a dataset are limited by the augmentation that it was trained with.
        """
        self._predictor, self._iou_threshold = predictor, iou_threshold
        self._has_yaw = {spec.name: spec.has_yaw for spec in specs}
        self._views = {spec.name: views(names, spec.augmentation) for spec in specs}

    def predict(self, scans: Sequence[Scan], dataset: str) -> list[Detections]:
        """Boxes of scans, a pass per view; see `Predictor.predict`."""
        has_yaw = self._has_yaw[dataset]
        by_scan: list[list[Detections]] = [[] for _ in scans]
        for view in self._views[dataset]:
            predicted = self._predictor.predict([view.transform_scan(scan) for scan in scans], dataset)
            for of_views, found in zip(by_scan, predicted, strict=True):
                of_views.append(dataclasses.replace(found, boxes=view.restore_boxes(found.boxes, has_yaw=has_yaw)))
        return [fuse(of_views, self._iou_threshold, rotated=has_yaw) for of_views in by_scan]


def fuse(found: Sequence[Detections], iou_threshold: float = 0.5, *, rotated: bool) -> Detections:
    """Fuse the boxes of several views, which are in one frame.

    Args:
        found: boxes of each view.
        iou_threshold: bird's-eye-view IoU above which boxes of one class are fused.
        rotated: True if yaw counts.

    Returns:
        Boxes class by class, by descending score.
    """
    labels, boxes, scores = (np.concatenate([getattr(one, k) for one in found]) for k in ("labels", "boxes", "scores"))
    view = np.repeat(np.arange(len(found)), [len(one) for one in found])
    fused = [Detections(np.zeros((0, 7), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))]
    for label in np.unique(labels):
        rows = labels == label
        means, sums = _fuse_class(boxes[rows], scores[rows], view[rows], iou_threshold, rotated)
        order = np.argsort(-sums, kind="stable")
        kept = np.full(len(order), label, np.int32)
        fused.append(Detections(means[order], sums[order] / np.float32(len(found)), kept))
    return Detections(*(np.concatenate([getattr(one, k) for one in fused]) for k in ("boxes", "scores", "labels")))


def _fuse_class(
    boxes: np.ndarray, scores: np.ndarray, view: np.ndarray, iou_threshold: float, rotated: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Fused boxes of one class, and the sums of the scores that went into each."""
    order = np.argsort(-scores, kind="stable")
    boxes, scores, view = boxes[order], scores[order], view[order]
    close = overlap_matrix(boxes, rotated=rotated) > iou_threshold
    np.fill_diagonal(close, True)  # a box without area does not overlap itself
    is_free = np.ones(len(boxes), bool)
    fused, sums = list[np.ndarray](), list[float]()
    for best in range(len(boxes)):
        if not is_free[best]:
            continue
        members = np.flatnonzero(is_free & close[best])
        is_free[members] = False
        members = members[np.unique(view[members], return_index=True)[1]]
        fused.append(_mean_box(boxes[best], boxes[members], scores[members]))
        sums.append(scores[members].sum())
    return np.array(fused, np.float32), np.array(sums, np.float32)


def _mean_box(leader: np.ndarray, boxes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of boxes that overlap; a box turned by 90 degrees counts as one with its sizes swapped."""
    if len(boxes) == 1:
        return boxes[0]
    values = boxes.astype(np.float64)
    turn = values[:, 6] - leader[6]
    quarters = np.round(turn / (math.pi / 2))
    swapped = quarters % 2 == 1
    values[np.ix_(swapped, [3, 4])] = values[np.ix_(swapped, [4, 3])]
    values[:, 6] = leader[6] + turn - quarters * math.pi / 2
    return np.average(values, axis=0, weights=weights)

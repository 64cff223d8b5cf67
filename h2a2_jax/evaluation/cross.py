"""A head of one dataset judged on the scans of another, over the classes that both have.

Classes are the same if their names are, without case, blanks, hyphens and underscores, or if `SYNONYMS` has both.
Boxes are compared as the dataset of the scans annotates them: where it has no yaw, a turned box counts as the
axis-aligned one that encloses it; where it has, the boxes of an axis-aligned head have yaw 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.scans.scan import enclosing_boxes
from h2a2_jax.scans.scan_folder import class_label, plain_name
from h2a2_jax.scans.specs import DatasetSpec

SYNONYMS = (
    ("bookshelf", "bookcase"),
    ("sofa", "couch"),
    ("garbagebin", "trash can", "waste bin"),
    ("refrigerator", "fridge"),
    ("night_stand", "bedside table"),
    ("board", "whiteboard"),
    ("bathtub", "bath"),
)
"""Names that datasets give to one class."""


@dataclass(frozen=True)
class CommonClasses:
    """Which classes of a head stand for which of the scans.

    Attributes:
        head: the dataset whose head predicts.
        data: the dataset of the scans.
        pairs: labels of the scans and of the head.
    """

    head: DatasetSpec
    data: DatasetSpec
    pairs: tuple[tuple[int, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the dataset of the scans calls them."""
        return tuple(self.data.classes[label] for label, _ in self.pairs)

    @property
    def without_counterpart(self) -> tuple[str, ...]:
        """Classes of the scans that the head does not have."""
        return tuple(name for name in self.data.classes if name not in self.names)

    @property
    def unused(self) -> tuple[str, ...]:
        """Classes of the head that the scans do not have."""
        used = {label for _, label in self.pairs}
        return tuple(name for label, name in enumerate(self.head.classes) if label not in used)

    def detections(self, found: Detections) -> Detections:
        """Boxes of the head, of the common classes only, counted and turned as those of the scans are."""
        labels = _relabelled(found.labels, [label for _, label in self.pairs], self.head.num_classes)
        kept = labels >= 0
        boxes = found.boxes[kept]
        if not self.data.has_yaw:
            boxes = enclosing_boxes(boxes)
        return Detections(boxes, found.scores[kept], labels[kept])

    def truth(self, there: GroundTruth) -> GroundTruth:
        """Annotated boxes of the scans, of the common classes only."""
        labels = _relabelled(there.labels, [label for label, _ in self.pairs], self.data.num_classes)
        return GroundTruth(there.boxes[labels >= 0], labels[labels >= 0])


def common_classes(head: DatasetSpec, data: DatasetSpec) -> CommonClasses:
    """The classes that two datasets share, in the order of the scans'; each stands for one at most."""
    found: dict[int, int] = {}
    for is_synonym in (False, True):  # equal names go before
        for label, name in enumerate(data.classes):
            names = _synonyms(name) if is_synonym else [name]
            free = [c for c in (class_label(other, head) for other in names) if c >= 0 and c not in found.values()]
            if label not in found and free:
                found[label] = free[0]
    return CommonClasses(head, data, tuple(sorted(found.items())))


def _relabelled(labels: np.ndarray, kept: Sequence[int], count: int) -> np.ndarray:
    """Labels by their place in `kept`; -1 for others."""
    places = np.full(count, -1, np.int32)
    places[list(kept)] = np.arange(len(kept))
    return places[labels]


def _synonyms(name: str) -> list[str]:
    return [other for group in SYNONYMS if plain_name(name) in map(plain_name, group) for other in group]

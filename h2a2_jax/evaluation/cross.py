"""The head of one dataset evaluated on the scans of another, over the classes that both have.

Classes are the same if their names are, without case, blanks, hyphens and underscores, or if `SYNONYMS` has both.
Boxes are compared as the dataset of the scans annotates them: where it has no yaw, a turned box counts as the
axis-aligned one that encloses it; where it has, the boxes of an axis-aligned head have yaw 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.evaluation.documents import per_cent
from h2a2_jax.scans.scan import enclosing_boxes
from h2a2_jax.scans.specs import DatasetSpec, class_label, plain_name

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
    """The classes that the head of one dataset and the scans (`data`) of another have in common.

    `pairs` has for each common class its label in the scans and its label in the head.
    """

    head: DatasetSpec
    data: DatasetSpec
    pairs: tuple[tuple[int, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the common classes, as the dataset of the scans has them."""
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
        """Boxes of the head in common classes, with the labels of `names`, turned as boxes of the scans are."""
        labels = _relabel(found.labels, [label for _, label in self.pairs], self.head.num_classes)
        kept = labels >= 0
        boxes = found.boxes[kept] if self.data.has_yaw else enclosing_boxes(found.boxes[kept])
        return Detections(boxes, found.scores[kept], labels[kept])

    def truth(self, there: GroundTruth) -> GroundTruth:
        """Annotated boxes of the scans in common classes, with the labels of `names`."""
        labels = _relabel(there.labels, [label for label, _ in self.pairs], self.data.num_classes)
        return GroundTruth(there.boxes[labels >= 0], labels[labels >= 0])


def common_classes(head: DatasetSpec, data: DatasetSpec) -> CommonClasses:
    """The classes that two datasets share, in the order of the scans' dataset; each is paired with one at most."""
    found: dict[int, int] = {}
    for is_synonym in (False, True):  # equal names take precedence over synonyms
        for label, name in enumerate(data.classes):
            names = _synonyms(name) if is_synonym else [name]
            free = [c for c in (class_label(other, head) for other in names) if c >= 0 and c not in found.values()]
            if label not in found and free:
                found[label] = free[0]
    return CommonClasses(head, data, tuple(sorted(found.items())))


def _relabel(labels: np.ndarray, kept: Sequence[int], count: int) -> np.ndarray:
    """Replace labels by their place in `kept`, others by -1."""
    places = np.full(count, -1, np.int32)
    places[list(kept)] = np.arange(len(kept))
    return places[labels]


def _synonyms(name: str) -> list[str]:
    return [other for group in SYNONYMS if plain_name(name) in map(plain_name, group) for other in group]


def cross_table(results: Mapping[str, Any]) -> str:
    """A text table of mAP in per cent from evaluation.json: heads by rows, scans by columns, over common classes."""
    heads = list(dict.fromkeys(head for data, values in results.items() for head in (data, *values["cross"])))
    lines = [["head \\ scans", *results]]
    for head in heads:
        cells = []
        for data, values in results.items():
            if head == data:
                cells.append(per_cent(values["thresholds"]))
            else:
                entry = values["cross"][head]
                own = f"own {per_cent(entry['thresholds'], 'own_mAP')}, {len(entry['classes'])} classes"
                cells.append(f"{per_cent(entry['thresholds'])} ({own})")
        lines.append([head, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    missing = [
        f"{head} on {data}: without counterpart are {', '.join(entry['without_counterpart']) or 'none'}."
        for data, values in results.items()
        for head, entry in values["cross"].items()
    ]
    title = "/".join(f"{level['iou']:g}" for level in next(iter(results.values()))["thresholds"])
    heading = f"Across datasets, mAP@{title} over common classes (own: the scans' own head, over the same):"
    return "\n".join([heading, *rows, *missing])

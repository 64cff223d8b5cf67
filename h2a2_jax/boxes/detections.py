"""Detections of one scan, on the host."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Detections:
    """Boxes found in one scan.

    Attributes:
        boxes: Boxes, in the scan's frame.
        scores: Confidence of each, 0 to 1.
        labels: Class of each, an index into the dataset's class names.
    """

    boxes: Float[np.ndarray, "n 7"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.scores)

    def of_score(self, lowest: float) -> "Detections":
        """Those of at least this score."""
        kept = self.scores >= np.float32(lowest)
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept])

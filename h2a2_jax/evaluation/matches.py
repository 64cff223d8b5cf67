"""Hits and misses of every detection, by scan: the scores of any drawing of the scans follow from them.

The file matches.npz stands beside evaluation.json. It holds "version" and the fields of `Matches` of every dataset, as
in "scannet/scores".
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from h2a2_jax.distributed import say
from h2a2_jax.errors import reason_of
from h2a2_jax.evaluation.average_precision import average_precision_of_draws
from h2a2_jax.files import whole_file
from h2a2_jax.untrusted.arrays import load_arrays

MATCHES_FILE = "matches.npz"
MATCHES_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Matches:
    """Detections of a dataset's scans by descending score, and their boxes.

    Attributes:
        names: Name of each scan.
        iou_thresholds: IoU that a hit exceeds.
        scores: Score of each detection.
        labels: Class of each detection.
        scans: Scan of each detection, a place in `names`.
        is_hit: Hits, by threshold.
        ground_truth: Number of annotated boxes of each scan and class.
    """

    names: tuple[str, ...]
    iou_thresholds: tuple[float, ...]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    scans: Int[np.ndarray, " n"]
    is_hit: Bool[np.ndarray, "t n"]
    ground_truth: Int[np.ndarray, "s c"]

    def mean_average_precision(self, counts: Int[np.ndarray, "draws s"]) -> Float[np.ndarray, "draws t"]:
        """MAP of an evaluation on every drawing of the scans, 0 to 1; NaN where no class has ground truth.

        Args:
            counts: Times that a drawing has each scan; a scan that is there twice counts as two scans.
        """
        scores = np.full((len(self.iou_thresholds), self.ground_truth.shape[1], len(counts)), np.nan)
        for label in np.flatnonzero(self.ground_truth.sum(0)).tolist():
            own = self.labels == label
            for t, is_hit in enumerate(self.is_hit):
                scores[t, label] = average_precision_of_draws(
                    is_hit[own], self.scans[own], self.ground_truth[:, label], counts
                )
        known = np.isfinite(scores)
        total, classes = np.where(known, scores, 0).sum(1), known.sum(1)
        return np.where(classes > 0, total / np.maximum(classes, 1), np.nan).T

    def check(self) -> None:
        """Check that the arrays belong together; raise ValueError if they do not."""
        detections, (scans, classes) = len(self.scores), self.ground_truth.shape
        for name, values, end in (("scans", self.scans, scans), ("labels", self.labels, classes)):
            if len(values) != detections or (detections and not (0 <= values.min() and values.max() < end)):
                raise ValueError(f"{name} are not one of {end} for each of {detections} detections")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Matches":
        """The matches of `to_dict`, or of arrays by the names of the fields."""
        return cls(
            names=tuple(map(str, values["names"])),
            iou_thresholds=tuple(map(float, values["iou_thresholds"])),
            scores=np.asarray(values["scores"], np.float32),
            labels=np.asarray(values["labels"], np.int32),
            scans=np.asarray(values["scans"], np.int32),
            is_hit=np.asarray(values["is_hit"], bool).reshape(len(values["iou_thresholds"]), len(values["scores"])),
            ground_truth=np.asarray(values["ground_truth"], np.int32).reshape(
                len(values["names"]), -1 if len(values["names"]) else 0
            ),
        )


def write_matches(file: Path, matches: Mapping[str, Matches]) -> None:
    """Write the matches of datasets, whole or not at all."""
    arrays: dict[str, Any] = {"version": np.asarray(MATCHES_VERSION)}
    arrays |= {
        f"{name}/{field}": np.asarray(value) for name, own in matches.items() for field, value in vars(own).items()
    }
    with whole_file(file) as part:
        np.savez_compressed(part, **arrays)


def read_matches(file: Path) -> dict[str, Matches]:
    """Read the matches of datasets; none if the file is missing, damaged, which is printed, or of another version."""
    if not file.exists():
        return {}
    try:
        arrays = load_arrays(file)
        if int(arrays["version"]) != MATCHES_VERSION:
            return {}
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays if "/" in key)
        fields = [field.name for field in dataclasses.fields(Matches)]
        found = {name: Matches.from_dict({f: arrays[f"{name}/{f}"] for f in fields}) for name in names}
        for matches in found.values():
            matches.check()
        return found
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        say(f"{file} is damaged and left out ({reason_of(error)}): --mode=eval writes it anew.")
        return {}

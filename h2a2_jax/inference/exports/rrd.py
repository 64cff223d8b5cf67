"""A recording of Rerun (.rrd): points, and boxes with labels and classes.

Below "scan" are "points", "boxes" (half sizes, quaternions, labels, class ids, and the scores as "score") and "origin",
a text with the origin (m) that was taken off the coordinates of a scan on a map. Metres, z up.
"""

from pathlib import Path
from typing import Any

import numpy as np

from h2a2_jax.inference.exports.upright import plain_text, upright
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.inference.input_files import OWN_COMMENT


def write(path: Path, boxes: Boxes) -> None:
    """Write points and boxes as a recording; no viewer is started."""
    import rerun
    from scipy.spatial.transform import Rotation

    from h2a2_jax.viewer.content import class_color, point_spacing  # here, for training loads this package

    placed = upright(boxes)
    recording = rerun.RecordingStream(OWN_COMMENT, recording_id=plain_text(boxes.scan.name), send_properties=False)
    recording.save(path)

    def log(place: str, *parts: Any) -> None:
        recording.log(place, *parts, static=True)

    classes = [
        rerun.AnnotationInfo(label, plain_text(name), tuple(round(255 * channel) for channel in class_color(label)))
        for label, name in enumerate(boxes.class_names)
    ]
    log("/", rerun.ViewCoordinates.RIGHT_HAND_Z_UP)
    log("scan", rerun.AnnotationContext(classes))
    x, y, z = placed.origin.tolist()
    log("scan/origin", rerun.TextDocument(f"{x:.0f} {y:.0f} {z:.0f}"))
    if len(placed.points):
        log(
            "scan/points",
            rerun.Points3D(placed.points, colors=placed.colors, radii=point_spacing(placed.points) / 2),
        )
    if len(boxes):
        turns = Rotation.from_matrix(placed.rotations).as_quat(canonical=True)
        named = zip(boxes.names, boxes.scores, strict=True)
        log(
            "scan/boxes",
            rerun.Boxes3D(
                centers=placed.centers,
                half_sizes=placed.sizes / 2,
                quaternions=turns,
                labels=[f"{plain_text(name)} {score:.2f}" for name, score in named],
                class_ids=boxes.labels.astype(np.uint16),
            ),
            rerun.AnyValues(score=boxes.scores),
        )
    recording.flush()
    recording.disconnect()

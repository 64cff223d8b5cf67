"""FCAF3D's training loss: a location inside a box learns its class, its faces, and how central it lies in it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from h2a2_jax.boxes.codec import decode_faces_padded, face_distances
from h2a2_jax.boxes.iou import axis_aligned_iou
from h2a2_jax.boxes.rotated_iou import rotated_iou
from h2a2_jax.losses.assignment import Assignment, empty_assignment, resolve_claims
from h2a2_jax.losses.detection import DetectionLoss, losses_of_candidates, sigmoid_focal_loss
from h2a2_jax.typing import AnyArray

ASSIGN_THRESHOLD = 27
"""Locations inside a box that its level must have, see `assign_by_centerness` (published for all datasets)."""
CENTER_THRESHOLD = 18
"""Largest number of locations that a box may take (published for all datasets)."""
LEVELS = 4
"""Levels of FCAF3D's locations."""

_CHUNK = 128
"""Locations in a chunk, whose largest centerness decides if it is searched."""
_BLOCK = 64
"""Chunks that are compared with boxes at once."""
_SMALLEST_UNION = 1e-6
"""Floor of the union of axis-aligned boxes (m^3)."""
_EPSILON = 2.0**-23
"""Added to the denominators of the published loss: the spacing of float32 at 1."""


def centerness(distances: Float[AnyArray, "*batch 6"]) -> Float[Array, "*batch"]:
    """Centerness of locations in boxes, from `face_distances`.

    The root of the product over the axes of the shorter distance over the longer one: 1 in the centre, 0 at a face.

    Args:
        distances: distances (m) to the faces at -x, +x, -y, +y, -z, +z.

    Returns:
        Numbers from 0 to 1; -1 for locations that are not strictly inside.

    References:
        FCAF3D: Fully Convolutional Anchor-Free 3D Object Detection, https://arxiv.org/abs/2112.00322, section 3.3;
        FCOS, https://arxiv.org/abs/1904.01355, equation 3.
    """
    faces = [(distances[..., axis], distances[..., axis + 1]) for axis in (0, 2, 4)]
    shorter = [jnp.minimum(low, high) for low, high in faces]
    is_inside = (shorter[0] > 0) & (shorter[1] > 0) & (shorter[2] > 0)
    longer = [jnp.where(is_inside, jnp.maximum(low, high), 1) for low, high in faces]
    x, y, z = (jnp.where(is_inside, short / long, 0) for short, long in zip(shorter, longer, strict=True))
    return jnp.where(is_inside, jnp.sqrt(x * y * z), -1.0)


def assign_by_centerness(
    locations: Float[AnyArray, "n 3"],
    scan: Int[AnyArray, " n"],
    level: Int[AnyArray, " n"],
    boxes: Float[AnyArray, "b g 7"],
    box_labels: Int[AnyArray, "b g"],
    *,
    assign_threshold: int = ASSIGN_THRESHOLD,
    center_threshold: int = CENTER_THRESHOLD,
    num_levels: int = LEVELS,
) -> Assignment:
    """Assign locations to ground-truth boxes as FCAF3D does.

    A box asks for locations of its scan and of one level strictly inside it. Seen from the finest, that level is the
    one before the first with fewer than `assign_threshold` locations inside; the finest if that is the first; the
    coarsest if all levels have as many. Of these, the box asks for those of strictly greater centerness than the
    (center_threshold + 1)-th: center_threshold of them, fewer where centerness ties, all of them where there are at
    most center_threshold. (In a scan that has no more than center_threshold locations at all, greater than the least
    central of the scan.) A location that several boxes ask for goes to the smallest, on a tie to the first.

    Runs inside jit. Every location is compared with the boxes of its own scan only, in blocks, twice if it may be
    among the most central ones.

    Args:
        locations: x, y, z (m) of the locations, finest level first, in each level scan by scan.
        scan: scan of each location; b or more for padding rows, which may stand between levels and scans.
        level: level of each location, 0 for the finest.
        boxes: ground-truth boxes, padded to g per scan.
        box_labels: class of each box, -1 for padding.
        assign_threshold: locations inside a box that its level must have, unless that is the finest.
        center_threshold: largest number of locations that a box may take.
        num_levels: number of levels.

    Returns:
        The assignment, with the centerness of the candidates; there is no gradient through it.

    References:
        FCAF3D: Fully Convolutional Anchor-Free 3D Object Detection, https://arxiv.org/abs/2112.00322, section 3.3.
    """
    num_locations, (num_scans, num_boxes) = locations.shape[0], box_labels.shape
    if num_locations == 0 or num_scans == 0 or num_boxes == 0:
        empty = empty_assignment(num_locations, num_scans, num_boxes, center_threshold)
        return dataclasses.replace(empty, centerness=jnp.full(empty.positive.shape, -1, locations.dtype))
    locations, boxes = jax.lax.stop_gradient((jnp.asarray(locations), jnp.asarray(boxes)))
    chunks = _Chunks.cut(locations, scan, level, (num_scans, num_levels), size=max(_CHUNK, center_threshold + 1))
    inside, most_central = chunks.compare(boxes)
    level_of_box = _level_of_boxes(chunks.sums(inside, (num_scans, num_levels)), assign_threshold)
    candidates, values = jax.lax.map(
        lambda one: chunks.most_central(most_central, *one, count=center_threshold + 1),
        (jnp.arange(num_scans), boxes, level_of_box),
    )
    # A scan with fewer locations has no (center_threshold + 1)-th one, and the last one stands in.
    num_rows = jnp.zeros(num_scans, jnp.int32).at[jnp.where(scan >= 0, scan, num_scans)].add(1, mode="drop")
    last = jnp.clip(num_rows - 1, 0, center_threshold)[:, None, None]
    edge = jnp.take_along_axis(values, jnp.broadcast_to(last, (num_scans, num_boxes, 1)), axis=-1)
    asked = (values > edge) & (jnp.asarray(box_labels) >= 0)[..., None]
    volume = boxes[..., 3] * boxes[..., 4] * boxes[..., 5]
    costs = jnp.where(asked, volume[..., None], jnp.inf)[..., :center_threshold]
    assignment = resolve_claims(candidates[..., :center_threshold], costs, jnp.asarray(box_labels), num_locations)
    return dataclasses.replace(assignment, centerness=jnp.where(asked, values, -1)[..., :center_threshold])


def _level_of_boxes(inside: Array, threshold: int) -> Array:
    """Levels [b, g] on which boxes ask, from the numbers of locations inside [b, levels, g]."""
    is_few = inside < threshold
    before_few = jnp.maximum(jnp.argmax(is_few, axis=1) - 1, 0)
    return jnp.where(jnp.any(is_few, axis=1), before_few, inside.shape[1] - 1)


class _Chunks(NamedTuple):
    """Locations cut into chunks of one scan and one level each.

    Attributes:
        columns: float [3, chunks, size], x, y and z of the locations.
        rows: int32 [chunks, size], row of each location; the number of rows on padding.
        is_location: bool [chunks, size], False on padding.
        scan: int32 [chunks], scan of each chunk; -1 on padding.
        level: int32 [chunks], level of each chunk.
    """

    columns: Array
    rows: Array
    is_location: Array
    scan: Array
    level: Array

    @classmethod
    def cut(
        cls, locations: Array, scan: AnyArray, level: AnyArray, scans_and_levels: tuple[int, int], *, size: int
    ) -> "_Chunks":
        """Cut locations into chunks; the last one of each scan and level is padded."""
        num_rows, (num_scans, num_levels) = len(locations), scans_and_levels
        num_segments = num_scans * num_levels
        is_location = (scan >= 0) & (scan < num_scans)
        segment = jnp.where(is_location, level * num_scans + scan, num_segments)
        length = jnp.zeros(num_segments, jnp.int32).at[segment].add(1, mode="drop")
        rows = jnp.arange(num_rows, dtype=jnp.int32)
        first = jnp.full(num_segments, num_rows, jnp.int32).at[segment].min(rows, mode="drop")
        chunks = -(-length // size)
        end = jnp.cumsum(chunks)
        # Every segment wastes less than a chunk.
        chunk = jnp.arange(-(-(num_rows // size + num_segments) // _BLOCK) * _BLOCK)
        is_used = chunk < end[-1]
        of = jnp.minimum(jnp.searchsorted(end, chunk, side="right"), num_segments - 1)
        place = (chunk - (end - chunks)[of])[:, None] * size + jnp.arange(size)
        is_location = is_used[:, None] & (place < length[of][:, None])
        rows = jnp.where(is_location, first[of][:, None] + place, num_rows)
        columns = jnp.stack([column.at[rows].get(mode="fill", fill_value=0) for column in locations.T])
        return cls(columns, rows, is_location, jnp.where(is_used, of % num_scans, -1), of // num_scans)

    def compare(self, boxes: Array) -> tuple[Array, Array]:
        """Number of locations inside each box of a chunk's scan, and the largest centerness; both [chunks, g]."""

        def of_block(block: tuple[Array, ...]) -> tuple[Array, Array]:
            columns, is_location, scan = block
            values = _centerness_of(columns[:, :, None], is_location[:, None], boxes[scan][:, :, None])
            return jnp.sum(values >= 0, axis=-1, dtype=jnp.int32), jnp.max(values, axis=-1)

        blocks = [jnp.reshape(table, (-1, _BLOCK, *table.shape[1:])) for table in (self.is_location, self.scan)]
        columns = jnp.moveaxis(self.columns.reshape(3, -1, _BLOCK, self.columns.shape[-1]), 0, 1)
        inside, largest = jax.lax.map(of_block, (columns, *blocks))
        return inside.reshape(len(self.scan), -1), largest.reshape(len(self.scan), -1)

    def sums(self, of_chunks: Array, scans_and_levels: tuple[int, int]) -> Array:
        """Sums [b, levels, g] over the chunks of each scan and level."""
        num_scans, num_levels = scans_and_levels
        scan = jnp.where(self.scan >= 0, self.scan, num_scans)
        zeros = jnp.zeros((num_scans, num_levels, of_chunks.shape[-1]), of_chunks.dtype)
        return zeros.at[scan, self.level].add(of_chunks, mode="drop")

    def most_central(
        self, largest: Array, scan: Array, boxes: Array, level: Array, *, count: int
    ) -> tuple[Array, Array]:
        """Rows and centerness [g, count] of the most central locations in boxes of one scan, -1 where there is none."""
        # The largest ones lie in the chunks with the largest maxima: only these are sorted.
        is_sought = (self.scan == scan) & (self.level == level[:, None])
        largest, chunk = jax.lax.top_k(jnp.where(is_sought, largest.T, -1), min(count, len(self.scan)))
        is_location = self.is_location[chunk] & (largest >= 0)[..., None]
        values = _centerness_of(self.columns[:, chunk], is_location, boxes[:, None, None])
        values, order = jax.lax.top_k(values.reshape(len(boxes), -1), count)
        return jnp.take_along_axis(self.rows[chunk].reshape(len(boxes), -1), order, axis=1), values


def _centerness_of(columns: Array, is_location: Array, boxes: Array) -> Array:
    """Centerness of locations given as columns [3, ...]; -1 outside and on padding."""
    return jnp.where(is_location, centerness(face_distances(jnp.moveaxis(columns, 0, -1), boxes)), -1)


def centerness_loss(
    locations: Float[AnyArray, "n 3"],
    scan: Int[AnyArray, " n"],
    level: Int[AnyArray, " n"],
    regression: Float[AnyArray, "n 8"],
    logits: Float[AnyArray, "n c"],
    center_logits: Float[AnyArray, " n"],
    boxes: Float[AnyArray, "b g 7"],
    box_labels: Int[AnyArray, "b g"],
    class_mask: Bool[AnyArray, " c"],
    has_yaw: bool | Bool[AnyArray, ""],
    is_scan: Bool[AnyArray, " b"],
    *,
    axis_name: str | tuple[str, ...] | None = None,
    assign_threshold: int = ASSIGN_THRESHOLD,
    center_threshold: int = CENTER_THRESHOLD,
    num_levels: int = LEVELS,
) -> DetectionLoss:
    """FCAF3D's loss: focal loss of all locations, centerness and IoU loss of the assigned ones.

    With P positives in a scan, at least 1, and c the centerness of a positive in its box, the terms of the scan are

        classification = sum over locations and classes of the focal loss / P
        centerness     = sum over positives of the cross-entropy of the centerness / P
        box            = sum over positives of c (1 - IoU) / sum over positives of c

    and the terms of the batch their means over its scans. A scan without boxes is all background (an error in the
    published code). With `axis_name` the number of scans is summed over the replicas, the loss is not: the caller sums
    the gradients of the replicas. Datasets of different class counts and box forms share one compiled function: classes
    and outputs are padded, `class_mask` and `has_yaw` may be traced. Padding rows, boxes, classes and scans contribute
    neither loss nor gradient, for any values short of NaN or infinity in the outputs.

    Args:
        locations: x, y, z (m) of the locations, finest level first, in each level scan by scan.
        scan: scan of each location; b or more for padding rows.
        level: level of each location, 0 for the finest.
        regression: distances (m) to the faces in columns 0:6, see `decode_faces`; without yaw the last two columns
            are unused.
        logits: class scores before the sigmoid.
        center_logits: centerness before the sigmoid.
        boxes: ground-truth boxes, padded to g per scan.
        box_labels: class of each box, -1 for padding.
        class_mask: False for columns of `logits` that only pad.
        has_yaw: True for rotated boxes (8 outputs, rotated IoU), False for axis-aligned ones (6 outputs).
        is_scan: False for scans that only pad the batch.
        axis_name: mesh axis or axes over which one dataset's scans are spread.
        assign_threshold: locations inside a box that its level must have.
        center_threshold: largest number of locations that a box may take.
        num_levels: number of levels.

    Returns:
        The loss. Without a positive, its terms of box and centerness are 0 and all gradients are finite.

    References:
        FCAF3D: Fully Convolutional Anchor-Free 3D Object Detection, https://arxiv.org/abs/2112.00322, section 3.3.
    """
    assignment = assign_by_centerness(
        locations,
        scan,
        level,
        boxes,
        box_labels,
        assign_threshold=assign_threshold,
        center_threshold=center_threshold,
        num_levels=num_levels,
    )
    return loss_of_assignment(
        locations, scan, regression, logits, center_logits, boxes, assignment, class_mask, has_yaw, is_scan,
        axis_name=axis_name,
    )  # fmt: skip


def loss_of_assignment(
    locations: Float[AnyArray, "n 3"],
    scan: Int[AnyArray, " n"],
    regression: Float[AnyArray, "n 8"],
    logits: Float[AnyArray, "n c"],
    center_logits: Float[AnyArray, " n"],
    boxes: Float[AnyArray, "b g 7"],
    assignment: Assignment,
    class_mask: Bool[AnyArray, " c"],
    has_yaw: bool | Bool[AnyArray, ""],
    is_scan: Bool[AnyArray, " b"],
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> DetectionLoss:
    """Terms of `centerness_loss`, with the same arguments, for targets that are assigned already."""
    positive = assignment.positive & is_scan[:, None, None]
    positives = jnp.sum(positive, axis=(1, 2), dtype=jnp.int32)
    num_positives, num_scans = jnp.sum(positives), jnp.sum(is_scan, dtype=jnp.int32)
    if axis_name is not None:
        num_positives, num_scans = jax.lax.psum((num_positives, num_scans), axis_name)
    # Weight of a scan's terms: its share in the mean over scans, over its number of positives.
    share = is_scan / jnp.maximum(num_scans, 1).astype(logits.dtype)
    weight = share / (jnp.maximum(positives, 1).astype(logits.dtype) + _EPSILON)

    is_location = (scan >= 0) & (scan < len(is_scan))
    # Padding rows are zeroed before the loss, so that their values reach no gradient.
    focal = sigmoid_focal_loss(jnp.where(is_location[:, None], logits, 0.0), assignment.labels, class_mask)
    weight_of_row = jnp.where(is_location, weight[jnp.where(is_location, scan, 0)], 0.0)

    target = jnp.where(positive, assignment.centerness, 0.0)
    logit = jnp.asarray(center_logits).at[assignment.candidates].get(mode="fill", fill_value=0)
    logit = jnp.where(positive, logit, 0.0)
    cross_entropy = jnp.where(positive, jax.nn.softplus(logit) - target * logit, 0.0)

    box_losses = losses_of_candidates(
        locations,
        regression,
        boxes,
        dataclasses.replace(assignment, positive=positive),
        has_yaw,
        decode=decode_faces_padded,
        rotated_loss=lambda predicted, target: 1 - rotated_iou(predicted, target, few=True),
        axis_aligned_loss=lambda predicted, target: 1 - axis_aligned_iou(predicted, target, smallest=_SMALLEST_UNION),
    )
    box = jnp.sum(target * box_losses, axis=(1, 2)) / (jnp.maximum(jnp.sum(target, axis=(1, 2)), 1e-6) + _EPSILON)
    return DetectionLoss(
        box=jnp.sum(share * box),
        classification=jnp.sum(jnp.sum(focal, axis=-1) * weight_of_row),
        num_positives=num_positives,
        centerness=jnp.sum(weight * jnp.sum(cross_entropy, axis=(1, 2))),
    )

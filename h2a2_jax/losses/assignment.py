"""Assignment of locations to ground-truth boxes."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from h2a2_jax.typing import AnyArray, Leaf

TOP_K = 6
"""Largest number of locations that a box may take."""

_CHUNK = 256
"""Locations in a chunk, whose smallest distance decides if it is searched."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
    """Targets of the locations of a batch, by location and by box.

    Attributes:
        labels: int32 [N], class of each location, -1 = background or padding.
        box: int32 [N], box of each location, an index into its scan's boxes; -1 = none.
        candidates: int32 [B, G, K], rows of the locations that each box asks for, nearest (of FCAF3D most central)
            first; N where there is none.
        positive: bool [B, G, K], True where the box got the candidate. Every location with a label is positive once.
        centerness: float [B, G, K], FCAF3D: centerness of each candidate in its box, -1 where there is none; None for
            TR3D.
    """

    labels: Leaf
    box: Leaf
    candidates: Leaf
    positive: Leaf
    centerness: Leaf = None


def assign(
    locations: Float[AnyArray, "n 3"],
    scan: Int[AnyArray, " n"],
    level: Int[AnyArray, " n"],
    boxes: Float[AnyArray, "b g 7"],
    box_labels: Int[AnyArray, "b g"],
    label_to_level: Int[AnyArray, " c"],
    *,
    top_k: int = TOP_K,
) -> Assignment:
    """Assign locations to ground-truth boxes as TR3D does.

    A box asks for the locations of its scan, on its label's level, that are strictly nearer to its centre than the
    (top_k + 1)-th one: top_k of them, fewer where distances tie, all of them where there are at most top_k. A
    location that several boxes ask for goes to the one whose centre is nearest, on a tie to the first.

    Runs inside jit. Work is O(b g n), memory at most one block [g, n]: scans are processed one after the other.

    Args:
        locations: x, y, z (m) of the locations of all levels and scans, in any order.
        scan: scan of each location; b or more for padding rows.
        level: level of each location.
        boxes: ground-truth boxes, padded to g per scan.
        box_labels: class of each box, -1 for padding.
        label_to_level: level on which boxes of each class ask for locations.
        top_k: largest number of locations that a box may take.

    Returns:
        The assignment.

    References:
        TR3D: Towards Real-Time Indoor 3D Object Detection, https://arxiv.org/abs/2302.02858, section 3.3.
    """
    num_locations, (num_scans, num_boxes) = locations.shape[0], box_labels.shape
    if num_locations == 0 or num_scans == 0 or num_boxes == 0:
        return empty_assignment(num_locations, num_scans, num_boxes, top_k)
    is_box = box_labels >= 0
    # -1 matches no level, so padding boxes ask for nothing.
    box_level = jnp.where(is_box, jnp.asarray(label_to_level)[jnp.where(is_box, box_labels, 0)], -1)
    chunks = _Chunks.cut(locations, scan, level, chunk=max(_CHUNK, top_k + 1))
    candidates, distances = jax.lax.map(
        lambda one: chunks.nearest(*one, top_k=top_k), (jnp.arange(num_scans), boxes[..., :3], box_level)
    )
    return resolve_claims(candidates, distances, jnp.asarray(box_labels), num_locations)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Locations cut into chunks of equal size.

    Attributes:
        columns: float [3, chunks, size], x, y and z of the locations.
        scan: int32 [chunks, size], scan of each location; -1 on padding.
        level: int32 [chunks, size], level of each location; -1 on padding.
    """

    columns: Array
    scan: Array
    level: Array

    @classmethod
    def cut(cls, locations: AnyArray, scan: AnyArray, level: AnyArray, *, chunk: int) -> "_Chunks":
        """Cut locations into chunks of `chunk`, the last one padded."""
        pad = -locations.shape[0] % chunk
        return cls(
            columns=jnp.pad(locations, ((0, pad), (0, 0))).T.reshape(3, -1, chunk),
            scan=jnp.pad(scan, (0, pad), constant_values=-1).reshape(-1, chunk),
            level=jnp.pad(level, (0, pad), constant_values=-1).reshape(-1, chunk),
        )

    def nearest(self, scan: Array, centers: Array, box_level: Array, *, top_k: int) -> tuple[Array, Array]:
        """Rows [g, top_k] and squared distances of the locations each box of one scan asks for, inf where none."""
        # The top_k + 1 smallest distances lie in the chunks with the smallest minima: only these are sorted.
        minima = self._distances(self.columns, self.scan, self.level, scan, centers, box_level).min(axis=-1)
        _, chunk = jax.lax.top_k(-minima, min(top_k + 1, minima.shape[-1]))
        size = self.scan.shape[-1]
        rows = (chunk[..., None] * size + jnp.arange(size)).reshape(chunk.shape[0], -1)
        distances = jax.vmap(
            lambda chunk, center, level: self._distances(
                self.columns[:, chunk], self.scan[chunk], self.level[chunk], scan, center[None], level[None]
            )[0]
        )(chunk, centers, box_level).reshape(rows.shape)
        negative, order = jax.lax.top_k(-distances, top_k + 1)
        is_nearer = -negative[:, :-1] < -negative[:, -1:]
        return (
            jnp.take_along_axis(rows, order[:, :-1], axis=1),
            jnp.where(is_nearer, -negative[:, :-1], jnp.inf),
        )

    @staticmethod
    def _distances(
        columns: Array, location_scan: Array, location_level: Array, scan: Array, centers: Array, box_level: Array
    ) -> Array:
        """Squared distances [g, chunks, size]; inf for locations of another scan or level."""
        offsets = [centers[:, axis, None, None] - columns[axis] for axis in range(3)]
        # The maximum changes no number. It keeps the compiler from fusing product and sum, which rounds differently
        # from one place to the next and from the reference, so that equal distances would differ. An optimization
        # barrier would be dropped before that fusion.
        x, y, z = (jnp.maximum(offset * offset, 0) for offset in offsets)
        is_sought = (location_scan == scan) & (location_level == box_level[:, None, None])
        return jnp.where(is_sought, x + y + z, jnp.inf)


def resolve_claims(
    candidates: Int[AnyArray, "b g k"],
    costs: Float[AnyArray, "b g k"],
    box_labels: Int[AnyArray, "b g"],
    num_locations: int,
) -> Assignment:
    """Give every location that boxes ask for to the box of least cost, on a tie to the first.

    Args:
        candidates: rows of the locations that each box asks for.
        costs: cost of giving each candidate to its box; infinite where there is no candidate.
        box_labels: class of each box.
        num_locations: number of rows.

    Returns:
        The assignment.
    """
    num_boxes = box_labels.shape[1]
    is_candidate = jnp.isfinite(costs)
    rows = jnp.where(is_candidate, candidates, num_locations).astype(jnp.int32)
    box = jnp.broadcast_to(jnp.arange(num_boxes, dtype=jnp.int32)[:, None], rows.shape)
    least = jnp.full(num_locations, jnp.inf, costs.dtype).at[rows].min(costs, mode="drop")
    is_least = is_candidate & (costs == least.at[rows].get(mode="fill", fill_value=jnp.inf))
    winner = (
        jnp.full(num_locations, num_boxes, jnp.int32).at[rows].min(jnp.where(is_least, box, num_boxes), mode="drop")
    )
    positive = is_least & (winner.at[rows].get(mode="fill", fill_value=num_boxes) == box)
    labels = (
        jnp.full(num_locations, -1, jnp.int32)
        .at[jnp.where(positive, rows, num_locations)]
        .set(jnp.broadcast_to(box_labels[..., None], rows.shape).astype(jnp.int32), mode="drop")
    )
    return Assignment(labels=labels, box=jnp.where(winner < num_boxes, winner, -1), candidates=rows, positive=positive)


def empty_assignment(num_locations: int, num_scans: int, num_boxes: int, top_k: int) -> Assignment:
    """All locations background, for batches without locations, scans or boxes."""
    none = jnp.full(num_locations, -1, jnp.int32)
    shape = (num_scans, num_boxes, top_k)
    return Assignment(
        labels=none,
        box=none,
        candidates=jnp.full(shape, num_locations, jnp.int32),
        positive=jnp.zeros(shape, bool),
    )

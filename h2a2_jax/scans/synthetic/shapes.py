"""The primitives that rooms and furniture are made of: cuboids and elliptic cylinders, upright or leaning."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32

Color = tuple[float, float, float]
"""Red, green, blue in 0-1."""


class Primitive(NamedTuple):
    """One primitive in the frame of its object, given by its bounds.

    Attributes:
        low: smallest x, y, z (m).
        high: largest x, y, z (m).
        color: red, green, blue in 0-1.
        is_round: an elliptic cylinder about z that fills the bounds, rather than a cuboid.
        lean: how much further along x its top is than its bottom, per metre of height; its horizontal sections all
            are alike, and the bounds hold all of it.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    color: Color
    is_round: bool = False
    lean: float = 0.0

    def moved(self, y: float = 0.0, z: float = 0.0) -> "Primitive":
        """Returns it moved sideways and up."""
        (x0, y0, z0), (x1, y1, z1) = self.low, self.high
        return self._replace(low=(x0, y0 + y, z0 + z), high=(x1, y1 + y, z1 + z))


@dataclass(frozen=True, eq=False)
class Solids:
    """Many primitives in one frame, as arrays.

    Attributes:
        centers: gravity centres (m).
        halves: half sizes along the own axes (m), of a leaning one those of its horizontal section and height.
        yaws: rotation about z (rad, counter-clockwise).
        colors: red, green, blue in 0-1.
        is_round: elliptic cylinder rather than cuboid.
        leans: shift along the own x axis per metre of height.
        owners: the object a primitive belongs to; -1 = none that is annotated.
    """

    centers: Float32[np.ndarray, "n 3"]
    halves: Float32[np.ndarray, "n 3"]
    yaws: Float32[np.ndarray, " n"]
    colors: Float32[np.ndarray, "n 3"]
    is_round: Bool[np.ndarray, " n"]
    leans: Float32[np.ndarray, " n"]
    owners: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        """Number of primitives."""
        return len(self.yaws)

    @property
    def boxes(self) -> Float32[np.ndarray, "n 7"]:
        """Boxes around the primitives: centre, sizes, yaw."""
        sizes = 2 * self.halves
        sizes[:, 0] += 2 * np.abs(self.leans) * self.halves[:, 2]
        return np.concatenate([self.centers, sizes, self.yaws[:, None]], axis=1)

    def to_local(self, index: Int[np.ndarray, " m"], points: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "m 3"]:
        """Brings points into the frames of primitives, where each is upright and centred on the origin.

        Args:
            index: the primitive for each point.
            points: x, y, z (m).
        """
        local = turned_each(points - self.centers[index], -self.yaws[index])
        local[:, 0] -= self.leans[index] * local[:, 2]
        return local

    def to_common(self, index: Int[np.ndarray, " m"], local: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "m 3"]:
        """The inverse of `to_local`."""
        leaning = local.copy()
        leaning[:, 0] += self.leans[index] * local[:, 2]
        return turned_each(leaning, self.yaws[index]) + self.centers[index]

    def placed(self, position: Float[np.ndarray, " 3"], yaw: float, owner: int) -> "Solids":
        """Returns the primitives turned by `yaw` about the origin, then moved to `position`, owned by `owner`."""
        return replace(
            self,
            centers=turned(self.centers, yaw) + position.astype(np.float32),
            yaws=self.yaws + np.float32(yaw),
            owners=np.full(len(self), owner, np.int32),
        )


def turned(points: Float32[np.ndarray, "m 3"], yaw: float) -> Float32[np.ndarray, "m 3"]:
    """Rotates points about z by `yaw` (rad, counter-clockwise)."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return points @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)


def turned_each(vectors: Float[np.ndarray, "*m 3"], yaws: Float[np.ndarray, "*#m"]) -> Float[np.ndarray, "*m 3"]:
    """Rotates each vector about z by a yaw of its own (rad, counter-clockwise)."""
    cos, sin = np.cos(yaws), np.sin(yaws)
    x = vectors[..., 0] * cos - vectors[..., 1] * sin
    y = vectors[..., 1] * cos + vectors[..., 0] * sin
    return np.stack([x, y, vectors[..., 2]], axis=-1)


def solids(primitives: Sequence[Primitive]) -> Solids:
    """Turns a list of primitives into arrays, in their own frame and without owner."""
    low = np.array([p.low for p in primitives], np.float32).reshape(-1, 3)
    high = np.array([p.high for p in primitives], np.float32).reshape(-1, 3)
    leans = np.array([p.lean for p in primitives], np.float32)
    halves = (high - low) / 2
    halves[:, 0] -= np.abs(leans) * halves[:, 2]
    count = len(primitives)
    return Solids(
        centers=(low + high) / 2,
        halves=halves,
        yaws=np.zeros(count, np.float32),
        colors=np.array([p.color for p in primitives], np.float32).reshape(-1, 3),
        is_round=np.array([p.is_round for p in primitives], bool),
        leans=leans,
        owners=np.full(count, -1, np.int32),
    )


def joined(parts: Sequence[Solids]) -> Solids:
    """Puts several sets of primitives of one frame together."""
    return Solids(
        centers=np.concatenate([part.centers for part in parts]),
        halves=np.concatenate([part.halves for part in parts]),
        yaws=np.concatenate([part.yaws for part in parts]),
        colors=np.concatenate([part.colors for part in parts]),
        is_round=np.concatenate([part.is_round for part in parts]),
        leans=np.concatenate([part.leans for part in parts]),
        owners=np.concatenate([part.owners for part in parts]),
    )


def corners(boxes: Float[np.ndarray, "n 7"]) -> Float[np.ndarray, "n 8 3"]:
    """Corners of boxes given as centre, sizes, yaw."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], boxes.dtype)
    offsets = signs * boxes[:, None, 3:6] / 2
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    x = offsets[..., 0] * cos - offsets[..., 1] * sin
    y = offsets[..., 0] * sin + offsets[..., 1] * cos
    return np.stack([x, y, offsets[..., 2]], axis=-1) + boxes[:, None, :3]

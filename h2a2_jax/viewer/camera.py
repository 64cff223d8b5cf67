"""Where a picture is taken from, and where on it a place appears."""

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

FIELD_OF_VIEW = math.radians(40)
"""Of the height of a picture."""

VIEWS = {"oblique": (-1.99, 0.88, False), "top": (-math.pi / 2, math.pi / 2, True)}
"""Yaw and pitch (rad) of the direction from what is looked at to the eye, and whether lines of sight are parallel."""

_HALF_HEIGHT = math.tan(FIELD_OF_VIEW / 2)
_ROUNDS = 6
_AIR = 1.03
_NEAR = 1e-3


@dataclass(frozen=True)
class Camera:
    """A camera that looks at a target, z up in the picture.

    Attributes:
        axes: rows: right, up in the picture, towards the eye.
        target: x, y, z (m) of what is in the middle.
        distance: of the eye (m); in parallel projection it sets the scale alone.
        parallel: whether lines of sight are.
        width: of the picture in pixels.
        height: of the picture in pixels.
    """

    axes: Float[np.ndarray, "3 3"]
    target: Float[np.ndarray, " 3"]
    distance: float
    parallel: bool
    width: int
    height: int

    @property
    def pixels_per_metre(self) -> float:
        """At the distance of the target."""
        return self.height / (2 * self.distance * _HALF_HEIGHT)

    def project(self, points: Float[np.ndarray, "n 3"]) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
        """Pixels and depth of places.

        Args:
            points: x, y, z (m).

        Returns:
            Pixels from the left and from the top, and the distance (m) in front of the eye, along the line of sight in
            the middle. The pixels of what is behind the eye mean nothing.
        """
        right, up, towards = ((points - self.target) @ self.axes.T).T
        depth = self.distance - towards
        scale = self.pixels_per_metre
        if not self.parallel:
            scale = scale * self.distance / np.maximum(depth, _NEAR)
        return np.stack([self.width / 2 + right * scale, self.height / 2 - up * scale], axis=1), depth


def camera_for(
    low: Float[np.ndarray, " 3"], high: Float[np.ndarray, " 3"], view: str, width: int, height: int
) -> Camera:
    """The nearest camera of a view that sees a box whole.

    Args:
        low: lowest corner of the box (m).
        high: its highest corner.
        view: a key of `VIEWS`.
        width: of the picture in pixels.
        height: of the picture in pixels.
    """
    yaw, pitch, parallel = VIEWS[view]
    axes = np.array(
        [
            [-math.sin(yaw), math.cos(yaw), 0],
            [-math.sin(pitch) * math.cos(yaw), -math.sin(pitch) * math.sin(yaw), math.cos(pitch)],
            [math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), math.sin(pitch)],
        ]
    )
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1).reshape(-1, 3).astype(np.float64)
    camera = Camera(axes, corners.mean(axis=0), 1.0, parallel, width, height)
    half = np.array([_HALF_HEIGHT * width / height, _HALF_HEIGHT])
    for _ in range(_ROUNDS):
        seen = (corners - camera.target) @ axes.T
        reach = np.abs(seen[:, :2]) / half + (0 if parallel else seen[:, 2:])
        camera = replace(camera, distance=float(_AIR * reach.max()))
        # In perspective the middle of the box is not the middle of its picture.
        pixels, _ = camera.project(corners)
        off = ((pixels.min(axis=0) + pixels.max(axis=0)) / 2 - [width / 2, height / 2]) / camera.pixels_per_metre
        camera = replace(camera, target=camera.target + off[0] * axes[0] - off[1] * axes[1])
    return camera

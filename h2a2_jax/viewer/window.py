"""Window of Open3D that shows a scan with its boxes; needs a display."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from h2a2_jax.boxes.codec import BOX_EDGES, box_corners
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import Scan
from h2a2_jax.viewer.content import (
    Content,
    Viewable,
    above_score,
    below_ceiling,
    class_color,
    display_colors,
    make_content,
    parts_of,
    view_limits,
)

_INSTEAD = "; an HTML page and a PNG of the scan need none of this"
_PACKAGES = "libusb-1.0-0 libgl1 libegl1 libx11-6 libudev1 libvulkan1 mesa-vulkan-drivers"
_MOST_POINTS = 2_000_000
_GAMMA = 2.2  # Open3D's shader of lines expects colours in linear light
_POINT_SIZE = 4.0  # pixels
_TRUTH_COLOR = (0.1, 0.1, 0.1)
_BACKGROUND = (0.867, 0.89, 0.918, 1.0)
_UNLIT, _LINES = "defaultUnlit", "unlitLine"


def show(
    scan: Scan | Viewable,
    detections: Detections | None = None,
    class_names: Sequence[str] = (),
    *,
    truth: GroundTruth | None = None,
    title: str | None = None,
    score: float | int = 0.3,
) -> None:
    """Open a window that shows a scan with its boxes, and return when it is closed.

    Detections have the colour of their class and a label, ground truth is black; a list at the side turns each class
    on and off. The arguments are those of `write_image`.

    Raises:
        InputError: Open3D, a library it needs, a graphics driver or a display is missing; or as of `parts_of`.
        ValueError: as of `make_content`.
    """
    _require_display()
    open3d = _open3d()
    content = make_content(*parts_of(scan, detections, class_names), truth, _MOST_POINTS)
    shown = above_score(content, score)
    try:
        open3d.visualization.draw(
            geometries(open3d, shown),
            title=shown.scan.name if title is None else title,
            show_skybox=False,
            bg_color=_BACKGROUND,
            point_size=int(_POINT_SIZE),
            line_width=3,
            show_ui=True,
            on_init=lambda window: _add_labels(window, shown),
            **_camera(shown),
        )
    except RuntimeError as error:  # Open3D raises it if there is no graphics driver
        raise InputError(
            f"Open3D cannot open its window ({str(error).rstrip('.!')}): apt-get install {_PACKAGES}{_INSTEAD}."
        ) from error


def geometries(open3d: Any, shown: Content) -> list[dict[str, Any]]:
    """Arguments of Open3D's `draw`: the points, and a group of lines for each class."""
    # Coordinates are relative to the scan's place: the window computes in float32.
    origin = _origin(shown)
    points, names = shown.scan.points, shown.class_names
    below = below_ceiling(points)
    cloud = open3d.geometry.PointCloud()
    cloud.points = open3d.utility.Vector3dVector(points[below].astype(np.float64) - origin)
    cloud.colors = open3d.utility.Vector3dVector(display_colors(shown.scan)[below].astype(np.float64))
    parts = [_part(open3d, "points", "scan", cloud, _UNLIT)]

    def add_boxes(boxes: np.ndarray, name: str, group: str, color: tuple[float, float, float]) -> None:
        edges = np.array(BOX_EDGES)[None] + 8 * np.arange(len(boxes))[:, None, None]
        lines = open3d.geometry.LineSet()
        lines.points = open3d.utility.Vector3dVector((box_corners(boxes) - origin).reshape(-1, 3))
        lines.lines = open3d.utility.Vector2iVector(edges.reshape(-1, 2))
        lines.paint_uniform_color(np.array(color) ** _GAMMA)
        parts.append(_part(open3d, f"{name} ({len(boxes)})", group, lines, _LINES))

    found, truth = shown.detections, shown.truth
    for label in np.unique(found.labels).tolist():
        add_boxes(found.boxes[found.labels == label], names[label], "detections", class_color(label))
    if truth is not None:
        for label in np.unique(truth.labels).tolist():
            add_boxes(truth.boxes[truth.labels == label], f"true {names[label]}", "ground truth", _TRUTH_COLOR)
    return parts


def _origin(shown: Content) -> np.ndarray:
    return np.floor(view_limits(shown)[0])


def _part(open3d: Any, name: str, group: str, geometry: Any, shader: str) -> dict[str, Any]:
    material = open3d.visualization.rendering.MaterialRecord()
    material.shader = shader
    material.line_width = 3.0
    material.point_size = _POINT_SIZE
    material.sRGB_color = True
    return {"name": name, "group": group, "geometry": geometry, "material": material}


def _add_labels(window: Any, shown: Content) -> None:
    found, origin = shown.detections, _origin(shown)
    for box, label, score in zip(found.boxes, found.labels.tolist(), found.scores.tolist(), strict=True):
        top = box[:3].astype(np.float64) - origin + [0, 0, box[5] / 2]
        window.add_3d_label(top, f"{shown.class_names[label]} {score:.2f}")


def _camera(shown: Content) -> dict[str, Any]:
    low, high = (corner - _origin(shown) for corner in view_limits(shown))
    middle, reach = (low + high) / 2, float(np.linalg.norm(high - low))
    eye = middle + reach * np.array([-0.27, -0.6, 0.8])
    return {"lookat": middle.astype(np.float32), "eye": eye.astype(np.float32), "up": np.array([0, 0, 1], np.float32)}


def _open3d() -> Any:
    try:
        import open3d
    except ModuleNotFoundError as error:
        raise InputError(
            f'A window needs {error.name or "open3d"}: pip install "h2a2_jax[visual]"{_INSTEAD}.'
        ) from error
    except (ImportError, OSError) as error:
        raise InputError(
            f"Open3D is installed but cannot be loaded ({error}): apt-get install {_PACKAGES}{_INSTEAD}."
        ) from error
    return open3d


def _require_display() -> None:
    named = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if sys.platform.startswith("linux") and not named:
        raise InputError(
            "A window needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set: run it on a desktop or with "
            f"ssh -X{_INSTEAD}."
        )

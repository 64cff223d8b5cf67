"""A picture of scans with their boxes, for a look at whether they fit: from above, and obliquely into the room."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from h2a2_jax.boxes.codec import BOX_EDGES, box_corners
from h2a2_jax.scans.scan import Scan, ScanSource, load_or_skip
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.viewer.content import below_ceiling, class_color, display_colors

_MOST_SCANS = 12
_MOST_POINTS = 400_000
_DPI = 130
_PANEL = 3.4  # inches
_MARGIN = 0.3  # m around the points
_WALL = 0.3  # m of the near walls that are taken away, above the skirting
_SKIRTING = 0.8
_BACKGROUND = (203, 211, 219)  # white furniture shows against it

_ABOVE = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
_HALO = withStroke(linewidth=1.8, foreground="white")


def _oblique() -> np.ndarray:
    """Rows: right, up in the picture, towards the eye, which looks along +y, a little along +x, and down."""
    towards = np.array([-0.45, -1.0, 0.95])
    towards /= np.linalg.norm(towards)
    right = np.cross([0, 0, 1], towards)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(towards, right), towards])


def draw_contact_sheet(
    sources: Mapping[Any, ScanSource], usable: Sequence[tuple[str, str]], spec: DatasetSpec, path: Path
) -> None:
    """Draws up to 12 scans, evenly chosen, each from above and obliquely, ceilings and near walls taken away.

    Args:
        sources: of the scans, by split.
        usable: split and name of the scans to choose from.
        spec: names the classes.
        path: of the PNG.
    """
    splits: dict[str, str] = {}
    for split, name in usable:
        splits[name] = f"{splits[name]}, {split}" if name in splits else split
    usable = [(split, name) for name, split in splits.items()]
    chosen = [usable[i] for i in np.unique(np.linspace(0, len(usable) - 1, _MOST_SCANS).astype(int))]
    columns = 1 if len(chosen) == 1 else 2 if len(chosen) <= 4 else 3
    rows = -(-len(chosen) // columns)
    scale = 1.6 if columns == 1 else 1.25 if columns == 2 else 1.0
    size = (2 * columns * _PANEL * scale, rows * (_PANEL * scale + 0.45))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for i, (split, name) in enumerate(chosen):
        row, column = divmod(i, columns)
        source = sources[split.split(",")[0]]
        pair = panels[row, 2 * column : 2 * column + 2]
        for scan in load_or_skip(source, {}, [list(source.names).index(name)]):
            pixels = int(_PANEL * scale * _DPI)
            draw_scan(pair, scan, spec, pixels, f"{name}  ({split})")
    figure.savefig(path)


def draw_scan(pair: Any, scan: Scan, spec: DatasetSpec, pixels: int, title: str) -> None:
    """Draws one scan.

    Args:
        pair: two matplotlib axes, for the view from above and the oblique one.
        scan: with at least one point.
        spec: names the classes.
        pixels: width of an axes.
        title: above them.
    """
    step = -(-len(scan.points) // _MOST_POINTS)
    points, colors = scan.points[::step], display_colors(scan)[::step]
    below, open_side = below_ceiling(points), _without_near_walls(points)
    views = ((pair[0], _ABOVE, below), (pair[1], _oblique(), below & open_side))
    for axes, view, shown in views:
        picture, extent = _raster(points[shown] @ view.T, colors[shown], _frame(scan, view), pixels)
        axes.imshow(picture, extent=extent, origin="lower", interpolation="nearest", aspect="equal")
        _draw_boxes(axes, scan, spec, view, extent, names=True)
        axes.set_xlim(extent[:2])
        axes.set_ylim(extent[2:])
    pair[0].set_title(title, loc="left", fontsize=8)
    extents = " x ".join(f"{length:.1f}" for length in np.ptp(scan.points, axis=0))
    pair[1].set_title(f"{len(scan.points):,} points, {len(scan.boxes)} boxes, {extents} m", loc="left", fontsize=7)
    _draw_scale(pair[0])


def _without_near_walls(points: np.ndarray) -> Bool[np.ndarray, " m"]:
    low = np.percentile(points, 1, axis=0)
    return (points[:, 2] < low[2] + _SKIRTING) | (points[:, :2] > low[:2] + _WALL).all(axis=1)


def _frame(scan: Scan, view: np.ndarray) -> tuple[float, float, float, float]:
    """Limits of the picture in metres: left, right, bottom, top; a few stray points do not count, boxes nearby do."""
    flat = scan.points @ view[:2].T
    low, high = np.percentile(flat, [0.2, 99.8], axis=0)
    if len(scan.boxes):
        corners = box_corners(scan.boxes).reshape(-1, 3) @ view[:2].T
        reach = high - low
        low = np.maximum(np.minimum(low, corners.min(0)), low - reach / 2)
        high = np.minimum(np.maximum(high, corners.max(0)), high + reach / 2)
    low, high = low - _MARGIN, high + _MARGIN
    middle, half = (low + high) / 2, (high - low).max() / 2
    return middle[0] - half, middle[0] + half, middle[1] - half, middle[1] + half


def _raster(
    points: np.ndarray, colors: np.ndarray, extent: tuple[float, float, float, float], pixels: int
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[float, float, float, float]]:
    """Points as squares that close the gaps between them, near ones over far ones."""
    side = extent[1] - extent[0]
    picture = np.full((pixels, pixels, 3), np.array(_BACKGROUND, np.uint8), np.uint8)
    if not len(points):
        return picture, extent
    place = ((points[:, :2] - [extent[0], extent[2]]) * (pixels / side)).astype(int)
    # Surfaces seen at an angle and behind each other take about twice the area of the picture that they cover.
    covered = len(np.unique(place // 4 @ np.array([1, 1 << 20]))) * 16
    square = int(np.clip(round(1.8 * np.sqrt(2 * covered / len(points))), 1, 8))
    order = np.argsort(points[:, 2], kind="stable")
    place, shades = place[order], (colors[order] * 255).astype(np.uint8)
    offsets = [(i - square // 2, j - square // 2) for i in range(square) for j in range(square)]
    depth = np.full(pixels * pixels, -1)
    rank = np.arange(len(place))
    for i, j in offsets:
        x, y = place[:, 0] + i, place[:, 1] + j
        inside = (x >= 0) & (y >= 0) & (x < pixels) & (y < pixels)
        np.maximum.at(depth, y[inside] * pixels + x[inside], rank[inside])
    filled = depth >= 0
    picture.reshape(-1, 3)[filled] = shades[depth[filled]]
    return picture, extent


def _draw_boxes(
    axes: Any, scan: Scan, spec: DatasetSpec, view: np.ndarray, extent: Sequence[float], names: bool
) -> None:
    placed: list[tuple[float, float]] = []
    side = extent[1] - extent[0]
    for corners, label in zip(box_corners(scan.boxes), scan.labels.tolist(), strict=True):
        color = class_color(label)
        edges = [corners[[a, b]] for a, b in BOX_EDGES]
        if spec.has_yaw:  # a line to the middle of the side that yaw points at
            edges.append(np.stack([corners.mean(0), corners[[1, 3, 5, 7]].mean(0)]))
        lines = [edge @ view[:2].T for edge in edges]
        axes.add_collection(LineCollection(lines, colors="white", linewidths=2.0, alpha=0.8))
        axes.add_collection(LineCollection(lines, colors=[color], linewidths=1.1))
        if names:
            top = corners[4:].mean(0) @ view[:2].T
            x, y = _free_place(float(top[0]), float(top[1]), placed, side)
            text = spec.classes[label] if label >= 0 else "?"
            dark = tuple(0.55 * channel for channel in color)
            axes.text(
                x, y, text, color=dark, fontsize=6.5, ha="center", va="center", path_effects=[_HALO], clip_on=True
            )


def _free_place(x: float, y: float, placed: list[tuple[float, float]], side: float) -> tuple[float, float]:
    """A place near (x, y) whose text covers no other."""
    wide, high = side / 7, side / 32
    for shift in (0, 1, -1, 2, -2, 3, -3, 4, -4):
        free = all(abs(x - a) > wide or abs(y + shift * high - b) > high * 0.95 for a, b in placed)
        if free:
            y += shift * high
            break
    placed.append((x, y))
    return x, y


def _draw_scale(axes: Any) -> None:
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    length = next((n for n in (5, 2, 1, 0.5, 0.2) if n < (right - left) / 4), 0.1)
    x, y = left + 0.03 * (right - left), bottom + 0.03 * (top - bottom)
    axes.plot([x, x + length], [y, y], color="black", linewidth=2.5, solid_capstyle="butt")
    axes.text(x, y + 0.012 * (top - bottom), f"{length:g} m", fontsize=6.5, va="bottom", path_effects=[_HALO])

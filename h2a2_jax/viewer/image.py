"""Pictures of scans with their boxes, drawn without a display."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from h2a2_jax.boxes.codec import BOX_EDGES, box_corners
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.scans.scan import Scan
from h2a2_jax.viewer.content import (
    Content,
    Viewable,
    above_score,
    below_ceiling,
    class_color,
    display_colors,
    make_content,
    opened,
    parts_of,
    point_spacing,
    thinned,
    view_limits,
)
from h2a2_jax.viewer.render import Camera, Canvas, Lines, camera_for, draw_lines, draw_points, shade

View = Literal["oblique", "top"]

_FINENESS = 2  # pixels a side that are drawn for one of the picture
_THUMBNAIL_POINTS = 20_000
_DIAMETER = 1.4  # of a point, in units of the distance between points
_BACKGROUND = (0.867, 0.89, 0.918)
_PAPER = (255, 255, 255)
_INK, _QUIET = (27, 36, 48), (88, 101, 118)
_HALO = (1.0, 1.0, 1.0)
_GRID = (0.45, 0.5, 0.56)
_MOST_METRES = 60  # largest extent with a line a metre
_MOST_LABELS = 80
_MOST_LEGEND = 24
_HEADER, _ROW, _MARGIN = 46, 22, 14
_LEGEND = 190


def write_image(
    path: str | Path,
    scan: Scan | Viewable,
    detections: Detections | None = None,
    class_names: Sequence[str] = (),
    *,
    truth: GroundTruth | None = None,
    title: str | None = None,
    view: View = "oblique",
    beside: bool = False,
    score: float | int = 0.3,
    size: tuple[int, int] = (1400, 900),
    max_points: int = 400_000,
) -> None:
    """Write a picture of a scan with its boxes; no display is needed.

    Detections have solid edges and scores, ground truth has dashed edges; parts behind points are fainter. Ceilings are
    cut off.

    Args:
        path: path of the PNG file, of any suffix.
        scan: points and colours; points without colours are coloured by height. The scan's boxes are not shown. Or, in
            place of this and the next two, one object that has all three (`Viewable`).
        detections: boxes in the scan's frame; None for none.
        class_names: names of the classes by label.
        truth: annotated boxes.
        title: title above the picture; the scan's name by default.
        view: "oblique", in perspective from above; or "top", to scale.
        beside: draw ground truth in a second picture beside the detections.
        score: detections below this score are not shown.
        size: width and height in pixels.
        max_points: a scan of more points is thinned evenly.

    Raises:
        InputError: as of `parts_of`.
        ValueError: as of `make_content`.
    """
    software = PngInfo()
    software.add_text("Software", "boxes of h2a2_jax")
    picture = draw_image(
        scan,
        detections,
        class_names,
        truth=truth,
        title=title,
        view=view,
        beside=beside,
        score=score,
        size=size,
        max_points=max_points,
    )
    picture.save(path, "PNG", pnginfo=software)


def draw_image(
    scan: Scan | Viewable,
    detections: Detections | None = None,
    class_names: Sequence[str] = (),
    *,
    truth: GroundTruth | None = None,
    title: str | None = None,
    view: View = "oblique",
    beside: bool = False,
    score: float | int = 0.3,
    size: tuple[int, int] = (1400, 900),
    max_points: int = 400_000,
) -> Image.Image:
    """Return the picture of `write_image`, whose arguments these are, as an image of Pillow."""
    shown = make_content(*parts_of(scan, detections, class_names), truth, max_points)
    return draw(shown, title=title, view=view, beside=beside, score=score, size=size)


def write_thumbnail(
    path: str | Path,
    scan: Scan | Viewable,
    detections: Detections | None = None,
    class_names: Sequence[str] = (),
    *,
    score: float | int = 0.3,
    size: tuple[int, int] = (320, 220),
) -> None:
    """Write a small JPEG of a scan with its boxes, obliquely from above, without ceiling, near walls and words.

    Args:
        path: path of the file, of any suffix.
        scan: points and colours, or one object that has boxes and class names too, as for `write_image`.
        detections: boxes in the scan's frame; None for none.
        class_names: names of the classes by label.
        score: detections below this score are not shown.
        size: width and height in pixels.

    Raises:
        InputError: as of `parts_of`.
        ValueError: as of `make_content`.
    """
    points, found, names = parts_of(scan, detections, class_names)
    content = make_content(thinned(points, _THUMBNAIL_POINTS), found, names, None, _THUMBNAIL_POINTS)
    shown = opened(above_score(content, score))
    camera = camera_for(*view_limits(shown), "oblique", *size)
    picture = _draw_pane(_draw_room(shown, camera), camera, shown, True, False, labels=False)
    picture.save(path, "JPEG", quality=82)


def draw(
    shown: Content,
    *,
    title: str | None = None,
    view: View = "oblique",
    beside: bool = False,
    score: float | int = 0.3,
    size: tuple[int, int] = (1400, 900),
    fineness: int = _FINENESS,
) -> Image.Image:
    """Draw the picture of `write_image`; `fineness` pixels a side are drawn for one of the picture."""
    shown = above_score(shown, score)
    page = Image.new("RGB", size, _PAPER)
    remark = f"{shown.num_points:,} points, {len(shown.detections)} detections with score {score:g} or more"
    if shown.truth is not None:
        remark += f", {len(shown.truth.labels)} true boxes"
    _write_title(page, shown.scan.name if title is None else title, remark)
    panes = [(True, False), (False, True)] if beside and shown.truth is not None else [(True, shown.truth is not None)]
    width = (size[0] - _LEGEND - _MARGIN * (len(panes) + 1)) // len(panes)
    height = size[1] - _HEADER - _MARGIN
    camera = camera_for(*view_limits(shown), view, max(width, 16), max(height, 16))
    points = _draw_room(shown, camera, fineness)
    for i, (with_found, with_truth) in enumerate(panes):
        picture = _draw_pane(points, camera, shown, with_found, with_truth, fineness=fineness)
        if len(panes) > 1:
            ImageDraw.Draw(picture).text((10, 8), ("Detections", "Ground truth")[i], _INK, _font(14))
        page.paste(picture, (_MARGIN + i * (width + _MARGIN), _HEADER))
    _write_legend(page, shown)
    return page


def draw_views(views: Mapping[View, Content], title: str, remark: str, pixels: int) -> Image.Image:
    """Draw views of true boxes from left to right, `pixels` wide and high, with solid edges and without a legend."""
    width = len(views) * (pixels + _MARGIN) + _MARGIN
    page = Image.new("RGB", (width, pixels + _HEADER + _MARGIN), _PAPER)
    for i, (view, shown) in enumerate(views.items()):
        camera = camera_for(*view_limits(shown), view, pixels, pixels)
        picture = _draw_pane(_draw_room(shown, camera), camera, shown, False, True, dashed=False)
        page.paste(picture, (_MARGIN + i * (pixels + _MARGIN), _HEADER))
    _write_title(page, title, remark)
    return page


def _draw_room(shown: Content, camera: Camera, fineness: int = _FINENESS) -> Canvas:
    """Draw points and the grid of the floor, `fineness` pixels a side for one of the picture."""
    fine = _finer(camera, fineness)
    points = shown.scan.points
    kept = below_ceiling(points)
    diameter = _DIAMETER * point_spacing(points)
    canvas = draw_points(fine, points[kept], display_colors(shown.scan)[kept], diameter, _BACKGROUND)
    canvas = shade(canvas, fineness, camera.distance if camera.parallel else None)
    low, high = view_limits(shown)
    grid = _grid(low, high)
    draw_lines(canvas, fine, Lines(grid, np.tile(_GRID, (len(grid), 1)), 0.8 * fineness), visible=0.35, hidden=0.0)
    return canvas


def _draw_pane(
    room: Canvas,
    camera: Camera,
    shown: Content,
    with_found: bool,
    with_truth: bool,
    dashed: bool = True,
    labels: bool = True,
    fineness: int = _FINENESS,
) -> Image.Image:
    canvas, fine = Canvas(room.colors.copy(), room.depth), _finer(camera, fineness)
    found, truth, names = shown.detections, shown.truth, shown.class_names
    if with_truth and truth is not None:
        _draw_boxes(canvas, fine, truth.boxes, truth.labels, 1.6 * fineness, dashed=dashed)
    if with_found:
        _draw_boxes(canvas, fine, found.boxes, found.labels, 2.0 * fineness, dashed=False)
    # A sum of slices: the mean over two axes takes several times as long.
    slices = [canvas.colors[i::fineness, j::fineness] for i in range(fineness) for j in range(fineness)]
    small = sum(slices[1:], start=slices[0]) / fineness**2
    picture = Image.fromarray((np.clip(small, 0, 1) * 255 + 0.5).astype(np.uint8))
    if not labels:
        return picture
    if with_found:
        words = [f"{names[k]} {score:.2f}" for k, score in zip(found.labels, found.scores, strict=True)]
        _write_labels(picture, camera, found.boxes, found.labels, words)
    elif with_truth and truth is not None:
        _write_labels(picture, camera, truth.boxes, truth.labels, [names[k] for k in truth.labels])
    if camera.parallel:
        _draw_scale(picture, camera)
    return picture


def _finer(camera: Camera, fineness: int) -> Camera:
    return replace(camera, width=fineness * camera.width, height=fineness * camera.height)


def _draw_boxes(
    canvas: Canvas, camera: Camera, boxes: np.ndarray, labels: np.ndarray, width: float, dashed: bool
) -> None:
    """Draw edges, and for turned boxes a line from the middle of the top towards the yaw; near boxes last."""
    order = np.argsort(-camera.project(boxes[:, :3].astype(np.float64))[1], kind="stable")
    corners = box_corners(boxes[order])
    edges = corners[:, np.array(BOX_EDGES)]
    turned = boxes[order, 6] != 0
    heading = np.stack([corners[:, 4:].mean(axis=1), corners[:, [5, 7]].mean(axis=1)], axis=1)[:, None]
    heading[~turned] = heading[~turned][:, :, :1]
    ends = np.concatenate([edges, heading], axis=1).reshape(-1, 2, 3)
    colors = np.array([class_color(int(label)) for label in labels[order]]).reshape(-1, 3)
    lines = Lines(ends, np.repeat(colors, edges.shape[1] + 1, axis=0), width, dashed)
    draw_lines(canvas, camera, lines, visible=1.0, hidden=0.35, halo=_HALO)


def _grid(low: np.ndarray, high: np.ndarray) -> Float[np.ndarray, "k 2 3"]:
    """Lines on the floor at whole metres; above 60 m at tens, hundreds and so on."""
    reach = float((high - low)[:2].max())
    every = 1.0 if reach <= _MOST_METRES else 10.0 ** np.ceil(np.log10(reach / _MOST_METRES))
    first, last = np.floor(low[:2] / every) * every, np.ceil(high[:2] / every) * every
    xs, ys = (np.arange(a, b + every / 2, every) for a, b in zip(first, last, strict=True))
    along_y = [[[x, first[1], low[2]], [x, last[1], low[2]]] for x in xs]
    along_x = [[[first[0], y, low[2]], [last[0], y, low[2]]] for y in ys]
    return np.array(along_y + along_x)


def _write_labels(
    picture: Image.Image, camera: Camera, boxes: np.ndarray, labels: np.ndarray, words: list[str]
) -> None:
    """Write names above boxes, in the given order; a name that would cover another moves up a little or is left out."""
    pen, font = ImageDraw.Draw(picture), _font(12)
    tops = boxes[:, :3].astype(np.float64)
    tops[:, 2] += boxes[:, 5] / 2
    pixels, depth = camera.project(tops)
    placed = np.zeros((0, 4))
    for (x, y), away, label, word in zip(pixels, depth, labels, words, strict=True):
        wide, high = font.getlength(word) + 12, 18
        outside = not (0 <= x < camera.width and 0 <= y < camera.height) or (away < 0 and not camera.parallel)
        if outside or len(placed) >= _MOST_LABELS:
            continue
        x = min(max(x - wide / 2, 2), camera.width - wide - 2)
        for lift in (0, 1, 2):
            frame = np.array([x, y - high - 2 - lift * high, x + wide, y - 2 - lift * high])
            covers = (placed[:, :2] < frame[2:]).all(axis=1) & (placed[:, 2:] > frame[:2]).all(axis=1)
            if frame[1] >= 0 and not covers.any():
                break
        else:
            continue
        placed = np.vstack([placed, frame])
        color = _pen_color(label)
        pen.rounded_rectangle(frame.tolist(), 4, (255, 255, 255), color, 1)
        pen.rectangle([frame[0] + 1, frame[1] + 3, frame[0] + 4, frame[3] - 3], color)
        pen.text((frame[0] + 7, frame[1] + 9), word, _INK, font, anchor="lm")


def _write_title(page: Image.Image, title: str, remark: str) -> None:
    pen, width = ImageDraw.Draw(page), page.width - 2 * _MARGIN
    pen.text((_MARGIN, 17), _shortened(title, width, 17), _INK, _font(17), anchor="lm")
    pen.text((_MARGIN, 35), _shortened(remark, width, 12), _QUIET, _font(12), anchor="lm")


def _write_legend(page: Image.Image, shown: Content) -> None:
    pen, left, y = ImageDraw.Draw(page), page.width - _LEGEND, _HEADER
    of_truth = np.zeros(0, int) if shown.truth is None else shown.truth.labels
    found, true = (np.bincount(k, minlength=len(shown.class_names)) for k in (shown.detections.labels, of_truth))
    present = np.flatnonzero(found + true)
    for label in present[:_MOST_LEGEND]:
        pen.rounded_rectangle([left, y + 4, left + 12, y + 16], 3, _pen_color(label))
        count = f"{found[label]}" if shown.truth is None else f"{found[label]} / {true[label]}"
        pen.text((left + 20, y + 10), _shortened(shown.class_names[label], 104, 13), _INK, _font(13), anchor="lm")
        pen.text((page.width - _MARGIN, y + 10), count, _QUIET, _font(13), anchor="rm")
        y += _ROW
    if len(present) > _MOST_LEGEND:
        pen.text((left, y + 10), f"and {len(present) - _MOST_LEGEND} more classes", _QUIET, _font(12), anchor="lm")
        y += _ROW
    y += 8
    if shown.truth is not None:
        for words, dashes in (("detected", [(0, 30)]), ("true", [(0, 8), (11, 19), (22, 30)])):
            for start, end in dashes:
                pen.line([left + start, y + 10, left + end, y + 10], _INK, 2)
            pen.text((left + 38, y + 10), words, _INK, _font(12), anchor="lm")
            y += _ROW
        pen.text((left, y + 10), "Numbers: detected / true", _QUIET, _font(12), anchor="lm")
        y += _ROW
    low, high = view_limits(shown)
    grid = "Grid of 1 m on the floor" if (high - low)[:2].max() <= _MOST_METRES else ""
    pen.text((left, y + 10), grid, _QUIET, _font(12), anchor="lm")


def _pen_color(label: np.integer) -> tuple[int, ...]:
    return tuple(int(255 * channel) for channel in class_color(int(label)))


def _draw_scale(picture: Image.Image, camera: Camera) -> None:
    most = 160 / camera.pixels_per_metre
    power = 10.0 ** np.floor(np.log10(most))
    length = next(n for n in (5, 2, 1) if n * power <= most) * power
    pen, y = ImageDraw.Draw(picture), camera.height - 16
    pen.line([16, y, 16 + length * camera.pixels_per_metre, y], _INK, 3)
    pen.text((16, y - 6), f"{length:g} m", _INK, _font(12), anchor="ls")


def _shortened(text: str, width: int, size: int) -> str:
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}\N{HORIZONTAL ELLIPSIS}") > width:
        text = text[:-1]
    return f"{text}\N{HORIZONTAL ELLIPSIS}"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Font that comes with Matplotlib: the same on every machine."""
    found = importlib.util.find_spec("matplotlib")  # importing it takes .2 s
    assert found is not None and found.origin is not None
    return ImageFont.truetype(str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), size)

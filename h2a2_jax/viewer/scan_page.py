"""HTML page that shows a scan with its boxes; the file refers to nothing outside itself."""

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt16

from h2a2_jax.boxes.matching import IOU_THRESHOLDS, GroundTruth
from h2a2_jax.boxes.nms import Detections
from h2a2_jax.scans.scan import Scan
from h2a2_jax.viewer.content import (
    Content,
    Viewable,
    ceiling_cut,
    class_color,
    find_hits,
    has_colors,
    height_colors,
    height_limits,
    make_content,
    parts_of,
    point_spacing,
    thinned,
    view_limits,
)
from h2a2_jax.viewer.image import draw
from h2a2_jax.viewer.page_parts import asset, filled, script_json

_SCRIPTS = (
    "camera.js",
    "scene.js",
    "model.js",
    "shapes.js",
    "picking.js",
    "panel.js",
    "table.js",
    "labels.js",
    "hover.js",
    "measure.js",
    "input.js",
    "viewer.js",
)
_STEPS = 65535
_DECIMALS = 4
_STILL_POINTS = 60_000


def write_viewer(
    path: str | Path,
    scan: Scan | Viewable,
    detections: Detections | None = None,
    class_names: Sequence[str] = (),
    *,
    truth: GroundTruth | None = None,
    title: str | None = None,
    score: float | int = 0.3,
    max_points: int = 500_000,
    still: bool = True,
    note: str = "",
) -> None:
    """Write a page that shows a scan with its boxes in any browser, from disk, without a network.

    Points are stored as 16-bit steps within the scan's extent (half a millimetre for 33 m) and 8-bit colours, 12 bytes
    a point in the file; boxes are stored exactly. Numbers on the page are in the scan's frame.

    Args:
        path: path of the HTML file.
        scan: points and colours; points without colours are coloured by height. The scan's boxes are not shown. Or, in
            place of this and the next two, one object that has all three (`Viewable`).
        detections: boxes in the scan's frame, of any score; None for none.
        class_names: names of the classes by label.
        truth: annotated boxes, shown over or beside the detections, which are marked as hits or not.
        title: title of the page; the scan's name by default.
        score: lowest score shown at first; a slider changes it.
        max_points: a scan of more points is thinned evenly, and the page says so.
        still: include a still picture for browsers without WebGL 2 (about 100 kB).
        note: sentence for the page, such as one about the frame of the numbers.

    Raises:
        InputError: as of `parts_of`.
        ValueError: as of `make_content`.
    """
    page = viewer_html(
        scan,
        detections,
        class_names,
        truth=truth,
        title=title,
        score=score,
        max_points=max_points,
        still=still,
        note=note,
    )
    Path(path).write_text(page, encoding="utf-8", newline="\n")


def viewer_html(
    scan: Scan | Viewable,
    detections: Detections | None = None,
    class_names: Sequence[str] = (),
    *,
    truth: GroundTruth | None = None,
    title: str | None = None,
    score: float | int = 0.3,
    max_points: int = 500_000,
    still: bool = True,
    note: str = "",
) -> str:
    """Return the page of `write_viewer`, whose arguments these are, as text that UTF-8 can encode."""
    shown = make_content(*parts_of(scan, detections, class_names), truth, max_points)
    document = _payload(shown, shown.scan.name if title is None else title, score)
    low, step, places = quantise(shown.scan.points)
    document["notes"] += [note] if note else []
    document["points"] |= {"origin": low.tolist(), "step": step.tolist()}
    colors = np.round(shown.scan.colors * 255).astype(np.uint8) if document["points"]["colored"] else b""
    parts = {
        "title": escape(document["title"]),
        "style": asset("palette.css") + asset("viewer.css"),
        "still": _still(shown, score) if still else "",
        "scene": script_json(document),
        "places": base64.b64encode(places.astype("<u2").tobytes()).decode(),
        "colors": base64.b64encode(bytes(colors)).decode(),
        "script": "\n".join(asset(name) for name in _SCRIPTS),
    }
    return filled("viewer.html", parts)


def quantise(points: Float[np.ndarray, "m 3"]) -> tuple[np.ndarray, np.ndarray, UInt16[np.ndarray, "m 3"]]:
    """Return lowest x, y, z (m) and the length of a step along each (m), both float64; points in steps, 0 to 65535."""
    wide = points.astype(np.float64)
    low, high = (wide.min(axis=0), wide.max(axis=0)) if len(wide) else (np.zeros(3), np.zeros(3))
    step = np.maximum(high - low, 1e-3) / _STEPS
    return low, step, np.round((wide - low) / step).astype(np.uint16)


def _payload(shown: Content, title: str, score: float) -> dict[str, Any]:
    points, found, truth = shown.scan.points, shown.detections, shown.truth
    hits, (low, high) = find_hits(shown), view_limits(shown)
    return {
        "title": title,
        "notes": list(shown.notes),
        "score": score,
        "points": {
            "count": len(points),
            "total": shown.num_points,
            "colored": has_colors(shown.scan),
            "spacing": point_spacing(points),
            "heights": height_limits(points),
            "ceiling": ceiling_cut(points),
        },
        "frame": {"low": low.tolist(), "high": high.tolist()},
        "ramp": height_colors(np.linspace(0, 1, 8)).round(_DECIMALS).tolist(),
        "classes": [
            {"name": name, "color": np.round(class_color(label), _DECIMALS).tolist()}
            for label, name in enumerate(shown.class_names)
        ],
        "detections": {
            "boxes": found.boxes.tolist(),
            "scores": found.scores.tolist(),
            "labels": found.labels.tolist(),
            "hits": hits.truth.tolist(),
            "iou": hits.iou.tolist(),
        },
        "truth": None if truth is None else {"boxes": truth.boxes.tolist(), "labels": truth.labels.tolist()},
        "iouThresholds": list(IOU_THRESHOLDS),
    }


def _still(shown: Content, score: float) -> str:
    encoded = io.BytesIO()
    few = replace(shown, scan=thinned(shown.scan, _STILL_POINTS))
    draw(few, score=score, size=(1000, 640), fineness=1).save(encoded, "JPEG", quality=80)
    data = base64.b64encode(encoded.getvalue()).decode()
    return f'<img id="still" alt="The scan with its boxes, obliquely from above" src="data:image/jpeg;base64,{data}">'

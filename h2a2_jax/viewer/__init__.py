"""Scans and their boxes to look at: a page for any browser, a picture without a display, a window of Open3D.

Everything is drawn in the frame of the `Scan`: metres, z up. `write_viewer` and `viewer_html` make the page of a scan,
`write_index` the page of a folder of predictions, `write_image`, `draw_image` and `write_thumbnail` make pictures,
`show` opens the window. They take a scan with detections and class names, or one object with all three (`Viewable`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h2a2_jax.viewer.content import Viewable
    from h2a2_jax.viewer.image import draw_image, write_image, write_thumbnail
    from h2a2_jax.viewer.index_page import write_index
    from h2a2_jax.viewer.scan_page import viewer_html, write_viewer
    from h2a2_jax.viewer.window import show

_HOMES = {
    "Viewable": "content",
    "draw_image": "image",
    "show": "window",
    "viewer_html": "scan_page",
    "write_image": "image",
    "write_index": "index_page",
    "write_thumbnail": "image",
    "write_viewer": "scan_page",
}

__all__ = [
    "Viewable",
    "draw_image",
    "show",
    "viewer_html",
    "write_image",
    "write_index",
    "write_thumbnail",
    "write_viewer",
]


def __getattr__(name: str) -> Any:
    # On demand: the colours of classes alone need no imaging library.
    if name in _HOMES:
        return getattr(import_module(f"h2a2_jax.viewer.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'h2a2_jax.viewer' has no attribute {name!r}")

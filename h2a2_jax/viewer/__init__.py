"""Scans and their boxes to look at: a page for any browser, a picture without a display, a window of Open3D.

Everything is drawn in the frame of the `Scan`: metres, z up.
"""

from h2a2_jax.viewer.image import write_image
from h2a2_jax.viewer.scan_page import write_viewer
from h2a2_jax.viewer.window import show

__all__ = ["show", "write_image", "write_viewer"]

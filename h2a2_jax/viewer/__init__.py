"""Scans and their boxes to look at: a page for any browser, a picture without a display, a window of Open3D.

The functions are `scan_page.write_viewer`, `image.write_image` and `window.show`. Everything is drawn in the frame of
the `Scan`: metres, z up.
"""

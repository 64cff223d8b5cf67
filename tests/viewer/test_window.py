"""Errors without Open3D or a display."""

import sys

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.viewer.window import show
from tests.viewer.scenes import NAMES, room


def test_a_missing_open3d_is_an_error_that_names_the_package(monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(InputError, match=r'pip install "h2a2_jax\[visual\]"; an HTML page and a PNG') as caught:
        show(room(), None, NAMES)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems always have a display")
def test_a_missing_display_is_an_error(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="neither DISPLAY nor WAYLAND_DISPLAY is set"):
        show(room(), None, NAMES)

"""Every format of a scan's results is written under its name, and only results are written over."""

import json
from dataclasses import replace

import numpy as np
import pytest

from h2a2_jax.boxes import Detections
from h2a2_jax.errors import InputError
from h2a2_jax.inference import exports
from h2a2_jax.inference.box_table import csv_header
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.inference.input_files import FORMATS
from h2a2_jax.inference.writers import check_output, is_result, write_scan
from h2a2_jax.scans.formats.ply import read_ply_columns
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import SUNRGBD

BOXES = np.array([[0, 0, 0, 2, 1, 1, 0.5], [0.5, 0.2, 0.3, 1, 1, 2, -0.2], [9, 9, 9, 1, 1, 1, 0]], np.float32)
FOUND = Detections(BOXES, np.array([0.4, 0.9, 0.5], np.float32), np.array([3, 1, 0], np.int32))
POINTS = np.random.default_rng(0).uniform(-2, 2, (3000, 3)).astype(np.float32)
SCAN = Scan("a", POINTS, np.full(POINTS.shape, 0.2, np.float32), BOXES[:0], FOUND.labels[:0])
MATRIX = np.array([[0.001, 0, 0, 5], [0, 0, -0.001, 1], [0, 0.001, 0, 0], [0, 0, 0, 1]])  # y up, in mm


def test_page_picture_and_clouds(tmp_path):
    rows = np.arange(3000)[::-1].copy()
    boxes = Boxes.of(FOUND, replace(SCAN, name="below/a.b"), MATRIX, SUNRGBD, rows=rows)
    write_scan(tmp_path, ("json", "ply", "html", "png", "glb"), boxes)
    ends = (".glb", ".html", ".json", ".png", "_boxes.ply", "_points.ply")
    assert {path.name for path in (tmp_path / "below").iterdir()} == {f"a.b{end}" for end in ends}
    assert json.loads((tmp_path / "below" / "a.b.json").read_text())["scans"] == [boxes.to_entry()]
    (tmp_path / "boxes.csv").write_text(csv_header())
    check_output(tmp_path, ["below/a.b"], FORMATS[:-2])  # all may be written again
    assert "Numbers on this page are in metres" in (tmp_path / "below" / "a.b.html").read_text()  # the file's are not
    assert (read_ply_columns(tmp_path / "below" / "a.b_points.ply")["index"] == rows).all()


@pytest.mark.parametrize(("kind", "package"), [("glb", "json"), ("dxf", "ezdxf"), ("rrd", "rerun")])
def test_exports_of_others_are_in_the_way_and_ours_are_not(tmp_path, kind, package):
    pytest.importorskip(package)
    write_scan(tmp_path, (kind,), Boxes.of(FOUND, SCAN, MATRIX, SUNRGBD))
    (path,) = tmp_path.iterdir()
    assert path.name == f"a.{kind}" and is_result(path)
    check_output(tmp_path, ["a"], (kind,))
    path.write_bytes(path.read_bytes().replace(b"boxes of h2a2_jax", b"something by hand"))
    with pytest.raises(InputError, match="is no result of a prediction"):
        check_output(tmp_path, ["a"], (kind,))


def test_a_missing_package_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(exports._PACKAGES, "dxf", ("no_such_module", "ezdxf", "dxf"))
    with pytest.raises(InputError, match=r'Files with .dxf need ezdxf: pip install "h2a2_jax\[dxf\]"'):
        check_output(tmp_path / "new", ["a"], ("json", "dxf"))
    assert not (tmp_path / "new").exists()

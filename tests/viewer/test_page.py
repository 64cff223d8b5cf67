"""The page: what it holds, and that it holds all of it."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest

from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.viewer.scan_page import quantise, write_viewer
from tests.viewer.browser import dom_of, needs_chromium
from tests.viewer.scenes import BOXES, NAMES, found, room, scan_of

EVIL = ("</script><b>bold", "St\u00fchle & \u6905\u5b50", "{{places}}")


class Page(html.parser.HTMLParser):
    """Text of scripts by id, tags, and what attributes refer to."""

    key = "scene-data"  # id of the script that holds the data

    def __init__(self, path):
        super().__init__()
        self.texts, self.tags, self.references, self._open = {}, [], [], None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.data = json.loads(self.texts[self.key], parse_constant=pytest.fail)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.references += [
            value for name, value in attrs.items() if name in ("src", "href", "action", "data", "srcset")
        ]
        self._open = attrs.get("id") or tag

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.texts[self._open] = self.texts.get(self._open, "") + data

    def points(self):
        steps = np.frombuffer(base64.b64decode(self.texts.get("places", "")), "<u2").reshape(-1, 3)
        return np.array(self.data["points"]["origin"]) + steps * np.array(self.data["points"]["step"])

    def colors(self):
        return np.frombuffer(base64.b64decode(self.texts.get("colors", "")), np.uint8).reshape(-1, 3)


def written(tmp_path, *args, **options):
    write_viewer(tmp_path / "page.html", *args, **{"still": False, **options})
    return Page(tmp_path / "page.html")


@pytest.mark.parametrize("shift", [(0, 0, 0), (500.0, -4000.0, 30.0)])
def test_points_are_those_of_the_scan_within_half_a_step(tmp_path, shift):
    scan = room(shift=shift)
    page = written(tmp_path, scan, found(BOXES + np.float32([*shift, 0, 0, 0, 0])), NAMES)
    # Half a step, and the rounding of sums in float64.
    reach = np.array(page.data["points"]["step"]) / 2 + 1e-9
    assert (np.abs(page.points() - scan.points) <= reach).all() and (reach < 1e-4).all()
    assert np.abs(page.colors() / 255 - scan.colors).max() <= 0.5 / 255 + 1e-6


def test_steps_end_at_the_corners_of_the_extent():
    low, step, places = quantise(np.array([[-1, 0, 5], [3, 0, 9]], np.float32))
    assert places.tolist() == [[0, 0, 0], [65535, 0, 65535]]
    np.testing.assert_allclose(low + step * places[1], [3, 0, 9])


def test_boxes_scores_and_hits_are_exact(tmp_path):
    truth = GroundTruth(BOXES[1:], np.array([1, 2], np.int32))
    page = written(tmp_path, room(), found(), NAMES, truth=truth)
    stored = page.data["detections"]
    np.testing.assert_array_equal(np.array(stored["boxes"], np.float32), BOXES)
    np.testing.assert_array_equal(np.array(stored["scores"], np.float32), np.float32([0.9, 0.6, 0.1]))
    assert stored["labels"] == [0, 1, 2] and stored["hits"] == [[-1, 0, 1], [-1, 0, 1]]
    np.testing.assert_array_equal(np.array(page.data["truth"]["boxes"], np.float32), BOXES[1:])
    assert [entry["name"] for entry in page.data["classes"]] == list(NAMES)


def test_it_refers_to_nothing_outside(tmp_path):
    page = written(tmp_path, room(), found(), NAMES, still=True)
    assert all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|import\s*\(|fetch\(", page.source)
    assert "default-src 'none'" in page.source and "{{" not in page.source


def test_a_script_looks_for_no_element_that_is_not_there(tmp_path):
    page = written(tmp_path, room(), found(), NAMES)
    wanted = set(re.findall(r'byId\("([\w-]+)"\)', page.source))
    assert len(wanted) > 20 and wanted <= set(re.findall(r'id="([\w-]+)"', page.source)) | {"places", "colors"}


def test_names_are_text_whatever_they_hold(tmp_path):
    plain = written(tmp_path, room(), found(), NAMES, title="room")
    page = written(tmp_path, room(), found(), EVIL, title="<img src=x onerror=alert(1)> & more")
    assert page.tags == plain.tags and page.references == plain.references
    assert [entry["name"] for entry in page.data["classes"]] == list(EVIL)
    assert "<img src=x" not in page.source and page.texts["h1"] == "<img src=x onerror=alert(1)> & more"
    assert len(page.points()) == 2000  # the placeholder in a class name was not replaced


def test_a_name_that_is_no_text_is_written(tmp_path):
    assert written(tmp_path, scan_of([0, 0, 0], name="caf\udce9"), None, NAMES).texts["h1"] == "caf?"


def test_empty_scans_and_no_boxes(tmp_path):
    page = written(tmp_path, scan_of([]), None, NAMES)
    assert page.points().shape == (0, 3) and page.data["detections"]["boxes"] == [] and page.data["truth"] is None
    assert written(tmp_path, scan_of([1, 2, 3]), found(), NAMES).points().tolist() == [[1, 2, 3]]


def test_points_without_colours_are_stored_without_any(tmp_path):
    page = written(tmp_path, scan_of(np.random.default_rng(0).normal(size=(50, 3))), None, NAMES)
    assert page.data["points"]["colored"] is False and len(page.colors()) == 0


def test_a_ceiling_is_cut_off(tmp_path):
    scan = room(3000)
    scan.points[::3, 2] = 2.6
    ceiling = written(tmp_path, scan, None, NAMES).data["points"]["ceiling"]
    assert 1.5 < ceiling < 2.6
    assert written(tmp_path, room(), None, NAMES).data["points"]["ceiling"] is None


def test_the_page_notes_thinning(tmp_path):
    page = written(tmp_path, room(), None, NAMES, max_points=500)
    assert len(page.points()) == 500 and page.data["points"]["total"] == 2000
    assert page.data["notes"] == ["500 of 2,000 points are shown, thinned evenly."]


def test_a_hundred_thousand_points_and_hundreds_of_boxes_are_small(tmp_path):
    boxes = np.tile(BOXES, (100, 1))
    detections = found(boxes, np.linspace(0, 1, 300), np.arange(300) % 3)
    write_viewer(tmp_path / "page.html", room(100_000), detections, NAMES)
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


@needs_chromium
def test_a_browser_shows_it(tmp_path):
    truth = GroundTruth(BOXES[:1], np.zeros(1, np.int32))
    write_viewer(tmp_path / "page.html", room(), found(labels=(0, 1, 1)), EVIL, truth=truth)
    dom = dom_of(tmp_path / "page.html")
    assert "2,000 points, 2 of 3 detections shown, 1 true box." in dom
    assert "1 of 1 true box found, 1 of 2 detections hit none." in dom
    assert "2 of 2" not in dom and 'class="plain"' not in dom
    labels = re.search(r'<div id="labels".*?</div>', dom, re.S)[0]
    assert "<bdi>&lt;/script&gt;&lt;b&gt;bold</bdi><b>0.90</b>" in labels and "visibility: visible" in labels

"""The pages in a browser: hover, dimensions, measuring, the table, hidden boxes; filter and order of the index."""

import numpy as np

from h2a2_jax.viewer.index_page import write_index
from h2a2_jax.viewer.scan_page import write_viewer
from tests.viewer.browser import drive, needs_chromium
from tests.viewer.scenes import BOXES, entry, found, scan_of

EVIL = ("=1+1", "ta\tble", '"sofa"')
CORNERS = np.array([[0, 0, 0], [4, 0, 0], [4, 3, 0], [4, 3, 1.5]], np.float32)


def pixel_of(row):
    """Script: the pixel of a point of the scan."""
    return f"camera.project([0, 1, 2].map((k) => model.places[3 * {row} + k] * model.data.points.step[k])).slice(0, 2)"


@needs_chromium
def test_what_a_page_does_with_a_mouse(tmp_path):
    detections = found(BOXES, (0.9, 0.6, 0.1), (0, 1, 2))
    write_viewer(tmp_path / "page.html", scan_of(CORNERS), detections, EVIL, still=False)
    shown = drive(
        tmp_path / "page.html",
        f"""
        const {{ model, camera, measure }} = viewer;
        const text = (id) => document.getElementById(id).textContent;
        const key = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true }}));
        const chair = model.boxes[0], shown = {{}};
        viewer.hovered(viewer.screen(chair));
        viewer.draw();
        shown.tip = [...document.querySelectorAll("#tip > *")].map((part) => part.textContent);
        viewer.clicked(...viewer.screen(chair));
        viewer.draw();
        shown.chosen = model.state.chosen === chair && document.getElementById("tip").hidden;
        shown.dimensions = [...document.querySelectorAll(".dimension")].map((label) => label.textContent);
        shown.visible = [...document.querySelectorAll(".dimension")].map((label) => label.style.visibility);
        shown.edges = viewer.labels.edges.map(([a, b]) => b - a);
        key("Escape");
        shown.none = model.state.chosen;
        key("m");
        viewer.clicked(...{pixel_of(0)}.map((at) => at + 3));
        viewer.clicked(...{pixel_of(3)});
        shown.measured = text("measured");
        shown.ends = measure.ends.map((end) => end.map((v) => Math.round(v * 100) / 100));
        viewer.clicked(5, 700);
        shown.nowhere = text("hint-words");
        key("Escape");
        shown.active = measure.active;
        shown.below = text("below");
        Object.defineProperty(navigator, "clipboard", {{ value: undefined }});
        document.getElementById("below").click();
        shown.summary = text("summary");
        shown.stillBelow = !document.getElementById("below").hidden;
        document.getElementById("copy").click();
        await idle();
        shown.table = document.getElementById("table-text").value;
        shown.open = document.getElementById("table").open;
        return shown;
        """,
    )
    assert shown["tip"] == ["=1+1", "score 0.90", "1.00 \u00d7 0.60 \u00d7 1.00 m", "0.600 m³"]
    assert shown["chosen"] and shown["none"] is None and not shown["active"]
    assert shown["dimensions"] == ["width 1.00 m", "depth 0.60 m", "height 1.00 m"]
    assert shown["visible"] == ["visible"] * 3 and shown["edges"] == [1, 2, 4]
    assert shown["ends"] == [[0, 0, 0], [4, 3, 1.5]]
    assert shown["measured"] == "5.22 m, horizontal 5.00 m, vertical 1.50 m"
    assert shown["nowhere"] == "No point of the scan there: choose a point"
    assert shown["below"] == "1 more below 0.30: show" and not shown["stillBelow"]
    assert shown["summary"] == "4 points, 3 of 3 detections shown." and shown["open"]
    header, *rows = shown["table"].splitlines()
    assert header.split("\t") == ["class", "score", *"x (m),y (m),z (m),dx (m),dy (m),dz (m),yaw (rad)".split(",")]
    assert [row.split("\t")[0] for row in rows] == ["'=1+1", "ta ble", '"""sofa"""']
    numbers = np.array([[float(number) for number in row.split("\t")[1:]] for row in rows])
    np.testing.assert_allclose(numbers, np.column_stack([[0.9, 0.6, 0.1], BOXES]), atol=1e-4)


@needs_chromium
def test_an_index_is_filtered_and_sorted(tmp_path):
    entries = [entry(f"room{i}", {"chair": i, "<b>desk": i % 2}) for i in (2, 10, 1)] + [entry("empty", {})]
    write_index(tmp_path / "index.html", entries, {}, title="rooms")
    shown = drive(
        tmp_path / "index.html",
        """
        const names = () => [...document.querySelectorAll("#rows .name")].map((cell) => cell.textContent);
        const sort = (key) => document.querySelector(`[data-key="${key}"] button`).click();
        const fill = (id, value, type) => {
          Object.assign(document.getElementById(id), { value }).dispatchEvent(new Event(type));
        };
        const shown = { first: names() };
        sort("name");
        shown.name = names();
        sort("boxes");
        shown.boxes = names();
        sort("boxes");
        shown.fewest = names();
        fill("filter", "ROOM desk", "input");
        shown.filtered = names();
        fill("filter", "", "input");
        fill("class", "0", "change");
        shown.chairs = [names(), document.getElementById("matching").textContent];
        return shown;
        """,
    )
    assert shown["first"] == ["room2", "room10", "room1", "empty"]
    assert shown["name"] == ["empty", "room1", "room2", "room10"]
    assert shown["boxes"] == ["room10", "room2", "room1", "empty"]
    assert shown["fewest"] == ["empty", "room2", "room1", "room10"]
    assert shown["filtered"] == ["room1"] and shown["chairs"] == [["room2", "room1", "room10"], "3 of 4 scans"]

"""What other programs read of our files: places, colours, names, units, in the frames that the pages promise."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh

from h2a2_jax.boxes import Detections
from h2a2_jax.inference.exports.dxf import layer_names
from h2a2_jax.inference.exports.upright import upright
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.scans.frame import UNITS, UPRIGHT
from h2a2_jax.scans.specs import SUNRGBD
from h2a2_jax.viewer.content import class_color
from tests.inference.test_found_boxes import BOXES, FOUND, FRAMES, ORDER, POINTS, SCAN

Y_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
HOSTILE = (
    "a*b/c",
    'say "<x>"',
    "  ",
    "\u6905\u5b50 \u4e00",
    "x" * 300,
    "X" * 300,
    "0",
    "line\nbreak",
    "\ud800",
    "%%d^J|`,",
)


def upright_corners(boxes: Boxes) -> np.ndarray:
    """Corners in metres, z up, in the axes of the input turned upright."""
    turn = np.array(UPRIGHT[boxes.up]) if boxes.alignment is None else boxes.alignment
    return boxes.corners * UNITS[boxes.unit] @ turn.T


def hostile_boxes() -> Boxes:
    count = len(HOSTILE)
    columns = np.repeat(BOXES[:1].astype(np.float64), count, axis=0)
    scores, labels = np.linspace(1, 0, count, dtype=np.float32), np.arange(count, dtype=np.int32)
    return Boxes(
        columns[:, :3], columns[:, 3:6], columns[:, 6], scores, labels, HOSTILE, scan=replace(SCAN, name="a\n/*")
    )


def names_of_nodes(path: Path) -> list[dict]:
    content = path.read_bytes()
    return json.loads(content[20 : 20 + int.from_bytes(content[12:16], "little")])["nodes"]


@pytest.mark.parametrize("matrix", FRAMES.values(), ids=FRAMES)
def test_gltf_is_in_metres_y_up_near_its_origin(tmp_path: Path, matrix: np.ndarray):
    boxes = Boxes.of(FOUND, SCAN, matrix, SUNRGBD)
    path = boxes.save(tmp_path / "a.glb")
    root, *nodes = names_of_nodes(path)
    assert root["name"] == "room" and [node["name"] for node in nodes][:2] == ["points", "table 0.90"]
    np.testing.assert_allclose(nodes[1]["extras"]["size"], boxes.sizes[0] * UNITS[boxes.unit], atol=1e-5)
    assert nodes[1]["extras"]["class"] == "table" and nodes[1]["extras"]["label"] == 1
    origin = np.array(root["extras"]["origin"])
    assert (abs(origin).max() > 1e5) == (matrix[0, 3] < -1e5)
    scene = trimesh.load_scene(path)
    expected = (upright_corners(boxes) - origin) @ Y_UP.T
    for i, name in enumerate(("table 0.90", "chair 0.40")):
        transform, geometry = scene.graph[name]
        mesh = scene.geometry[geometry]
        assert mesh.volume > 0  # faces are seen from outside
        vertices = trimesh.transform_points(mesh.vertices, transform)
        np.testing.assert_allclose(vertices.min(axis=0), expected[i].min(axis=0), atol=0.012)
        np.testing.assert_allclose(vertices.max(axis=0), expected[i].max(axis=0), atol=0.012)
    moved = (POINTS.astype(np.float64) - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T * UNITS[boxes.unit]
    turn = np.array(UPRIGHT[boxes.up]) if boxes.alignment is None else boxes.alignment
    np.testing.assert_allclose(
        scene.geometry[scene.graph["points"][1]].vertices, (moved @ turn.T - origin) @ Y_UP.T, atol=1e-4
    )


def test_gltf_of_nothing_of_boxes_alone_and_of_hostile_names(tmp_path: Path):
    boxes = hostile_boxes()
    nodes = names_of_nodes(boxes.save(tmp_path / "a.glb"))
    assert [node["name"] for node in nodes[:3]] == ["a /*", "points", "a*b/c 1.00"] and len(nodes) == 2 + len(HOSTILE)
    assert len(trimesh.load_scene(tmp_path / "a.glb").geometry) == 1 + len(HOSTILE)
    without = replace(boxes, scan=Boxes.scan)
    assert len(names_of_nodes(without.save(tmp_path / "b.glb"))) == 1 + len(HOSTILE)
    assert names_of_nodes(without[:0].save(tmp_path / "c.glb"))[0]["name"] == "boxes"


def test_colours_of_gltf_are_linear(tmp_path: Path):
    colors = np.random.default_rng(1).random(POINTS.shape, np.float32)
    scene = trimesh.load_scene(replace(hostile_boxes(), scan=replace(SCAN, colors=colors)).save(tmp_path / "a.glb"))
    shades = np.asarray(scene.geometry[scene.graph["points"][1]].colors)[:, :3] / 255
    np.testing.assert_allclose(shades, colors**2.2, atol=0.015)


@pytest.mark.parametrize("name", FRAMES)
def test_dxf_is_in_the_unit_of_the_input_z_up(tmp_path: Path, name: str):
    ezdxf = pytest.importorskip("ezdxf")
    boxes = Boxes.of(FOUND, SCAN, FRAMES[name], SUNRGBD)
    document = ezdxf.readfile(boxes.save(tmp_path / "a.dxf"))
    assert not document.audit().errors and not document.audit().fixes
    code = {"m": 6, "mm": 4, "cm": 5, "ft": 2}[boxes.unit]
    assert document.header["$INSUNITS"] == code and document.header["$MEASUREMENT"] == (boxes.unit != "ft")
    expected = boxes.corners if boxes.alignment is not None else upright_corners(boxes) / UNITS[boxes.unit]
    space = document.modelspace()
    lines = space.query('LINE[layer=="table"]')
    ends = np.array([[line.dxf.start, line.dxf.end] for line in lines])
    assert ends.shape == (12, 2, 3)
    metres, scale = UNITS[boxes.unit], max(1, np.abs(expected).max())
    gaps = np.linalg.norm(ends.reshape(-1, 1, 3) - expected[0], axis=-1) * metres
    assert gaps.min(axis=1).max() < 1e-9 * scale and gaps.min(axis=0).max() < 1e-9 * scale
    lengths = np.sort(np.linalg.norm(ends[:, 0] - ends[:, 1], axis=1) * metres)
    np.testing.assert_allclose(lengths, np.repeat(np.sort(BOXES[1, 3:6]), 4), atol=1e-5)
    if boxes.alignment is None:
        (footprint,) = space.query('LWPOLYLINE[layer=="table_footprint"]')
        assert footprint.closed and footprint.dxf.elevation == pytest.approx(expected[0, :, 2].min())
        x, y = (np.array(footprint.get_points("xy")) - footprint[0][:2]).T
        area = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
        assert area * metres**2 == pytest.approx(1.5, rel=1e-5)
    else:
        (footprint,) = space.query('POLYLINE[layer=="table_footprint"]')
        assert footprint.is_closed and len(footprint) == 4
    first, second = (text.dxf.text for text in space.query('TEXT[layer=="table"]'))
    assert first == "table 0.90" and second.endswith(f" {boxes.unit}") and second.count(" x ") == 2
    assert tuple(document.layers.get("table").rgb) == tuple(round(255 * channel) for channel in class_color(1))
    assert len(document.groups) == 3 and len(space.query("LINE")) == 36


def test_dxf_of_nothing_and_of_hostile_names(tmp_path: Path):
    ezdxf = pytest.importorskip("ezdxf")
    document = ezdxf.readfile(hostile_boxes().save(tmp_path / "a.dxf"))
    assert not document.audit().errors and not document.audit().fixes
    texts = [text.dxf.text for text in document.modelspace().query("TEXT")]
    assert (
        len(texts) == 2 * len(HOSTILE) and max(map(len, texts)) < 256 and any("\u6905\u5b50" in text for text in texts)
    )
    assert len(document.layers) == 2 + 2 * len(HOSTILE)
    document = ezdxf.readfile(hostile_boxes()[:0].save(tmp_path / "b.dxf"))
    assert len(document.modelspace()) == 0


def test_names_of_layers_are_allowed_and_all_different():
    names = layer_names((*HOSTILE, "chair", "Chair", "chair_footprint", "0"))
    every = [name for each in names for name in (each, f"{each}_footprint")]
    assert len({name.lower() for name in every} | {"0"}) == len(every) + 1
    assert not set("".join(every)) & set('<>/\\":;?*|=`,\n') and max(map(len, every)) < 255
    assert names[0] == "a_b_c" and names[3] == HOSTILE[3] and names[-4:-2] == ("chair", "Chair-2")


@pytest.mark.parametrize("name", ["y in mm", "on a map", "tilted"])
def test_rerun_has_boxes_of_the_scan(tmp_path: Path, name: str):
    chunk = pytest.importorskip("rerun.chunk")
    boxes = Boxes.of(FOUND, SCAN, FRAMES[name], SUNRGBD)
    reader = chunk.RrdReader(boxes.save(tmp_path / "a.rrd"))
    (store,) = reader.recordings()
    assert store.application_id == "boxes of h2a2_jax" and store.recording_id == "room"
    parts = {part.entity_path: part.to_record_batch() for part in reader.stream()}
    assert set(parts) == {"/", "/scan", "/scan/origin", "/scan/points", "/scan/boxes"}

    def column(name: str) -> np.ndarray:
        return np.array(parts["/scan/boxes"][name].to_pylist()[0])

    origin = np.array([float(n) for n in parts["/scan/origin"]["TextDocument:text"].to_pylist()[0][0].split()])
    np.testing.assert_allclose(column("Boxes3D:half_sizes") * 2, boxes.sizes * UNITS[boxes.unit], rtol=1e-5)
    assert column("Boxes3D:labels").tolist() == ["table 0.90", "chair 0.40", "chair 0.40"]
    assert column("Boxes3D:class_ids").tolist() == FOUND.labels[ORDER].tolist()
    middle = upright_corners(boxes).mean(axis=1)
    np.testing.assert_allclose(column("Boxes3D:centers"), middle - origin, atol=1e-4)
    x, y, z, w = column("Boxes3D:quaternions").T
    turn = np.array(UPRIGHT[boxes.up]) if boxes.alignment is None else boxes.alignment
    np.testing.assert_allclose(2 * (x * y + z * w), (turn @ boxes.rotations)[:, 1, 0], atol=1e-6)


def test_rerun_of_nothing_and_of_hostile_names(tmp_path: Path):
    pytest.importorskip("rerun")
    boxes = hostile_boxes()
    assert boxes.save(tmp_path / "a.rrd").stat().st_size > 1000
    assert replace(boxes, scan=Boxes.scan)[:0].save(tmp_path / "b.rrd").stat().st_size > 100


def test_a_large_scan_is_thinned():
    boxes = Boxes.of(Detections(BOXES, FOUND.scores, FOUND.labels), SCAN, np.eye(4), SUNRGBD)
    placed = upright(boxes, 100)
    assert len(placed.points) == len(placed.colors) == 100 and {*map(tuple, placed.points)} < {*map(tuple, POINTS)}

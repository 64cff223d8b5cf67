"""Files of laser scanners, E57 and PTX: all scans in one frame, points that the laser did not hit left out."""

import struct

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats import e57 as e57_module
from h2a2_jax.scans.formats.point_cloud import THINNED, read_point_cloud

POINTS = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 3], [1, 2, 3], [4, 5, 6]], np.float64)
COLORS = np.array([[0, 128, 255], [1, 2, 3], [200, 100, 50], [9, 8, 7], [255, 255, 255]])
SHIFT = np.array([500000.25, 4649000.5, 12.0])
TURN = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])  # by 90 degrees about z


# ---- E57 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pye57():
    return pytest.importorskip("pye57", exc_type=ImportError)


def columns(points=POINTS, colors=COLORS, invalid=None):
    found = dict(zip(("cartesianX", "cartesianY", "cartesianZ"), points.T.copy(), strict=True))
    if colors is not None:
        found |= dict(zip(("colorRed", "colorGreen", "colorBlue"), colors.astype(np.uint8).T.copy(), strict=True))
    if invalid is not None:
        found["cartesianInvalidState"] = np.array(invalid, np.int8)
    return found


def write(pye57, path, *scans):
    """Scans of (columns, turned and shifted or not)."""
    file = pye57.E57(str(path), mode="w")
    for data, placed in scans:
        half = np.sqrt(0.5)
        pose = {"rotation": np.array([half, 0, 0, half]), "translation": SHIFT} if placed else {}
        file.write_scan_raw(data, **pose)
    file.close()
    return path


def test_all_scans_of_an_e57_file_lie_in_its_frame(tmp_path, pye57):
    path = write(pye57, tmp_path / "a.e57", (columns(), True), (columns(invalid=[0, 2, 0, 1, 0]), False))
    cloud = read_point_cloud(path)
    assert (cloud.up, cloud.unit, cloud.full_color) == ("z", "m", 255)
    np.testing.assert_allclose(cloud.points[:5], POINTS @ TURN.T + SHIFT, rtol=0, atol=1e-6)
    np.testing.assert_allclose(cloud.points[5:], POINTS[[0, 2, 4]], atol=1e-6)
    np.testing.assert_array_equal(cloud.colors, np.concatenate([COLORS, COLORS[[0, 2, 4]]]))
    assert cloud.assumed == ("has 2 points that the scanner calls invalid, which are left out",) and not cloud.notes


def test_an_e57_file_is_thinned_block_by_block(tmp_path, pye57, monkeypatch):
    monkeypatch.setattr(e57_module, "_BLOCK", 48)
    points = np.stack([np.arange(500.0), np.zeros(500), np.ones(500)], axis=1)
    colors = np.stack([np.arange(500) % 256] * 3, axis=1)
    path = write(pye57, tmp_path / "a.e57", (columns(points, colors), False), (columns(points + 500, colors), False))
    cloud = read_point_cloud(path, 100)
    rows = cloud.points[:, 0].round().astype(int)
    assert ((rows >= np.arange(100) * 10) & (rows < np.arange(1, 101) * 10)).all() and cloud.notes == {THINNED: 900}
    np.testing.assert_array_equal(cloud.colors[:, 0], rows % 500 % 256)
    np.testing.assert_allclose(read_point_cloud(path).points[:, 0], np.arange(1000), atol=1e-4)


def test_scans_without_colours(tmp_path, pye57):
    assert read_point_cloud(write(pye57, tmp_path / "a.e57", (columns(colors=None), False))).colors is None
    path = write(pye57, tmp_path / "b.e57", (columns(colors=None), False), (columns(), False))
    cloud = read_point_cloud(path)
    assert "has 1 of 2 scans without colours, whose points are taken as grey" in cloud.assumed
    np.testing.assert_array_equal(cloud.colors[:5], 128)
    np.testing.assert_array_equal(cloud.colors[5:], COLORS)


def write_nodes(path, fields, limits, pose=None):
    """An E57 file by the library's own calls: fields by name of (values, least, most), real ones without bounds."""
    libe57 = pytest.importorskip("pye57", exc_type=ImportError).libe57
    import pye57

    file = pye57.E57(str(path), mode="w")
    image = file.image_file
    scan, prototype = libe57.StructureNode(image), libe57.StructureNode(image)
    scan.set("guid", libe57.StringNode(image, "{1}"))
    buffers = libe57.VectorSourceDestBuffer()
    arrays = {}
    for name, (values, *bounds) in fields.items():
        node = libe57.IntegerNode(image, bounds[0], *bounds) if bounds else libe57.FloatNode(image, 0.0)
        prototype.set(name, node)
        arrays[name] = np.ascontiguousarray(values, np.uint16 if bounds else np.float64)
        buffers.append(libe57.SourceDestBuffer(image, name, arrays[name], len(values), True, not bounds))
    if limits:
        box = libe57.StructureNode(image)
        for name in ("Red", "Green", "Blue"):
            for end, value in zip(("Minimum", "Maximum"), limits, strict=True):
                box.set(f"color{name}{end}", libe57.IntegerNode(image, value))
        scan.set("colorLimits", box)
    if pose:
        node, inner = libe57.StructureNode(image), libe57.StructureNode(image)
        for name, value in pose.items():
            inner.set(name, libe57.FloatNode(image, value))
        node.set("rotation", inner)
        scan.set("pose", node)
    points = libe57.CompressedVectorNode(image, prototype, libe57.VectorNode(image, True))
    scan.set("points", points)
    file.data3d.append(scan)
    points.writer(buffers).write(len(next(iter(arrays.values()))))
    file.close()
    return path


@pytest.mark.parametrize(
    ("scale", "limits", "most", "sentence"),
    [
        (257, (0, 65535), 65535, None),
        (257, None, 65535, None),
        (1, (0, 255), 65535, None),
        (1, (0, 65535), 65535, "up to 255 under limits of 0 to 65535: taken as 0-255"),
        (257, (0, 255), 65535, "up to 65535 under limits of 0 to 255: taken as 0-65535"),
        (16, (0, 4080), 4095, None),
    ],
)
def test_colours_of_an_e57_file_by_their_limits(tmp_path, pye57, scale, limits, most, sentence):
    fields = {
        name: (column,) for name, column in zip(("cartesianX", "cartesianY", "cartesianZ"), POINTS.T, strict=True)
    }
    for name, column in zip(("colorRed", "colorGreen", "colorBlue"), COLORS.T, strict=True):
        fields[name] = (column * scale, 0, most)
    cloud = read_point_cloud(write_nodes(tmp_path / "a.e57", fields, limits))
    np.testing.assert_array_equal(cloud.colors, COLORS)
    np.testing.assert_array_equal(cloud.points, POINTS)
    assert (sentence is None and not cloud.assumed) or sentence in cloud.assumed[0]


def test_spherical_coordinates_and_a_pose_whose_parts_are_in_another_order(tmp_path, pye57):
    half = np.sqrt(0.5)
    fields = {
        "sphericalRange": ([1, 2, 3],),
        "sphericalAzimuth": ([0, np.pi / 2, 0],),
        "sphericalElevation": ([0, 0, np.pi / 2],),
    }
    path = write_nodes(tmp_path / "a.e57", fields, None, {"x": 0.0, "y": 0.0, "z": half, "w": half})
    cloud = read_point_cloud(path)
    np.testing.assert_allclose(cloud.points, POINTS[:3] @ TURN.T, atol=1e-12)
    assert cloud.colors is None


def test_damaged_e57_files(tmp_path, pye57):
    path = write(pye57, tmp_path / "a.e57", (columns(), True))
    content = path.read_bytes()
    for bad, sentence in (
        (b"no scan", "is no E57 file"),
        (content[:40], "is no E57 file or is cut off in its header"),
        (content[:-1], "is cut off: its header says"),
        (content[:1500] + bytes([content[1500] ^ 255]) + content[1501:], "is damaged"),
        (content[:24] + struct.pack("<Q", 2**40) + content[32:], "is damaged"),
    ):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=sentence):
            read_point_cloud(path)
    assert path.exists()


def test_without_the_extra_one_sentence_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.e57").write_bytes(b"ASTM-E57" + bytes(40))
    monkeypatch.setitem(__import__("sys").modules, "pye57", None)
    with pytest.raises(InputError, match=r"is an E57 file: install the extra, pip install 'h2a2_jax\[e57\]'\."):
        read_point_cloud(tmp_path / "a.e57")


# ---- PTX -----------------------------------------------------------------------------------------------------------


def ptx(points=POINTS, colors=COLORS, turn=TURN, shift=SHIFT):
    """One scan of two columns, with a direction without a point at its end."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[3, :3] = turn.T, shift
    lines = ["2", f"{(len(points) + 1) // 2}", *(["0 0 0"] * 4)]
    lines += [" ".join(map(str, row)) for row in matrix.tolist()]
    rows = [*points.tolist(), [0, 0, 0]]
    tints = [""] * len(rows) if colors is None else [" " + " ".join(map(str, c)) for c in [*colors.tolist(), [0, 0, 0]]]
    lines += [f"{' '.join(map(str, row))} 0.5{tint}" for row, tint in zip(rows, tints, strict=True)]
    return "\n".join([*lines, ""])


def test_all_scans_of_a_ptx_file_lie_in_its_frame(tmp_path):
    (tmp_path / "a.ptx").write_text(ptx() + ptx(turn=np.eye(3), shift=np.zeros(3)))
    cloud = read_point_cloud(tmp_path / "a.ptx")
    np.testing.assert_allclose(cloud.points, np.concatenate([POINTS @ TURN.T + SHIFT, POINTS]), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(cloud.colors, np.concatenate([COLORS, COLORS]))
    assert cloud.assumed == ("has 2 directions without a point of 12 read",)
    (tmp_path / "b.ptx").write_text(ptx(colors=None).replace("\n", "\r\n"))
    cloud = read_point_cloud(tmp_path / "b.ptx")
    assert len(cloud.points) == 5 and cloud.colors is None


def test_a_ptx_file_is_thinned(tmp_path):
    points = np.stack([np.arange(1.0, 500), np.zeros(499), np.ones(499)], axis=1)
    content = ptx(points, None, np.eye(3), np.zeros(3))
    (tmp_path / "a.ptx").write_text(content + content)
    cloud = read_point_cloud(tmp_path / "a.ptx", 50)
    assert len(cloud.points) == 50 and 940 < cloud.notes[THINNED] <= 950
    assert (np.diff(cloud.points[:25, 0]) > 0).all() and cloud.points[25, 0] < cloud.points[24, 0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("x y z\n1 2 3\n", "has no PTX header"),
        (ptx().replace("0 0 0\n", "", 1), "has no PTX header"),
        (ptx()[:-20], "is cut off|is not x y z intensity"),
        ("1000000000\n1000000000\n" + ptx()[4:], "is cut off: its header says 1000000000000000000 points"),
        (ptx().replace(" 0.5", ""), "lines of another kind"),
    ],
)
def test_damaged_ptx_files(tmp_path, content, sentence):
    (tmp_path / "a.ptx").write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_point_cloud(tmp_path / "a.ptx")

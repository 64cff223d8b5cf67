"""PLY files of other programs: lists anywhere, untidy headers, and the digits of a text."""

import io
import struct

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.ply import read_ply_columns, read_ply_header
from h2a2_jax.scans.formats.ply_mesh import read_ply_faces
from h2a2_jax.scans.formats.point_cloud import THINNED, read_point_cloud

N = 600
RANDOM = np.random.default_rng(0)
POINTS = RANDOM.uniform(0, 4, (N, 3)).astype(np.float32)
COLORS = RANDOM.integers(0, 256, (N, 3)).astype(np.uint8)
XYZ = [f"property float {axis}" for axis in "xyz"]
RGB = [f"property uchar {name}" for name in ("red", "green", "blue")]
FORMS = ("ascii", "binary_little_endian", "binary_big_endian")


def ply(form, *elements, comments=("comment made here",)) -> bytes:
    """A PLY file of elements (name, properties, rows); a row is a list of (struct's letter, value)."""
    lines, body = ["ply", f"format {form} 1.0", *comments], []
    for name, properties, rows in elements:
        lines += [f"element {name} {len(rows)}", *properties]
        for row in rows:
            kinds, values = zip(*row, strict=True)
            if form == "ascii":
                body.append(" ".join(map(str, values)).encode() + b"\n")
            else:
                body.append(struct.pack(("<" if "little" in form else ">") + "".join(kinds), *values))
    return "\n".join([*lines, "end_header", ""]).encode() + b"".join(body)


def vertices(extra=lambda i: []):
    return [
        [*(("f", v) for v in p), *(("B", v) for v in c), *extra(i)]
        for i, (p, c) in enumerate(zip(POINTS.tolist(), COLORS.tolist(), strict=True))
    ]


def entries(kind, length, values):
    return [(length, len(values)), *((kind, value) for value in values)]


def check(path, count=50):
    cloud, some = read_point_cloud(path), read_point_cloud(path, count)
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)
    assert cloud.full_color == 255 and not cloud.notes and some.notes == {THINNED: N - count}
    rows = [np.flatnonzero((POINTS == p).all(axis=1))[0] for p in some.points.astype(np.float32)]
    assert (np.diff(rows) > 0).all() and (COLORS[rows] == some.colors).all()
    return cloud


FACE = ["property list uchar int vertex_indices"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "faces",
    [[[0, 1, 2]], [[i, i + 1, i + 2] for i in range(0, 300, 3)], [list(range(i % 7)) for i in range(500)], []],
    ids=["one triangle", "triangles", "lists of many lengths", "none"],
)
def test_faces_before_the_vertices(tmp_path, form, faces):
    rows = [entries("i", "B", face) for face in faces]
    (tmp_path / "a.ply").write_bytes(ply(form, ("face", FACE, rows), ("vertex", XYZ + RGB, vertices())))
    cloud = check(tmp_path / "a.ply")
    if faces:
        assert cloud.assumed == (f"has {len(faces)} faces, which are not used: its 600 vertices are the points",)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [lambda i: 2, lambda i: i % 5, lambda i: 0 if i % 100 else 200])
def test_lists_in_the_vertices(tmp_path, form, count):
    """The layout of OpenMVS: the views of each point behind its colours."""
    lists = ["property list uchar uint view_indices", "property list ushort double view_weights"]
    rows = vertices(lambda i: [*entries("I", "B", range(count(i))), *entries("d", "H", [0.5] * count(i))])
    (tmp_path / "a.ply").write_bytes(ply(form, ("vertex", XYZ + RGB + lists, rows)))
    check(tmp_path / "a.ply")


@pytest.mark.parametrize("form", FORMS)
def test_lists_before_and_between_the_numbers_of_a_vertex(tmp_path, form):
    rows = [
        [*entries("h", "I", range(i % 3)), *row[:2], *entries("d", "b", [1.5] * (i % 2)), *row[2:]]
        for i, row in enumerate(vertices())
    ]
    properties = ["property list uint short a", *XYZ[:2], "property list char double b", XYZ[2], *RGB]
    others = [[("i", i), *entries("f", "B", [0.25] * (i % 4)), ("d", 1.0)] for i in range(70)]
    other = ["property int id", "property list uint8 float32 weights", "property float64 quality"]
    (tmp_path / "a.ply").write_bytes(
        ply(
            form,
            ("camera", other, others),
            ("vertex", properties, rows),
            ("face", FACE, [entries("i", "B", [0, 1, 2])]),
        )
    )
    check(tmp_path / "a.ply")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "lengths", [[], [2] * 4, [1, 0, 3, 2]], ids=["no lists", "lists alike", "lists of many lengths"]
)
def test_integers_of_eight_bytes(tmp_path, form, lengths):
    """As trimesh writes labels."""
    rows = [[*vertices()[i][:3], ("q", 2**40 + i)] for i in range(4)]
    rows = [[*row, *entries("i", "B", range(n))] for row, n in zip(rows, lengths, strict=True)] if lengths else rows
    properties = [*XYZ, "property int64 label", *["property list uchar int views"] * bool(lengths)]
    (tmp_path / "a.ply").write_bytes(ply(form, ("vertex", properties, rows)))
    columns = read_ply_columns(tmp_path / "a.ply")
    np.testing.assert_array_equal(columns["label"], 2**40 + np.arange(4))
    np.testing.assert_array_equal(columns["z"], POINTS[:4, 2].astype(columns["z"].dtype))


@pytest.mark.parametrize("form", FORMS)
def test_polygons_are_cut_into_triangles(tmp_path, form):
    lengths = [3] * 200 + [4] * 3 + [3] * 5 + [0, 1, 2] * 30 + [4] * 100 + [3]
    faces = [[*entries("I", "B", range(n)), ("B", n)] for n in lengths]
    content = ply(
        form,
        ("face", ["property list uchar uint vertex_index", "property uchar red"], faces),
        ("vertex", XYZ + RGB, vertices()),
    )
    (tmp_path / "a.ply").write_bytes(content)
    triangles, columns = read_ply_faces(tmp_path / "a.ply", read_ply_header(tmp_path / "a.ply"))
    expected = [[0, k, k + 1] for n in lengths for k in range(1, n - 1)]
    assert sorted(triangles.tolist()) == sorted(expected)
    assert sorted(columns["red"].tolist()) == sorted(n for n in lengths for _ in range(n - 2))
    check(tmp_path / "a.ply")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"\3\0\0\0\0", "a list of its face elements does not end in the file"),
        (b"\xff" + bytes(30), "a list of its face elements does not end in the file"),
        (b"\xff", "is cut off"),
    ],
)
def test_lists_that_are_damaged(tmp_path, body, sentence):
    for kind in ("uchar", "char"):  # -1 as a signed length
        header = f"ply\nformat binary_little_endian 1.0\nelement face 2\nproperty list {kind} int vertex_indices\n"
        header += "element vertex 0\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
        (tmp_path / "a.ply").write_bytes(header.encode() + body)
        with pytest.raises(InputError, match=sentence):
            read_point_cloud(tmp_path / "a.ply")


@pytest.mark.parametrize("rows", ["3 0 1\n1 2 3\n", "x 0 1 2\n1 2 3\n", "-1\n1 2 3\n"])
def test_lists_of_a_text_that_are_damaged(tmp_path, rows):
    properties = "property list uchar int a\n" + "\n".join(XYZ)
    (tmp_path / "a.ply").write_text(f"ply\nformat ascii 1.0\nelement vertex 1\n{properties}\nend_header\n{rows}")
    with pytest.raises(InputError, match="has a vertex that is not 3 numbers"):
        read_point_cloud(tmp_path / "a.ply")


# ---- the digits of a text ------------------------------------------------------------------------------------------

UTM = np.array([[448265.4348, 5411933.7787, 109.9992], [448263.5989, 5411933.25, 109.9977]])


@pytest.mark.parametrize("kind", ["float", "float32", "double"])
@pytest.mark.parametrize("axes", ["xyz", "XYZ"])
def test_coordinates_of_a_text_keep_their_digits(tmp_path, kind, axes):
    lines = ["ply", "format ascii 1.0", f"element vertex {len(UTM)}", *(f"property {kind} {axis}" for axis in axes)]
    lines += ["property float quality", "end_header", *(" ".join([*map(str, p), "0.1"]) for p in UTM.tolist()), ""]
    (tmp_path / "a.ply").write_text("\n".join(lines))
    np.testing.assert_array_equal(read_point_cloud(tmp_path / "a.ply").points, UTM)
    assert read_ply_columns(tmp_path / "a.ply")["quality"].dtype == np.float32


# ---- layouts of programs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "points", "colors"),
    [
        (  # CloudCompare, as text with a scalar field
            "ply\nformat ascii 1.0\ncomment Created by CloudCompare v2.13.1 (Kharkiv - Jul 10 2024)\n"
            "comment Created 2024-11-30T10:00:00\nobj_info Generated by CloudCompare!\nelement vertex 2\n"
            "property double x\nproperty double y\nproperty double z\nproperty uchar red\nproperty uchar green\n"
            "property uchar blue\nproperty float scalar_Intensity\nend_header\n"
            "1.5 2 3 255 0 9 0.25 \n4 5 6 1 2 3 nan \n",
            [[1.5, 2, 3], [4, 5, 6]],
            [[255, 0, 9], [1, 2, 3]],
        ),
        (  # MeshLab, with a camera before the vertices
            "ply\nformat ascii 1.0\ncomment VCGLIB generated\nelement camera 1\nproperty float view_px\n"
            "property float view_py\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
            "property float nx\nproperty float ny\nproperty float nz\nproperty int flags\nproperty uchar red\n"
            "property uchar green\nproperty uchar blue\nproperty uchar alpha\nproperty float quality\nelement face 0\n"
            "property list uchar int vertex_indices\nproperty list uchar float texcoord\nend_header\n"
            "0.5 0.5\n1 2 3 0 0 1 0 255 0 9 255 0.1 \n4 5 6 0 0 1 0 1 2 3 255 0.1 \n",
            [[1, 2, 3], [4, 5, 6]],
            [[255, 0, 9], [1, 2, 3]],
        ),
        (  # blank lines, CRLF, tabs, the format behind a comment, names of types with bits
            "ply\r\ncomment first\r\nformat ascii 1.0\r\n\r\nelement  vertex\t2\r\nproperty float32 x\r\n"
            "property float64 y\r\nproperty int16 z\r\nproperty uint8 r\r\nproperty uint8 g\r\nproperty uint8 b\r\n"
            "end_header\r\n\r\n1\t2  3 255 0 9\r\n\r\n  \r\n4 5 6 1 2 3\r\n\r\n",
            [[1, 2, 3], [4, 5, 6]],
            [[255, 0, 9], [1, 2, 3]],
        ),
        (  # capitals, a name with a blank, an element of another name
            "ply\nformat ascii 1.0\nelement vertices 2\nproperty float X\nproperty float Y\nproperty float Z\n"
            "property uchar Red\nproperty uchar Green\nproperty uchar Blue\nproperty float my scalar\n"
            "element other 1\nproperty int id\nend_header\n1 2 3 255 0 9 1\n4 5 6 1 2 3 1\n7\n",
            [[1, 2, 3], [4, 5, 6]],
            [[255, 0, 9], [1, 2, 3]],
        ),
        ("ply\nformat ascii 1.0\nelement vertex 1\n" + "\n".join(XYZ) + "\nend_header\n1 2 3", [[1, 2, 3]], None),
    ],
    ids=["CloudCompare", "MeshLab", "untidy", "other names", "no line break at the end"],
)
def test_layouts_of_other_programs(tmp_path, content, points, colors):
    (tmp_path / "a.ply").write_bytes(content.encode())
    cloud = read_point_cloud(tmp_path / "a.ply")
    np.testing.assert_array_equal(cloud.points, points)
    if colors is None:
        assert cloud.colors is None
    else:
        np.testing.assert_array_equal(cloud.colors, colors)


@pytest.mark.parametrize(("comment", "up"), [("Vertical Axis: z", "z"), ("Vertical axis: y", "y"), ("axis z", None)])
def test_a_comment_may_say_which_way_is_up(tmp_path, comment, up):
    """As Nerfstudio's exporter writes it."""
    (tmp_path / "a.ply").write_bytes(ply("ascii", ("vertex", XYZ + RGB, vertices()), comments=[f"comment {comment}"]))
    assert check(tmp_path / "a.ply").up == up


@pytest.mark.parametrize("order", ["<", ">", "text"])
@pytest.mark.parametrize("faces_first", [False, True])
def test_files_that_plyfile_writes(tmp_path, order, faces_first):
    plyfile = pytest.importorskip("plyfile")
    fields = [*((a, "f4") for a in "xyz"), *((c, "u1") for c in ("red", "green", "blue"))]
    rows = np.zeros(N, [*fields, *([("views", "O")] * (order != ">"))])  # plyfile swaps no bytes beside lists
    for names, values in (("x y z", POINTS), ("red green blue", COLORS)):
        for name, column in zip(names.split(), values.T, strict=True):
            rows[name] = column
    if order != ">":
        rows["views"] = [np.arange(i % 4, dtype=np.int32) for i in range(N)]
    faces = np.array([([0, 1, 2],), ([3, 4, 5],)], [("vertex_indices", "i4", (3,))])
    elements = [plyfile.PlyElement.describe(rows, "vertex"), plyfile.PlyElement.describe(faces, "face")]
    elements = elements[::-1] if faces_first else elements
    content = io.BytesIO()
    plyfile.PlyData(elements, text=order == "text", byte_order="=" if order == "text" else order).write(content)
    (tmp_path / "a.ply").write_bytes(content.getvalue())
    check(tmp_path / "a.ply")


@pytest.mark.parametrize("encoding", ["ascii", "binary"])
def test_points_that_trimesh_writes(tmp_path, encoding):
    trimesh = pytest.importorskip("trimesh")
    content = trimesh.PointCloud(POINTS, COLORS).export(file_type="ply", encoding=encoding)
    (tmp_path / "a.ply").write_bytes(content.encode() if isinstance(content, str) else content)
    cloud = read_point_cloud(tmp_path / "a.ply")
    np.testing.assert_allclose(cloud.points, POINTS, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(cloud.colors, COLORS)


@pytest.mark.parametrize("text", [False, True])
def test_points_that_open3d_writes(tmp_path, text):
    o3d = pytest.importorskip("open3d", exc_type=ImportError)
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(POINTS.astype(np.float64)))
    cloud.colors = o3d.utility.Vector3dVector(COLORS / 255)
    o3d.io.write_point_cloud(str(tmp_path / "a.ply"), cloud, write_ascii=text)
    found = read_point_cloud(tmp_path / "a.ply")
    np.testing.assert_allclose(found.points, POINTS, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found.colors, COLORS)

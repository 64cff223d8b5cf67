"""Meshes are read as points on their surface, with the colours, the axis and the unit that the file says."""

import base64
import io
import json
import struct

import numpy as np
import pytest
import trimesh
from PIL import Image

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.point_cloud import read_point_cloud
from h2a2_jax.scans.formats.surface import sample_surface

ROOM = trimesh.creation.box((4, 3, 2.5))
AREA = 2 * (4 * 3 + 4 * 2.5 + 3 * 2.5)  # 59 m2
N = round(AREA / 0.02**2)


def export(mesh, path):
    content = mesh.export(file_type=path.suffix[1:])
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def is_on_the_box(points, size=(4, 3, 2.5)):
    inside = np.abs(points) / (np.array(size) / 2)
    return bool((np.abs(inside.max(axis=1) - 1) < 1e-5).all())


@pytest.mark.parametrize("suffix", ["obj", "glb", "stl", "off", "ply"])
def test_the_surface_is_covered_evenly(tmp_path, suffix):
    cloud = read_point_cloud(export(ROOM, tmp_path / f"a.{suffix}"))
    assert cloud.points.shape == (N, 3) and cloud.colors is None and is_on_the_box(cloud.points)
    assert "is a mesh of 12 faces and 59 m²" in cloud.assumed[0] and "about 2 cm: 147,500 points" in cloud.assumed[0]
    assert (cloud.up, cloud.unit) == (("y", "m") if suffix == "glb" else (None, None))
    assert ("its unit taken as m" in cloud.assumed[0]) == (suffix != "glb")
    # Every 10 cm of floor, ceiling and walls have about 25 points.
    for axis, (a, b) in enumerate(((1, 2), (0, 2), (0, 1))):
        wall = cloud.points[cloud.points[:, axis] > (4, 3, 2.5)[axis] / 2 - 1e-4]
        cells = np.floor((wall[:, [a, b]] + 2) / 0.1 + 1e-6).astype(int)
        counts = np.unique(cells, axis=0, return_counts=True)[1]
        inner = counts[counts > 12]
        assert abs(np.median(inner) - 25) <= 1 and len(inner) > 0.9 * len(wall) / 25
    np.testing.assert_array_equal(cloud.points, read_point_cloud(tmp_path / f"a.{suffix}").points)


def test_large_and_small_faces_have_points_by_their_area():
    vertices = np.array([[0, 0, 0], [3, 0, 0], [0, 2, 0], [0, 0, 1], [1, 0, 1], [0, 2, 1], [np.nan] * 3], np.float64)
    samples = sample_surface(vertices, np.arange(6).reshape(2, 3), 4000)
    assert np.bincount(samples.faces).tolist() == [3000, 1000]
    np.testing.assert_allclose(samples.weights.sum(axis=1), 1)
    assert (samples.weights >= 0).all()
    means = [samples.weights[samples.faces == face].mean(axis=0) for face in (0, 1)]
    np.testing.assert_allclose(means, np.full((2, 3), 1 / 3), atol=0.005)


def test_the_number_of_points_has_bounds_and_a_guessed_unit(tmp_path):
    millimetres = trimesh.creation.box((4000, 3000, 2500))
    cloud = read_point_cloud(export(millimetres, tmp_path / "a.stl"))
    assert len(cloud.points) == N and "59 m² (its unit taken as mm)" in cloud.assumed[0]
    some = read_point_cloud(tmp_path / "a.stl", 1000)
    assert len(some.points) == 1000 and "about 24 cm: 1,000 points" in some.assumed[0] and not some.notes
    chair = read_point_cloud(export(trimesh.creation.box((0.5, 0.5, 1)), tmp_path / "b.stl"))
    assert len(chair.points) == 50_000
    hall = read_point_cloud(export(trimesh.creation.box((39, 39, 10)), tmp_path / "c.stl"))
    assert len(hall.points) == 500_000 and "4,602 m²" in hall.assumed[0]


SIDES = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]], np.uint8)


@pytest.mark.parametrize("suffix", ["obj", "glb", "ply"])
def test_colours_of_vertices_are_interpolated(tmp_path, suffix):
    mesh = ROOM.copy()
    mesh.visual.vertex_colors = np.concatenate(
        [np.rint((mesh.vertices / (4, 3, 2.5) + 0.5) * 200), np.full((8, 1), 255)], axis=1
    ).astype(np.uint8)
    cloud = read_point_cloud(export(mesh, tmp_path / f"a.{suffix}"))
    assert cloud.full_color == 255
    np.testing.assert_allclose(cloud.colors, (cloud.points / (4, 3, 2.5) + 0.5) * 200, atol=1.01)


def side(points):
    """Number of the box's side that each point lies on: 0 to 2 for the negative ones, 3 to 5."""
    inside = points / np.array((4, 3, 2.5)) * 2
    axis = np.abs(inside).argmax(axis=1)
    return axis + 3 * (inside[np.arange(len(points)), axis] > 0)


def test_colours_of_faces(tmp_path):
    mesh = ROOM.copy()
    sides = side(mesh.triangles_center)
    mesh.visual.face_colors = np.concatenate([SIDES[sides], np.full((12, 1), 255, np.uint8)], axis=1)
    cloud = read_point_cloud(export(mesh, tmp_path / "a.ply"))
    np.testing.assert_array_equal(cloud.colors, SIDES[side(cloud.points)])


def textured(image, factor=None):
    """A floor of 2 x 1 m with a picture on it, its lower left corner at the origin."""
    vertices = [[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0], [0, 0, 1], [2, 0, 1], [2, 1, 1], [0, 1, 1]]
    faces = [[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]]
    uv = [[0, 0], [1, 0], [1, 1], [0, 1]] * 2
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=image, baseColorFactor=factor)
    visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return trimesh.Trimesh(vertices, faces, visual=visual, process=False)


PICTURE = Image.fromarray(np.array([[[10, 20, 30], [40, 50, 60]], [[200, 0, 0], [0, 0, 200]]], np.uint8))
"""Above: dark, on the left and on the right; below: red, blue."""


def of_the_picture(points):
    left, above = points[:, 0] < 1, points[:, 1] > 0.5
    return np.array(PICTURE)[(~above).astype(int), (~left).astype(int)]


def test_a_texture_gives_each_point_its_colour(tmp_path):
    cloud = read_point_cloud(export(textured(PICTURE), tmp_path / "a.glb"))
    np.testing.assert_array_equal(cloud.colors, of_the_picture(cloud.points))
    half = read_point_cloud(export(textured(PICTURE, [1.0, 0.5, 0.5, 1.0]), tmp_path / "b.glb"))
    np.testing.assert_allclose(half.colors, cloud.colors * [1, 0.5, 0.5], atol=1.01)


OBJ = """mtllib a.mtl
v 0 0 0
v 2 0 0
v 2 1 0
v 0 1 0
vt 0 0
vt 1 0
vt 1 1
vt 0 1
usemtl floor
f 1/1 2/2 3/3
f 1/1 3/3 4/4
"""


@pytest.mark.parametrize("picture", ["a.png", "pictures/a b.png", r"pictures\a b.png", "-s 1 1 1 -clamp on a.png"])
def test_the_material_and_texture_of_an_obj_file(tmp_path, picture):
    (tmp_path / "a.obj").write_text(OBJ)
    (tmp_path / "a.mtl").write_text(f"newmtl floor\nKd 0.1 0.1 0.1\nmap_Kd {picture}\n")
    (tmp_path / "pictures").mkdir()
    place = tmp_path / picture.replace("\\", "/").removeprefix("-s 1 1 1 -clamp on ")
    PICTURE.save(place)
    cloud = read_point_cloud(tmp_path / "a.obj")
    np.testing.assert_array_equal(cloud.colors, of_the_picture(cloud.points))
    assert len(cloud.assumed) == 1
    place.unlink()
    cloud = read_point_cloud(tmp_path / "a.obj")
    assert cloud.assumed[1] == f"names {picture}, which is not in its folder: it is left out"
    np.testing.assert_array_equal(np.unique(cloud.colors), [26])
    (tmp_path / "a.mtl").unlink()
    cloud = read_point_cloud(tmp_path / "a.obj")
    assert cloud.colors is None and "names a.mtl, which is not in its folder" in cloud.assumed[1]


def test_a_picture_on_the_faces_of_a_ply_file(tmp_path):
    corners = [[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0]] * 2
    lines = ["ply", "format ascii 1.0", "comment VCGLIB generated", "comment TextureFile a.png", "element vertex 8"]
    lines += [*(f"property float {axis}" for axis in "xyz"), "element face 4"]
    lines += ["property list uchar int vertex_indices", "property list uchar float texcoord", "end_header"]
    lines += [f"{x} {y} {i // 4}" for i, (x, y, _) in enumerate(corners)]
    for first in (0, 4):
        lines += [
            f"3 {first} {first + 1} {first + 2} 6 0 0 1 0 1 1",
            f"3 {first} {first + 2} {first + 3} 6 0 0 1 1 0 1",
        ]
    (tmp_path / "a.ply").write_text("\n".join([*lines, ""]))
    PICTURE.save(tmp_path / "a.png")
    cloud = read_point_cloud(tmp_path / "a.ply")
    np.testing.assert_array_equal(cloud.colors, of_the_picture(cloud.points))
    (tmp_path / "a.png").unlink()
    cloud = read_point_cloud(tmp_path / "a.ply")
    assert cloud.colors is None and len(cloud.points) == 50_000
    assert cloud.assumed[1] == "names a.png, which is not in its folder: it is left out"


def test_materials_without_a_texture_and_parts_without_colours(tmp_path):
    box = OBJ.replace("/1", "").replace("/2", "").replace("/3", "").replace("/4", "")
    (tmp_path / "a.obj").write_text(box)
    (tmp_path / "a.mtl").write_text("newmtl floor\nKd 1 0.5 0\n")
    assert (read_point_cloud(tmp_path / "a.obj").colors == [255, 128, 0]).all()
    scene = trimesh.Scene([textured(PICTURE, None), trimesh.creation.box((1, 1, 1))])
    cloud = read_point_cloud(export(scene, tmp_path / "b.glb"))
    assert "has 1 of 2 parts without colours, taken as grey" in cloud.assumed
    assert (cloud.colors == 128).all(axis=1).mean() == pytest.approx(6 / 10, abs=1e-3)  # of the area


def test_parts_lie_where_the_scene_of_a_gltf_file_places_them(tmp_path):
    scene = trimesh.Scene()
    turn = trimesh.transformations.rotation_matrix(np.pi / 2, [0, 1, 0])
    turn[:3, 3] = [10, 20, 30]
    scene.add_geometry(ROOM, transform=turn)
    for name, content in scene.export(file_type="gltf").items():
        (tmp_path / name).write_bytes(content)
    cloud = read_point_cloud(tmp_path / "model.gltf")
    assert is_on_the_box(cloud.points - [10, 20, 30], (2.5, 3, 4)) and (cloud.up, cloud.unit) == ("y", "m")


@pytest.mark.parametrize("full", [1, 255])
def test_an_obj_file_of_points_alone(tmp_path, full):
    colors = np.array([[255, 128, 0], [0, 51, 255], [1, 2, 3]])
    values = (colors / 255).round(4) if full == 1 else colors
    points = np.array([[0.5, 1.25, 2], [3, 4, 5], [-1, 0, 7]])
    lines = [f"v {' '.join(map(str, (*p, *c)))}" for p, c in zip(points.tolist(), values.tolist(), strict=True)]
    (tmp_path / "a.obj").write_text("\n".join(["# points", *lines, ""]))
    cloud = read_point_cloud(tmp_path / "a.obj")
    np.testing.assert_array_equal(cloud.points, points)
    np.testing.assert_array_equal(cloud.colors, colors)
    assert ("taken as 0-255" in " ".join(cloud.assumed)) == (full == 255)
    (tmp_path / "b.obj").write_text("v 0.5 1.25 2\nv 3 4 5\n")
    cloud = read_point_cloud(tmp_path / "b.obj")
    np.testing.assert_array_equal(cloud.points, points[:2])
    assert cloud.colors is None


@pytest.mark.parametrize("full", [1, 255])
@pytest.mark.parametrize("corner", ["{0}", "{0}//{0}", "{0}/{0}/{0}"])
def test_colours_of_vertices_beside_a_material_as_meshlab_writes_them(tmp_path, full, corner):
    lines = ["# OBJ File Generated by Meshlab", "mtllib ./a.obj.mtl", ""]
    for x, y in ((0, 0), (2, 0), (2, 1), (0, 1)):
        lines += [
            "vn 0 0 1",
            f"vt {x / 2} {y}",
            f"v {x}.000000 {y}.000000 0.000000 {full} {0.2 * full:.6f} {x * full / 2:.6f}",
        ]
    lines += ["usemtl material_0", *("f " + " ".join(corner.format(i) for i in f) for f in ((1, 2, 3), (1, 3, 4))), ""]
    (tmp_path / "a.obj").write_text("\n".join(lines))
    (tmp_path / "a.obj.mtl").write_text("newmtl material_0\nKa 0.2 0.2 0.2\nKd 0.75 0.75 0.75\n")
    cloud = read_point_cloud(tmp_path / "a.obj")
    expected = np.stack(
        [np.full(len(cloud.points), 255), np.full(len(cloud.points), 51), 127.5 * cloud.points[:, 0]], 1
    )
    np.testing.assert_allclose(cloud.colors, expected, atol=1.01)
    (tmp_path / "a.obj.mtl").unlink()
    np.testing.assert_allclose(read_point_cloud(tmp_path / "a.obj").colors, expected, atol=1.01)


def test_corners_that_count_back_from_a_face(tmp_path):
    """Two squares at z = 0 and 1, each behind its own vertices, as SketchUp's and Kenney's files have them."""
    lines = []
    for z in (0, 1):
        lines += [f"v {x} {y} {z}" for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))]
        lines += ["vt 0 0", "f -4/-1 -3/-1 -2/-1", "f -4 -2 -1"]
    (tmp_path / "a.obj").write_text("\n".join([*lines, ""]))
    cloud = read_point_cloud(tmp_path / "a.obj")
    assert np.bincount(cloud.points[:, 2].round().astype(int)).tolist() == [25_000, 25_000]
    assert np.isin(cloud.points[:, 2], [0, 1]).all()


@pytest.mark.parametrize("counts", ["COFF 4 2 0\n", "COFF\n# made by hand\n4 2 0\n", "CNOFF\n4 2 0\n"])
def test_colours_of_an_off_file(tmp_path, counts):
    rows = ["0 0 0 255 0 0 255", "1 0 0 255 0 0 255", "1 1 0 255 0 0 255", "0 1 0 255 0 0 255"]
    if counts.startswith("CN"):  # as Open3D writes it: normals before colours
        rows = [row[:5] + " 0 0 1" + row[5:] for row in rows]
    (tmp_path / "a.off").write_text(counts + "\n".join([*rows, "3 0 1 2", "3 0 2 3", ""]))
    cloud = read_point_cloud(tmp_path / "a.off")
    assert (cloud.colors == [255, 0, 0]).all() and (cloud.points[:, 2] == 0).all()


def test_meshes_that_open3d_writes(tmp_path):
    o3d = pytest.importorskip("open3d", exc_type=ImportError)
    box = o3d.geometry.TriangleMesh.create_box(4.0, 3.0, 2.5)
    box.paint_uniform_color([1.0, 0.0, 0.2])
    box.compute_vertex_normals()
    for suffix in ("ply", "obj", "off", "glb"):
        assert o3d.io.write_triangle_mesh(str(tmp_path / f"a.{suffix}"), box)
        cloud = read_point_cloud(tmp_path / f"a.{suffix}")
        assert len(cloud.points) == N and is_on_the_box(cloud.points - [2, 1.5, 1.25]), suffix
        assert (cloud.colors == [255, 0, 51]).all(), suffix


# ---- PLY: vertices or faces ----------------------------------------------------------------------------------------


def grid(step, size=2.0, z=0.0):
    """A square in triangles whose short sides are `step` long."""
    n = round(size / step) + 1
    x, y = np.meshgrid(np.arange(n) * step, np.arange(n) * step)
    corner = (np.arange(n - 1)[:, None] * n + np.arange(n - 1)).reshape(-1)
    triangles = [corner, corner + 1, corner + n + 1], [corner, corner + n + 1, corner + n]
    vertices = np.stack([x.reshape(-1), y.reshape(-1), np.full(n * n, z)], axis=1)
    return trimesh.Trimesh(vertices, np.concatenate([np.stack(t, axis=1) for t in triangles]), process=False)


@pytest.mark.parametrize("metres", [1, 0.001])
def test_the_vertices_of_a_dense_mesh_are_its_points(tmp_path, metres):
    mesh = grid(0.04)
    mesh.apply_scale(1 / metres)
    cloud = read_point_cloud(export(mesh, tmp_path / "a.ply"))
    np.testing.assert_array_equal(cloud.points, mesh.vertices.astype(np.float32))
    assert cloud.assumed == (f"has {len(mesh.faces):,} faces, which are not used: its 2,601 vertices are the points",)
    assert len(read_point_cloud(tmp_path / "a.ply", 100).points) == 100
    mesh = grid(0.25)
    mesh.apply_scale(1 / metres)
    assert len(read_point_cloud(export(mesh, tmp_path / "b.ply")).points) == 50_000


@pytest.mark.parametrize("suffix", ["ply", "glb"])
def test_faces_with_corners_that_are_nowhere_are_counted(tmp_path, suffix):
    mesh = grid(0.25)
    mesh.vertices[40] = [np.nan, 0, np.inf]  # an inner one, which six faces share
    cloud = read_point_cloud(export(mesh, tmp_path / f"a.{suffix}"))
    assert f"is a mesh of {len(mesh.faces) - 6:,} faces" in cloud.assumed[0] and len(cloud.points) == 50_000
    assert "has 6 faces with NaN or infinite corners, which are left out" in cloud.assumed
    mesh.vertices[:] = np.nan
    assert len(read_point_cloud(export(mesh, tmp_path / f"b.{suffix}")).points) == 0


def test_dense_furniture_between_bare_walls_is_a_surface(tmp_path):
    chair, wall = grid(0.01, 1.0), grid(3.0, 3.0, z=2.0)
    cloud = read_point_cloud(export(trimesh.util.concatenate([chair, wall]), tmp_path / "a.ply"))
    high = cloud.points[:, 2] > 1
    assert 0.88 < high.mean() < 0.92 and "is a mesh of 20,002 faces and 10 m²" in cloud.assumed[0]


@pytest.mark.parametrize(
    ("faces", "sentence"),
    [
        ([[0, 1, 2], [0, 2, 3], [0, 1, 3], [1, 2, 3]], "has 4 faces, which are not used: its 20 vertices are"),
        ([[0, 1, 99]] * 5, "has 5 faces, which are not used: its 20 vertices are the points"),
    ],
    ids=["of few vertices", "of vertices that are not there"],
)
@pytest.mark.parametrize("cut", [0, 3])
def test_faces_that_are_no_surface(tmp_path, faces, sentence, cut):
    points = np.random.default_rng(0).uniform(0, 3, (20, 3)).astype("<f4")
    header = "ply\nformat binary_little_endian 1.0\nelement vertex 20\n"
    header += "property float x\nproperty float y\nproperty float z\n"
    header += f"element face {len(faces)}\nproperty list uchar uint vertex_index\nend_header\n"
    body = points.tobytes() + b"".join(struct.pack("<B3I", 3, *face) for face in faces)
    (tmp_path / "a.ply").write_bytes(header.encode() + body[: len(body) - cut])
    cloud = read_point_cloud(tmp_path / "a.ply")
    np.testing.assert_array_equal(cloud.points, points)
    assert cloud.assumed[0].startswith(sentence)
    assert [said.startswith("has faces that cannot be read: it is cut off") for said in cloud.assumed[1:]] == [True] * (
        cut > 0
    )


# ---- damaged and hostile files -------------------------------------------------------------------------------------

TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()
DATA = "data:application/octet-stream;base64," + base64.b64encode(TRIANGLE).decode()


def gltf(uri=DATA, **more):
    accessor = {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}
    tree = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "buffers": [{"uri": uri, "byteLength": 36}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "accessors": [accessor | more.pop("accessor", {})],
        **more,
    }
    return json.dumps(tree)


def test_what_is_not_read_of_a_gltf_file_is_said(tmp_path):
    parts = [{"attributes": {"POSITION": 0}, "mode": mode} for mode in (4, 0, 6, 3)]
    (tmp_path / "a.gltf").write_text(gltf(meshes=[{"primitives": parts}], extensionsUsed=["KHR_texture_transform"]))
    said = read_point_cloud(tmp_path / "a.gltf").assumed[1:]
    assert "has textures that are moved or scaled, which is not done: its colours may be wrong" in said
    assert "has 2 of 4 parts of lines or fans, which are left out" in said
    assert any("points beside its faces, which are left out" in sentence for sentence in said)


def test_a_small_gltf_file(tmp_path):
    (tmp_path / "a.gltf").write_text(gltf())
    cloud = read_point_cloud(tmp_path / "a.gltf")
    assert len(cloud.points) == 50_000 and cloud.points.sum(axis=1).max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.gltf", gltf("../secret.bin"), r"needs the file \.\./secret\.bin, which is not in its folder"),
        ("a.gltf", gltf("{outside}"), "needs the file /.*secret.bin, which is not in its folder"),
        ("a.gltf", gltf("link.bin"), r"needs the file link\.bin, which is not in its folder"),
        ("a.gltf", gltf("http://127.0.0.1:9/a.bin"), "needs the file http://127.0.0.1:9/a.bin, which is not in"),
        ("a.gltf", gltf("file:///etc/passwd"), "needs the file file:///etc/passwd, which is not in its folder"),
        ("a.gltf", gltf(accessor={"count": 10**12}), "is damaged"),
        ("a.gltf", json.dumps({"accessors": [{"count": 10**12}]}), "claims 1000000000000 numbers"),
        ("a.gltf", gltf(accessor={"sparse": {}}), "has sparse arrays"),
        ("a.gltf", gltf(extensionsUsed=["KHR_draco_mesh_compression"]), r"is compressed \(KHR_draco.*without compres"),
        ("a.gltf", "{", "is damaged"),
        ("a.gltf", "[" * 100_000, "is damaged"),
        ("a.glb", b"glTF\2\0\0\0", "is damaged"),
        ("a.glb", b"no mesh", "is damaged"),
        ("a.glb", struct.pack("<4sIIII", b"glTF", 2, 2**32 - 1, 2**32 - 1, 0x4E4F534A), "is damaged"),
        (
            "a.stl",
            b"\0" * 80 + struct.pack("<I", 2**32 - 1) + b"\0" * 50,
            "says 4294967295 faces, which take 214748364834 bytes, but it has 134",
        ),
        ("a.stl", ROOM.export(file_type="stl")[:-1], "says 12 faces, which take 684 bytes, but it has 683"),
        ("a.stl", b"", "no STL file or is cut off"),
        ("a.stl", b"solid a\nfacet normal 0 0 1\nouter loop\nvertex 0 0\n", "does not end with 'endsolid'"),
        ("a.off", "OFF\n1000000000000 1000000000000 0\n0 0 0\n", "is damaged"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "is damaged"),
        ("a.off", "", "is damaged"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "is damaged"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 x\n", "is damaged"),
    ],
    ids=str,
)
def test_damaged_and_hostile_files(tmp_path, name, content, sentence):
    (tmp_path / "secret.bin").write_bytes(TRIANGLE)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = tmp_path / "scans" / name
    content = (
        content.replace("{outside}", str(tmp_path / "secret.bin")).encode() if isinstance(content, str) else content
    )
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        read_point_cloud(path)
    assert "\n" not in str(caught.value)


def test_textures_outside_of_the_folder_are_not_read(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.obj").write_text(OBJ)
    (tmp_path / "scans" / "a.mtl").write_text("newmtl floor\nmap_Kd ../a.png\n")
    cloud = read_point_cloud(tmp_path / "scans" / "a.obj")
    assert cloud.colors is None and "names ../a.png, which is not in its folder" in cloud.assumed[1]


def test_a_damaged_texture_and_circles_of_nodes(tmp_path):
    (tmp_path / "a.obj").write_text(OBJ)
    (tmp_path / "a.mtl").write_text("newmtl floor\nmap_Kd a.png\n")
    picture = io.BytesIO()
    PICTURE.resize((64, 64)).save(picture, "PNG")
    (tmp_path / "a.png").write_bytes(picture.getvalue()[:-60])
    cloud = read_point_cloud(tmp_path / "a.obj")
    assert cloud.colors is None and "has a texture that cannot be read (image file is truncated" in cloud.assumed[1]
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert "names a.png, which is no picture that can be read" in read_point_cloud(tmp_path / "a.obj").assumed[1]
    (tmp_path / "b.gltf").write_text(gltf(nodes=[{"mesh": 0, "children": [1]}, {"children": [0]}]))
    assert len(read_point_cloud(tmp_path / "b.gltf").points) == 50_000


@pytest.mark.parametrize(
    ("name", "content"), [("a.obj", "# nothing\n"), ("a.off", "OFF\n0 0 0\n"), ("a.stl", "solid a\nendsolid a\n")]
)
def test_a_mesh_of_nothing_has_no_points(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_point_cloud(tmp_path / name).points.shape == (0, 3)

"""Point clouds: every format gives back the written points, and assumptions about a file are reported."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.pcd import decompress_lzf
from h2a2_jax.scans.formats.point_cloud import THINNED, PointCloud, read_point_cloud, unit_colors
from h2a2_jax.scans.scan import NOT_FINITE

POINTS = np.array([[0.5, -1.25, 2], [3, 4, -5.5], [0.125, 0, 2**-10]], np.float32)
COLORS = np.array([[0, 128, 255], [1, 2, 3], [200, 100, 50]], np.uint8)


def write_ply(path: Path, form: str, colors: bool = True, kind: str = "float") -> Path:
    order = ">" if "big" in form else "<"
    lines = ["ply", f"format {form} 1.0", "comment made here", "element camera 1", "property int id"]
    lines += [f"element vertex {len(POINTS)}", *(f"property {kind} {axis}" for axis in "xyz")]
    lines += [f"property uchar {name}" for name in ("red", "green", "blue")] * colors
    lines += ["element face 1", "property list uchar int vertex_indices", "end_header", ""]
    fields = [(axis, order + ("f8" if kind == "double" else "f4")) for axis in "xyz"]
    fields += [(name, "u1") for name in ("r", "g", "b")] * colors
    rows = np.array([(*p, *c)[: len(fields)] for p, c in zip(POINTS, COLORS, strict=True)], fields)
    if form == "ascii":
        text = "\n".join(" ".join(str(value) for value in row) for row in rows.tolist())
        body = f"7\n{text}\n3 0 1 2\n".encode()
    else:
        body = struct.pack(f"{order}i", 7) + rows.tobytes() + struct.pack(f"{order}B3i", 3, 0, 1, 2)
    path.write_bytes("\n".join(lines).encode() + body)
    return path


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("kind", ["float", "double"])
def test_ply(tmp_path, form, kind):
    cloud = read_point_cloud(write_ply(tmp_path / "a.ply", form, kind=kind))
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)
    assert cloud.full_color == 255 and not cloud.notes
    np.testing.assert_allclose(unit_colors(cloud), COLORS / 255, atol=1e-7)
    assert read_point_cloud(write_ply(tmp_path / "b.ply", form, colors=False)).colors is None


def ply_with_lists(where: str, form: str, ends: int = 3) -> bytes:
    """Vertices with lists, or behind the lists of faces."""
    lists = [[0, 1, 2, 3][:ends], [7, 8, 9]]
    order = ">" if "big" in form else "<"

    def row(values, kinds):
        return (
            f"{' '.join(map(str, values))}\n".encode() if form == "ascii" else struct.pack(f"{order}{kinds}", *values)
        )

    rows = [([*p.tolist(), *c.tolist()], "3f3B") for p, c in zip(POINTS, COLORS, strict=True)]
    faces = [([len(entries), *entries], f"B{len(entries)}i") for entries in lists]
    vertex = [f"element vertex {len(rows)}", *(f"property float {axis}" for axis in "xyz")]
    vertex += [f"property uchar {name}" for name in ("red", "green", "blue")]
    if where == "in vertices":
        rows = [(a + b, f"{i}{j}") for (a, i), (b, j) in zip(rows, [*faces, ([0], "B")], strict=True)]
        lines, body = [*vertex, "property list uchar int views"], rows
    else:
        lines = [f"element face {len(faces)}", "property list uchar int vertex_indices", *vertex]
        body = faces + rows
    header = ["ply", f"format {form} 1.0", *lines, "end_header", ""]
    return "\n".join(header).encode() + b"".join(row(*each) for each in body)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize(("where", "ends"), [("in vertices", 3), ("before vertices", 3), ("before vertices", 4)])
def test_lists_of_ply_files_are_passed_over(tmp_path, form, where, ends):
    (tmp_path / "a.ply").write_bytes(ply_with_lists(where, form, ends))
    cloud, some = read_point_cloud(tmp_path / "a.ply"), read_point_cloud(tmp_path / "a.ply", 1)
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)
    assert some.notes == {THINNED: 2} and some.points.tolist() in POINTS[:, None].tolist()


def test_headers_of_ply_files_may_be_untidy(tmp_path):
    header = "ply\r\ncomment caf\xe9\r\nformat  ascii 1.0 \r\n\r\nobj_info x\r\nelement vertex 1\r\n"
    header += "".join(f"property  float {axis}\r\n" for axis in "xyz") + "end_header \r\n1 2 3\r\n"
    (tmp_path / "a.ply").write_bytes(header.encode("latin1"))
    np.testing.assert_array_equal(read_point_cloud(tmp_path / "a.ply").points, [[1, 2, 3]])


def lzf(content: bytes) -> bytes:
    """What a compressor would write: literals, and repetitions near and overlapping."""
    output, at = bytearray(), 0
    while at < len(content):
        found = max(((n, d) for d in range(1, min(at, 600) + 1) for n in [_alike(content, at, d)]), default=(0, 0))
        if found[0] >= 3:
            n, d = found[0] - 2, found[1] - 1
            output += bytes([min(n, 7) << 5 | d >> 8] + [n - 7] * (n >= 7) + [d & 255])
            at += found[0]
        else:
            output += bytes([0, content[at]])
            at += 1
    return bytes(output)


def _alike(content: bytes, at: int, distance: int) -> int:
    n = 0
    while n < 264 and at + n < len(content) and content[at + n] == content[at + n - distance]:
        n += 1
    return n


def test_lzf_undoes_literals_and_repetitions():
    content = b"abcabcabcabcX" + b"\0" * 700 + bytes(range(40)) + b"abcX" * 3
    packed = lzf(content)
    assert len(packed) < len(content) / 4
    assert bytes(decompress_lzf(packed, len(content))) == content
    for wrong in (packed[:-1], packed + b"\0", bytes([0x20, 5]) + packed):
        with pytest.raises((ValueError, IndexError)):
            decompress_lzf(wrong, len(content))


def write_pcd(path: Path, data: str, rgb: str = "F", extra: str = "") -> Path:
    packed = (COLORS.astype("<u4") @ np.array([1 << 16, 1 << 8, 1], "<u4")).astype("<u4")
    kind = {"F": "<f4", "U": "<u4", "I": "<i4"}[rgb]
    rows = np.zeros(len(POINTS), [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("pad", "V4"), ("rgb", kind)])
    for i, axis in enumerate("xyz"):
        rows[axis] = POINTS[:, i]
    rows["rgb"] = packed.view(kind)
    if extra == "nan":
        rows["x"][1] = np.nan
    fields = f"FIELDS x y z _ rgb\nSIZE 4 4 4 1 4\nTYPE F F F U {rgb}\nCOUNT 1 1 1 4 1\n"
    header = f"# .PCD v0.7\nVERSION 0.7\n{fields}WIDTH 3\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 3\nDATA {data}\n"
    if data == "ascii":
        body = "".join(f"{r['x']!r} {r['y']!r} {r['z']!r} 0 0 0 0 {r['rgb']!r}\n" for r in rows)
        body = body.replace("np.float32(", "").replace("np.uint32(", "").replace("np.int32(", "").replace(")", "")
        content = body.encode()
    elif data == "binary":
        content = rows.tobytes()
    else:
        planes = b"".join(np.ascontiguousarray(rows[name]).tobytes() for name in rows.dtype.names)
        packed_bytes = lzf(planes)
        content = struct.pack("<II", len(packed_bytes), len(planes)) + packed_bytes
    path.write_bytes(header.encode() + content)
    return path


@pytest.mark.parametrize("data", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize("rgb", ["F", "U"])
def test_pcd_with_padding_and_packed_colours(tmp_path, data, rgb):
    cloud = read_point_cloud(write_pcd(tmp_path / "a.pcd", data, rgb))
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)
    assert cloud.full_color == 255


@pytest.mark.parametrize("data", ["ascii", "binary", "binary_compressed"])
def test_pcd_points_without_return_are_left_out_and_counted(tmp_path, data):
    cloud = read_point_cloud(write_pcd(tmp_path / "a.pcd", data, extra="nan"))
    np.testing.assert_array_equal(cloud.points, POINTS[[0, 2]])
    np.testing.assert_array_equal(cloud.colors, COLORS[[0, 2]])
    assert cloud.notes == {NOT_FINITE: 1}


def test_numpy_files(tmp_path):
    six = np.concatenate([POINTS, COLORS], axis=1)
    np.save(tmp_path / "six.npy", six)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(six))
    np.save(tmp_path / "three.npy", POINTS.astype(np.float64))
    np.save(tmp_path / "nine.npy", np.concatenate([six, POINTS], axis=1))
    np.savez_compressed(tmp_path / "two.npz", points=POINTS, colors=COLORS)
    np.savez(tmp_path / "one.npz", xyz=six)
    for name in ("six.npy", "fortran.npy", "nine.npy", "two.npz", "one.npz"):
        cloud = read_point_cloud(tmp_path / name)
        np.testing.assert_array_equal(cloud.points, POINTS)
        np.testing.assert_array_equal(cloud.colors, COLORS)
        assert cloud.full_color == (255 if name == "two.npz" else None)
    assert read_point_cloud(tmp_path / "three.npy").colors is None
    assert "_ not used" in read_point_cloud(tmp_path / "nine.npy").assumed[0]
    fields = np.zeros(3, [("X", "f8"), ("Y", "f8"), ("Z", "f8"), ("intensity", "f4")])
    fields["X"], fields["Y"], fields["Z"] = POINTS.T
    np.save(tmp_path / "named.npy", fields)
    np.testing.assert_array_equal(read_point_cloud(tmp_path / "named.npy").points, POINTS)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [3, 4, 6])
def test_the_width_of_raw_rows_is_found_and_reported(tmp_path, width, centred):
    rng = np.random.default_rng(width)
    rows = np.zeros((1200, width), "<f4")  # 1200 rows of any width are whole rows of the others as well
    rows[:, :3] = rng.uniform(0, 1, (1200, 3)) * [6, 4, 2.5] - ([3, 2, 1.25] if centred else [0, 0, 0])
    rows[:, 3:] = rng.uniform(0, 1 if width == 4 else 255, (1200, width - 3))
    rows.tofile(tmp_path / "a.bin")
    cloud = read_point_cloud(tmp_path / "a.bin")
    np.testing.assert_array_equal(cloud.points, rows[:, :3])
    assert (cloud.colors is None) == (width != 6)
    assert {3: "x, y, z", 4: "not used", 6: "r, g, b"}[width] in cloud.assumed[0]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "x y z r g b\n{}",
        "//X Y Z R G B\n{}",
        "# made, by hand\n\n{}",
        "3\n{}\n",
    ],
)
@pytest.mark.parametrize("mark", [" ", ",", ";", "\t", " , "])
def test_text(tmp_path, text, mark):
    body = "\n".join(mark.join(str(v) for v in (*p, *c)) for p, c in zip(POINTS.tolist(), COLORS.tolist(), strict=True))
    (tmp_path / "a.xyz").write_text(text.format(body))
    cloud = read_point_cloud(tmp_path / "a.xyz")
    np.testing.assert_allclose(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)


def test_digits_beyond_float32_are_kept(tmp_path):
    (tmp_path / "map.txt").write_text("500000.123 4649000.456 12.5\n")
    np.testing.assert_array_equal(read_point_cloud(tmp_path / "map.txt").points, [[500000.123, 4649000.456, 12.5]])


def test_colours_come_to_unit_range():
    def colors(values, convention="auto", full=None):
        cloud = PointCloud(np.zeros((1, 3), np.float32), np.array([values], np.float32), full)
        return unit_colors(cloud, convention)

    np.testing.assert_allclose(colors([0, 0.5, 1]), [[0, 0.5, 1]])
    np.testing.assert_allclose(colors([0, 51, 255]), [[0, 0.2, 1]])
    np.testing.assert_allclose(colors([0, 1, 1], full=255.0), [[0, 1 / 255, 1 / 255]])
    np.testing.assert_allclose(colors([0, 13107, 65535], full=65535.0), [[0, 0.2, 1]])
    np.testing.assert_allclose(colors([0, 0.5, 1], "0-255"), [[0, 0.5 / 255, 1 / 255]])
    assert colors([0, 0.5, 1], "none") is None
    for values, convention in (([0, 0, 2], "0-1"), ([0, 0, 300], "auto"), ([-1, 0, 0], "0-255")):
        with pytest.raises(InputError, match="rescale"):
            colors(values, convention)


@pytest.mark.skipif("H2A2_SCANS_DIR" not in os.environ, reason="H2A2_SCANS_DIR names no folder of example scans")
@pytest.mark.parametrize(
    ("name", "kept", "lost", "colored"),
    [
        ("pcl_region_growing_rgb.pcd", 259_847, 307_200 - 259_847, True),
        ("pcl_capture0001.pcd", 249_647, 307_200 - 249_647, False),
        ("pcl_room_scan1.pcd", 112_586, 0, False),
        ("o3d_fragment.pcd", 113_662, 0, True),
        ("scene0000_00.bin", 40_684, 0, True),
        ("000017.bin", 50_000, 0, True),
    ],
)
def test_real_files(scans_dir, name, kept, lost, colored):
    cloud = read_point_cloud(scans_dir / name)
    assert len(cloud.points) == kept and cloud.notes.get(NOT_FINITE, 0) == lost
    assert (cloud.colors is not None) == colored
    if name == "pcl_region_growing_rgb.pcd":
        assert 0.84 < cloud.points[:, 2].min() < 0.85 and 3.81 < cloud.points[:, 2].max() < 3.83
    if colored:
        assert 0.5 < unit_colors(cloud).max() <= 1


@pytest.mark.parametrize("suffix", ["txt", "xyz", "pts", "csv", "asc"])
def test_text_files_are_read_whatever_their_suffix(tmp_path, suffix):
    separator = "," if suffix == "csv" else " "
    rows = [separator.join(map(str, [*point, *color])) for point, color in zip(POINTS, COLORS, strict=True)]
    path = tmp_path / f"a.{suffix}"
    path.write_text("\n".join(rows) + "\n")
    cloud = read_point_cloud(path)
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)


def test_archives_whose_colours_are_all_alike(tmp_path, monkeypatch):
    monkeypatch.setattr("h2a2_jax.untrusted.ALWAYS_FITS", 1000)
    points = np.random.default_rng(0).normal(size=(20_000, 3)).astype(np.float32)
    np.savez_compressed(tmp_path / "grey.npz", points=points, colors=np.full(points.shape, 0.5))
    assert len(read_point_cloud(tmp_path / "grey.npz").points) == len(points)
    np.savez_compressed(tmp_path / "zeros.npz", points=np.zeros_like(points), colors=np.zeros_like(points))
    with pytest.raises(InputError, match=r"its content \(points, colors\) claims"):
        read_point_cloud(tmp_path / "zeros.npz")

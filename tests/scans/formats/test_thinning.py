"""Large files are thinned out while they are read: the same rows whatever the format, colours with their points."""

import io
import struct

import laspy
import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans import formats
from h2a2_jax.scans.formats.point_cloud import THINNED, read_point_cloud

N, MOST = 1000, 64
XYZ = np.stack([np.arange(N), np.arange(N) % 7, np.zeros(N)], axis=1).astype(np.float32)
RGB = np.stack([np.arange(N) % 256, np.full(N, 9), np.arange(N) // 256], axis=1).astype(np.uint8)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(formats, "_BLOCK", 48)


def las(points, colors=None, *, form=2, minor=2, count=None) -> bytes:
    """An LAS file in hundredths, shifted by 500,000 along x."""
    places = {2: (26, 20), 0: (20, None), 7: (36, 30)}
    width, place = places[form]
    size = 375 if minor == 4 else 227
    header = bytearray(size)
    header[:4], header[24:26] = b"LASF", bytes([1, minor])
    count = len(points) if count is None else count
    struct.pack_into("<HII", header, 94, size, size, 0)
    struct.pack_into("<BHI", header, 104, form, width, 0 if minor == 4 else count)
    struct.pack_into("<6d", header, 131, 0.01, 0.01, 0.01, 5e5, 0, 0)
    if minor == 4:
        struct.pack_into("<Q", header, 247, count)
    rows = np.zeros((len(points), width), np.uint8)
    rows[:, :12] = np.round(points * 100).astype("<i4").view(np.uint8).reshape(-1, 12)
    if colors is not None:
        rows[:, place : place + 6] = colors.astype("<u2").view(np.uint8).reshape(-1, 6)
    return bytes(header) + rows.tobytes()


def laz(content: bytes) -> bytes:
    """The same points compressed."""
    packed = io.BytesIO()
    laspy.read(io.BytesIO(content)).write(packed, do_compress=True, laz_backend=laspy.LazBackend.Lazrs)
    return packed.getvalue()


def write(path, form: str) -> None:
    both = np.concatenate([XYZ, RGB], axis=1).astype(np.float32)
    fields = [*(f"property float {axis}" for axis in "xyz"), *(f"property uchar {c}" for c in ("red", "green", "blue"))]
    header = ["ply", f"format {'ascii' if form == 'text ply' else 'binary_little_endian'} 1.0", f"element vertex {N}"]
    rows = np.rec.fromarrays([*XYZ.T, *RGB.T], dtype=[*((a, "<f4") for a in "xyz"), *((c, "u1") for c in "rgb")])
    lines = "".join(" ".join(f"{value:g}" for value in row) + "\n" for row in both)
    pcd = f"FIELDS x y z r g b\nSIZE 4 4 4 1 1 1\nTYPE F F F U U U\nWIDTH {N}\nHEIGHT 1\nPOINTS {N}\nDATA "
    match form:
        case "ply" | "text ply":
            body = rows.tobytes() if form == "ply" else lines.encode()
            path.write_bytes("\n".join([*header, *fields, "end_header", ""]).encode() + body)
        case "pcd":
            path.write_bytes(pcd.encode() + b"binary\n" + rows.tobytes())
        case "text pcd":
            path.write_text(pcd + "ascii\n" + lines)
        case "npy":
            np.save(path, both)
        case "npy by columns":
            np.save(path, np.asfortranarray(both))
        case "npz":
            np.savez_compressed(path, points=XYZ, colors=RGB)
        case "bin":
            both.tofile(path)
        case "xyz":
            path.write_text("x y z r g b\n" + lines)
        case "las" | "laz":
            content = las(XYZ - [5e5, 0, 0], RGB)
            path.write_bytes(content if form == "las" else laz(content))


@pytest.mark.parametrize(
    "form", ["ply", "text ply", "pcd", "text pcd", "npy", "npy by columns", "npz", "bin", "xyz", "las", "laz"]
)
def test_the_same_points_of_every_format(tmp_path, form):
    path = tmp_path / f"a.{form.split()[1] if form.startswith('text') else form.split()[0]}"
    write(path, form)
    whole, some = read_point_cloud(path), read_point_cloud(path, MOST)
    np.testing.assert_allclose(whole.points, XYZ, atol=1e-6)
    np.testing.assert_allclose(whole.colors, RGB, atol=1e-6)
    assert not whole.notes and dict(some.notes) == {THINNED: N - MOST}
    rows = some.points[:, 0].round().astype(int)
    edges = np.arange(MOST + 1) * N // MOST
    assert ((rows >= edges[:-1]) & (rows < edges[1:])).all()
    np.testing.assert_array_equal(rows, formats.Thinning(MOST).rows(N))
    np.testing.assert_allclose(some.points, XYZ[rows], atol=1e-6)
    np.testing.assert_allclose(some.colors, RGB[rows], atol=1e-6)
    assert not read_point_cloud(path, N).notes


@pytest.mark.parametrize("pack", [bytes, laz], ids=["las", "laz"])
@pytest.mark.parametrize(("form", "minor"), [(2, 2), (7, 4)])
def test_las_in_map_coordinates(tmp_path, form, minor, pack):
    path = tmp_path / "a.las"
    path.write_bytes(pack(las(XYZ, RGB.astype(np.uint16) * 257, form=form, minor=minor)))
    cloud = read_point_cloud(path)
    np.testing.assert_array_equal(cloud.points, np.round(XYZ * 100).astype(int) * 0.01 + np.float64((5e5, 0, 0)))
    assert cloud.full_color == 65535 and cloud.colors.max() == 255 * 257
    path.write_bytes(pack(las(XYZ, form=0)))
    assert read_point_cloud(path).colors is None


def changed(content: bytes, place: int, form: str, value: int) -> bytes:
    content = bytearray(content)
    struct.pack_into(form, content, place, value)
    return bytes(content)


LAZ = laz(las(XYZ))
START = struct.unpack_from("<I", LAZ, 96)[0]  # of the points, where the place of the table of chunks is


@pytest.mark.parametrize("suffix", [".las", ".laz"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"LASF", "is no LAS file or is cut off in its header"),
        (b"PK" + las(XYZ)[2:], "is no LAS file"),
        (las(XYZ, count=10**9), "cut off: its header says 1000000000 points"),
        (las(XYZ)[:-1], "cut off: its header says 1000 points, which take 26000 bytes, but 25999"),
        (changed(las(XYZ), 104, "<B", 30), "is no LAS file or its header is damaged .*30"),
        (changed(las(XYZ), 100, "<I", 10**9), "after 227 bytes and 1000000000 records"),
        (changed(las(XYZ), 96, "<I", 10**9), "after 1000000000 bytes and 0 records"),
        (LAZ[:-30], "cut off or damaged: it lacks a table"),
        (changed(LAZ, START, "<q", -1)[:-4], "cut off or damaged: it lacks a table"),
        (changed(LAZ, struct.unpack_from("<q", LAZ, START)[0] + 4, "<I", 10**9), "it lacks a table"),
        (changed(LAZ, 107, "<I", 10**9), "is cut off or damaged"),
    ],
)
def test_damaged_las(tmp_path, content, sentence, suffix):
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_point_cloud(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("end", ["\n", "\n\n", "\r\n \r\n", "\r"], ids=repr)
def test_blank_lines_and_other_ends_of_lines_count_for_nothing(tmp_path, end):
    lines = [" ".join(map(str, row)) for row in XYZ]
    (tmp_path / "a.txt").write_text(end.join(["x y z", *lines, ""]), newline="")
    cloud = read_point_cloud(tmp_path / "a.txt", MOST)
    assert len(cloud.points) == MOST and cloud.notes == {THINNED: N - MOST}
    assert len(read_point_cloud(tmp_path / "a.txt", N).points) == N

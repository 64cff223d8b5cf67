"""Colours: their scale is decided by type and values, the same for files of every format and for arrays."""

import pickle

import laspy
import numpy as np
import pytest
from plyfile import PlyData, PlyElement

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.colors import COLOR_RANGES, GREY_POINTS
from h2a2_jax.scans.formats.point_cloud import cloud_of_arrays, read_point_cloud, unit_colors
from h2a2_jax.scans.mmdet3d import Mmdet3dFolder
from h2a2_jax.scans.scan import ScanError
from h2a2_jax.scans.specs import SCANNET, SUNRGBD, DatasetSpec

N = 300
RNG = np.random.default_rng(0)
XYZ = RNG.uniform(0, 3, (N, 3)).astype(np.float32)
RGB = np.clip(np.outer(RNG.uniform(0.2, 1.4, N), [180, 130, 90]) + RNG.normal(0, 5, (N, 3)), 1, 250).round()
UNIT = RGB / 255
PACKED = (RGB.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)).astype(np.uint32)
SOME = np.arange(N) % 3 == 0  # points without a colour
GREYED = np.where(SOME[:, None], 0.5, UNIT)


def check(cloud, colors, *words: str, atol: float = 1e-3) -> None:
    """The cloud has the colours, 0-1, and a remark with each of the words, no other one."""
    found = unit_colors(cloud)
    assert (found is None) == (colors is None)
    if found is not None:
        np.testing.assert_allclose(found, colors, atol=atol)
        assert found.dtype == np.float32
    assert len(cloud.assumed) == len(words)
    for remark, word in zip(cloud.assumed, words, strict=True):
        assert word in remark


def rows_of(values, kind: str) -> np.ndarray:
    return np.round(values).astype(kind)


PLAIN = {
    "bytes": RGB.astype("u1"),
    "bytes in signed whole numbers": RGB.astype("i8"),
    "bytes in floats": RGB.astype("f4"),
    "bytes in halves": RGB.astype("f2"),
    "16 bits": rows_of(UNIT * 65535, "u2"),
    "16 bits of bytes": (RGB * 257).astype("u2"),
    "32 bits": rows_of(UNIT * (2**32 - 1), "u4"),
    "floats": UNIT.astype("f4"),
    "doubles": UNIT,
    "means of bytes": RGB + RNG.uniform(-0.3, 0.3, (N, 3)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_the_usual_scales_need_no_word(kind):
    check(cloud_of_arrays(XYZ, PLAIN[kind]), UNIT, atol=0.002)


FIRST = np.arange(N)[:, None] < 1
TOLD = {
    **{f"bytes in {kind}": (RGB.astype(kind), UNIT, "taken as 0 to 255") for kind in ("u2", "u4", "u8")},
    **{f"12 bits in {kind}": (rows_of(UNIT * 4095, kind), UNIT, "taken as 0 to 4095") for kind in ("u2", "i4", "f4")},
    "10 bits": (rows_of(UNIT * 1023, "u2"), UNIT, "taken as 0 to 1023"),
    **{f"16 bits in {kind}": (rows_of(UNIT * 65535, kind), UNIT, "0 to 65535") for kind in ("u4", "i4", "i8", "f4")},
    "signed bytes": (RGB.astype("u1").view("i1"), UNIT, "signed bytes"),
    "a little above 1": (UNIT * 1.04, np.minimum(UNIT * 1.04, 1), "outside 0 to 1 .*clipped"),
    "bright lamps": (np.where(np.arange(N)[:, None] < 9, 6.5, UNIT), None, "27 colour values outside 0 to 1"),
    "one of 16 bits": (np.where(FIRST, 65535, RGB), None, "3 colour values outside 0 to 255"),
    "a little below 0": (np.where(FIRST, -0.002, UNIT), None, "3 colour values outside 0 to 1"),
    "cut to whole numbers": ((UNIT > 0.5).astype("u1"), UNIT > 0.5, "no colours but 0 and 1"),
    "white": (np.full((N, 3), 255, "u1"), np.ones((N, 3)), "the one colour 255, 255, 255"),
    "dark bytes": ((RGB // 40).astype("u1"), RGB // 40 / 255, "nearly black"),
    "dark whole floats": (RGB // 40, RGB // 40 / 255, "nearly black"),
    "divided twice": (UNIT / 255, UNIT / 255, "nearly black"),
}


@pytest.mark.parametrize("kind", TOLD)
def test_other_scales_are_decided_and_told(kind):
    values, colors, words = TOLD[kind]
    cloud = cloud_of_arrays(XYZ, values)
    (remark,) = cloud.assumed
    assert all(word in remark for word in words.split(" .*"))
    if colors is None:
        within = ((values >= 0) & (values <= cloud.full_color)).all(axis=1)
        np.testing.assert_allclose(unit_colors(cloud)[within], UNIT[within], atol=1e-6)
        assert ((unit_colors(cloud) == 0) | (unit_colors(cloud) == 1))[~within].all()
    else:
        np.testing.assert_allclose(unit_colors(cloud), colors, atol=1e-3)


def test_dark_scans_of_16_bits_are_known_by_their_steps():
    for step in (256, 257):
        cloud = cloud_of_arrays(XYZ, (RGB // 20 * step).astype("u2"))
        np.testing.assert_allclose(unit_colors(cloud), RGB // 20 * step / 65535, atol=1e-6)
        assert "0 to 65535" in cloud.assumed[0] and "nearly black" in cloud.assumed[1]


OPEN = {
    "of a network's input": UNIT * 2 - 1,
    "by mean and deviation": (UNIT - 0.45) / 0.22,
    "twice bytes": RGB * 2,
    "high dynamic range": UNIT * 5,
    "fractions to 65535": UNIT * 65535 + 0.25,
}


@pytest.mark.parametrize("kind", OPEN)
def test_scales_that_are_open_are_refused(kind):
    cloud = cloud_of_arrays(XYZ, OPEN[kind].astype("f4"))
    with pytest.raises(InputError, match=r"its colours reach from .* rescale them"):
        unit_colors(cloud)
    with pytest.raises(InputError, match=r"its colours reach from .* rescale them"):
        unit_colors(cloud_of_arrays(XYZ, OPEN[kind].astype("f4"), "0-1"), "0-1")
    assert unit_colors(cloud, "none") is None


@pytest.mark.parametrize("color_range", [each for each in COLOR_RANGES if each not in ("auto", "none")])
def test_a_given_range_settles_the_scale(color_range):
    full = float(color_range[2:])
    cloud = cloud_of_arrays(XYZ, UNIT.astype("f4"), color_range)
    assert cloud.assumed == ()
    np.testing.assert_allclose(unit_colors(cloud, color_range), UNIT / full, rtol=1e-5)
    np.testing.assert_allclose(unit_colors(cloud_of_arrays(XYZ, UNIT), color_range), UNIT / full, rtol=1e-5)
    black = cloud_of_arrays(XYZ, np.zeros((N, 3), np.uint8), color_range)
    assert unit_colors(black, color_range).max() == 0


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_colours_of_0_count_as_none(kind):
    check(cloud_of_arrays(XYZ, np.zeros((N, 3), kind)), None, "all 0 and count as none")


@pytest.mark.parametrize("missing", [np.nan, np.inf, -1])
@pytest.mark.parametrize("full", [1, 255])
def test_points_without_a_colour_are_kept_and_counted(missing, full):
    colors = np.where(SOME[:, None], missing, UNIT * full)
    cloud = cloud_of_arrays(XYZ, colors)
    check(cloud, GREYED)
    assert cloud.notes == {GREY_POINTS: SOME.sum()} and np.isfinite(cloud.colors).all()
    check(cloud_of_arrays(XYZ, np.full((N, 3), np.nan)), None, "all NaN")


def write_ply(path, **fields) -> None:
    rows = np.zeros(N, [(name, values.dtype) for name, values in fields.items()])
    for name, values in fields.items():
        rows[name] = values
    PlyData([PlyElement.describe(rows, "vertex")]).write(path)


def columns(names: str, values: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(names.split(), values.T, strict=True))


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i4", "f4", "f8"])
def test_bytes_in_any_type_of_ply(tmp_path, kind):
    write_ply(tmp_path / "a.ply", **columns("x y z", XYZ), **columns("red green blue", RGB.astype(kind)))
    check(read_point_cloud(tmp_path / "a.ply"), UNIT, *["taken as 0 to 255"] * (kind in ("u2", "u4")))


def test_names_of_colours_in_ply(tmp_path):
    points, small = columns("x y z", XYZ), RGB.astype("u1")
    path, diffuse = tmp_path / "a.ply", columns("diffuse_red diffuse_green diffuse_blue", small)
    write_ply(path, **points, **columns("red green blue", 0 * small), **diffuse)
    check(read_point_cloud(path), UNIT, "in diffuse_red, diffuse_green, diffuse_blue, not in red, green, blue")
    write_ply(path, **points, **columns("red green blue", small), **{name: 1 + v // 2 for name, v in diffuse.items()})
    check(read_point_cloud(path), UNIT, "in red, green, blue, not in diffuse_red")
    write_ply(path, **points, **columns("red green blue", 0 * small + 255), **diffuse)
    check(read_point_cloud(path), UNIT, "in diffuse_red, diffuse_green, diffuse_blue, not in red, green, blue")
    write_ply(path, **columns("X Y Z", XYZ.astype("f8")), **columns("R G B", small))
    check(read_point_cloud(path), UNIT)
    write_ply(path, **points, **columns("scalar_red scalar_green scalar_blue", small))
    check(read_point_cloud(path), UNIT)
    write_ply(path, **points, **columns("f_dc_0 f_dc_1 f_dc_2", ((UNIT - 0.5) / 0.28209479).astype("f4")))
    check(read_point_cloud(path), UNIT, "splats")


@pytest.mark.parametrize("suffix", ["las", "laz"])
@pytest.mark.parametrize("form", [1, 2, 3, 7])
def test_las(tmp_path, form, suffix):
    for values, words in ((RGB, ["to 255"]), (UNIT * 4095, ["to 4095"]), (RGB * 257, [])):
        header = laspy.LasHeader(point_format=form, version="1.4" if form > 5 else "1.2")
        header.scales = np.full(3, 1e-4)
        las = laspy.LasData(header)
        las.x, las.y, las.z = XYZ.T
        if form > 1:
            las.red, las.green, las.blue = rows_of(values, "u2").T
        las.write(tmp_path / f"a.{suffix}")
        cloud = read_point_cloud(tmp_path / f"a.{suffix}")
        assert cloud.up == "z"
        check(cloud, *((UNIT, *words) if form > 1 else (None,)))


def write_pcd(path, names: str, types: str, sizes: str, data: str, body: bytes, key: str = "FIELDS") -> None:
    head = f"VERSION .7\n{key} {names}\nSIZE {sizes}\nTYPE {types}\nWIDTH {N}\nHEIGHT 1\nPOINTS {N}\nDATA {data}\n"
    path.write_bytes(head.encode() + body)


ALPHA = PACKED | np.uint32(0xFF000000)
FLOATS = [f"{value:.9g}" for value in PACKED.view("f4").tolist()]
TEXTS = {
    "integers in F 4": ("F", 4, PACKED, UNIT),
    "integers in F 8": ("F", 8, PACKED, UNIT),
    "integers with alpha in F": ("F", 4, ALPHA, UNIT),
    "signed integers in F": ("F", 4, ALPHA.view("i4"), UNIT),
    "integers in U": ("U", 4, PACKED, UNIT),
    "integers in U 8": ("U", 8, PACKED, UNIT),
    "signed integers in I": ("I", 4, ALPHA.view("i4"), UNIT),
    "floats": ("F", 4, FLOATS, UNIT),
    "floats in F 8": ("F", 8, FLOATS, UNIT),
    "floats, some NaN": ("F", 4, np.where(SOME, "nan", FLOATS), GREYED),
    "integers, some NaN": ("F", 4, np.where(SOME, "nan", PACKED.astype(str)), GREYED),
}


@pytest.mark.parametrize("name", ["rgb", "RGB", "Rgb", "rgba"])
@pytest.mark.parametrize("kind", TEXTS)
def test_packed_colours_as_text(tmp_path, kind, name):
    letter, size, values, colors = TEXTS[kind]
    body = "".join(f"{x} {y} {z} {value}\n" for (x, y, z), value in zip(XYZ.tolist(), values, strict=True)).encode()
    path = tmp_path / "a.pcd"
    write_pcd(path, f"x y z {name}", f"F F F {letter}", f"4 4 4 {size}", "ascii", body, "COLUMNS")
    cloud = read_point_cloud(path)
    check(cloud, colors)
    np.testing.assert_allclose(cloud.points, XYZ, atol=1e-6)
    assert dict(cloud.notes) == ({GREY_POINTS: SOME.sum()} if colors is GREYED else {})


BINARIES = {
    "bits": ("F", 4, PACKED.view("f4"), UNIT),
    "bits with alpha": ("F", 4, ALPHA.view("f4"), UNIT),
    "bits, some NaN": ("F", 4, np.where(SOME, np.float32(np.nan), PACKED.view("f4")), GREYED),
    "integers made floats": ("F", 4, PACKED.astype("f4"), UNIT),
    "integers made doubles": ("F", 8, PACKED.astype("f8"), UNIT),
    "integers of 8 bytes": ("U", 8, PACKED.astype("u8"), UNIT),
    "signed": ("I", 4, ALPHA.view("i4"), UNIT),
}


@pytest.mark.parametrize("kind", BINARIES)
def test_packed_colours_in_bytes(tmp_path, kind):
    letter, size, values, colors = BINARIES[kind]
    rows = np.zeros(N, [("p", "<f4", 3), ("rgb", values.dtype)])
    rows["p"], rows["rgb"] = XYZ, values
    write_pcd(tmp_path / "a.pcd", "x y z rgb", f"F F F {letter}", f"4 4 4 {size}", "binary", rows.tobytes())
    check(read_point_cloud(tmp_path / "a.pcd"), colors)


@pytest.mark.parametrize(
    ("names", "kind", "values", "words"),
    [
        ("r g b", "U 2", RGB, ["to 255"]),
        ("r g b", "U 4", RGB, ["to 255"]),
        ("Red Green Blue", "U 1", RGB, []),
        ("r g b", "F 4", UNIT, []),
        ("red green blue", "F 4", RGB, []),
    ],
)
def test_channels_of_pcd(tmp_path, names, kind, values, words):
    letter, size = kind.split()
    channel = f"<{letter.lower()}{size}"
    rows = np.zeros(N, [("p", "<f4", 3), ("c", channel, 3)])
    rows["p"], rows["c"] = XYZ, values
    types, sizes = " ".join(["F F F", *letter * 3]), " ".join(["4 4 4", *[size] * 3])
    write_pcd(tmp_path / "a.pcd", f"x y z {names}", types, sizes, "binary", rows.tobytes())
    check(read_point_cloud(tmp_path / "a.pcd"), UNIT, *words)


@pytest.mark.parametrize("encoding", ["BINARY", "BINARY_COMPRESSED"])
def test_files_of_pypcd4(tmp_path, encoding):
    pypcd4 = pytest.importorskip("pypcd4")
    packed = pypcd4.PointCloud.encode_rgb(RGB.astype("u1"))
    pypcd4.PointCloud.from_xyzrgb_points(np.column_stack([XYZ, packed])).save(
        tmp_path / "a.pcd", encoding=pypcd4.Encoding[encoding]
    )
    check(read_point_cloud(tmp_path / "a.pcd"), UNIT)


def prepared(root, colors, spec: DatasetSpec):
    """The scan of a folder as mmdetection3d prepares it."""
    (root / "points").mkdir()
    np.concatenate([XYZ, colors], axis=1).astype("<f4").tofile(root / "points" / "a.bin")
    entry = {"lidar_points": {"lidar_path": "a.bin"}, "instances": [], "axis_align_matrix": np.eye(4).tolist()}
    (root / "infos.pkl").write_bytes(pickle.dumps({"metainfo": {}, "data_list": [entry]}))
    return Mmdet3dFolder(root, "infos.pkl", spec)[0]


@pytest.mark.parametrize("spec", [SCANNET, SUNRGBD], ids=lambda spec: spec.name)
def test_colours_of_the_datasets_own_scale(tmp_path, spec):
    stored = (UNIT * spec.color_scale).astype(np.float32)
    scan = prepared(tmp_path, stored, spec)
    np.testing.assert_array_equal(scan.colors, stored / np.float32(spec.color_scale))  # to the bit
    assert not scan.notes


@pytest.mark.parametrize(
    ("spec", "colors", "expected", "note"),
    [
        (SCANNET, UNIT, UNIT, "scans with colours of 0 to 1, where scannet has 0 to 255"),
        (SCANNET, RGB * 257, UNIT, "scans with colours of 0 to 65535, where scannet has 0 to 255"),
        (SUNRGBD, RGB, UNIT, "scans with colours of 0 to 255, where sunrgbd has 0 to 1"),
        (SUNRGBD, UNIT * 1.04, np.minimum(UNIT * 1.04, 1), "colour values outside their range, clipped"),
        (SCANNET, RGB // 40, RGB // 40 / 255, None),
        (SCANNET, (RGB > 200), (RGB > 200) / 255, None),
        (SUNRGBD, RGB * 0, 0 * RGB + 0.5, "scans without colours, made grey"),
    ],
)
def test_another_scale_in_a_prepared_folder(tmp_path, spec, colors, expected, note):
    scan = prepared(tmp_path, colors, spec)
    np.testing.assert_allclose(scan.colors, expected, atol=1e-3)
    assert list(scan.notes) == [note] * (note is not None)


def test_colours_of_a_prepared_scan_that_are_open(tmp_path):
    with pytest.raises(ScanError, match=r"has colours from .* rescale them"):
        prepared(tmp_path, UNIT * 2 - 1, SCANNET)

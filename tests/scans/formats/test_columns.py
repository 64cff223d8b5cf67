"""Columns of tables and arrays: their names decide, else their values with a remark, else --columns."""

import io

import laspy
import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.formats.columns import parse_columns
from h2a2_jax.scans.formats.point_cloud import read_point_cloud, unit_colors
from h2a2_jax.scans.scan import NOT_FINITE

N = 240
RNG = np.random.default_rng(0)
XYZ = np.round(np.stack([RNG.uniform(-2, 5, N), RNG.uniform(0, 4, N), RNG.normal(0, 0.01, N)], axis=1), 4)
RGB = np.clip(np.outer(RNG.uniform(0.5, 1.4, N), [150, 115, 80]) + RNG.normal(0, 5, (N, 3)), 0, 255).round().astype(int)
INTENSITY, LEICA = RNG.integers(0, 256, (N, 1)), RNG.integers(-2048, 2048, (N, 1))
LABEL, ALPHA, ROW = RNG.integers(0, 20, (N, 1)), np.full((N, 1), 255), np.arange(N)[:, None]
NORMAL = np.where(ROW < N // 2, [[0, 0.6, 0.8]], [[0.8, -0.6, 0]]) + RNG.normal(0, 0.002, (N, 3)).round(4)


def table(*columns, mark=" ", comma=".") -> str:
    """Lines of whole numbers and of numbers with digits."""
    words = [
        np.array([f"{value:d}" if part.dtype.kind == "i" else f"{value:.6f}".replace(".", comma) for value in column])
        for part in columns
        for column in part.T
    ]
    return "".join(mark.join(row) + "\n" for row in zip(*words, strict=True))


def check(path, colors=RGB / 255):
    """The file has the points and colours; return its remarks."""
    cloud = read_point_cloud(path)
    np.testing.assert_allclose(cloud.points, XYZ, atol=1e-6)
    found = unit_colors(cloud)
    assert (found is None) == (colors is None)
    if found is not None:
        np.testing.assert_allclose(found, colors, atol=1e-5)
    return cloud.assumed


LINES = table(XYZ, RGB).splitlines()
FAR = XYZ + np.array([448260, 5411930, 110])
NAMED = {
    "others between": ("x,y,z,intensity,red,green,blue\n" + table(XYZ, INTENSITY, RGB, mark=","), True),
    "colours first": ("R;G;B;X;Y;Z\n" + table(RGB, XYZ, mark=";"), True),
    "CloudCompare": ("//X Y Z R G B Intensity Nx Ny Nz\n" + table(XYZ, RGB, INTENSITY, NORMAL), True),
    "CloudCompare with a count": (f"//X Y Z R G B\n{N}\n" + table(XYZ, RGB), True),
    "CloudCompare's floats": ("//X,Y,Z,Rf,Gf,Bf,Scalar field\n" + table(XYZ, RGB / 255, LEICA, mark=","), True),
    "PDAL": ('"X","Y","Z","Intensity","Red","Green","Blue"\n' + table(XYZ, INTENSITY, RGB * 257, mark=","), True),
    "ParaView": ('"RGB:0","RGB:1","RGB:2","Points:0","Points:1","Points:2"\n' + table(RGB, XYZ, mark=","), True),
    "units": ("x [m]\ty [m]\tz [m]\tgps time\tred\tgreen\tblue\n" + table(XYZ, ROW, RGB, mark="\t"), True),
    "units and blanks": ("X(m) Y(m) Z(m) Red (8bit) Green (8bit) Blue (8bit)\n" + table(XYZ, RGB), True),
    "a line of units": ("z,x,y\nm,m,m\n" + table(XYZ[:, [2, 0, 1]], mark=","), False),
    "map": ("Northing|Easting|Elevation\n" + table(XYZ[:, [1, 0, 2]], mark="|"), False),
    "prefixes": ("pos_x,pos_y,pos_z,diffuse_red,diffuse_green,diffuse_blue\n" + table(XYZ, RGB, mark=","), True),
    "normals first": ("nx,ny,nz,x,y,z,r,g,b\n" + table(NORMAL, XYZ, RGB, mark=","), True),
    "pandas' index": (",x,y,z,r,g,b\n" + table(ROW, XYZ, RGB, mark=","), True),
    "an index with a name": ("Unnamed: 0;x;y;z\n" + table(ROW, XYZ, mark=";"), False),
    "row names of R": ("x y z r g b\n" + "".join(f'"{i}" {line}\n' for i, line in enumerate(LINES, 1)), True),
    "packed": ("x,y,z,rgb\n" + table(XYZ, RGB @ [[1 << 16], [1 << 8], [1]], mark=","), True),
    "words": ("x,y,z,class,r,g,b\n" + table(XYZ, LABEL, RGB, mark=",").replace(",7,", ",chair,"), True),
    "gaps": ("x,y,z,i,r,g,b\n" + table(XYZ, INTENSITY, RGB, mark=",").replace(",7,", ",,"), True),
    "a comment of names": ("# columns: x y z r g b\n" + table(XYZ, RGB), True),
    "quoted numbers": ('"x","y","z"\n"' + table(XYZ, mark='","').replace("\n", '"\n"')[:-1], False),
    "commas at the ends": ("x,y,z,r,g,b,\n" + table(XYZ, RGB, mark=",").replace("\n", ",\n"), True),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMED)
def test_names_decide(tmp_path, kind):
    text, colored = NAMED[kind]
    (tmp_path / "a.txt").write_text(text)
    remarks = check(tmp_path / "a.txt", RGB / 255 if colored else None)
    assert all("65535" in remark for remark in remarks)  # nothing else is assumed


FORMS = {
    "BOM": ("\ufeffx,y,z,r,g,b\n" + table(XYZ, RGB, mark=","), "utf-8"),
    "UTF-16": ("x\ty\tz\tr\tg\tb\n" + table(XYZ, RGB, mark="\t"), "utf-16"),
    "UTF-16 without names": (table(XYZ, RGB), "utf-16"),
    "lines of Windows": (table(XYZ, RGB, mark=",").replace("\n", "\r\n"), "utf-8"),
    "comments": ("# one\n" + table(XYZ, RGB).replace("\n", "\n// other\n% third\n; fourth\n\n", 2), "utf-8"),
    "comments behind numbers": (table(XYZ, RGB).replace("\n", "  # here\n", 5), "utf-8"),
    "blanks at the ends": ("  " + table(XYZ, RGB).replace("\n", "  \n"), "utf-8"),
    "semicolons at the ends": (table(XYZ, RGB, mark=";").replace("\n", ";\n"), "utf-8"),
    "decimal commas": (table(XYZ, RGB, mark=";", comma=","), "utf-8"),
    "decimal commas, blanks": (table(XYZ, RGB, mark="  ", comma=","), "utf-8"),
    "decimal commas, tabs, names": ("x\ty\tz\tr\tg\tb\n" + table(XYZ, RGB, mark="\t", comma=","), "utf-8"),
}


@pytest.mark.parametrize("kind", FORMS)
def test_forms_of_text(tmp_path, kind):
    text, encoding = FORMS[kind]
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    assert check(tmp_path / "a.csv") == (("has decimal commas",) if "decimal" in kind else ())


UNNAMED = {
    "x y z i": ((XYZ, INTENSITY), "x, y, z, _"),
    "row, x y z": ((ROW, XYZ), "_, x, y, z"),
    "x y z r g b": ((XYZ, RGB), None),
    "x y z and colours to 1": ((XYZ, RGB / 255), None),
    "x y z normals": ((XYZ, NORMAL), "x, y, z, _, _, _"),
    "x y z i r g b of Leica": ((XYZ, LEICA, RGB), "x, y, z, _, r, g, b"),
    "x y z i r g b": ((XYZ, INTENSITY, RGB), "x, y, z, _, r, g, b"),
    "x y z i r g b to 1": ((XYZ, INTENSITY / 255, RGB / 255), "x, y, z, _, r, g, b"),
    "x y z brightness r g b": ((XYZ, (RGB @ [[0.3], [0.59], [0.11]]).round().astype(int), RGB), "x, y, z, _, r, g, b"),
    "x y z r g b label": ((XYZ, RGB, LABEL), "x, y, z, r, g, b, _"),
    "x y z r g b alpha": ((XYZ, RGB, ALPHA), "x, y, z, r, g, b, _"),
    "x y z r g b i": ((XYZ, RGB, INTENSITY), "x, y, z, r, g, b, _"),
    "row, x y z r g b": ((ROW, XYZ, RGB), "_, x, y, z, r, g, b"),
    "x y z r g b label i": ((XYZ, RGB, LABEL, INTENSITY), "x, y, z, r, g, b, _, _"),
    "x y z i r g b label": ((XYZ, INTENSITY, RGB, LABEL), "x, y, z, _, r, g, b, _"),
    "x y z r g b normals": ((XYZ, RGB, NORMAL), "x, y, z, r, g, b, _, _, _"),
    "x y z normals r g b": ((XYZ, NORMAL, RGB), "x, y, z, _, _, _, r, g, b"),
    "x y z r g b i normals": ((XYZ, RGB, INTENSITY, NORMAL), "x, y, z, r, g, b, _, _, _, _"),
    "label, x y z r g b": ((LABEL, XYZ, RGB), "_, x, y, z, r, g, b"),
    "numbers in disorder, x y z": ((ROW[::-1], XYZ), "_, x, y, z"),
    "row and column of a scanner, x y z r g b": ((ROW // 20, ROW % 20, XYZ, RGB), "_, _, x, y, z, r, g, b"),
    "seconds of a week, x y z i": ((4e5 + ROW / 8, XYZ, INTENSITY), "_, x, y, z, _"),
}


@pytest.mark.parametrize("form", ["txt", "npy", "bin", "float64 bin", "transposed npy"])
@pytest.mark.parametrize("kind", UNNAMED)
def test_values_decide_without_names_and_it_is_said(tmp_path, kind, form):
    parts, layout = UNNAMED[kind]
    rows, path = np.concatenate(parts, axis=1), tmp_path / f"a.{form.split()[-1]}"
    if form == "txt":
        path.write_text(table(*parts))
    elif form.endswith("npy"):
        np.save(path, rows.T if "transposed" in form else rows)
    else:
        rows.astype("<f8" if "64" in form else "<f4").tofile(path)
    remarks = " ".join(check(path, RGB / 255 if "g b" in kind or "colours" in kind else None))
    assert ("[" in remarks) == ("transposed" in form) and ("read as float" in remarks) == form.endswith("bin")
    if layout:
        assert f"has {rows.shape[1]} columns without names, taken as {layout}" in remarks
        assert ("_ not used" in remarks) == ("_" in layout) and "--columns settles it" in remarks
    elif not form.endswith("bin"):
        assert "without names" not in remarks


@pytest.mark.parametrize("intensity", [LEICA, INTENSITY, INTENSITY / 255], ids=["signed", "bytes", "to 1"])
def test_pts(tmp_path, intensity):
    lines = table(XYZ, intensity, RGB)
    (tmp_path / "a.pts").write_text(f"{N}\n{lines}")
    (remark,) = check(tmp_path / "a.pts")
    assert "x, y, z, _, r, g, b" in remark
    (tmp_path / "b.pts").write_text(f"{N}\n{lines}{N}\n{lines}")
    cloud = read_point_cloud(tmp_path / "b.pts")
    np.testing.assert_allclose(cloud.points, np.concatenate([XYZ, XYZ]), atol=1e-6)
    assert cloud.assumed[0] == f"says {N} points and has {2 * N}"


def test_a_few_rows_of_pts_and_of_pandas(tmp_path):
    (tmp_path / "a.pts").write_text("2\n0.5 1.5 2 -112 152 103 70\n3.5 -1 2 48 140 98 57\n")
    (tmp_path / "a.csv").write_text("0,0.5,1.5,2,152,103,70\n1,3.5,-1,2,140,98,57\n2,3.5,-1,2,140,98,57\n")
    for name in ("a.pts", "a.csv"):
        cloud = read_point_cloud(tmp_path / name)
        np.testing.assert_array_equal(cloud.points[:2], [[0.5, 1.5, 2], [3.5, -1, 2]])
        np.testing.assert_array_equal(cloud.colors[:2], [[152, 103, 70], [140, 98, 57]])


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_tables_of_pandas(tmp_path, index, sep):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.concatenate([XYZ, RGB], axis=1), columns=list("xyzrgb"))
    frame.to_csv(tmp_path / "named.csv", index=index, sep=sep)
    frame.assign(label="wall").to_csv(tmp_path / "words.csv", index=index, sep=sep, decimal="," if sep == ";" else ".")
    frame.to_csv(tmp_path / "bare.csv", index=index, sep=sep, header=False)
    pandas.DataFrame(frame.to_numpy()).to_csv(tmp_path / "numbers.csv", index=index, sep=sep)  # names 0, 1, 2, ...
    assert check(tmp_path / "named.csv") == ()
    assert check(tmp_path / "words.csv") == (("has decimal commas",) if sep == ";" else ())
    for name in ("bare.csv", "numbers.csv"):
        assert ("the first counts the rows" in "".join(check(tmp_path / name))) == index
    frame.loc[3, ["x", "y", "z"]] = np.nan  # pandas writes nothing
    frame.to_csv(tmp_path / "gaps.csv", index=index, sep=sep)
    cloud = read_point_cloud(tmp_path / "gaps.csv")
    assert len(cloud.points) == N - 1 and cloud.notes == {NOT_FINITE: 1}


def test_tables_of_numpy(tmp_path):
    rows = np.concatenate([XYZ, RGB], axis=1)
    np.savetxt(tmp_path / "a.txt", rows, header="x y z r g b")
    np.savetxt(tmp_path / "b.csv", rows, delimiter=",", fmt="%g")
    assert check(tmp_path / "a.txt") == check(tmp_path / "b.csv") == ()


REFUSED = {
    "other names": ("lat,lon,height,r\n" + table(XYZ, LABEL, mark=","), "no x, y, z among the names"),
    "fewer names": ("x y z\n" + table(XYZ, RGB), "names the columns x, y, z, but its rows have 6: .*--columns"),
    "two colours": (table(XYZ, RGB, RGB), "has 9 columns without names, of which 4 to 6 or .*--columns"),
    "decimal commas or columns": (table(XYZ, mark=",", comma=","), "has 6 columns without names, whose last three"),
    "colours first": (table(RGB, XYZ * [[1, 1, 0]] + [[3, 0.5, 2.5]]), "first three of which look like colours"),
    "a short line": (table(XYZ, RGB) + "1 2 3\n", "not numbers like the others, 3 in place of 6: '1 2 3'"),
    "a long line": ("x,y,z\n" + table(XYZ, mark=",") + "1,2,3,4\n", "not numbers like the others, 4 in place of 3"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tables_that_leave_it_open(tmp_path, kind):
    text, sentence = REFUSED[kind]
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_point_cloud(tmp_path / "a.txt")


def test_names_that_are_not_understood_are_said(tmp_path):
    (tmp_path / "a.txt").write_text("E N H Rot Gruen Blau\n" + table(XYZ, RGB))
    (remark,) = check(tmp_path / "a.txt")
    assert "names of columns that are not understood (E, N, H, Rot, Gruen, Blau)" in remark


def test_comments_that_only_speak_of_columns_are_said(tmp_path):
    (tmp_path / "a.txt").write_text("# x, y and z in metres\n" + table(XYZ, RGB))
    assert check(tmp_path / "a.txt") == ("has a comment '# x, y and z in metres' that does not name its 6 columns",)


@pytest.mark.parametrize("suffix", ["txt", "npy", "bin", "npz"])
def test_columns_settle_it(tmp_path, suffix):
    path, rows = tmp_path / f"a.{suffix}", np.concatenate([RGB, XYZ, RGB[:, :1]], axis=1)
    if suffix == "txt":
        path.write_text("x y z r g b i\n" + table(RGB, XYZ, RGB[:, :1]))
    else:
        {"npy": np.save, "npz": lambda p, a: np.savez(p, points=a), "bin": lambda p, a: a.tofile(p)}[suffix](path, rows)
    for columns in ("r,g,b,x,y,z,_", ("red", "green", "blue", "x", "y", "z", "i")):
        cloud = read_point_cloud(path, columns=columns)
        np.testing.assert_allclose(cloud.points, XYZ, atol=1e-6)
        np.testing.assert_array_equal(cloud.colors, RGB)
    with pytest.raises(InputError, match="columns, but --columns names 9" if suffix != "bin" else "whole rows of 9"):
        read_point_cloud(path, columns="x,y,z,_,_,_,_,_,_")


@pytest.mark.parametrize(("columns", "words"), [("x,y,z,rgb", "'rgb'"), ("x,y,_", "x,y,_"), ("x,y,z,r,g", "r, g, b")])
def test_columns_that_make_no_sense(columns, words):
    with pytest.raises(InputError, match=f"--columns .*{words}"):
        parse_columns(columns)


def test_columns_of_a_file_that_names_them(tmp_path):
    head = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 1\nHEIGHT 1\nPOINTS 1\nDATA ascii\n"
    (tmp_path / "a.pcd").write_text(head + "1 2 3\n")
    cloud = read_point_cloud(tmp_path / "a.pcd", columns="z,y,x")
    np.testing.assert_array_equal(cloud.points, [[1, 2, 3]])
    assert "--columns is not used" in cloud.assumed[0]


def test_arrays_of_archives(tmp_path):
    x, y, z = XYZ.T
    r, g, b = RGB.T
    for i, arrays in enumerate(
        (
            {"pcd": XYZ, "colors": RGB},
            {"point_cloud": np.concatenate([XYZ, RGB], axis=1)},
            {"Vertices": XYZ, "vertex_colors": RGB.astype(np.uint8)},
            {"points": XYZ.T, "rgb": RGB.T},
            {"points": XYZ, "rgb": np.concatenate([RGB, ALPHA], axis=1)},
            {"x": x, "y": y, "z": z, "r": r, "g": g, "b": b},
        )
    ):
        np.savez(tmp_path / f"{i}.npz", **arrays)
        assert len(check(tmp_path / f"{i}.npz")) == (i == 3)
    np.savez(tmp_path / "more.npz", data=RGB, points=XYZ, intensity=INTENSITY)
    (remark,) = check(tmp_path / "more.npz", None)
    assert remark == "has its points in points, and arrays that are not used: data, intensity"
    np.savez(tmp_path / "lengths.npz", x=x, y=y[:9], z=z)
    with pytest.raises(InputError, match="of different shapes"):
        read_point_cloud(tmp_path / "lengths.npz")


def test_fields_of_several_numbers(tmp_path):
    rows = np.zeros(N, [("label", "i4"), ("position", "f8", 3), ("color", "u1", 3)])
    rows["position"], rows["color"] = XYZ, RGB
    np.save(tmp_path / "a.npy", rows)
    assert check(tmp_path / "a.npy") == ()


@pytest.mark.parametrize("width", [3, 6])
def test_raw_columns_one_after_the_other(tmp_path, width):
    rows = np.concatenate([XYZ, RGB], axis=1)[:, :width].repeat(20, axis=0)
    rows.T.astype("<f4").tofile(tmp_path / "a.bin")
    with pytest.raises(InputError, match="looks as if all x came before all y"):
        read_point_cloud(tmp_path / "a.bin")
    rows.astype("<f4").tofile(tmp_path / "a.bin")
    np.testing.assert_allclose(read_point_cloud(tmp_path / "a.bin").points, rows[:, :3], atol=1e-6)


def test_bytes_that_are_no_floats(tmp_path):
    (XYZ * 1000).astype("<i4").tofile(tmp_path / "a.bin")
    with pytest.raises(InputError, match="neither float32 nor float64"):
        read_point_cloud(tmp_path / "a.bin")


def test_float32_far_from_the_origin_is_said(tmp_path):
    np.save(tmp_path / "single.npy", FAR.astype(np.float32))
    np.save(tmp_path / "once.npy", FAR.astype(np.float32).astype(np.float64))
    np.save(tmp_path / "double.npy", FAR)
    np.save(tmp_path / "near.npy", (XYZ * 1000).astype(np.float32))
    assert "are in float32, which has steps of 0.5 at 5.41e+06" in read_point_cloud(tmp_path / "single.npy").assumed[0]
    assert "once were in float32" in read_point_cloud(tmp_path / "once.npy").assumed[0]
    assert read_point_cloud(tmp_path / "double.npy").assumed == read_point_cloud(tmp_path / "near.npy").assumed == ()


def test_rounded_coordinates_are_said(tmp_path):
    rng, path = np.random.default_rng(1), tmp_path / "a.txt"
    points = rng.uniform(0, [6, 5, 2.5], (3000, 3))
    for far, form, step in (((0, 0, 0), "%.1f", "0.1"), ((4.5e5, 5.4e6, 0), "%g", "1"), ((0, 0, 0), "%.2f", None)):
        np.savetxt(path, points + far, form)
        remarks = read_point_cloud(path).assumed
        expected = (f"has coordinates in steps of {step}: if they were rounded, export it with more digits",)
        assert remarks == (expected if step else ())
    header = laspy.LasHeader(point_format=0)
    header.scales = np.ones(3)
    las = laspy.LasData(header)
    las.x, las.y, las.z = points.T
    las.write(tmp_path / "a.las")
    assert "steps of 1:" in read_point_cloud(tmp_path / "a.las").assumed[0]
    np.savetxt(path, np.rint(1000 * points), "%d")  # millimetres
    assert read_point_cloud(path).assumed == ()


def test_colours_under_names_that_are_not_known_are_taken_by_their_values(tmp_path):
    (tmp_path / "a.csv").write_text("X;Y;Z;Rot;Grün;Blau\n" + table(XYZ, RGB, mark=";"), encoding="utf-8")
    assert check(tmp_path / "a.csv") == ("has its colours in Rot, Grün, Blau, by their values",)
    (tmp_path / "a.csv").write_text("X,Y,Z,,,\n" + table(XYZ, RGB, mark=","))
    assert check(tmp_path / "a.csv") == ("has its colours in column 4, column 5, column 6, by their values",)
    others = np.concatenate([INTENSITY, LABEL, LABEL % 3, INTENSITY[::-1]], axis=1)
    (tmp_path / "a.csv").write_text("X,Y,Z,Intensity,Class,Returns,Quality\n" + table(XYZ, others, mark=","))
    assert check(tmp_path / "a.csv", None) == ()


def test_colours_that_cannot_be_read_are_said(tmp_path):
    lines = [f"{line} #{r:02x}{g:02x}{b:02x}" for line, (r, g, b) in zip(table(XYZ).splitlines(), RGB, strict=True)]
    (tmp_path / "a.txt").write_text("x y z color\n" + "\n".join(lines))
    assert check(tmp_path / "a.txt", None) == ("has no colours that can be read, though it has color",)
    (tmp_path / "a.txt").write_text("x,y,z,red\n" + table(XYZ, INTENSITY, mark=","))
    assert check(tmp_path / "a.txt", None) == ("has no colours that can be read, though it has red",)
    las = laspy.LasData(laspy.LasHeader(point_format=0))
    las.add_extra_dim(laspy.ExtraBytesParams("Red", "uint8"))
    las.x, las.y, las.z = XYZ.T
    las.write(tmp_path / "a.las")
    assert "though it has Red" in read_point_cloud(tmp_path / "a.las").assumed[0]


def test_commas_between_numbers_with_decimal_commas_in_quotes(tmp_path):
    frame = pytest.importorskip("pandas").DataFrame(np.concatenate([XYZ, RGB], axis=1), columns=list("xyzrgb"))
    frame.to_csv(tmp_path / "a.csv", decimal=",")
    assert check(tmp_path / "a.csv") == ("has decimal commas",)
    (tmp_path / "a.csv").write_text('x,y,z\n"1,500",0.25,1\n0.5,1.5,1\n')  # rather thousands
    with pytest.raises(InputError, match="names the columns x, y, z, but its rows have 4"):
        read_point_cloud(tmp_path / "a.csv")


def test_bytes_are_no_coordinates(tmp_path):
    np.save(tmp_path / "color.npy", RGB.astype("u1"))
    with pytest.raises(InputError, match="its array holds bytes, as colours are"):
        read_point_cloud(tmp_path / "color.npy")


def test_suffixes_of_open3d(tmp_path):
    (tmp_path / "a.xyzrgb").write_text(table(XYZ, RGB / 255))
    np.testing.assert_allclose(unit_colors(read_point_cloud(tmp_path / "a.xyzrgb")), RGB / 255, atol=1e-5)
    (tmp_path / "a.xyzn").write_text(table(XYZ, NORMAL))
    assert read_point_cloud(tmp_path / "a.xyzn").colors is None


def test_text_of_a_pcd_keeps_its_digits(tmp_path):
    head = f"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH {N}\nHEIGHT 1\nPOINTS {N}\nDATA ascii\n"
    (tmp_path / "a.pcd").write_text(head + table(FAR))
    cloud = read_point_cloud(tmp_path / "a.pcd")
    np.testing.assert_allclose(cloud.points, FAR, rtol=0, atol=1e-6)
    assert cloud.assumed == ()
    for turn, words in (("1 0 0 0", ()), ("0 1.0 -0 0.000", ()), ("0.7071 0 0 0.7071", ("0.7071 0 0 0.7071",))):
        (tmp_path / "a.pcd").write_text(head.replace("POINTS", f"VIEWPOINT 1 2 3 {turn}\nPOINTS") + table(XYZ))
        remarks = check(tmp_path / "a.pcd", None)
        assert len(remarks) == len(words) and all(word in remarks[0] for word in words)


def test_no_table_but_an_empty_one(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n")
    assert len(read_point_cloud(tmp_path / "a.txt").points) == 0
    text = io.StringIO()
    np.savetxt(text, XYZ[:0], header="x y z")
    (tmp_path / "b.txt").write_text(text.getvalue())
    with pytest.raises(InputError, match="no line of numbers"):
        read_point_cloud(tmp_path / "b.txt")

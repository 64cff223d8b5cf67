"""Files that inputs stand for, names of their results, and error messages where nothing is found."""

import os

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.inference.input_files import OWN_COMMENT, PredictRequest, find_inputs, printable
from h2a2_jax.scans.formats.folders import describe_unread
from h2a2_jax.scans.scan_folder import point_cloud_files


def touch(root, *names, content="1 2 3\n"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def names(*inputs, output=None):
    return [file.name for file in find_inputs([str(path) for path in inputs], output).files]


def test_folders_are_searched_to_the_bottom(tmp_path):
    touch(tmp_path, "b.ply", "a/c.pcd", "a/d/e.BIN", "a/f.laz", ".hidden/g.ply", ".h.ply", "notes.md", "a/i.png")
    found = find_inputs([str(tmp_path)])
    assert [file.name for file in found.files] == ["b", "a/c", "a/f", "a/d/e"]
    assert [file.path.name for file in found.files] == ["b.ply", "c.pcd", "f.laz", "e.BIN"]
    assert not found.problems and not found.passed_over
    assert [path.name for path in found.unread] == ["notes.md", "i.png"]


def test_every_file_that_is_not_read_is_named_with_a_reason(tmp_path):
    touch(
        tmp_path,
        "a.PLY",
        "b/c.XYZ",
        "pictures/1.jpg",
        "pictures/2.JPG",
        "LICENSE",
        "old.ply.gz",
        "new.zip",
        "house.fbx",
    )
    touch(tmp_path, "scan.rcp", ".DS_Store", "._a.ply", "__MACOSX/._b.ply", "__MACOSX/c.ply", ".git/x", "drive.bag")
    found = find_inputs([str(tmp_path)])
    assert [file.name for file in found.files] == ["a", "b/c"]
    assert list(describe_unread(found.unread)) == [
        "Not read, as no point clouds: 1 file without suffix (LICENSE), 2 files .jpg (1.jpg, 2.JPG).",
        "Not read, as no point clouds (compressed: unpack them): 1 file .gz (old.ply.gz), 1 file .zip (new.zip).",
        "Not read, as no point clouds (export it as .e57, .las or .ply): 1 file .rcp (scan.rcp).",
        "Not read, as no point clouds (export it as .glb, .obj or .ply): 1 file .fbx (house.fbx).",
        "Not read, as no point clouds (export its points as .pcd or .ply): 1 file .bag (drive.bag).",
    ]
    # Patterns name them too, and many names are cut short.
    touch(tmp_path, *(f"pictures/{i}.jpg" for i in range(10, 30)))
    unread = find_inputs([f"{tmp_path}/*.PLY", f"{tmp_path}/pictures/*"]).unread
    (line,) = describe_unread(unread)
    assert line.startswith("Not read, as no point clouds: 22 files .jpg (1.jpg, 10.jpg, ") and line.endswith(", ...).")
    with pytest.raises(InputError, match=r"There is no point cloud in .* Not read, as no point clouds: 22 files \.jpg"):
        find_inputs([str(tmp_path / "pictures")])


def test_parts_of_meshes_are_neither_scans_nor_unread(tmp_path):
    touch(tmp_path, "room.obj", content="mtllib room.mtl\nv 0 0 0\n")
    touch(tmp_path, "room.mtl", content="newmtl a\nmap_Kd -s 1 1 1 pictures/wall paper.png\n")
    touch(
        tmp_path,
        "hall.gltf",
        content='{"buffers": [{"uri": "hall%20data.bin"}], "images": [{"uri": "pictures\\/floor.jpg"}]}',
    )
    touch(tmp_path, "desk.ply", content="ply\nformat ascii 1.0\ncomment TextureFile desk.png\nend_header\n")
    touch(
        tmp_path, "hall data.bin", "pictures/wall paper.png", "pictures/floor.jpg", "desk.png", "kitti.bin", "view.jpg"
    )
    found = find_inputs([str(tmp_path)])
    assert [file.name for file in found.files] == ["desk", "hall", "kitti", "room"]
    assert [path.name for path in found.unread] == ["view.jpg"]
    assert names(tmp_path / "*.bin") == ["hall data", "kitti"]  # asked for by a pattern that no mesh matches
    assert names(tmp_path / "hall data.bin") == ["hall data"]
    assert point_cloud_files(tmp_path) == ["desk.ply", "hall.gltf", "kitti.bin", "room.obj"]


def test_files_and_patterns(tmp_path):
    touch(tmp_path, "a/one.ply", "a/two.ply", "b/one.ply", "b/three.pcd", "b/x.md")
    assert names(tmp_path / "a" / "one.ply") == ["one"]
    assert names(tmp_path / "*" / "*.ply") == ["a/one", "a/two", "b/one"]
    assert names(tmp_path / "b" / "*") == ["one", "three"]
    assert names(tmp_path / "**") == ["a/one", "a/two", "b/one", "b/three"]
    assert names(tmp_path / "[b]*") == ["b/one", "b/three"]
    # A file that two inputs name counts once.
    assert names(tmp_path / "a", tmp_path / "a" / "one.ply") == ["one", "two"]


def test_names_are_unique_and_plain(tmp_path):
    touch(tmp_path, "a.ply", "a.pcd", "B.ply", "b.bin", "predictions.ply", "x/a.ply", "c.v2.ply", "c.v3.ply")
    assert sorted(names(tmp_path)) == [
        *("B.ply", "a.pcd", "a.ply", "b.bin", "c.v2", "c.v3"),
        *("predictions.ply", "x/a"),
    ]
    assert names(tmp_path / "a.ply", tmp_path / "x" / "a.ply") == ["a.ply", "a.ply-2"]


def test_no_folder_of_a_name_is_the_result_of_another_scan(tmp_path):
    touch(
        tmp_path,
        "a.ply",
        "a.json/b.ply",
        "index.html/c.ply",
        "predictions.jsonl/d.ply",
        "x.HTML/y.JPG/e.ply",
        "v1.2/f.ply",
    )
    assert names(tmp_path) == ["a", "a_json/b", "index_html/c", "predictions_jsonl/d", "v1.2/f", "x_HTML/y_JPG/e"]
    touch(tmp_path, "a_json/b.ply")
    assert len(set(names(tmp_path))) == 7


def test_names_of_other_bytes(tmp_path):
    root = os.fsencode(tmp_path)
    for name in (b"caf\xe9.ply", b"caf\xe8.ply", b"line\nbreak.ply"):
        with open(os.path.join(root, name), "wb") as file:
            file.write(b"ply")
    found = find_inputs([str(tmp_path)])
    assert [file.name for file in found.files] == ["caf_.ply", "caf_.ply-2", "line_break"]
    assert printable(found.files[0].path.name) == "caf?.ply" and printable("ok: ä €") == "ok: ä €"
    assert all(file.path.is_file() for file in found.files)


def test_links_in_circles_are_followed_once(tmp_path):
    touch(tmp_path, "a/one.ply", "other/two.ply")
    (tmp_path / "a" / "round").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self.ply").symlink_to("self.ply")
    (tmp_path / "a" / "gone.ply").symlink_to("nowhere.ply")
    assert names(tmp_path) == ["a/gone", "a/one", "a/self", "other/two"]
    assert names(tmp_path / "**" / "*.ply") == ["a/gone", "a/one", "a/self", "other/two"]


def test_results_are_no_input(tmp_path):
    touch(tmp_path, "one.ply", "out/one_points.ply")
    assert names(tmp_path, output=tmp_path / "out") == ["one"]
    assert names(tmp_path / "one.ply", output=tmp_path) == ["one"]
    with pytest.raises(InputError, match="is the folder of the input and of the output"):
        names(tmp_path, output=tmp_path / "out" / "..")


def test_texts_without_points_are_passed_over(tmp_path):
    touch(tmp_path, "README.txt", content="Scans of 3 rooms\nmade in 2024\n")
    touch(tmp_path, "a.txt", content="x y z\n1 2 3\n")
    touch(tmp_path, "empty.xyz", content="")
    found = find_inputs([str(tmp_path)])
    assert [file.name for file in found.files] == ["a", "empty"]
    assert [path.name for path in found.passed_over] == ["README.txt"]
    assert names(tmp_path / "README.txt") == ["README"]  # asked for by name


def test_results_of_a_prediction_are_no_input(tmp_path):
    touch(tmp_path, "a.ply", content="ply\nformat ascii 1.0\nelement vertex 0\nend_header\n")
    own = f"ply\nformat binary_little_endian 1.0\ncomment {OWN_COMMENT}\nelement vertex 0\nend_header\n"
    touch(tmp_path, "a_points.ply", "out/b_boxes.ply", content=own)
    found = find_inputs([str(tmp_path)])
    assert [file.name for file in found.files] == ["a"]
    assert [path.name for path in found.results] == ["a_points.ply", "b_boxes.ply"]
    assert names(tmp_path / "**" / "*.ply") == ["a"]
    assert names(tmp_path / "a_points.ply") == ["a_points"]  # asked for by name
    with pytest.raises(InputError, match="holds results of predictions only"):
        names(tmp_path / "out")


def test_the_error_explains_a_comma_in_a_name(tmp_path):
    touch(tmp_path, "a,b.ply")
    with pytest.raises(InputError, match=r"a: check the path \(a comma separates two"):
        names(tmp_path / "a", "b.ply")
    assert names(tmp_path / "a?b.ply") == ["a,b"]


def test_formats_of_nothing_are_refused():
    with pytest.raises(InputError, match="--formats is empty"):
        PredictRequest(("a.ply",), formats=())
    assert PredictRequest(("a.ply",), formats=(), show=True).show and PredictRequest((), formats=()).formats == ()


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ((), "No input is given: give files, folders or patterns"),
        (("gone.ply",), r"There is no file or folder .*gone\.ply: check"),
        (("*.ply",), r"Nothing matches .*\*\.ply: check the pattern"),
        (("**a/*.ply",), r"(is no pattern|Nothing matches) .*: check"),
        (("",), "There is no point cloud in .*: files with .ply"),
        (("a\0b",), r"has the entry '.*a\?b'"),
        (("x" * 5000,), "There is no file or folder"),
        (("pipe.ply",), r"pipe\.ply is neither a file nor a folder"),
        (("caf\udce9.ply",), r"There is no file or folder .*caf\?\.ply"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_nothing_to_predict(tmp_path, inputs, sentence):
    if "pipe.ply" in inputs:
        os.mkfifo(tmp_path / "pipe.ply")
    with pytest.raises(InputError, match=sentence) as error:
        names(*(f"{tmp_path}/{each}" for each in inputs))
    str(error.value).encode("utf-8")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into any folder")
def test_a_folder_without_permission_is_named(tmp_path):
    touch(tmp_path, "a.ply", "closed/b.ply")
    (tmp_path / "closed").chmod(0)
    try:
        found = find_inputs([str(tmp_path)])
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert [file.name for file in found.files] == ["a"]
    assert "closed cannot be looked into: Permission denied." in next(iter(found.problems.values()))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("up", "w", "--up is 'w'; expected is one of z, -z, y, -y, x, -x, auto"),
        ("unit", "yd", "--unit is 'yd'; expected is one of m, cm, mm, ft, in, auto"),
        ("colors", "cmyk", "--colors is 'cmyk'; expected is one of auto, 0-1, 0-255, none"),
        ("columns", "x,y,_", "--columns is x,y,_; expected are x, y, z once each"),
        ("align", "walls", "--align is 'walls'; expected is one of none, gravity, manhattan, both"),
        ("formats", ("json", "obj"), "--formats is 'obj'; expected is one of json, csv, ply, html, png"),
        ("score", 30.0, "--score is 30; expected is a number from 0 to 1"),
        ("tile", 1.0, "--tile is 1.0; expected is auto, off or the sides"),
    ],
)
def test_requests_that_make_no_sense(field, value, sentence):
    if field in ("colors", "align"):
        request = PredictRequest(("a",))
        object.__setattr__(request, field, value)
        with pytest.raises(InputError, match=sentence):
            request.__post_init__()
        return
    with pytest.raises(InputError, match=sentence):
        PredictRequest(("a",), **{field: value})

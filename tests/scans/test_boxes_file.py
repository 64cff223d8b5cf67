"""boxes.json of other programs and editors: keys that turn a box, encodings, keys given twice, paths of Windows."""

import json

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.scan import ENCLOSED
from h2a2_jax.scans.scan_folder import ScanFolder, point_cloud_files, read_folder
from h2a2_jax.scans.sources import SourceConfig, build_source
from h2a2_jax.scans.specs import SCANNET, SUNRGBD

TABLE = {"center": [2.1, 1.6, 0.37], "size": [1.2, 0.8, 0.74], "class": "table"}


def document(*boxes, file="a.npy"):
    return {"version": 1, "scans": [{"file": file, "boxes": list(boxes)}]}


def write(root, content):
    np.save(root / "a.npy", np.random.default_rng(0).uniform(0, 2, (60, 3)))
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (root / "boxes.json").write_bytes(content)
    return root


def yaws(root, *boxes):
    return [box.box[6] for box in read_folder(write(root, document(*boxes))).scans[0].boxes]


@pytest.mark.parametrize(
    "turn",
    [
        {"heading": 0.5}, {"rotation": 0.5}, {"rotation_y": -1.57}, {"rotation_z": 0.5}, {"rotationZ": 30},
        {"rotations": {"x": 0, "y": 0, "z": 97.5}}, {"angle": 0.5}, {"angles": [0, 0, 0.5]}, {"orientation": 1.2},
        {"theta": 0.5}, {"euler": [0, 0, 0.5]}, {"heading_angle": 0.5}, {"rz": 0.5}, {"ry": 0.5},
        {"quaternion": [0, 0, 0.38, 0.92]}, {"rotation": {"qx": 0, "qy": 0, "qz": 0.38, "qw": 0.92}}, {"qz": 0.38},
        {"yaw_rad": 0.5}, {"Yaw angle": 0.5}, {"pitch": 0.1}, {"roll": 0.1}, {"direction": [1, 0]}, {"rotation": "0.5"},
        {"zrot": 30},
        {"turn": {"degrees": 30}},
        {"attributes": {"heading": 0.5}}, {"pose": [[1, 0], [0, 1]]}, {"yaw": 0.2, "heading": 0.5},
    ],
    ids=lambda turn: " ".join(turn),
)  # fmt: skip
def test_a_key_that_turns_the_box_is_refused_by_name(tmp_path, turn):
    key = next(key for key in turn if key != "yaw")
    with pytest.raises(
        InputError, match=rf"box 2 of a.npy has the (un)?known key|box 2 of a.npy has the key '{key}"
    ) as e:
        yaws(tmp_path, TABLE, {**TABLE, **turn})
    assert key in str(e.value) and "yaw" in str(e.value)


@pytest.mark.parametrize(
    ("keys", "yaw"),
    [
        ({"yaw": 0.5}, 0.5),
        ({"yaw_degrees": 90}, np.pi / 2),
        ({"yaw_deg": -450.0}, -np.pi / 2),
        ({"yaw": 0.5, "heading": 0.5}, 0.5),
        ({"heading": 0, "rotation": {"x": 0, "y": 0.0, "z": 0}, "orientation": None}, 0),
        ({"is_rotated": False, "notes": "from the door", "score": 0.7, "protocol": 3, "header": "x"}, 0),
    ],
)
def test_yaw_and_keys_that_turn_nothing(tmp_path, keys, yaw):
    assert yaws(tmp_path, {**TABLE, **keys}) == pytest.approx([yaw])


def test_two_yaws_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"box 1 of a.npy has 'yaw' and 'yaw_degrees'; give one of them"):
        yaws(tmp_path, {**TABLE, "yaw": 0, "yaw_degrees": 0})


def test_degrees_are_refused_in_training(tmp_path):
    write(tmp_path, document(TABLE, {**TABLE, "yaw": 45}, {**TABLE, "yaw": -270}))
    for split in ("train", "val"):
        with pytest.raises(
            InputError, match=r"boxes.json: 2 boxes have a yaw of more than a full turn, up to 270: give"
        ):
            build_source(SourceConfig("sunrgbd", root=str(tmp_path)), split)


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        (
            {
                "position": {"x": 1, "y": 1, "z": 1},
                "dimensions": {"length": 1, "width": 1, "height": 1},
                "name": "table",
            },
            r"the center of box 1 .* expected are three numbers, \[x, y, z\] .*its keys are position, dimensions, name",
        ),
        (
            {"center": [1, 1, 1], "extent": [1, 1, 1], "class": "table"},
            r"the size of box 1 of a.npy is None; .* full \[dx, dy, dz\] .*its keys are center, extent, class",
        ),
        (
            {"center": [1, 1, 1], "size": [1, 1, 1], "label": "table"},
            "the class of box 1 of a.npy is None; expected is a name; its keys are center, size, label",
        ),
        (
            {"center": {"x": 1, "y": 1, "z": 1}, "size": [1, 1, 1], "class": "table"},
            r"the center of box 1 of a.npy is \{'x': 1.*expected are three numbers, \[x, y, z\] of the middle",
        ),
    ],
)
def test_missing_keys_are_named_with_those_that_are_there(tmp_path, box, sentence):
    with pytest.raises(InputError, match=sentence):
        yaws(tmp_path, box)


def test_long_values_are_cut_in_the_sentence(tmp_path):
    with pytest.raises(InputError, match=r"the center of box 1 of a.npy is \[0, 0, .*\.\.\.; expected") as caught:
        yaws(tmp_path, {**TABLE, "center": [0] * 10_000})
    assert len(str(caught.value)) < 500


def test_a_path_that_begins_with_a_dot_is_the_same_file(tmp_path):
    assert read_folder(write(tmp_path, document(file="./a.npy"))).scans[0].file == "a.npy"
    with pytest.raises(InputError, match=r"unknown key 'centre'; did you mean 'center'\?$"):
        yaws(tmp_path, {"centre": [1, 1, 1], "size": [1, 1, 1], "class": "table"})


def test_a_quarter_of_a_turn_to_few_digits_turns_nothing(tmp_path):
    folder = write(tmp_path, document({**TABLE, "class": "chair", "yaw": 1.5708}))
    scan = ScanFolder(folder, "train", SCANNET)[0]
    assert scan.boxes[0, 3:] == pytest.approx([0.8, 1.2, 0.74, 0], abs=1e-4) and ENCLOSED not in scan.notes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_of_editors(tmp_path, encoding):
    content = json.dumps(document({**TABLE, "class": "Stühle"}), ensure_ascii=False).encode(encoding)
    assert read_folder(write(tmp_path, content)).classes == ("Stühle",)


def test_an_unknown_encoding_is_one_sentence(tmp_path):
    content = json.dumps(document({**TABLE, "class": "Stühle"}), ensure_ascii=False).encode("latin-1")
    with pytest.raises(InputError, match=r"boxes.json is no JSON file .*repair or write it again"):
        read_folder(write(tmp_path, content))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"version": 1, "scans": [{"file": "a.npy", "boxes": []}], "scans": [{"file": "a.npy"}]}', "scans"),
        ('{"version": 1, "scans": [{"file": "a.npy", "boxes": [], "boxes": []}]}', "boxes"),
        ('{"version": 1, "scans": [{"file": "a.npy", "boxes": [{"yaw": 1, "center": [0, 0, 0], "yaw": 0}]}]}', "yaw"),
    ],
)
def test_a_key_given_twice_is_refused_by_name(tmp_path, text, key):
    with pytest.raises(InputError, match=rf"boxes.json: an object \(.*\) has the key '{key}' more than once; give it"):
        read_folder(write(tmp_path, text.encode()))


def test_paths_of_windows(tmp_path):
    (tmp_path / "office").mkdir()
    rows = np.random.default_rng(0).uniform(0, 2, (60, 3))
    np.save(tmp_path / "office" / "desk.npy", rows)
    source = ScanFolder(write(tmp_path, document(TABLE, file="office\\desk.npy")), "train", SUNRGBD)
    assert source.names == ["office/desk"]
    np.testing.assert_allclose(source[0].points, rows, atol=1e-6)
    for outside in ("C:\\data\\a.npy", "..\\a.npy", "C:/data/a.npy"):
        with pytest.raises(InputError, match="lies outside the folder"):
            read_folder(write(tmp_path, document(file=outside)))
    both = document(TABLE, file="office\\desk.npy")
    both["scans"].append({"file": "office/desk.npy"})
    with pytest.raises(InputError, match="scan office/desk is there more than once"):
        read_folder(write(tmp_path, both))


def test_files_of_archives_and_file_managers_are_passed_over(tmp_path):
    for name in ("a.ply", "._a.ply", "__MACOSX/a.ply", "__MACOSX/._a.ply", ".cache/b.ply", "below/c.PLY"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert point_cloud_files(tmp_path) == ["a.ply", "below/c.PLY"]

import pickle

import numpy as np
import pytest

from h2a2_jax.scans.raw import RawDataset
from h2a2_jax.scans.raw.s3dis import S3dis
from h2a2_jax.scans.scan import validate_scan
from h2a2_jax.scans.specs import S3DIS
from tests.scans.raw.miniature import BAD_LINE, S3DIS_ROOMS, S3DIS_SPLITS, room_folder, write_s3dis


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3dis")
    write_s3dis(folder)
    return folder


def test_it_is_a_raw_dataset(root):
    dataset = S3dis(root)
    assert isinstance(dataset, RawDataset)
    assert dataset.spec is S3DIS and dataset.splits == S3DIS_SPLITS and dataset.notes == {}


@pytest.mark.parametrize("name", S3DIS_ROOMS)
def test_points_and_boxes_equal_those_computed_by_hand(root, name):
    room, scan = S3DIS_ROOMS[name], S3dis(root).load(name)
    rows = np.concatenate([room[file] for file in sorted(room)])
    origin = rows[:, :3].min(axis=0)
    np.testing.assert_allclose(scan.points, rows[:, :3] - origin, atol=1e-6)
    np.testing.assert_allclose(scan.colors, rows[:, 3:] / 255, atol=1e-6)
    named = [(file, file.split("_")[0]) for file in sorted(room) if file.split("_")[0] in S3DIS.classes]
    assert [S3DIS.classes[label] for label in scan.labels] == [word for _, word in named]
    for box, (file, _) in zip(scan.boxes, named, strict=True):
        low, high = room[file][:, :3].min(axis=0) - origin, room[file][:, :3].max(axis=0) - origin
        np.testing.assert_allclose(box, [*(low + high) / 2, *(high - low), 0], atol=1e-6)
    assert validate_scan(scan, S3DIS.num_classes) == []


def test_the_smallest_coordinates_become_the_origin(root):
    room, scan = S3DIS_ROOMS["Area_1_office_2"], S3dis(root).load("Area_1_office_2")
    assert scan.points.min(axis=0).tolist() == [0, 0, 0]
    first = np.concatenate([room[file] for file in sorted(room)])[0, :3]
    np.testing.assert_allclose(scan.transform @ [*first, 1], [*scan.points[0], 1], atol=1e-5)


def test_the_published_broken_line_is_repaired_and_counted(root):
    scan = S3dis(root).load("Area_5_hallway_6")
    raw = (room_folder(root, "Area_5_hallway_6") / "ceiling_1.txt").read_bytes().split(b"\n")
    assert b"\x00" in raw[BAD_LINE] and len(raw[BAD_LINE].split()) == 5
    assert scan.notes["lines repaired"] == 1 and "lines that could not be read" not in scan.notes
    colors = S3DIS_ROOMS["Area_5_hallway_6"]["ceiling_1"][BAD_LINE, 3:]
    ceiling = 8 + BAD_LINE  # after the eight points of board_1
    np.testing.assert_allclose(scan.colors[ceiling], colors / 255, atol=1e-6)


def test_unknown_classes_are_clutter(root):
    scan = S3dis(root).load("Area_1_office_2")
    assert scan.notes == {
        "objects of no class of the dataset": 2,  # the ceiling and the stairs
        "objects of an unknown name, taken as clutter": 1,
    }
    assert len(scan.points) == sum(map(len, S3DIS_ROOMS["Area_1_office_2"].values()))


def test_another_area_for_validation(root):
    splits = S3dis(root, val_area=2).splits
    assert splits["val"] == ("Area_2_hallway_11",) and "Area_5_hallway_6" in splits["train"]


def test_the_folder_of_the_archive_is_found(tmp_path):
    write_s3dis(tmp_path / "Stanford3dDataset_v1.2_Aligned_Version")
    assert S3dis(tmp_path).splits == S3DIS_SPLITS


def test_a_copy_in_another_process_is_the_same(root):
    copy = pickle.loads(pickle.dumps(S3dis(root)))
    assert copy.splits == S3DIS_SPLITS
    assert len(copy.load("Area_3_lounge_1").boxes) == 2


GOOD = b"1.000 2.000 3.000 10 20 30\n"


@pytest.mark.parametrize(
    ("line", "row", "note"),
    [
        (b"1.5 2.5 3.5 185 187 190", [1.5, 2.5, 3.5, 185, 187, 190], None),
        (b"  1.5\t2.5  3.5 185 187 190 \r", [1.5, 2.5, 3.5, 185, 187, 190], None),
        (b"1.5 2.5 3.5 185.000000 1.87e2 190", [1.5, 2.5, 3.5, 185, 187, 190], None),
        (b"1.5 2.5 3.5 185\x00187 190", [1.5, 2.5, 3.5, 185, 187, 190], "lines repaired"),
        (b"1.5 2.5 3.5 185\xff187 190", [1.5, 2.5, 3.5, 185, 187, 190], "lines repaired"),
        (b"1.5 2.5 3.5 185\xa0187 190", [1.5, 2.5, 3.5, 185, 187, 190], "lines repaired"),
        (b"1.5 2.5 3.5 185?187 190", [1.5, 2.5, 3.5, 185, 187, 190], "lines repaired"),
        (b"1.5 2.5 3.5 1\x0085 187 190", [1.5, 2.5, 3.5, 185, 187, 190], "lines repaired"),
        (b"1.5 2.5 3.5 185 187 190\x00\x00\x00", [1.5, 2.5, 3.5, 185, 187, 190], "lines repaired"),
        (b"1.5 2.5 3.5 185 187 190 here is more", [1.5, 2.5, 3.5, 185, 187, 190], "lines repaired"),
        (b"1.5,2.5,3.5,185,187,190", [1.5, 2.5, 3.5, 185, 187, 190], "lines repaired"),
        (b"1.5 2.5 3.5 185 187", None, "lines that could not be read"),
        (b"1.5 2.5 3.5 185 187 190 7", None, "lines that could not be read"),
        (b"1.5 2.5 3.5 185 187 1-90", None, "lines that could not be read"),
        (b"1.5 2.5.1 3.5 185 187 190", None, "lines that could not be read"),
        (b"1.5 2.5 3.5 185\x10187 190", [1.5, 2.5, 3.5, 185, 187, 190], "lines repaired"),
        (b"\x00\x00\x00\x00", None, "lines that could not be read"),
        (b"nan 2.5 3.5 185 187 190", None, "points with NaN or infinite values"),
        (b"1.5 -inf 3.5 185 187 190", None, "points with NaN or infinite values"),
        (b"1.5 1e999 3.5 185 187 190", None, "points with NaN or infinite values"),
        (b"1.5 2.5 3.5e8 185 187 190", None, "points more than 1 km from the origin"),
        (b"1.5 2.5 3.5 185 1870 190", None, "points with colours outside 0-255"),
        (b"1.5 2.5 3.5 185 nan 190", None, "points with colours outside 0-255"),
        (b"", None, None),
        (b" \t ", None, None),
    ],
)
def test_lines(tmp_path, line, row, note):
    write_s3dis(tmp_path)
    name = "Area_6_office_9"
    table = room_folder(tmp_path, name) / "table_1.txt"
    corner = b"0 0 0 0 0 0\n"  # so that the origin is known
    table.write_bytes(corner + GOOD + line + b"\n" + GOOD)
    scan = S3dis(tmp_path).load(name)
    rows = [[0] * 6, [1, 2, 3, 10, 20, 30], *([row] if row else []), [1, 2, 3, 10, 20, 30]]
    np.testing.assert_allclose(scan.points, np.array(rows)[:, :3], atol=1e-6)
    np.testing.assert_allclose(scan.colors, np.array(rows)[:, 3:] / 255, atol=1e-6)
    assert scan.notes == ({note: 1} if note else {})


def test_one_broken_line_among_many(tmp_path):
    write_s3dis(tmp_path)
    name = "Area_6_office_9"
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.uniform(0, 3, (5000, 3)).round(3), rng.integers(0, 256, (5000, 3))], axis=1)
    lines = [b"%.3f %.3f %.3f %d %d %d" % tuple(row) for row in rows]
    lines[4321] = lines[4321].replace(b" ", b"\x00", 1)
    (room_folder(tmp_path, name) / "table_1.txt").write_bytes(b"\n".join(lines))
    scan = S3dis(tmp_path).load(name)
    np.testing.assert_allclose(scan.points, rows[:, :3] - rows[:, :3].min(axis=0), atol=1e-6)
    assert scan.notes == {"lines repaired": 1}

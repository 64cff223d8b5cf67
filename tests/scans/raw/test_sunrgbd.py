import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from h2a2_jax.scans.mmdet3d import Mmdet3dFolder, lay_out
from h2a2_jax.scans.raw import RawDataset
from h2a2_jax.scans.raw.sunrgbd import POINTS, SunRgbd, back_project, decode_depth
from h2a2_jax.scans.scan import points_in_box, validate_scan
from h2a2_jax.scans.specs import SUNRGBD
from tests.scans.raw.miniature import SUN_FRAMES, SUN_SPLITS, cells, sun_meta, write_depth, write_sunrgbd

NAMES = [f"{number:06d}" for number in range(1, len(SUN_FRAMES) + 1)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sunrgbd")
    write_sunrgbd(folder)
    return folder


def expected_points(frame):
    """Every measured pixel by itself, with its place in the image."""
    (fx, _, cx), (_, fy, cy), _ = frame["K"]
    found = {}
    for row, line in enumerate(frame["depth"]):
        for column, millimetres in enumerate(line):
            d = min(int(millimetres) / 1000, 8.0)
            if d > 0:
                camera = [(column + 1 - cx) * d / fx, d, -(row + 1 - cy) * d / fy]
                found[row, column] = [sum(r * c for r, c in zip(turn, camera, strict=True)) for turn in frame["Rtilt"]]
    return found


def test_it_is_a_raw_dataset(root):
    dataset = SunRgbd(root)
    assert isinstance(dataset, RawDataset)
    assert dataset.spec is SUNRGBD and dataset.splits == SUN_SPLITS and dataset.notes == {}


def test_miniature_metadata_loads_as_the_original_does(root):
    frames = loadmat(root / "SUNRGBDMeta3DBB_v2.mat")["SUNRGBDMeta"]
    assert frames.shape == (1, 4) and frames["groundtruth3DBB"][0, 1].size == 0
    assert frames["groundtruth3DBB"][0, 0].shape == (1, 3) and frames["groundtruth3DBB"][0, 2].shape == (1, 1)
    assert frames["groundtruth3DBB"][0, 0]["classname"][0, 0].tolist() == ["bed"]
    assert frames["depthpath"][0, 0].tolist()[0].startswith("/n/fs/sun3d/data/SUNRGBD/kv2/")


@pytest.mark.parametrize("name", NAMES)
def test_points_equal_those_computed_by_hand(root, name):
    frame, scan = SUN_FRAMES[int(name) - 1], SunRgbd(root).load(name)
    expected = expected_points(frame)
    assert len(scan.points) == len(expected) < POINTS
    np.testing.assert_allclose(scan.points, list(expected.values()), atol=1e-5)
    with Image.open(root / frame["folder"] / "image/color.jpg") as image:
        pixels = np.array(image)
    np.testing.assert_allclose(scan.colors, [pixels[place] / 255 for place in expected], atol=1e-6)
    np.testing.assert_array_equal(scan.transform, np.eye(4))
    assert validate_scan(scan, 10) == []


@pytest.mark.parametrize("annotations", ["v2", "v1"])
def test_boxes_equal_those_computed_by_hand(root, annotations):
    dataset = SunRgbd(root, annotations)
    for name, frame in zip(NAMES, SUN_FRAMES, strict=True):
        boxes, classes = [], []
        for word, centroid, (first, second, third), (toward_x, toward_y, _) in frame["objects"]:
            if word != "pillow":
                yaw = math.atan2(toward_y, toward_x)
                boxes.append([*centroid, 2 * abs(second), 2 * abs(first), 2 * abs(third), yaw])
                classes.append(word)
        scan = dataset.load(name)
        np.testing.assert_allclose(scan.boxes, np.array(boxes).reshape(-1, 7), atol=1e-6)
        assert [SUNRGBD.classes[label] for label in scan.labels] == classes
        pillows = sum(word == "pillow" for word, *_ in frame["objects"])
        assert scan.notes == ({"objects of no class of the dataset": pillows} if pillows else {})


def test_versions_of_the_annotations_differ(tmp_path):
    write_sunrgbd(tmp_path)
    other = [dict(frame, objects=[("sofa", (1, 1, 1), (1, 1, 1), (1, 0, 0))]) for frame in SUN_FRAMES]
    savemat(tmp_path / "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat", {"SUNRGBDMeta": sun_meta(other)})
    assert SunRgbd(tmp_path, "v1").load("000002").labels.tolist() == [SUNRGBD.classes.index("sofa")]
    assert SunRgbd(tmp_path, "v2").load("000002").labels.tolist() == []


def test_encoded_depth_is_decoded():
    millimetres = np.arange(2**16, dtype=np.uint16)
    encoded = np.array([((d * 8) % 2**16) + d // 2**13 for d in range(2**16)], np.uint16)
    np.testing.assert_allclose(decode_depth(encoded), np.minimum(millimetres / 1000, 8.0), rtol=1e-6)
    assert decode_depth(encoded).dtype == np.float32


def test_depth_of_the_file_is_in_the_rotated_encoding(tmp_path):
    write_depth(tmp_path / "depth.png", np.array([[1064, 0, 8191, 8192]], np.uint16))
    with Image.open(tmp_path / "depth.png") as image:
        pixels = np.array(image)
    # 1064 is 0b10000101000: three more zeros; 8192 is bit 13, which comes around to bit 0.
    assert pixels.dtype == np.uint16 and pixels.tolist() == [[8512, 0, 65528, 1]]


def test_axes_of_the_camera():
    intrinsics, upright = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]]), np.eye(3)
    u, v, depth = np.array([320, 420, 320]), np.array([240, 240, 140]), np.float32([2, 2, 2])
    points = back_project(u, v, depth, intrinsics, upright)
    # Straight ahead is y; a pixel further right is at larger x; a pixel further up is at larger z.
    np.testing.assert_allclose(points, [[0, 2, 0], [0.4, 2, 0], [0, 2, 0.4]], atol=1e-6)
    looking_down = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    np.testing.assert_allclose(back_project(u, v, depth, intrinsics, looking_down)[0], [0, 0, -2], atol=1e-6)


def test_large_frames_are_sampled_the_same_in_every_run(tmp_path):
    rng = np.random.default_rng(0)
    large = dict(SUN_FRAMES[0], depth=rng.integers(900, 7000, (240, 300)).astype(np.uint16))
    large["color"] = np.full((240, 300, 3), 90, np.uint8)
    write_sunrgbd(tmp_path, [large, *SUN_FRAMES[1:]])
    scan, again = SunRgbd(tmp_path).load("000001"), SunRgbd(tmp_path).load("000001")
    assert len(scan.points) == POINTS == 50_000
    np.testing.assert_array_equal(scan.points, again.points)
    whole = np.array(list(expected_points(large).values()), np.float32)
    places = {tuple(point): place for place, point in enumerate(whole.round(4).tolist())}
    chosen = [places.get(tuple(point)) for point in scan.points.round(4).tolist()]
    # Without replacement, from everywhere in the image (rounding may part a few points from their twin).
    found = np.array([place for place in chosen if place is not None])
    assert len(found) > 49_000 and len(np.unique(found)) > 49_000
    counts, _ = np.histogram(found, bins=10, range=(0, len(whole)))
    assert counts.min() > 0.9 * len(found) / 10


def test_paths_under_another_prefix(tmp_path):
    write_sunrgbd(tmp_path)
    meta = sun_meta(SUN_FRAMES)
    for field in ("depthpath", "rgbpath"):
        meta[field][0] = [path.replace("/n/fs/sun3d/data", "/home/someone/else") for path in meta[field][0]]
    savemat(tmp_path / "SUNRGBDMeta3DBB_v2.mat", {"SUNRGBDMeta": meta})
    folders = [[f"D:/{SUN_FRAMES[int(name) - 1]['folder']}" for name in SUN_SPLITS[split]] for split in SUN_SPLITS]
    lists = {"alltrain": cells(folders[0]), "alltest": cells(folders[1])}
    savemat(tmp_path / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat", lists)
    dataset = SunRgbd(tmp_path)
    assert dataset.splits == SUN_SPLITS
    assert len(dataset.load("000001").points) == len(expected_points(SUN_FRAMES[0]))


def test_a_copy_in_another_process_parses_nothing_again(tmp_path):
    write_sunrgbd(tmp_path)
    dataset = SunRgbd(tmp_path)
    (tmp_path / "SUNRGBDMeta3DBB_v2.mat").unlink()
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.splits == dataset.splits
    np.testing.assert_array_equal(copy.load("000003").boxes, dataset.load("000003").boxes)


@pytest.mark.skipif("H2A2_SCANS_DIR" not in os.environ, reason="H2A2_SCANS_DIR names no folder of example scans")
def test_a_real_depth_image():
    path = Path(os.environ["H2A2_SCANS_DIR"]) / "o3d_RGBD_other_formats_SUN_depth.png"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    with Image.open(path) as image:
        depth = decode_depth(np.asarray(image))
    measured = depth[depth > 0]
    assert depth.shape == (480, 640)
    assert round(float(measured.min()), 2) == 1.06 and measured.max() == 8.0


@pytest.mark.skipif("H2A2_SCANS_DIR" not in os.environ, reason="H2A2_SCANS_DIR names no folder of example scans")
def test_conventions_of_boxes_on_a_real_frame(tmp_path):
    folder = Path(os.environ["H2A2_SCANS_DIR"])
    if not (folder / "000017.bin").is_file():
        pytest.skip(f"there is no 000017.bin in {folder}")
    lay_out([folder / "000017.bin"], folder / "sunrgbd_000017_infos.pkl", SUNRGBD, tmp_path)
    scan = Mmdet3dFolder(tmp_path, "sunrgbd_infos_train.pkl", SUNRGBD)[0]
    bed = scan.boxes[scan.labels.tolist().index(SUNRGBD.classes.index("bed"))]
    assert points_in_box(scan.points, bed).sum() == 18_117
    # The same box as the raw file would have it: half sizes with the first two exchanged, a direction for the yaw.
    x, y, z, length, width, height, yaw = bed.tolist()
    direction = (math.cos(yaw), math.sin(yaw), 0)
    frame = dict(SUN_FRAMES[1], objects=[("bed", (x, y, z), (-width / 2, length / 2, height / 2), direction)])
    write_sunrgbd(tmp_path, [SUN_FRAMES[0], frame, *SUN_FRAMES[2:]])
    parsed = SunRgbd(tmp_path).load("000002").boxes[0]
    # Rounding to float32 may move a point on the surface in or out.
    np.testing.assert_allclose(parsed, bed, atol=1e-6)
    assert abs(int(points_in_box(scan.points, parsed).sum()) - 18_117) <= 2

import pickle

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.raw import PUBLISHED, RawDataset
from h2a2_jax.scans.raw.arkitscenes import SKIPPED, ArkitScenes
from h2a2_jax.scans.scan import ScanError, points_in_box, validate_scan
from h2a2_jax.scans.specs import ARKITSCENES
from tests.scans.raw.miniature import ARKIT_SCANS, ARKIT_SPLITS, write_arkitscenes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arkitscenes")
    write_arkitscenes(folder)
    return folder


def test_it_is_a_raw_dataset(root):
    dataset = ArkitScenes(root)
    assert isinstance(dataset, RawDataset)
    assert dataset.spec is ARKITSCENES and dataset.splits == ARKIT_SPLITS
    assert dataset.notes == {SKIPPED: 1}
    assert PUBLISHED["arkitscenes"] == {"train": 4498, "val": 549}
    assert ArkitScenes(root / "3dod").splits == ARKIT_SPLITS


def test_boxes_equal_those_computed_by_hand(root):
    scan = ArkitScenes(root).load("40753679")
    # atan2(.6, .8), atan2(-1, 0), atan2(0, -1): the angles of the first rows (.8, .6), (0, -1), (-1, 0).
    yaws = (0.6435011, -1.5707963, 3.1415927)
    expected = [
        [0.5, 1.0, -0.9, 2.0, 1.5, 0.8, yaws[0]],
        [-1.0, 0.25, 0.3, 0.1, 1.0, 0.6, yaws[1]],
        [1.5, -1.0, 0.2, 0.2, 0.5, 0.4, yaws[2]],
    ]
    np.testing.assert_allclose(scan.boxes, expected, atol=1e-6)
    assert [ARKITSCENES.classes[label] for label in scan.labels] == ["bed", "tv_monitor", "tv_monitor"]
    assert scan.notes == {"objects of no class of the dataset": 1}
    (toilet,) = ArkitScenes(root).load("41069021").boxes
    np.testing.assert_allclose(toilet, [0, 0.5, -1, 0.7, 0.4, 0.75, 2.2142974], atol=1e-6)


def test_a_box_holds_what_the_corners_of_the_authors_enclose(root):
    """Corners are centroid + R^T (+-lengths / 2): points just inside are in the box, points just outside are not."""
    scan = ArkitScenes(root).load("40753679")
    label, centroid, lengths, axes = ARKIT_SCANS["Training/40753679"]["objects"][0]
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    corners = signs * np.array(lengths) / 2 @ np.array(axes).reshape(3, 3)
    assert label == "bed" and points_in_box(np.array(centroid) + 0.999 * corners, scan.boxes[0]).all()
    assert not points_in_box(np.array(centroid) + 1.001 * corners, scan.boxes[0]).any()
    # By columns they would be turned the other way.
    other = np.array(centroid) + 0.999 * (signs * np.array(lengths) / 2 @ np.array(axes).reshape(3, 3).T)
    assert not points_in_box(other, scan.boxes[0]).all()


@pytest.mark.parametrize("place", [place for place, scan in ARKIT_SCANS.items() if not scan["skipped"]])
def test_points_and_colours_are_those_of_the_mesh(root, place):
    scan, written = ArkitScenes(root).load(place.partition("/")[2]), ARKIT_SCANS[place]
    np.testing.assert_array_equal(scan.points, written["vertices"])
    np.testing.assert_allclose(scan.colors, written["colors"] / 255.0, atol=1e-7)
    np.testing.assert_array_equal(scan.transform, np.eye(4))
    assert validate_scan(scan, ARKITSCENES.num_classes) == []


def test_it_can_be_pickled(root):
    again = pickle.loads(pickle.dumps(ArkitScenes(root)))
    np.testing.assert_array_equal(again.load("41069021").points, ARKIT_SCANS["Validation/41069021"]["vertices"])


def test_skipped_and_unknown_scans_are_not_loaded(root):
    for name in ("40753680", "7"):
        with pytest.raises(ScanError, match=f"There is no scan {name} in .*3dod: check its name"):
            ArkitScenes(root).load(name)


def test_a_folder_of_another_layout(tmp_path, root):
    with pytest.raises(InputError, match=r"There is no folder .*nowhere: it should hold 3dod/Training/"):
        ArkitScenes(tmp_path / "nowhere")
    (tmp_path / "3dod" / "Training").mkdir(parents=True)
    with pytest.raises(InputError, match=r"There is no folder Validation in .*3dod: an ARKitScenes folder holds"):
        ArkitScenes(tmp_path)
    for folder in ("Training", "Validation"):
        (tmp_path / "3dod" / folder / "1").mkdir(parents=True)
    with pytest.raises(InputError, match="1 scans such as 1 are in Training and in Validation"):
        ArkitScenes(tmp_path)

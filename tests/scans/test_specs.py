import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.specs import S3DIS, SCANNET, SPECS, SUNRGBD, dataset_spec


def test_number_of_classes_and_box_outputs():
    assert [spec.num_classes for spec in SPECS] == [18, 10, 5]
    assert [spec.num_outputs for spec in SPECS] == [6, 8, 6]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_class_has_a_level(spec):
    assert len(spec.label_to_level) == spec.num_classes
    assert set(spec.label_to_level) == {0, 1}
    assert len(set(spec.classes)) == spec.num_classes


def test_large_objects_are_learned_on_the_coarse_level():
    for spec, large, small in (
        (SCANNET, "bed sofa table window bookshelf counter desk curtain bathtub", "chair door toilet garbagebin"),
        (SUNRGBD, "bed table sofa desk bookshelf", "chair toilet dresser night_stand bathtub"),
        (S3DIS, "table sofa bookcase", "chair board"),
    ):
        assert {spec.label_to_level[spec.classes.index(name)] for name in large.split()} == {1}
        assert {spec.label_to_level[spec.classes.index(name)] for name in small.split()} == {0}


def test_look_up_by_name():
    assert dataset_spec("s3dis") is S3DIS
    with pytest.raises(InputError, match=r"'kitti'.*scannet, sunrgbd, s3dis"):
        dataset_spec("kitti")

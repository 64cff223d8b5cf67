"""A head on the scans of another dataset: which classes are common, how boxes are compared."""

import math

import numpy as np

from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.evaluation.cross import common_classes
from h2a2_jax.scans.scan import enclosing_boxes
from h2a2_jax.scans.specs import S3DIS, SCANNET, SUNRGBD, own_spec


def test_classes_are_common_by_name_or_by_synonym():
    common = common_classes(SCANNET, S3DIS)
    assert common.names == ("table", "chair", "sofa", "bookcase")
    assert [SCANNET.classes[label] for _, label in common.pairs] == ["table", "chair", "sofa", "bookshelf"]
    assert common.without_counterpart == ("board",) and "bed" in common.unused and "bookshelf" not in common.unused
    assert len(common_classes(SUNRGBD, SCANNET).pairs) == 8
    own = own_spec("own", ("Trash Can", "couch", "sofa", "plant"))
    assert common_classes(SCANNET, own).names == ("Trash Can", "sofa")  # an equal name goes before a synonym
    assert common_classes(own_spec("other", ("lamp",)), S3DIS).pairs == ()


def test_boxes_of_a_head_are_counted_and_turned_as_the_scans_boxes_are():
    sofa, bed, bookshelf = (SUNRGBD.classes.index(name) for name in ("sofa", "bed", "bookshelf"))
    boxes = np.array([[1, 2, 3, 2, 1, 1, math.pi / 2], [0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, math.pi / 4]])
    found = Detections(
        boxes.astype(np.float32), np.array([0.9, 0.8, 0.7], np.float32), np.array([sofa, bed, bookshelf], np.int32)
    )
    common = common_classes(SUNRGBD, S3DIS)
    kept = common.detections(found)
    assert [common.names[label] for label in kept.labels] == ["sofa", "bookcase"]
    root = math.sqrt(2)
    np.testing.assert_allclose(kept.boxes, [[1, 2, 3, 1, 2, 1, 0], [0, 0, 0, root, root, 1, 0]], atol=1e-6)
    np.testing.assert_array_equal(kept.scores, found.scores[[0, 2]])
    board, chair = S3DIS.classes.index("board"), S3DIS.classes.index("chair")
    truth = common.truth(GroundTruth(boxes[:2].astype(np.float32), np.array([board, chair], np.int32)))
    assert [common.names[label] for label in truth.labels] == ["chair"]
    np.testing.assert_array_equal(truth.boxes, boxes[1:2])
    # Scans with yaw take boxes as they are.
    turned = common_classes(SCANNET, SUNRGBD).detections(
        Detections(found.boxes[:1], found.scores[:1], np.array([SCANNET.classes.index("sofa")], np.int32))
    )
    np.testing.assert_array_equal(turned.boxes, found.boxes[:1])


def test_an_enclosing_box_of_one_that_is_not_turned_is_itself():
    boxes = np.array([[1, 2, 3, 4, 5, 6, 0], [0, 0, 0, 2, 1, 1, math.pi]], np.float32)
    np.testing.assert_allclose(enclosing_boxes(boxes)[:, :6], boxes[:, :6], atol=1e-6)

"""One label space: columns by name, the loss of own columns, prediction of each dataset and of all classes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.balancers.packing import Packing
from h2a2_jax.boxes import Detections
from h2a2_jax.boxes.codec import decode_boxes_padded
from h2a2_jax.checkpoint.train_state import head_configs, is_exclusive, split_model
from h2a2_jax.config import ExperimentConfig, SourceConfig
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.evaluate import EvalRequest, chosen_sources
from h2a2_jax.inference.placement import Frame, choose_head
from h2a2_jax.inference.predictor import Predictor
from h2a2_jax.inference.scan_prediction import renamed_specs
from h2a2_jax.layers import DatasetContext
from h2a2_jax.losses import detection_loss
from h2a2_jax.models import TR3D
from h2a2_jax.models.head import DatasetHeads, UnionHead, outputs_of_union
from h2a2_jax.models.tr3d_weights import tr3d_slots
from h2a2_jax.pretrained.card import CardFacts, model_card
from h2a2_jax.scans.formats.point_cloud import PointCloud
from h2a2_jax.scans.frame import place_cloud
from h2a2_jax.scans.label_space import UNION, union_classes, union_columns, union_spec
from h2a2_jax.scans.specs import S3DIS, SCANNET, SUNRGBD, own_spec, plain_name
from h2a2_jax.training.gradients import targets_of
from h2a2_jax.training.step import _nonfinite
from tests.checkpoint import test_warm_start as warm
from tests.inference.tiny import SPECS, TINY, random_detector, room

MODEL = dataclasses.replace(TINY, label_space="union")
HEADS = head_configs(SPECS, MODEL)
SMALL = room("small", 500, 1.2)


def test_classes_of_one_name_are_one_column_in_any_order():
    lab = own_spec("lab", ("Trash Can", "chair", "robot"))
    flat = own_spec("flat", ("trash_can", "bed"))
    specs = (S3DIS, lab, flat)
    classes = union_classes(specs)
    assert [*classes] == ["bed", "board", "bookcase", "chair", "robot", "sofa", "table", "Trash Can"]
    assert union_classes(specs[::-1]) == classes
    for spec, columns in zip(specs, union_columns(specs), strict=True):
        assert [plain_name(classes[column]) for column in columns] == [plain_name(name) for name in spec.classes]
    assert not union_spec(specs, union_columns(specs)).has_yaw
    assert union_spec((*specs, SUNRGBD), union_columns((*specs, SUNRGBD))).has_yaw
    three = union_classes((SCANNET, SUNRGBD, S3DIS))
    assert len(three) == 22 == len({plain_name(name) for name in (*SCANNET.classes, *SUNRGBD.classes, *S3DIS.classes)})


def test_loss_and_gradients_are_those_of_own_columns():
    specs, rng = (SCANNET, SUNRGBD, S3DIS), np.random.default_rng(0)
    targets, columns = targets_of(specs, MODEL), union_columns(specs)
    count = len(union_classes(specs))
    head = UnionHead(4, count, rngs=nnx.Rngs(0))
    graph, params = nnx.split(head)
    # The direct computation: a head of the dataset's own, with copies of its columns.
    plain = DatasetHeads(4, tuple(spec.num_classes for spec in specs), (8, 8, 8), rngs=nnx.Rngs(1))
    for name in ("box_kernel", "box_bias"):
        getattr(plain, name).set_value(jnp.stack([getattr(head, name)[...]] * 3))
    for name in ("class_kernel", "class_bias"):
        whole = getattr(head, name)[...]
        getattr(plain, name).set_value(jnp.stack([whole[..., own] for own in targets.columns]))
    features = jnp.asarray(rng.normal(size=(60, 4)), jnp.float32)
    locations = jnp.asarray(rng.uniform(0, 4, (60, 3)), jnp.float32)
    boxes = jnp.asarray(np.c_[rng.uniform(0, 4, (3, 3)), rng.uniform(0.5, 2, (3, 3)), [0.3, 0, 1]], jnp.float32)[None]
    level = jnp.asarray(rng.integers(0, 2, 60), jnp.int32)
    scan = jnp.zeros(60, jnp.int32)

    @jax.jit
    def slopes(params, plain, target, dataset, boxes, labels):
        def loss(regression, logits):
            return detection_loss(
                locations, scan, level, regression, logits, boxes, labels,
                target.label_to_level, target.class_mask, target.has_yaw,
            ).total  # fmt: skip

        def of_union(params):
            return loss(*nnx.merge(graph, params)(features, target.columns))

        def direct(plain):
            return loss(*plain(features, dataset))

        return jax.value_and_grad(of_union)(params), jax.value_and_grad(direct)(plain)

    for d, spec in enumerate(specs):
        labels = jnp.asarray(rng.integers(0, spec.num_classes, (1, 3)), jnp.int32)
        given = boxes if spec.has_yaw else boxes.at[..., 6].set(0)
        target = jax.tree.map(lambda leaf, d=d: leaf[d], targets)
        of_union, direct = slopes(params, plain, target, DatasetContext.one(d, 3), given, labels)
        (value, grads), (expected, alone) = of_union, direct
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for name in ("class_kernel", "class_bias", "box_kernel", "box_bias"):
            ours, theirs = np.asarray(grads[name][...]), np.asarray(getattr(alone, name)[...])[d]
            if name.startswith("class"):
                assert not ours[..., np.setdiff1d(np.arange(count), columns[d])].any()
                ours, theirs = ours[..., columns[d]], theirs[..., : spec.num_classes]
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
            assert np.abs(theirs).max() > 1e-4 or name.startswith("box")


def test_outputs_mean_the_same_size_with_and_without_yaw():
    outputs = jnp.array([[0.1, -0.2, 0.3, 1.5, 0.7, 2.0, 0.4, 0.3]])
    location = jnp.array([[1.0, 2.0, 0.5]])
    boxes = [decode_boxes_padded(location, outputs_of_union(outputs, yaw), yaw)[0] for yaw in (True, False)]
    np.testing.assert_allclose(boxes[1][3:6], (1.5, 0.7, 2.0), rtol=1e-6)
    np.testing.assert_allclose(boxes[0][5], 2.0, rtol=1e-6)
    np.testing.assert_allclose(boxes[0][3] + boxes[0][4], 1.5 + 0.7, rtol=1e-6)
    np.testing.assert_allclose(boxes[0][:3], boxes[1][:3])


def test_all_of_the_head_is_shared_and_of_the_size_of_the_union():
    model = nnx.eval_shape(lambda: TR3D(MODEL, HEADS, rngs=nnx.Rngs(0)))
    _, exclusive, shared, _ = split_model(model)
    assert "heads" not in exclusive and shared["heads"]["class_kernel"].shape == (4, 12)
    assert not any(is_exclusive((), leaf) for leaf in (model.heads.box_kernel, model.heads.class_bias))
    with pytest.raises(ValueError, match="give every head its columns"):
        TR3D(MODEL, head_configs(SPECS, TINY), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model() -> TR3D:
    return random_detector(MODEL)


def of_classes(found: Detections, names: list[str], wanted: tuple[str, ...]) -> list[tuple]:
    rows = [
        (plain_name(names[label]), round(float(score), 3), *np.round(box, 2).tolist())
        for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True)
        if names[label] in wanted
    ]
    return sorted(rows)


@pytest.mark.slow
def test_every_class_is_predicted_by_its_column(model: TR3D):
    predictor = Predictor(model, SPECS, score_threshold=0.1, conditioning="sunrgbd")
    assert [spec.name for spec in predictor.heads] == ["sunrgbd", "s3dis", UNION]
    (everything,) = predictor.predict([SMALL], UNION)
    union = predictor.spec(UNION)
    assert len(np.unique(everything.labels)) > 6
    (own,) = predictor.predict([SMALL], "sunrgbd")
    assert len(own) and of_classes(own, [*SUNRGBD.classes], SUNRGBD.classes) == of_classes(
        everything, [*union.classes], SUNRGBD.classes
    )
    with pytest.raises(InputError, match="predicts as sunrgbd, s3dis, union, not as 'scannet'"):
        predictor.predict([SMALL], "scannet")

    # "own" is the mean where no dataset is meant; nothing is folded here.
    whole = Predictor(model, SPECS, score_threshold=0.1, folded=False)
    mean = Predictor(model, SPECS, score_threshold=0.1, conditioning="mean")
    found, expected = (p.predict([SMALL], UNION)[0] for p in (whole, mean))
    assert found.labels.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=2e-5)


def test_own_names_of_classes_move_no_column(model: TR3D):
    specs = renamed_specs(SPECS, {"chair": "a seat"})
    (before, after) = (Predictor(model, given).spec(UNION).classes for given in (SPECS, specs))
    assert [name for name in after if name not in before] == ["a seat"]
    assert after.index("a seat") == before.index("chair")


def test_the_union_is_no_choice_of_auto():
    placed = place_cloud("small", PointCloud(SMALL.points, SMALL.colors), np.eye(4), "0-1")
    spec, remarks = choose_head(placed, Frame(), (S3DIS, union_spec((S3DIS,), union_columns((S3DIS,)))))
    assert spec is S3DIS and "--dataset=union" in remarks[0]


def test_a_folder_is_evaluated_by_the_head_of_all_classes(tmp_path: Path):
    sources = tuple(SourceConfig(spec.name, root="data") for spec in SPECS)
    config = ExperimentConfig(sources, MODEL)
    (tmp_path / "boxes.json").write_text(json.dumps({"version": 1, "up": "z", "unit": "m", "scans": []}))
    chosen = chosen_sources(config, EvalRequest(dataset=UNION, data=str(tmp_path)))
    assert chosen[0].spec.classes == union_classes(SPECS) and chosen[0].spec.has_yaw and [*chosen] == [0]
    with pytest.raises(InputError, match="no scans of its own: name a folder"):
        chosen_sources(config, EvalRequest(dataset=UNION))
    with pytest.raises(InputError, match="trained on sunrgbd, s3dis, not on 'union'"):
        chosen_sources(ExperimentConfig(sources, TINY), EvalRequest(dataset=UNION, data=str(tmp_path)))
    with pytest.raises(InputError, match=r"datasets is .*'union'.*; expected other names"):
        ExperimentConfig((SourceConfig(UNION, root="data", classes=("chair",)),), MODEL)


def test_only_separate_heads_are_converted(model: TR3D):
    with pytest.raises(InputError, match="only detectors with separate heads are converted"):
        tr3d_slots(model)


def test_a_warm_start_finds_columns_by_name(tmp_path: Path):
    stored, model = (warm.SCANNET, warm.S3DIS), dataclasses.replace(warm.TINY, label_space="union")
    lab = SourceConfig("lab", root="data", classes=("robot", "Chair"))
    there = union_classes([source.spec for source in stored])
    here = union_classes([lab.spec])
    saved = warm.save(tmp_path / "run", 1, stored, model)[""]["heads.class_kernel"]
    before, after, report = warm.start(tmp_path / "run", (lab,), model)
    assert ("", "heads.class_kernel") in warm.pairs(report.loaded)
    kernel = after[""]["heads.class_kernel"]
    np.testing.assert_array_equal(kernel[:, here.index("Chair")], saved[:, there.index("chair")])
    fresh = before[""]["heads.class_kernel"]
    np.testing.assert_array_equal(kernel[:, here.index("robot")], fresh[:, here.index("robot")])


def test_a_detector_without_exclusive_parameters_is_checked_for_what_is_finite():
    model = nnx.eval_shape(lambda: TR3D(dataclasses.replace(MODEL, selection=None), HEADS, rngs=nnx.Rngs(0)))
    exclusive = split_model(model)[1]
    assert not jax.tree.leaves(exclusive)
    shared = {"kernel": jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])}
    found = _nonfinite(shared, Packing.of(exclusive, lambda _: "any", 1).pack(exclusive), {}, jnp.array([1.0, jnp.inf]))
    assert found.tolist() == [[False, False, False], [True, False, True]]


def test_the_model_card_says_that_there_is_one_head():
    card = model_card(CardFacts(), SPECS, "mine", {}, "union")
    assert "with one head for the classes of all datasets (sunrgbd, s3dis)" in card
    assert "with 2 heads (sunrgbd, s3dis)" in model_card(CardFacts(), SPECS, "mine", {})

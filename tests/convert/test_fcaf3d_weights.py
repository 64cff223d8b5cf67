"""FCAF3D from its published names and back: golden weights bit for bit, old names, one backbone for two detectors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.checkpoint.store import read_detector, restore_checkpoint
from h2a2_jax.convert.conversion import convert_command, convert_file
from h2a2_jax.convert.torch_file import TorchFile, read_torch_file
from h2a2_jax.inference.predictor import Predictor
from h2a2_jax.models import DetectorConfig, HeadConfig
from h2a2_jax.models.fcaf3d import FCAF3D
from h2a2_jax.models.fcaf3d_weights import fcaf3d_slots, published_fcaf3d
from h2a2_jax.models.weight_slots import export_slots, load_slots, of_one_dataset
from h2a2_jax.scans.scan import Scan
from tests.boxes.golden import FIXTURES
from tests.convert.test_command import STATE as TR3D_STATE
from tests.convert.test_command import converted
from tests.parity_model import MATCHED_SHARE, matched_share

CONFIG = DetectorConfig(kind="fcaf3d", depth=10, stem_channels=4, stage_channels=(4, 6, 5, 6), neck_channels=7)
SUNRGBD = HeadConfig("sunrgbd", 10, 8)


def shapes(*heads: HeadConfig, config: DetectorConfig = CONFIG) -> FCAF3D:
    return nnx.eval_shape(lambda: FCAF3D(config, heads, rngs=nnx.Rngs(0)))


def drawn(model: FCAF3D) -> FCAF3D:
    """Random numbers in place of shapes, no two alike."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype), state))


STATE = export_slots(fcaf3d_slots(drawn(shapes(SUNRGBD))))


def file(state: dict[str, np.ndarray]) -> TorchFile:
    return TorchFile(state, (), (), ())


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz") as stored:
        return {name: stored[name] for name in stored.files}


@pytest.mark.parametrize(("kind", "threshold"), [("scannet_seed9", 571), ("sunrgbd_seed11", 136)])
def test_the_golden_weights_come_back_bit_for_bit(tmp_path, capsys, kind, threshold):
    state = golden(f"weights_fcaf3d_{kind}")
    given = state
    if kind.startswith("sunrgbd"):  # as an older file of a wrapped detector
        given = {f"module.{name.removeprefix('bbox_')}": value for name, value in state.items()}
    status, out, _ = converted(tmp_path, capsys, given, "--voxel_size=0.02", f"--prune_threshold={threshold}")
    counters = sum(name.endswith("num_batches_tracked") for name in state)
    assert status == 0 and "left over: 0\n" in out and "missing: 0\n" in out
    assert f"used: {len(state) - counters}\n" in out and f"{threshold} locations a level" in out
    assert "FCAF3D of depth 18, stem 8, stages 8-12-16-24, neck 16" in out
    assert ("The file has an old name for its head" in out) == (given is not state)
    model, config = restore_checkpoint(tmp_path / "run")
    assert config.model == model.config and config.model == DetectorConfig(
        kind="fcaf3d", depth=18, stem_channels=8, stage_channels=(8, 12, 16, 24), neck_channels=16, voxel_size=0.02,
        prune_threshold=threshold,
    )  # fmt: skip
    assert config.dataset_names == (kind.partition("_")[0],) and config.datasets[0].recipe == "fcaf3d"

    assert convert_command([str(tmp_path / "run"), "--reverse", f"--output={tmp_path / 'back.pth'}"]) == 0
    back = read_torch_file(tmp_path / "back.pth").tensors
    assert set(back) == set(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype and back[name].shape == value.shape, name
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.slow
def test_converted_golden_weights_find_the_golden_boxes(tmp_path, capsys):
    flags = ("--voxel_size=0.02", "--prune_threshold=136")
    assert converted(tmp_path, capsys, golden("weights_fcaf3d_sunrgbd_seed11"), *flags)[0] == 0
    batch = golden("fcaf3d_batch2_sunrgbd_seed11")
    cloud = batch["points"][: batch["num_points"][0]].astype(np.float32)  # one scan is enough
    scan = Scan("0", cloud[:, :3], cloud[:, 3:], np.zeros((0, 7), np.float32), np.zeros(0, np.int32))
    detector = read_detector(tmp_path / "run")
    (found,) = Predictor(detector, detector.specs).predict([scan], "sunrgbd")
    mine = found.boxes, found.scores, found.labels
    original = tuple(batch[f"pred1000.scene0.{key}"] for key in ("boxes", "scores", "labels"))
    assert len(found.scores) == len(original[1])
    assert min(matched_share(*mine, *original), matched_share(*original, *mine)) >= MATCHED_SHARE


def test_only_the_beginning_of_a_name_is_renamed():
    names = ("head.conv_center.kernel", "bbox_head.conv_cls.bias", "backbone.head.kernel")
    found = published_fcaf3d(dict.fromkeys(names, np.zeros(1)))
    assert list(found or {}) == ["bbox_head.conv_center.kernel", "bbox_head.conv_cls.bias", "backbone.head.kernel"]
    assert published_fcaf3d(dict.fromkeys(names[1:], np.zeros(1))) is None


def test_parameters_have_the_published_shapes_and_the_places_of_their_dataset():
    heads = [HeadConfig("scannet", 18, 6), SUNRGBD]
    config = replace(CONFIG, adapters=True, exclusive_stages=(4,), neck="exclusive", norm_affine="exclusive")
    model = drawn(shapes(*heads, config=config))
    found = export_slots(fcaf3d_slots(of_one_dataset(model, 1), 1))
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in STATE.items()}
    for name, expected in {
        "backbone.norm1.bias": model.backbone.stem.norm.bias[...][None],
        "backbone.layer4.0.conv1.kernel": model.backbone.stages[3][0].first.conv.kernel[1],
        "bbox_head.up_block_3.0.kernel": model.neck.ups[2].generate.conv.kernel[1],
        "bbox_head.up_block_1.4.bn.weight": model.neck.ups[0].conv.norm.scale[1],
        "bbox_head.out_block_0.1.bn.running_var": model.neck.outs[0].norm.var[1],
        "bbox_head.conv_center.kernel": model.heads.center_kernel[1],
        "bbox_head.conv_reg.kernel": model.heads.box_kernel[1],
        "bbox_head.conv_cls.kernel": model.heads.class_kernel[1, :, :10],
        "bbox_head.conv_cls.bias": model.heads.class_bias[1:, :10],
        "bbox_head.scales.3.scale": model.heads.scales[1, 3],
    }.items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    assert export_slots(fcaf3d_slots(model, 0))["bbox_head.conv_reg.kernel"].shape == (7, 6)

    other = drawn(shapes(*heads, config=config))
    kept = np.array(other.heads.class_kernel[...])
    load_slots(fcaf3d_slots(other, 1), {"bbox_head.conv_cls.kernel": np.zeros((7, 10), np.float32)})
    np.testing.assert_array_equal(other.heads.class_kernel[0], kept[0])
    np.testing.assert_array_equal(other.heads.class_kernel[1, :, 10:], kept[1, :, 10:])
    assert not other.heads.class_kernel[1, :, :10].any()
    with pytest.raises(ValueError, match=r"bbox_head.scales.0.scale is \(1,\) in the checkpoint, \(\) in this"):
        load_slots(fcaf3d_slots(other), {"bbox_head.scales.0.scale": np.ones(1, np.float32)})


def test_the_backbone_of_tr3d_becomes_one_of_fcaf3d_where_that_is_asked_for():
    conversion = convert_file(file(TR3D_STATE), "s3dis", kind="fcaf3d")
    used = {entry.name for entry in conversion.of("used")}
    assert used == {n for n in TR3D_STATE if n.startswith("backbone.layer") or n == "backbone.conv1.kernel"}
    assert {entry.name for entry in conversion.of("left over")} == set(TR3D_STATE) - used
    heads = [entry for entry in conversion.of("left over") if entry.name.startswith(("bbox_head", "neck"))]
    assert heads and {entry.why for entry in heads} == {"of TR3D, not of its backbone"}
    assert {entry.name.split(".")[0] for entry in conversion.of("missing")} == {"backbone", "bbox_head"}
    assert conversion.config.model == replace(CONFIG, neck_channels=128)
    assert conversion.config.datasets[0].recipe == "fcaf3d"


def test_what_a_file_lacks_is_listed():
    scales = [name for name in STATE if "scales" in name]
    conversion = convert_file(file({name: value for name, value in STATE.items() if name not in scales}))
    assert [entry.name for entry in conversion.of("missing")] == scales and len(scales) == 4
    assert {entry.form for entry in conversion.of("missing")} == {"scalar"}
    assert len(conversion.of("used")) == len(STATE) - 4

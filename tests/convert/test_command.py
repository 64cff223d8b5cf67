from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.checkpoint.store import restore_checkpoint
from h2a2_jax.convert.conversion import Entry, convert_command, convert_file, table
from h2a2_jax.convert.torch_file import read_torch_file, write_torch_file
from h2a2_jax.errors import InputError
from h2a2_jax.models import TR3D, DetectorConfig, HeadConfig
from h2a2_jax.models.architecture import STAGE_BLOCKS
from h2a2_jax.models.tr3d_weights import tr3d_of_weights, tr3d_slots
from h2a2_jax.models.weight_slots import export_slots, of_one_dataset
from tests.boxes.golden import FIXTURES

CONFIG = DetectorConfig(depth=10, stem_channels=4, stage_channels=(4, 6, 5, 6), neck_channels=7)


def weights(num_classes=10, num_outputs=8, seed=0):
    """Weights of a small TR3D, under its names; no two alike."""
    heads = [HeadConfig("any", num_classes, num_outputs)]
    slots = tr3d_slots(nnx.eval_shape(lambda: TR3D(CONFIG, heads, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.5, 1, slot.shape).astype(np.float32) for name, slot in slots.items()}


STATE = weights()


def converted(tmp_path, capsys, state, *flags, meta=None):
    """Exit status, what was printed, and what went to standard error."""
    write_torch_file(tmp_path / "tr3d.pth", state, meta)
    status = convert_command([str(tmp_path / "tr3d.pth"), f"--output={tmp_path / 'run'}", *flags])
    out, err = capsys.readouterr()
    assert err.count("\n") == (status == 2), err
    return status, out, err


def restored(tmp_path, index=0):
    model, config = restore_checkpoint(tmp_path / "run")
    return export_slots(tr3d_slots(model, index)), config


def test_the_voxel_size_can_be_given(tmp_path, capsys):
    assert "--voxel_size is 0; expected is a length" in converted(tmp_path, capsys, STATE, "--voxel_size=0")[2]
    status, out, _ = converted(tmp_path, capsys, STATE, "--voxel_size=0.015")
    assert status == 0 and "voxels of 0.015 m" in out
    model, config = restore_checkpoint(tmp_path / "run")
    assert config.model.voxel_size == model.config.voxel_size == 0.015


def test_there_and_back_keeps_every_bit(tmp_path, capsys):
    counters = {"backbone.norm1.bn.num_batches_tracked": np.array(7, np.int64)}
    wrapped = {f"module.{name}": value for name, value in (STATE | counters).items()}
    status, out, _ = converted(tmp_path, capsys, wrapped, meta={"dataset_meta": {"classes": ["sofa"]}})
    assert status == 0
    assert f"used: {len(STATE)}\n" in out and "left over: 0\n" in out and "missing: 0\n" in out
    assert all(name in out for name in STATE) and "calls its classes sofa" in out
    found, config = restored(tmp_path)
    assert config.model == CONFIG and config.dataset_names == ("sunrgbd",)
    assert (tmp_path / "run" / "config.json").is_file()
    for name, value in STATE.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)

    assert convert_command([str(tmp_path / "run"), "--reverse", f"--output={tmp_path / 'back.pth'}"]) == 0
    assert capsys.readouterr().out.startswith("written: ")
    back = read_torch_file(tmp_path / "back.pth")
    assert back.classes == config.specs[0].classes
    counted = {name for name in back.tensors if name.endswith("num_batches_tracked")}
    assert set(back.tensors) - counted == set(STATE) and len(counted) == sum("running_var" in name for name in STATE)
    for name, value in STATE.items():
        np.testing.assert_array_equal(back.tensors[name], value, err_msg=name)
    for arguments, match in (
        ([f"--output={tmp_path / 'back.pth'}"], "exists"),
        ([f"--output={tmp_path / 'other.pth'}", "--dataset=s3dis"], "not on s3dis"),
        ([f"--output={tmp_path / 'other.pth'}", "--step=3"], "no checkpoint of step 3"),
        ([f"--output={tmp_path / 'other.pth'}", "--voxel_size=0.02"], "not for --reverse"),
        ([f"--output={tmp_path / 'other.pth'}", "--kind=tr3d"], "not for --reverse"),
    ):
        assert convert_command([str(tmp_path / "run"), "--reverse", *arguments]) == 2
        assert match in capsys.readouterr().err
    # The folder is a run now, and is not written over.
    assert "is the folder of a run already" in converted(tmp_path, capsys, STATE)[2]


def test_prompts_adapters_and_exclusive_kernels_of_a_dataset_go_into_kernels_and_norms():
    config = replace(CONFIG, norm_affine="prompt", prompt_dim=3, adapters=True, exclusive_stages=(4,))
    heads = [HeadConfig("first", 10, 8), HeadConfig("second", 10, 8)]
    graph, state = nnx.split(nnx.eval_shape(lambda: TR3D(config, heads, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    model = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype), state))
    found = export_slots(tr3d_slots(of_one_dataset(model, 1), 1))
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in STATE.items()}
    block, last = model.backbone.stages[0][0].second, model.backbone.stages[3][0].first
    expected = np.array(block.conv.kernel[...])
    expected[13] += block.conv.adapter[1]
    np.testing.assert_array_equal(found["backbone.layer1.0.conv2.kernel"], expected)
    np.testing.assert_array_equal(found["backbone.layer4.0.conv1.kernel"], last.conv.kernel[1])
    factor, shift = block.norm.factors(model.embedding[1])
    np.testing.assert_allclose(found["backbone.layer1.0.norm2.bn.weight"], block.norm.scale[...] * factor, rtol=1e-6)
    expected = block.norm.bias[...] * factor + shift
    np.testing.assert_allclose(found["backbone.layer1.0.norm2.bn.bias"], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["scannet", "sunrgbd"])
def test_the_reference_weights_keep_every_bit(tmp_path, capsys, kind):
    with np.load(FIXTURES / f"weights_{kind}_seed7.npz") as stored:
        state = {name: stored[name] for name in stored.files}
    assert converted(tmp_path, capsys, state)[0] == 0
    found, config = restored(tmp_path)
    assert config.dataset_names == (kind,) and config.model.depth == 34
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_unprintable_letters_of_names_are_replaced():
    # A lone surrogate cannot be printed, and an escape sequence would clear the terminal.
    text = table([Entry("left over", "a\ud800b\x1b[2Jc\nd", "3 float32")])
    assert "a?b?[2Jc?d  3 float32" in text and text.encode()


def test_half_a_model_is_refused_unless_partial(tmp_path, capsys):
    state = {name: value for name, value in STATE.items() if not name.startswith("bbox_head.conv_reg")}
    state["neck.out_block_0.1.bn.weight"] = np.ones(9, np.float32)
    state["extra.weight"] = np.ones(3, np.float32)
    status, out, err = converted(tmp_path, capsys, state, "--dataset=sunrgbd")
    assert status == 2 and "--partial" in err and "neck.out_block_0.1.bn.weight" in err
    assert not (tmp_path / "run").exists()
    status, out, _ = converted(tmp_path, capsys, state, "--dataset=sunrgbd", "--partial")
    assert status == 0
    assert f"used: {len(state) - 2}\n" in out and "left over: 2\n" in out and "missing: 3\n" in out
    assert "7 expected" in out and "3 parameters are initialised" in out
    found, _ = restored(tmp_path)
    assert np.all(np.isfinite(found["bbox_head.conv_reg.kernel"])) and np.any(found["bbox_head.conv_reg.kernel"])
    np.testing.assert_array_equal(found["bbox_head.conv_cls.kernel"], STATE["bbox_head.conv_cls.kernel"])


def test_the_backbone_of_fcaf3d_is_converted(tmp_path, capsys):
    # Its stem has an instance norm, its head names of ours for other things.
    state = {n: v for n, v in STATE.items() if n.startswith("backbone.") and not n.startswith("backbone.norm1")}
    state |= {"backbone.norm1.weight": np.ones((1, 4), np.float32), "backbone.norm1.bias": np.ones((1, 4), np.float32)}
    state |= {n: v for n, v in STATE.items() if n.startswith("bbox_head.")}
    state["bbox_head.conv_center.kernel"] = np.ones((7, 1), np.float32)
    status, _, err = converted(tmp_path, capsys, state, "--kind=tr3d", "--partial")
    assert status == 2 and "--dataset" in err
    conversion = convert_file(read_torch_file(tmp_path / "tr3d.pth"), "s3dis", kind="tr3d")
    used = {entry.name for entry in conversion.of("used")}
    assert used == {n for n in state if n.startswith("backbone.layer") or n == "backbone.conv1.kernel"}
    assert {entry.name for entry in conversion.of("left over")} == set(state) - used
    assert all(entry.why for entry in conversion.of("left over") if entry.name.startswith("bbox_head"))
    assert all(entry.name.startswith(("backbone.norm1", "neck", "bbox_head")) for entry in conversion.of("missing"))
    assert conversion.config.model == replace(CONFIG, neck_channels=128)
    assert conversion.config.dataset_names == ("s3dis",) and conversion.config.datasets[0].recipe == "tr3d"


def test_a_dataset_of_ones_own(tmp_path, capsys):
    state = weights(num_classes=2)
    assert "name the dataset" in converted(tmp_path, capsys, state)[2]
    assert "2 classes" in converted(tmp_path, capsys, state, "--dataset=office")[2]
    assert "1 are given" in converted(tmp_path, capsys, state, "--dataset=office", "--classes=lamp")[2]
    status, _, _ = converted(tmp_path, capsys, state, "--dataset=office", "--classes=lamp, plant")
    assert status == 0
    spec = restored(tmp_path)[1].specs[0]
    assert spec.name == "office" and spec.classes == ("lamp", "plant") and spec.has_yaw


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--dataset=scannet"], "another --dataset"),
        (["--dataset=sunrgbd", "--classes=a,b"], "built in"),
        (["--classes=a,b"], "--dataset"),
        (["--step=3"], "--reverse"),
        (["--reverse", "--partial"], "--reverse"),
        (["--seed=-1"], "0 or more"),
        (["--prune_threshold=0"], "--prune_threshold is 0; expected 1 or more"),
        (["--prune_threshold=9"], "--prune_threshold is for FCAF3D"),
        (["--kind=votenet"], "invalid choice"),
        (["--nonsense"], "unrecognized"),
        (["--seed=x"], "invalid int"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_refused(tmp_path, capsys, flags, match):
    status, _, err = converted(tmp_path, capsys, STATE, *flags)
    assert status == 2 and match in err


def test_output_is_required_and_must_be_a_folder(tmp_path, capsys):
    assert convert_command(["tr3d.pth"]) == 2
    assert "--output" in capsys.readouterr().err
    (tmp_path / "run").write_text("")
    assert "is a file" in converted(tmp_path, capsys, STATE)[2]


def test_weights_that_are_not_finite_or_of_another_network_are_refused(tmp_path, capsys):
    damaged = STATE | {"backbone.conv1.kernel": np.full_like(STATE["backbone.conv1.kernel"], np.nan)}
    assert "NaN" in converted(tmp_path, capsys, damaged)[2]
    assert "no weights of TR3D" in converted(tmp_path, capsys, {"conv.weight": np.ones(3, np.float32)})[2]
    bottleneck = STATE | {"backbone.layer1.0.conv3.kernel": np.ones((4, 16), np.float32)}
    assert "two convolutions" in converted(tmp_path, capsys, bottleneck)[2]
    deeper = STATE | {"backbone.layer1.1.conv1.kernel": np.ones((27, 4, 4), np.float32)}
    assert "2, 1, 1, 1 blocks" in converted(tmp_path, capsys, deeper)[2]


@pytest.mark.parametrize("depth", list(STAGE_BLOCKS))
def test_depth_and_widths_are_read_off_the_weights(depth):
    blocks = STAGE_BLOCKS[depth]
    state = {"backbone.conv1.kernel": np.zeros((27, 3, 4)), "neck.out_block_0.0.kernel": np.zeros((27, 7, 7))}
    for stage, count in enumerate(blocks):
        width = CONFIG.stage_channels[stage]
        state |= {f"backbone.layer{stage + 1}.{b}.conv1.kernel": np.zeros((27, width, width)) for b in range(count)}
    config = tr3d_of_weights(state)
    assert (config.depth, config.stem_channels) == (depth, 4)
    assert (config.stage_channels, config.neck_channels) == (CONFIG.stage_channels, 7)
    with pytest.raises(InputError, match="is missing"):
        tr3d_of_weights({name: value for name, value in state.items() if "layer3" not in name})

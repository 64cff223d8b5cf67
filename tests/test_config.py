"""Configs: strict reading, round trips, overrides from the command line, the config files."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from h2a2_jax.balancers import GRAMIAN_METHODS
from h2a2_jax.config import (
    EvalConfig,
    ExperimentConfig,
    ParameterGroup,
    SourceConfig,
    config_dict,
    experiment_config,
    from_json,
    to_json,
)
from h2a2_jax.errors import InputError
from h2a2_jax.layers.kernel_selection import SelectionConfig
from h2a2_jax.models import DetectorConfig
from h2a2_jax.scans.specs import ALL_SPECS
from h2a2_jax.sweeps.rivals import balanced, shared_otherwise
from h2a2_jax.sweeps.sweep_plan import naive_joint

CONFIGS = Path(__file__).parents[1] / "configs"
SOURCES = (SourceConfig("sunrgbd", root="b"), SourceConfig("scannet", kind="synthetic", repeats=3))
JOINT = ExperimentConfig(SOURCES, DetectorConfig(selection=SelectionConfig(tau=0.3)))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(path: str, value: Any) -> dict[str, Any]:
    """JOINT as plain values with one of them changed."""
    values = config_dict(JOINT).to_dict()
    *groups, key = path.split(".")
    group = values
    for name in groups:
        group = group[name]
    group[key] = value
    return values


@pytest.mark.parametrize("config", [JOINT, ExperimentConfig(SOURCES[::-1])])
def test_round_trips_keep_everything_and_the_order(config: ExperimentConfig):
    assert experiment_config(config_dict(config)) == config
    assert experiment_config(config_dict(config).to_dict()) == config
    assert from_json(to_json(config)) == config
    assert list(config_dict(config).datasets) == list(config.dataset_names)


def test_json_has_a_version_and_refuses_another():
    values = json.loads(to_json(JOINT))
    assert values["version"] == 2 and [entry["name"] for entry in values["datasets"]] == ["sunrgbd", "scannet"]
    with pytest.raises(InputError, match="version 3"):
        from_json(json.dumps({**values, "version": 3}))
    with pytest.raises(InputError, match="no JSON"):
        from_json("{")


def test_keys_left_out_take_their_defaults():
    config = experiment_config({"datasets": {"s3dis": {"root": "x"}}, "optim": {"lr": 1}})
    assert config.datasets == (SourceConfig("s3dis", root="x"),)
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.train.batch_size == 16 and config.model.selection is None


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("optim.lrr", 1.0, "unknown config key 'optim.lrr'; did you mean 'lr'? (keys there: lr, weight_decay,"),
        ("traim", {}, "unknown config key 'traim'; did you mean 'train'? (keys there: datasets, model,"),
        ("datasets.scannet.rot", "a", "unknown config key 'datasets.scannet.rot'; did you mean 'root'?"),
        ("model.selection.xyz", 1, "unknown config key 'model.selection.xyz'; (keys there: kernels, convolutions,"),
        ("train.batch_size", 2.5, "train.batch_size is 2.5 (float); expected int."),
        ("train.batch_size", True, "train.batch_size is True (bool); expected int."),
        ("optim.lr", "fast", "optim.lr is 'fast' (str); expected float."),
        ("optim.lr", None, "optim.lr is None (NoneType); expected float."),
        ("optim.decay_epochs", 8, "optim.decay_epochs is 8 (int); expected a list of any number of int."),
        ("model.stage_channels", [1, 2], "model.stage_channels has 2 entries ([1, 2]); expected a list of 4 int."),
        ("eval.iou_thresholds", [0.5, "a"], "eval.iou_thresholds.1 is 'a' (str); expected float."),
        (
            "harmonize.method",
            "nhg",
            "harmonize.method is 'nhg'; expected one of 'ngh', 'mean', 'pcgrad', 'gradnorm', 'mgda'",
        ),
        ("harmonize.cagrad_c", -0.1, "harmonize.cagrad_c is -0.1; expected a finite number from 0."),
        ("harmonize.dwa_window", 0, "harmonize.dwa_window is 0; expected 1 or more."),
        ("harmonize.weights", [1.0, -1.0], "harmonize.weights is (1.0, -1.0); expected finite numbers from 0, not all"),
        ("harmonize.method", "fixed", "harmonize.weights is (); expected 2 numbers, one for each of sunrgbd, scannet."),
        ("model.selection.consistency", "x", "expected one of 'centered_cosine', 'half_cosine', 'relu_cosine'."),
        ("optim", 3, "optim is 3 (int); expected a group with the keys lr,"),
        ("datasets.scannet", 3, "datasets.scannet is 3 (int); expected a group with the keys of a dataset."),
        ("train.batch_size", 0, "train.batch_size is 0; expected 1 or more."),
        ("optim.lr", -1.0, "optim.lr is -1.0; expected a finite number above 0."),
        ("optim.decay_epochs", [8, 8], "optim.decay_epochs is (8, 8); expected rising epochs from 1."),
        ("model.depth", 50, "model.depth is 50; the residual network has depth 10, 18 or 34."),
        ("model.kind", "votenet", "model.kind is 'votenet'; expected one of 'tr3d', 'fcaf3d'."),
        ("model.prune_threshold", 0, "model.prune_threshold is 0; expected 1 or more."),
        ("model.assign_threshold", 0, "model.assign_threshold is 0; expected 1 or more."),
        ("model.center_threshold", 0, "model.center_threshold is 0; expected 1 or more."),
        (
            "datasets.scannet.recipe",
            "votenet",
            "datasets.scannet.recipe is 'votenet'; expected one of 'tr3d', 'fcaf3d'.",
        ),
        ("model.selection.tau", 1.5, "model.selection.tau is 1.5; expected a number from 0 to 1."),
        ("model.stage_channels", [4, 4, 0, 4], "expected widths of 1 or more."),
        ("datasets", {}, "datasets is (); expected at least one, such as scannet, sunrgbd, s3dis."),
        ("datasets", {"kitti": {"root": "a"}}, "Unknown dataset 'kitti'"),
        ("datasets.scannet.kind", "mmdet3d", "datasets.scannet.root is ''; expected the folder of the scans."),
        ("datasets.scannet.repeats", 0, "datasets.scannet.repeats is 0; expected 1 or more, or None."),
        ("datasets.scannet.batch_size", 0, "datasets.scannet.batch_size is 0; expected 1 or more, or None"),
        ("datasets.scannet.weight", 0.0, "datasets.scannet.weight is 0.0; expected a probability above 0 up to 1."),
        ("datasets.scannet.share", 1.5, "datasets.scannet.share is 1.5; expected a number above 0 up to 1, or None."),
        ("datasets.scannet.share", 0, "datasets.scannet.share is 0.0; expected a number above 0 up to 1, or None."),
        ("datasets", [{"root": "a"}], "config key 'datasets.0.name' is missing; expected str."),
        ("datasets", [{"name": "s3dis", "root": "a"}] * 2, "expected every dataset once, not s3dis twice."),
        ("datasets", [{"name": name, "root": "a", "classes": ["b"]} for name in ("Own", "own")], "not Own twice."),
        ("datasets", [{"name": "own", "root": "a", "classes": ["b\n"]}], "a class called"),
        ("datasets", [{"name": "a/b", "root": "a", "classes": ["b"]}], "The name of the dataset 'a/b' has a slash"),
        ("eval.iou_thresholds", [], "eval.iou_thresholds is (); expected at least one number"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(path: str, value: Any, sentence: str):
    with pytest.raises(InputError) as error:
        experiment_config(changed(path, value))
    assert sentence in str(error.value)


def test_shared_kernels_are_not_evaluated_where_none_are_trained():
    model = DetectorConfig(selection=SelectionConfig(kernels="exclusive"))
    with pytest.raises(
        InputError, match=r"eval.kernels is 'shared'; expected 'selected' where model.selection.kernels"
    ):
        ExperimentConfig(SOURCES, model, eval=EvalConfig(kernels="shared"))


def test_selection_may_be_absent():
    assert experiment_config(changed("model.selection", None)).model.selection is None


def test_missing_datasets_are_named():
    with pytest.raises(InputError, match="'datasets' is missing"):
        experiment_config({})


def parsed(*arguments: str) -> ConfigDict:
    """What absl makes of a command line."""
    values = flags.FlagValues()
    argv = ["run.py", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections, on Python 3.11
def test_flags_override_values():
    config = experiment_config(
        parsed(
            f"--config={CONFIGS / 'joint.py'}:two",
            "--config.datasets.scannet.root=/elsewhere",
            "--config.datasets.sunrgbd.repeats=4",
            "--config.datasets.sunrgbd.train_infos=('a.pkl',)",
            "--config.optim.lr=1",
            "--config.optim.decay_epochs=(2,)",
            "--config.model.selection.tau=0.5",
            "--config.optim.groups=({'parameters': ('selection', '*.prior'), 'lr': 30},)",
            "--config.train.permute_boxes",
        )
    )
    scannet, sunrgbd = config.datasets
    assert (scannet.name, scannet.root, scannet.augment) == ("scannet", "/elsewhere", False)
    assert (sunrgbd.repeats, sunrgbd.train_infos) == (4, ("a.pkl",))
    assert (config.optim.lr, config.optim.decay_epochs) == (1.0, (2,))
    assert config.model.selection == SelectionConfig(tau=0.5) and config.train.permute_boxes
    assert config.optim.groups == (ParameterGroup(("selection", "*.prior"), 30.0),)


def test_a_dataset_can_be_taken_out():
    values = load("joint").get_config("demo")
    del values.datasets["sunrgbd"]
    assert experiment_config(values).dataset_names == ("scannet", "s3dis")


def test_joint_is_the_papers_setting():
    module = load("joint")
    config = experiment_config(module.get_config())
    assert config == module.paper() == experiment_config(module.get_config("paper"))
    assert config.dataset_names == ("scannet", "sunrgbd", "s3dis")
    assert config.model == DetectorConfig(selection=SelectionConfig()) and config.harmonize.method == "ngh"
    assert (config.train.batch_size, config.train.epochs, config.optim.lr) == (16, 12, 1e-3)
    assert all(source.augment and source.sample and source.repeats is None for source in config.datasets)


def test_joint_variants():
    module = load("joint")
    demo = experiment_config(module.get_config("demo"))
    assert {source.kind for source in demo.datasets} == {"synthetic"} and demo.model.selection is not None
    rooms = experiment_config(module.get_config("rooms"))
    assert {(source.kind, source.scale) for source in rooms.datasets} == {("synthetic", "varied")}
    assert rooms.train.steps * rooms.train.batch_size < min(source.train_size for source in rooms.datasets)
    without = experiment_config(module.get_config("demo,no_sfks"))
    assert without == dataclasses.replace(demo, model=dataclasses.replace(demo.model, selection=None))
    with pytest.raises(InputError, match="variants are paper, synthetic, demo, tiny, rooms, two"):
        module.get_config("demmo")


def test_joint_variants_with_a_gap():
    module = load("joint")
    demo = experiment_config(module.get_config("demo"))
    assert {source.gap for source in demo.datasets} == {1.0} and experiment_config(
        module.get_config("demo,gap1")
    ) == demo
    near = experiment_config(module.get_config("tiny,no_sfks,gap0.5"))
    assert {source.gap for source in near.datasets} == {0.5} and near.model.selection is None
    assert not any(spec.has_yaw for spec in experiment_config(module.get_config("demo,gap0")).specs)
    for variant in ("gap0", "two,gap2", "synthetic,gap2"):
        with pytest.raises(InputError, match="datasets that are not procedural: use gap with demo or tiny"):
            module.get_config(variant)
    with pytest.raises(InputError, match=r"datasets.scannet.gap is 2.5; expected a number from 0 to 2"):
        experiment_config(module.get_config("demo,gap2.5"))
    with pytest.raises(InputError, match="no variant 'gapless'"):
        module.get_config("demo,gapless")


def test_joint_with_six_datasets():
    module = load("joint")
    six = experiment_config(module.get_config("six"))
    assert six.dataset_names == ("scannet", "s3dis", "multiscan", "3rscan", "scannetpp", "arkitscenes")
    assert [source.share for source in six.datasets] == [1.0, 0.33, 0.25, 0.15, 0.33, 0.08]
    assert dataclasses.replace(six, datasets=module.paper().datasets) == module.paper()
    tiny = experiment_config(module.get_config("no_sfks,tiny,six"))
    assert tiny.dataset_names == six.dataset_names and all(source.is_procedural for source in tiny.datasets)
    assert tiny.model.selection is None and tiny.train == module.tiny().train
    full = experiment_config(module.get_config("six,synthetic"))
    assert [source.root for source in full.datasets[1:3]] == ["data/synthetic_s3dis", "data/synthetic"]
    for variant, sentence in (
        ("six,two", "The word six does not go with two"),
        ("demo,tiny", "names demo and tiny: choose one of paper, synthetic, demo, tiny, rooms, two"),
        ("six,demo,gap0", "The gap of the procedural multiscan is 0"),
    ):
        with pytest.raises(InputError, match=sentence):
            module.get_config(variant)


def test_a_rival_is_one_word():
    module = load("joint")
    naive = experiment_config(module.get_config("demo,no_sfks,mean"))
    assert naive == naive_joint(module.demo())
    for word in ("pdnorm", "adapters", "exclusive_stage4", "exclusive_all", "union"):
        assert experiment_config(module.get_config(f"demo,no_sfks,mean,{word}")) == shared_otherwise(naive, word)
    for word in (*GRAMIAN_METHODS, "gradnorm", "uncertainty", "dwa", "famo", "random"):
        assert experiment_config(module.get_config(f"no_sfks,{word},demo")) == balanced(naive, word)
    with pytest.raises(InputError, match="no variant 'fixed'"):
        module.get_config("demo,fixed")


@pytest.mark.parametrize(
    "words",
    [
        ("tiny", "demo"),
        ("mgda", "mean"),
        ("gap0", "gap2"),
        ("exclusive_stage4", "exclusive_all"),
        ("pdnorm", "exclusive_all"),
    ],
)
def test_of_two_words_for_one_thing_none_is_dropped(words: tuple[str, str]):
    names = {" and ".join(order) for order in (words, words[::-1])}
    given = words if words[0] == "tiny" else ("tiny", "no_sfks", *words)
    for order in (given, given[::-1]):
        with pytest.raises(InputError, match="|".join(f"names {name}" for name in names)):
            load("joint").get_config(",".join(order))
    assert experiment_config(load("joint").get_config("tiny,no_sfks,mgda,pdnorm,gap2")).datasets[0].gap == 2


def test_thresholds_in_any_order_are_the_same():
    assert EvalConfig((0.5, 0.25)) == EvalConfig((0.25, 0.5))
    assert dataclasses.replace(EvalConfig(), iou_thresholds=(0.7, 0.1, 0.5)).iou_thresholds == (0.1, 0.5, 0.7)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"label_space": "union"},
            'model.label_space is "union"; FCAF3D has a head for each dataset: choose "separate"',
        ),
        (
            {"exclusive_stages": (0, 4)},
            "model.exclusive_stages has 0, the stem, which FCAF3D shares; choose stages from",
        ),
        (
            {"selection": SelectionConfig(convolutions=("residual", "neck"))},
            'model.selection.convolutions has "neck"; FCAF3D selects kernels in its residual stages alone',
        ),
        ({"selection": SelectionConfig(convolutions=("stem",))}, 'model.selection.convolutions has "stem"; FCAF3D'),
    ],
    ids=str,
)
def test_what_fcaf3d_does_not_share_is_refused(changes: dict[str, Any], sentence: str):
    assert ExperimentConfig(SOURCES, DetectorConfig(**changes)).model.kind == "tr3d"
    with pytest.raises(InputError) as error:
        ExperimentConfig(SOURCES, DetectorConfig(kind="fcaf3d", **changes))
    assert sentence in str(error.value)


def test_joint_with_fcaf3d():
    module = load("joint")
    config = experiment_config(module.get_config("fcaf3d"))
    assert {source.recipe for source in config.datasets} == {"fcaf3d"}
    assert [spec.repeats for spec in config.specs] == [10, 3, 13]
    assert config.model == DetectorConfig(
        kind="fcaf3d", stage_channels=(64, 128, 256, 512), selection=SelectionConfig()
    )
    assert dataclasses.replace(config, datasets=module.paper().datasets, model=module.paper().model) == module.paper()
    for base in ("synthetic", "demo", "tiny", "two"):
        tr3d, model = getattr(module, base)(), experiment_config(module.get_config(f"{base},fcaf3d")).model
        assert model.kind == "fcaf3d" and (model.depth, model.neck_channels) == (
            tr3d.model.depth,
            tr3d.model.neck_channels,
        )
    demo = experiment_config(module.get_config("demo,fcaf3d"))
    assert demo.model == dataclasses.replace(
        module.demo().model, kind="fcaf3d", prune_threshold=8000, assign_threshold=9, center_threshold=6
    )
    assert all(source.sample for source in experiment_config(module.get_config("two,fcaf3d")).datasets)
    for words in ("six", "no_sfks,mean", "no_sfks,pdnorm", "no_sfks,adapters", "no_sfks,exclusive_all", "gap2,mgda"):
        plain, changed = (experiment_config(module.get_config(f"demo,{words}{w}")) for w in ("", ",fcaf3d"))
        assert changed.dataset_names == plain.dataset_names and changed.model.kind == "fcaf3d"
        assert changed.harmonize == plain.harmonize and changed.model.selection == plain.model.selection
        assert changed.model.exclusive_stages == plain.model.exclusive_stages
    with pytest.raises(InputError, match=r'model.label_space is "union"; FCAF3D has a head for each dataset'):
        module.get_config("demo,no_sfks,union,fcaf3d")


def test_single_with_fcaf3d():
    module = load("single")
    config = experiment_config(module.get_config("scannet,fcaf3d"))
    assert config == experiment_config(module.get_config("fcaf3d,scannet"))
    assert config.model == DetectorConfig(kind="fcaf3d", stage_channels=(64, 128, 256, 512))
    assert config.datasets == (SourceConfig("scannet", root="data/scannet", recipe="fcaf3d"),)
    assert from_json(to_json(config)) == config
    for variant in ("fcaf3d", "scannet,sunrgbd", "scannet,fcaf"):
        with pytest.raises(InputError, match=f"there is no variant '{variant}'; choose it as in"):
            module.get_config(variant)


def test_single_is_tr3d_on_one_dataset():
    module = load("single")
    config = experiment_config(module.get_config("s3dis"))
    assert config.dataset_names == ("s3dis",) and config.datasets[0].root == "data/s3dis"
    assert config.model == DetectorConfig() and config.harmonize.method == "mean"
    for spec in ALL_SPECS:
        assert experiment_config(module.get_config(spec.name)).specs == (spec,)
    for variant in (None, "kitti"):
        with pytest.raises(InputError, match="from scannet, sunrgbd, s3dis, arkitscenes, multiscan, 3rscan, scannetpp"):
            module.get_config(variant)


def test_a_config_of_version_1_keeps_the_readings_of_its_time():
    values = json.loads(to_json(JOINT))
    assert values["model"]["selection"]["prior"] == "agreement"
    for key in ("prior", "consistency", "agreement_decay"):
        del values["model"]["selection"][key]
    selection = from_json(json.dumps({**values, "version": 1})).model.selection
    assert selection == SelectionConfig(tau=0.3, prior="learned", consistency="half_cosine")
    assert from_json(json.dumps(values)).model.selection == JOINT.model.selection


def test_keys_of_version_0_1_0_have_their_present_names():
    old = {"optim": {"batches": 4, "average_decay": 0.99}, "train": {"max_rung": 2, "most_skipped": 3}}
    config = experiment_config({"datasets": {"scannet": {"root": "a"}}, **old})
    assert (config.optim.accumulate_steps, config.optim.ema_decay) == (4, 0.99)
    assert (config.train.max_bucket, config.train.max_skipped_steps) == (2, 3)


def test_a_key_under_its_old_and_its_present_name_is_refused():
    values = {"datasets": {"scannet": {"root": "a"}}, "train": {"max_rung": 2, "max_bucket": 3}}
    with pytest.raises(InputError, match=r"train.max_rung and train.max_bucket, two names of one value"):
        experiment_config(values)

"""Warm starts: arrays are loaded by name, and the report names every array that is not."""

import dataclasses
import functools
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.checkpoint.train_state import TrainState, head_configs, merge_model, split_model
from h2a2_jax.checkpoint.tree import Arrays, stored_params, stored_statistics
from h2a2_jax.checkpoint.warm_start import ArrayName, WarmStart, warm_start
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.errors import InputError
from h2a2_jax.models import DetectorConfig, DetectorNetwork, build_network
from h2a2_jax.scans.sources import SourceConfig
from tests.checkpoint.test_store import PLAIN, TINY

SCANNET, SUNRGBD, S3DIS = (SourceConfig(name, root="data") for name in ("scannet", "sunrgbd", "s3dis"))
MINE = SourceConfig("mine", root="data", classes=("box", "bag"))
Sources = tuple[SourceConfig, ...]


@functools.cache
def parts(sources: Sources, model: DetectorConfig) -> tuple:
    heads = head_configs([source.spec for source in sources], model)
    return split_model(nnx.eval_shape(lambda: build_network(model, heads, rngs=nnx.Rngs(0))))


def detector(seed: int, sources: Sources, model: DetectorConfig) -> DetectorNetwork:
    """A detector of random numbers; nothing is compiled."""
    rng = np.random.default_rng(seed)
    graph, *trees = parts(sources, model)
    return merge_model(graph, *jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape), leaf.dtype), trees))


def arrays(model: DetectorNetwork, sources: Sources) -> dict[str, Arrays]:
    """Arrays of a detector by dataset ("" for shared ones) and path."""
    specs = [source.spec for source in sources]
    _, exclusive, shared, stats = split_model(model)
    params, statistics = stored_params(shared, exclusive, specs), stored_statistics(stats, specs)
    return {"": params["shared"], **{s.name: params["datasets"][s.name] | statistics[s.name] for s in specs}}


def save(run: Path, seed: int, sources: Sources, model: DetectorConfig, step: int = 7) -> dict[str, Arrays]:
    """Save a checkpoint of a random detector; return its arrays."""
    trained, nothing = detector(seed, sources, model), {"count": jnp.int32(0)}
    _, exclusive, shared, stats = split_model(trained)
    with CheckpointStore(run / "checkpoints") as store:
        state = TrainState(
            jnp.int32(step), shared, exclusive, stats, nothing, nothing, nothing, jnp.int32(0), jnp.int32(0)
        )
        store.save(step, state, ExperimentConfig(sources, model), [source.name for source in sources])
    return arrays(trained, sources)


def start(run: Path, sources: Sources, model: DetectorConfig) -> tuple[dict, dict, WarmStart]:
    """Arrays before and after a warm start, and the report."""
    fresh = detector(99, sources, model)
    before = arrays(fresh, sources)
    started, report = warm_start(fresh, [source.spec for source in sources], run)
    assert_same(arrays(fresh, sources), before)
    assert started.heads_config == fresh.heads_config
    after = arrays(started, sources)
    kinds = (report.loaded, report.averaged, report.initialised, report.other_shape)
    named = [(name.dataset, name.path) for kind in kinds for name in kind]
    assert sorted(named) == sorted((owner, path) for owner in after for path in after[owner])  # each once
    for name in (*report.initialised, *report.other_shape):
        np.testing.assert_array_equal(after[name.dataset][name.path], before[name.dataset][name.path])
    return before, after, report


def assert_same(a: dict[str, Arrays], b: dict[str, Arrays]) -> None:
    assert a.keys() == b.keys()
    for owner in a:
        assert a[owner].keys() == b[owner].keys()
        assert not [path for path in a[owner] if not np.array_equal(a[owner][path], b[owner][path])]


def pairs(names: Sequence[ArrayName]) -> set[tuple[str, str]]:
    return {(name.dataset, name.path) for name in names}


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Arrays]]:
    """A run with kernel selection on two datasets, and its arrays."""
    run = tmp_path_factory.mktemp("joint")
    return run, save(run, 1, (SCANNET, SUNRGBD), TINY)


@pytest.fixture(scope="module")
def tr3d(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Arrays]]:
    """A run without selection on one dataset, and its arrays."""
    run = tmp_path_factory.mktemp("tr3d")
    return run, save(run, 2, (SCANNET,), PLAIN)


def test_the_same_detector_loads_every_array_by_name(joint: tuple[Path, dict]):
    run, held = joint
    _, after, report = start(run, (SUNRGBD, SCANNET), TINY)
    assert_same({owner: after[owner] for owner in held}, held)
    assert not (report.averaged or report.initialised or report.other_shape or report.left_over)
    count = sum(map(len, held.values()))
    source = f"the checkpoint of step 7 in {run / 'checkpoints'}"
    assert report.text().startswith(f"Warm start from {source}: {count} of {count} arrays loaded: ")
    assert report.text().endswith(" stem 3, neck 18, of sunrgbd 67, of scannet 67.")
    assert "\n" not in report.text()


def test_a_new_dataset_is_initialised_with_the_mean_statistics(joint: tuple[Path, dict]):
    run, held = joint
    _, after, report = start(run, (SCANNET, MINE, SUNRGBD), TINY)
    assert_same({owner: after[owner] for owner in held}, held)
    own = {"embedding", "heads.box_kernel", "heads.box_bias", "heads.class_kernel", "heads.class_bias"}
    initialised = {name.path for name in report.initialised}
    assert own < initialised and all(path.endswith(".conv.exclusive") for path in initialised - own)
    assert {name.dataset for name in (*report.initialised, *report.averaged)} == {"mine"}
    for name in report.averaged:
        mean = (held["scannet"][name.path] + held["sunrgbd"][name.path]) / 2
        np.testing.assert_allclose(after["mine"][name.path], mean, rtol=1e-6)
    assert not report.left_over
    assert "Statistics that start as the mean over the checkpoint's datasets: of mine " in report.text()
    assert "  heads.{box_bias,box_kernel,class_bias,class_kernel} of mine" in report.text()


def test_a_dataset_of_the_checkpoint_alone_is_left_out(joint: tuple[Path, dict]):
    run, held = joint
    _, after, report = start(run, (SUNRGBD,), TINY)
    assert_same(after, {"": held[""], "sunrgbd": held["sunrgbd"]})
    assert report.left_datasets == ("scannet",) and pairs(report.left_over) == {("scannet", p) for p in held["scannet"]}
    count = len(held["scannet"])
    assert report.text().splitlines()[1:] == [
        f"Left over in the checkpoint: {count} arrays of scannet, which is not in this run."
    ]


def test_tr3d_becomes_the_start_of_h2a2(tr3d: tuple[Path, dict]):
    run, held = tr3d
    _, after, report = start(run, (SCANNET, S3DIS), TINY)
    for path, kernel in held[""].items():
        place = path if path in after[""] else path.replace(".conv.kernel", ".conv.shared")
        np.testing.assert_array_equal(after[""][place], kernel)
    assert_same({"": {path: after["scannet"][path] for path in held["scannet"]}}, {"": held["scannet"]})
    assert {name.dataset for name in report.averaged} == {"s3dis"} and not report.left_over
    stem = "backbone.stages.0.0.first.conv."
    missing = pairs(report.initialised)
    assert {("", stem + "prior"), ("scannet", stem + "exclusive"), ("s3dis", "embedding")} <= missing
    assert ("", stem + "shared") not in missing
    lines = report.text().splitlines()
    convolutions = "  backbone.stages.{0,1,2,3}.0.{first,second}.conv"
    assert f"{convolutions}.{{exclusive,center,disagreement}} of scannet, s3dis" in lines
    assert "  backbone.stages.{0,1,2,3}.0.{first,second}.conv.{prior,projection,prototypes}" in lines
    assert len(lines) < 12


def test_exclusive_kernels_that_start_as_copies_copy_the_loaded_kernel(tr3d: tuple[Path, dict]):
    run, held = tr3d
    copying = dataclasses.replace(TINY, selection=dataclasses.replace(TINY.selection, exclusive_init="copy"))
    _, after, _ = start(run, (SCANNET, S3DIS), copying)
    kernel = held[""]["backbone.stages.1.0.second.conv.kernel"]
    for owner, parameter in (("", "shared"), ("scannet", "exclusive"), ("s3dis", "exclusive")):
        np.testing.assert_array_equal(after[owner][f"backbone.stages.1.0.second.conv.{parameter}"], kernel)


def test_a_checkpoint_with_selection_is_refused_as_the_start_of_tr3d(joint: tuple[Path, dict]):
    with pytest.raises(InputError, match=r"The checkpoint of step 7 in .* selects its kernels and this model does not"):
        start(joint[0], (SCANNET,), PLAIN)


def test_convolutions_that_no_longer_select_are_initialised(tmp_path: Path):
    wide = dataclasses.replace(TINY, selection=dataclasses.replace(TINY.selection, convolutions=("residual", "stem")))
    save(tmp_path, 3, (SCANNET,), wide)
    _, _, report = start(tmp_path, (SCANNET,), TINY)
    assert pairs(report.initialised) == {("", "backbone.stem.conv.kernel")}
    assert {("", "backbone.stem.conv.shared"), ("scannet", "backbone.stem.conv.exclusive")} < pairs(report.left_over)


def test_shared_arrays_of_the_checkpoint_start_exclusive_ones_here(tr3d: tuple[Path, dict]):
    run, held = tr3d
    own = dataclasses.replace(PLAIN, neck="exclusive", norm_affine="exclusive")
    _, after, report = start(run, (SCANNET, MINE), own)
    for path in ("neck.steps.0.up.conv.kernel", "backbone.stem.norm.scale"):
        for name in ("scannet", "mine"):
            np.testing.assert_array_equal(after[name][path], held[""][path])
    assert {name.path.split(".")[0] for name in report.initialised} == {"heads"} and not report.left_over


ADAPTED = dataclasses.replace(PLAIN, norm_affine="prompt", prompt_dim=3, adapters=True, exclusive_stages=(4,))
EXTRA = ("embedding", "conv.adapter", "norm.prompt.kernel", "norm.prompt.bias")
"""Ends of the paths that a detector with prompts and adapters has beside those of TR3D."""


def test_tr3d_starts_prompts_adapters_and_exclusive_stages(tr3d: tuple[Path, dict]):
    run, held = tr3d
    _, after, report = start(run, (SCANNET, MINE), ADAPTED)
    others = {name.path for name in report.initialised if not name.path.endswith(EXTRA)}
    assert {path.split(".")[0] for path in others} == {"heads"} and not report.left_over
    for path in ("backbone.stages.3.0.first.conv.kernel", "backbone.stages.3.0.second.norm.scale"):
        for name in ("scannet", "mine"):
            np.testing.assert_array_equal(after[name][path], held[""][path])
    np.testing.assert_array_equal(
        after[""]["backbone.stages.0.0.second.conv.kernel"], held[""]["backbone.stages.0.0.second.conv.kernel"]
    )


def test_other_datasets_start_from_prompts_and_adapters_and_tr3d_leaves_them(tmp_path: Path):
    held = save(tmp_path, 5, (SCANNET, SUNRGBD, S3DIS), ADAPTED)
    _, after, report = start(tmp_path, (S3DIS, MINE), ADAPTED)
    own = ("embedding", "backbone.stages.0.0.second.conv.adapter", "backbone.stages.3.0.first.conv.kernel")
    for path in own:
        np.testing.assert_array_equal(after["s3dis"][path], held["s3dis"][path])
    path = "neck.steps.0.up.norm.prompt.kernel"
    np.testing.assert_array_equal(after[""][path], held[""][path])
    assert {("mine", path) for path in own} < pairs(report.initialised)
    _, _, report = start(tmp_path, (SCANNET,), dataclasses.replace(PLAIN, exclusive_stages=(4,)))
    assert not report.initialised and all(
        name.path.endswith(EXTRA) for name in report.left_over if name.dataset not in report.left_datasets
    )


@pytest.mark.parametrize("classes", [("box", "bat"), ("bag", "box"), ("box", "bag", "bat")])
def test_a_head_of_other_classes_starts_anew(tmp_path: Path, classes: tuple[str, ...]):
    held = save(tmp_path, 4, (MINE,), PLAIN)
    _, after, report = start(tmp_path, (dataclasses.replace(MINE, classes=classes),), PLAIN)
    assert pairs(report.other_shape) == {("mine", "heads.class_kernel"), ("mine", "heads.class_bias")}
    np.testing.assert_array_equal(after["mine"]["heads.box_kernel"], held["mine"]["heads.box_kernel"])
    assert report.text().endswith("\n  heads.{class_bias,class_kernel} of mine (of other classes)")
    assert not report.left_over


def test_a_head_of_boxes_with_another_number_of_outputs_starts_anew(tmp_path: Path):
    save(tmp_path, 4, (MINE,), PLAIN)
    _, _, report = start(tmp_path, (dataclasses.replace(MINE, has_yaw=True),), PLAIN)
    assert pairs(report.other_shape) == {("mine", "heads.box_kernel"), ("mine", "heads.box_bias")}
    assert "  heads.box_kernel of mine (float32[4,6] in the checkpoint, float32[4,8] here)" in report.text()


@pytest.mark.parametrize("kinds", [("tr3d", "fcaf3d"), ("fcaf3d", "tr3d")])
def test_another_kind_of_detector_starts_from_the_backbone_alone(tmp_path: Path, kinds: tuple[str, str]):
    of, to = (dataclasses.replace(TINY, kind=kind) for kind in kinds)
    held = save(tmp_path, 4, (SUNRGBD,), of)
    _, after, report = start(tmp_path, (SUNRGBD,), to)
    kept = {"embedding", "backbone"}
    assert {name.path.partition(".")[0] for name in report.loaded} == kept
    for name in report.loaded:
        np.testing.assert_array_equal(after[name.dataset][name.path], held[name.dataset][name.path])
    # Their heads have parameters of the same names and shapes.
    assert ("sunrgbd", "heads.box_kernel") in pairs(report.other_shape)
    assert f"of sunrgbd (of {kinds[0].upper()})" in report.text()


def test_arrays_of_another_shape_are_initialised_and_reported(tr3d: tuple[Path, dict]):
    _, _, report = start(tr3d[0], (SCANNET, MINE), dataclasses.replace(PLAIN, stem_channels=6))
    assert ("", "backbone.stem.conv.kernel") in pairs(report.other_shape)
    assert ("mine", "backbone.stem.norm.mean") in pairs(report.other_shape)
    assert "  backbone.stem.norm.{bias,scale} (float32[4] in the checkpoint, float32[6] here)" in report.text()


def test_paths_in_braces_expand_to_every_path(tr3d: tuple[Path, dict]):
    _, _, report = start(tr3d[0], (SCANNET,), TINY)
    listed = [line.split(" of ")[0].strip() for line in report.text().splitlines() if line.startswith("  ")]
    expanded = subprocess.run(["bash", "-c", f"echo {' '.join(listed)}"], capture_output=True, text=True, check=True)
    assert sorted(expanded.stdout.split()) == sorted(name.path for name in report.initialised)


def test_a_checkpoint_without_a_fitting_parameter_is_refused(tr3d: tuple[Path, dict]):
    other = dataclasses.replace(PLAIN, stem_channels=6, stage_channels=(6, 6, 6, 6), neck_channels=6)
    with pytest.raises(InputError, match=r"^No parameter of the checkpoint of step 7 in .* has the name and the shape"):
        start(tr3d[0], (MINE,), other)


def test_a_run_its_checkpoints_or_one_of_them_can_be_given(tmp_path: Path, tr3d: tuple[Path, dict]):
    run, specs = tr3d[0], [SCANNET.spec]
    fresh = detector(5, (SCANNET,), PLAIN)
    for path in (run / "checkpoints", run / "checkpoints" / "7"):
        assert not warm_start(fresh, specs, str(path))[1].initialised
    assert not warm_start(fresh, specs, run, 7)[1].initialised
    with pytest.raises(InputError, match="no checkpoint of step 8"):
        warm_start(fresh, specs, run, 8)
    with pytest.raises(InputError, match=r"There is no folder .*none: train first, or give the folder of a run"):
        warm_start(fresh, specs, tmp_path / "none")
    with pytest.raises(InputError, match="There is no checkpoint in"):
        warm_start(fresh, specs, tmp_path)

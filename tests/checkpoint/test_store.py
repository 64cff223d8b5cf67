"""Checkpoints: restored exactly, by name, on any devices; refused with an error message if they do not fit."""

import dataclasses
import errno
import functools
import json
import logging
import re
import resource
import shutil
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging
from flax import nnx

from h2a2_jax.balancers import build_balancer
from h2a2_jax.balancers.ngh import norm_gradient_harmonization, plain_mean
from h2a2_jax.checkpoint import integrity
from h2a2_jax.checkpoint.integrity import DamagedCheckpointError, UnsavedCheckpointError
from h2a2_jax.checkpoint.store import CheckpointStore, checkpoint_place
from h2a2_jax.checkpoint.train_state import Averages, TrainState, place_state, split_model
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.config import ExperimentConfig, HarmonizeConfig, SourceConfig
from h2a2_jax.distributed import train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.host import quiet_command_line
from h2a2_jax.layers.kernel_selection import SelectionConfig
from h2a2_jax.models import DetectorConfig, HeadConfig, build_network
from h2a2_jax.scans.specs import dataset_spec

# Orbax stops waiting for the other files when it cannot read one, and TensorStore then reports to a closed event loop.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*loop is closed:pytest.PytestUnraisableExceptionWarning")

NAMES = ("scannet", "sunrgbd", "s3dis")
TINY = DetectorConfig(
    depth=10,
    stem_channels=4,
    stage_channels=(4, 4, 4, 4),
    neck_channels=4,
    selection=SelectionConfig(projection_dim=2, embedding_dim=4, hidden=4, exclusive_init="independent"),
)
PLAIN = dataclasses.replace(TINY, selection=None)
OPTIMIZER = optax.adamw(optax.constant_schedule(1e-3))


def experiment(names: Sequence[str] = NAMES, model: DetectorConfig = TINY) -> ExperimentConfig:
    return ExperimentConfig(tuple(SourceConfig(name, root="data") for name in names), model)


@functools.cache
def state_shapes(names: Sequence[str], model: DetectorConfig, balanced: bool) -> TrainState:
    specs = [dataset_spec(name) for name in names]
    heads = [HeadConfig(s.name, s.num_classes, s.num_outputs) for s in specs]
    _, exclusive, shared, stats = split_model(nnx.eval_shape(lambda: build_network(model, heads, rngs=nnx.Rngs(0))))
    balancer = norm_gradient_harmonization(len(names)) if balanced else plain_mean()
    number = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(
        step=number,
        skipped=number,
        skipped_in_row=number,
        shared=shared,
        exclusive=exclusive,
        stats=stats,
        shared_optimizer=jax.eval_shape(OPTIMIZER.init, shared),
        exclusive_optimizer=jax.eval_shape(OPTIMIZER.init, exclusive),
        balancer=jax.eval_shape(balancer.init, shared),
    )


def make_state(
    seed: int, names: Sequence[str] = NAMES, model: DetectorConfig = TINY, balanced: bool = True
) -> TrainState:
    """A state of random numbers, zero where heads are padded; nothing is compiled."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        values = (100 * rng.random(leaf.shape)).astype(leaf.dtype)
        place = jax.tree_util.keystr(path)
        for row, spec in enumerate(map(dataset_spec, names)):
            if "heads" in place and "exclusive" in place:
                values[row, ..., spec.num_outputs if "box_" in place else spec.num_classes :] = 0
        return jnp.asarray(values)

    return jax.tree_util.tree_map_with_path(draw, state_shapes(tuple(names), model, balanced))


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    leaves = zip(flat_names(a), jax.device_get(jax.tree.leaves(a)), jax.device_get(jax.tree.leaves(b)), strict=True)
    different = [name for name, x, y in leaves if x.dtype != y.dtype or not np.array_equal(x, y)]
    assert not different


def reordered(state: TrainState, rows: list[int]) -> TrainState:
    """The state whose dataset axis has another order."""

    def take(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[jnp.array(rows)] if leaf.ndim else leaf, tree)

    return dataclasses.replace(
        state,
        exclusive=take(state.exclusive),
        stats=take(state.stats),
        exclusive_optimizer=take(state.exclusive_optimizer),
        balancer=state.balancer._replace(norms=take(state.balancer.norms), scales=take(state.balancer.scales)),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """A folder with a checkpoint of step 7 of a model with kernel selection, and its state."""
    folder, state = tmp_path_factory.mktemp("run") / "checkpoints", make_state(1)
    with CheckpointStore(folder) as store:
        store.save(7, state, experiment(), NAMES)
    return folder, state


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """The same of a model without selection, which has fewer arrays, written from six devices."""
    folder, state = tmp_path_factory.mktemp("plain") / "checkpoints", make_state(1, model=PLAIN)
    with CheckpointStore(folder) as store:
        store.save(7, place_state(state, train_mesh(3)), experiment(model=PLAIN), NAMES)
    return folder, state


def test_a_state_is_restored_bit_for_bit(saved: tuple[Path, TrainState]):
    folder, state = saved
    with CheckpointStore(folder) as store:
        assert store.latest_step() == 7
        restored = store.restore_state(None, make_state(2), NAMES, experiment())
    assert_equal(restored, state)
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored))  # as those of the state it is like


def test_another_order_of_datasets_is_restored_by_name(plain: tuple[Path, TrainState]):
    folder, state = plain
    order = ("s3dis", "scannet", "sunrgbd")
    with CheckpointStore(folder) as store:
        restored = store.restore_state(7, make_state(2, order, PLAIN), order)
    assert_equal(restored, reordered(state, [2, 0, 1]))


def test_prompts_adapters_and_exclusive_stages_are_restored_by_name_in_any_order(tmp_path: Path):
    model = dataclasses.replace(PLAIN, norm_affine="prompt", prompt_dim=3, adapters=True, exclusive_stages=(4,))
    state, order = make_state(1, model=model), ("s3dis", "scannet", "sunrgbd")
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(7, state, experiment(model=model), NAMES)
        restored = store.restore_state(7, make_state(2, order, model), order)
        held = store.restore_arrays(7)
        with pytest.raises(InputError, match=r"model.adapters is True in the checkpoint and False in the config"):
            store.restore_state(7, make_state(2, model=PLAIN), NAMES, experiment(model=PLAIN))
    assert_equal(restored, reordered(state, [2, 0, 1]))
    own = {"embedding", "backbone.stages.0.0.second.conv.adapter", "backbone.stages.3.0.first.conv.kernel"}
    assert own <= held.datasets["s3dis"].keys() and "backbone.stem.norm.prompt.kernel" in held.shared


@pytest.mark.parametrize("devices", [1, 3])
def test_fewer_devices_restore_a_state_of_six(plain: tuple[Path, TrainState], devices: int):
    folder, state = plain
    like = place_state(make_state(4, model=PLAIN), train_mesh(3, jax.devices()[:devices]))
    with CheckpointStore(folder) as store:
        restored = store.restore_state(7, like, NAMES)
    assert_equal(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding and leaf.committed


def test_the_model_is_restored_without_a_config(saved: tuple[Path, TrainState]):
    folder, state = saved
    with CheckpointStore(folder) as store:
        model, config = store.restore_model(7)
    assert config == experiment()
    assert [head.dataset for head in model.heads_config] == list(NAMES)
    _, exclusive, shared, stats = split_model(model)
    assert_equal((exclusive, shared, stats), (state.exclusive, state.shared, state.stats))


def test_stored_arrays_are_slices_by_name_without_padding(saved: tuple[Path, TrainState]):
    folder, state = saved
    params = ocp.StandardCheckpointer().restore(folder / "7" / "params")
    assert set(params["datasets"]) == set(NAMES)
    moments = ocp.StandardCheckpointer().restore(folder / "7" / "optimizer")["datasets"]
    for row, spec in enumerate(map(dataset_spec, NAMES)):
        own = params["datasets"][spec.name]
        assert own["heads.box_kernel"].shape == (4, spec.num_outputs)
        assert own["heads.box_bias"].shape == (spec.num_outputs,)
        assert own["heads.class_kernel"].shape == (4, spec.num_classes)
        assert own["heads.class_bias"].shape == (spec.num_classes,)
        np.testing.assert_array_equal(own["embedding"], state.exclusive["embedding"][...][row])
        assert moments[spec.name]["0.mu.heads.class_kernel"].shape == (4, spec.num_classes)
    assert params["shared"]["backbone.stem.conv.kernel"].shape == (27, 3, 4)


def test_only_the_latest_are_kept(tmp_path: Path):
    state = make_state(1, model=PLAIN)
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (1, 2, 2, 3):
            store.save(step, state, experiment(model=PLAIN), NAMES)
        store.wait()
        assert store.latest_step() == 3
        with pytest.raises(InputError, match=r"no checkpoint of step 1 .*; there are those of 2, 3"):
            store.restore_state(1, state, NAMES)


def test_without_a_checkpoint(tmp_path: Path):
    for folder in (tmp_path / "none", tmp_path):
        store = CheckpointStore(folder)
        assert store.latest_step() is None
        with pytest.raises(InputError, match="There is no checkpoint in"):
            store.restore_model()
    assert not (tmp_path / "none").exists()


def test_another_architecture_is_refused_by_config_keys(saved: tuple[Path, TrainState]):
    folder, state = saved
    other = dataclasses.replace(TINY, stem_channels=8, selection=SelectionConfig())
    with CheckpointStore(folder) as store, pytest.raises(InputError) as error:
        store.restore_state(7, state, NAMES, experiment(model=other))
    message = str(error.value)
    assert "model.stem_channels is 4 in the checkpoint and 8 in the config" in message
    assert "model.selection.projection_dim is 2 in the checkpoint and 32 in the config" in message
    with CheckpointStore(folder) as store, pytest.raises(InputError, match=r"selection is on .* and off in the config"):
        store.restore_state(7, state, NAMES, experiment(model=PLAIN))


def test_another_architecture_is_refused_by_shapes(plain: tuple[Path, TrainState]):
    other = dataclasses.replace(PLAIN, stem_channels=8)
    with CheckpointStore(plain[0]) as store, pytest.raises(InputError) as error:
        store.restore_state(7, make_state(2, model=other), NAMES)
    message = str(error.value)
    assert "is of another model" in message and "more)" in message
    assert "float32[27,4,4] in the checkpoint and float32[27,8,4] here" in message


def test_other_datasets_are_refused(plain: tuple[Path, TrainState]):
    folder, state = plain
    with CheckpointStore(folder) as store, pytest.raises(InputError) as error:
        store.restore_state(7, state, NAMES[:2])
    assert "holds the datasets scannet, sunrgbd, s3dis, the config asks for scannet, sunrgbd:" in str(error.value)


@pytest.mark.parametrize("method", ["pcgrad", "gradnorm", "gradvac"])
def test_the_state_of_a_balancer_is_restored_by_name(tmp_path: Path, method: Any):
    balancer = build_balancer(HarmonizeConfig(method), len(NAMES))
    state = make_state(1, model=PLAIN)
    rng = np.random.default_rng(3)
    start = jax.eval_shape(balancer.init, state.shared)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.random(leaf.shape) * 9, leaf.dtype), start)
    order, rows = ("s3dis", "scannet", "sunrgbd"), jnp.array([2, 0, 1])
    with CheckpointStore(tmp_path) as store:
        store.save(1, dataclasses.replace(state, balancer=drawn), experiment(model=PLAIN), NAMES)
        restored = store.restore_state(1, dataclasses.replace(state, balancer=drawn), NAMES)
        assert_equal(restored.balancer, drawn)
        like = dataclasses.replace(make_state(2, order, PLAIN), balancer=start)
        moved = store.restore_state(1, like, order).balancer
    assert jax.tree.structure(moved) == jax.tree.structure(drawn)
    assert_equal(moved.record.psi, drawn.record.psi)
    assert_equal(moved.record.norms, jax.tree.map(lambda leaf: leaf[rows], drawn.record.norms))
    np.testing.assert_array_equal(moved.method.scales, drawn.method.scales[rows])
    if method == "gradnorm":
        np.testing.assert_array_equal(moved.method.weights, drawn.method.weights[rows])
        np.testing.assert_array_equal(moved.method.first_losses, drawn.method.first_losses[rows])
    else:
        assert moved.method.steps == drawn.method.steps
    if method == "gradvac":  # a number for each pair of datasets
        np.testing.assert_array_equal(moved.method.memory, drawn.method.memory[rows][:, rows])


def test_another_balancer_is_refused(plain: tuple[Path, TrainState]):
    like = make_state(2, model=PLAIN, balanced=False)
    with CheckpointStore(plain[0]) as store, pytest.raises(InputError, match="another gradient harmonisation"):
        store.restore_state(7, like, NAMES)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, make_state(1, model=PLAIN), experiment(model=PLAIN), NAMES)
    (tmp_path / "1" / "config" / "metadata").write_text("{")
    with CheckpointStore(tmp_path) as store, pytest.raises(InputError, match="cannot be read"):
        store.restore_model()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Log messages as the command line filters them."""
    logger, verbosity = logging.getLogger("absl"), absl_logging.get_verbosity()
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(logger, "filters", [*logger.filters])
    quiet_command_line()
    yield
    absl_logging.set_verbosity(verbosity)


def test_a_library_leaves_logging_and_hooks_alone(tmp_path: Path):
    logger = logging.getLogger("absl")

    def process_state() -> tuple[Any, ...]:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        return sys.unraisablehook, sys.excepthook, [*logger.filters], logger.level, [*warnings.filters], handlers

    before = process_state()
    with CheckpointStore(tmp_path) as store:
        store.save(1, make_state(1, model=PLAIN), experiment(model=PLAIN), NAMES)
        store.wait()
        store.restore_model()
    assert process_state() == before


def test_nothing_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, quiet: None):
    with caplog.at_level(logging.WARNING), CheckpointStore(tmp_path) as store:
        store.save(1, make_state(1, model=PLAIN), experiment(model=PLAIN), NAMES)
        store.wait()
        store.restore_model()
    assert not caplog.records


def test_a_failure_in_the_background_is_raised_once_and_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quiet: None
):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = CheckpointStore(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # bytes of a file, as if the disk were full
    try:
        store.save(1, make_state(1, model=PLAIN), experiment(model=PLAIN), NAMES)
        with pytest.raises(UnsavedCheckpointError, match=r"could not be written .*the same command begins anew"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.close()
    assert store.steps() == [] and list(tmp_path.iterdir()) == []
    assert caplog.text == ""


def test_a_path_stands_for_a_run_its_checkpoints_or_one_of_them(tmp_path: Path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    for step in (run / "checkpoints" / "100", moved / "200"):
        (step / "params").mkdir(parents=True)
    (run / "2026").mkdir()  # of somebody's results
    directory = run / "checkpoints"
    assert checkpoint_place(run) == checkpoint_place(directory) == (run, directory, None)
    assert checkpoint_place(directory / "100") == (run, directory, 100)
    assert checkpoint_place(moved) == (moved, moved, None) and checkpoint_place(moved / "200") == (moved, moved, 200)
    # A run may be called by a number.
    (tmp_path / "7" / "checkpoints").mkdir(parents=True)
    assert checkpoint_place(tmp_path / "7").directory == tmp_path / "7" / "checkpoints"


def test_averages_are_stored_and_restored_as_the_model(tmp_path: Path):
    state = make_state(1, model=PLAIN)
    other = make_state(5, model=PLAIN)
    averaged = dataclasses.replace(state, averages=Averages(other.shared, other.exclusive, other.stats))
    with CheckpointStore(tmp_path) as store:
        store.save(1, averaged, experiment(model=PLAIN), NAMES)
        again = store.restore_state(1, averaged, NAMES)
        assert_equal(again, averaged)
        for wanted, use in ((other, True), (state, False)):
            model, _ = store.restore_model(1, averaged=use)
            _, exclusive, shared, stats = split_model(model)
            assert_equal((exclusive, shared, stats), (wanted.exclusive, wanted.shared, wanted.stats))
        # A run that keeps none any more leaves them.
        assert store.restore_state(1, state, NAMES).averages is None


def test_averages_begin_with_the_parameters_of_a_checkpoint_without_them(tmp_path: Path):
    state = make_state(1, model=PLAIN)
    like = dataclasses.replace(state, averages=Averages(state.shared, state.exclusive, state.stats))
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, experiment(model=PLAIN), NAMES)
        averages = store.restore_state(1, like, NAMES).averages
    assert_equal((averages.shared, averages.exclusive, averages.stats), (state.shared, state.exclusive, state.stats))


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("item", ["params", "batch_stats", "optimizer"])
def test_a_flipped_bit_is_detected(tmp_path: Path, item: str):
    state = make_state(1, model=PLAIN)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, experiment(model=PLAIN), NAMES)
    path = largest_file(tmp_path / "1" / item)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with (
        CheckpointStore(tmp_path) as store,
        pytest.raises(DamagedCheckpointError, match=r"is damaged|cannot be read"),
    ):
        store.restore_state(1, state, NAMES)


def test_the_best_stays_beside_the_latest(tmp_path: Path):
    state, best = make_state(1, model=PLAIN), [None]
    with CheckpointStore(tmp_path, keep=2, lasting=lambda steps: {best[0]} & {*steps}) as store:
        for step in (1, 2, 3, 4, 5):
            store.save(step, state, experiment(model=PLAIN), NAMES)
            store.wait()
            best[0] = 2
        assert store.steps() == [2, 4, 5]
        best[0] = 4
        store.save(6, state, experiment(model=PLAIN), NAMES)
        store.wait()
        assert store.steps() == [4, 5, 6]


def test_remains_of_a_kill_are_removed_and_a_damaged_checkpoint_is_set_aside(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    with CheckpointStore(folder) as store:
        for step in (2, 3):
            store.save(step, make_state(1, model=PLAIN), experiment(model=PLAIN), NAMES)
        store.wait()
        (folder / "4.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
        (folder / "1" / "params").mkdir(parents=True)  # half removed
        (folder / "4" / "params").mkdir(parents=True)  # damaged, for nothing newer is there
        (folder / "2_before_tuning").mkdir()  # somebody's own
        store.tidy()
        assert sorted(path.name for path in folder.iterdir()) == ["2", "2_before_tuning", "3", "4"]
        assert store.set_aside(4) == tmp_path / "checkpoints_damaged" / "4"
        assert store.steps() == [2, 3] and (tmp_path / "checkpoints_damaged" / "4" / "params").is_dir()


def test_superseded_checkpoints_are_removed_by_tidy(tmp_path: Path):
    with CheckpointStore(tmp_path, keep=9) as store:
        for step in (1, 2, 3, 4):
            store.save(step, make_state(1, model=PLAIN), experiment(model=PLAIN), NAMES)
    with CheckpointStore(tmp_path, keep=2, lasting=lambda steps: {1} & {*steps}) as store:
        store.tidy()
        assert store.steps() == [1, 3, 4]


def test_a_changed_config_is_damage(tmp_path: Path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, make_state(1, model=PLAIN), experiment(model=PLAIN), NAMES)
        store.wait()
        path = tmp_path / "1" / "config" / "metadata"
        text = path.read_text()
        assert '"lr": 0.001' in text
        path.write_text(text.replace('"lr": 0.001', '"lr": 0.003'))
        with pytest.raises(DamagedCheckpointError, match="config is not what was saved"):
            store.stored_config(1)


def test_a_failed_write_names_the_newest_saved_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = make_state(1, model=PLAIN)
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, experiment(model=PLAIN), NAMES)
        store.wait()

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(UnsavedCheckpointError, match=r"\(No space left on device\).* after step 1"):
            store.save(2, state, experiment(model=PLAIN), NAMES)
        monkeypatch.undo()
        assert store.steps() == [1]
        store.save(2, state, experiment(model=PLAIN), NAMES)
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [1, 2]


def rewritten(checkpoint: Path, **values: Any) -> None:
    """Write a checkpoint's config anew with other values and a checksum that fits; None takes a value out."""
    path = checkpoint / "config" / "metadata"
    stored = json.loads(path.read_text()) | values
    stored = {key: value for key, value in stored.items() if value is not None and key != "checksum"}
    path.write_text(json.dumps({**stored, "checksum": zlib.crc32(json.dumps(stored, sort_keys=True).encode())}))


def write_config(content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config" / "metadata").write_bytes(content)


def change_config(**values: Any) -> Callable[[Path], Any]:
    return lambda folder: rewritten(folder, **values)


def write_layout(content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "params" / "_METADATA").write_text(content)


OF_ANOTHER_SHAPE = {
    "config a list": (write_config(b"[]"), "lacks the checksums"),
    "config deeply nested": (write_config(b"[" * 100_000), "cannot be read"),
    "config not UTF-8": (write_config(b'{"a": "\xff"}'), "cannot be read"),
    "checksums a list": (change_config(checksums=[1, 2, 3]), "lacks the checksums"),
    "no checksums": (change_config(checksums=None), "lacks the checksums"),
    "checksums of nothing": (change_config(checksums={}), "lacks the checksums"),
    "no datasets": (change_config(datasets=None), "names the datasets None, its config scannet"),
    "datasets a number": (change_config(datasets=3), "names the datasets 3"),
    "other datasets": (change_config(datasets=["scannet", "a"]), "names the datasets ['scannet', 'a']"),
    "no config": (change_config(config=None), "a config that this program cannot read"),
    "config of numbers": (change_config(config=[1]), "a config that this program cannot read"),
    "another step": (change_config(step=30), "was saved as that of step 30: give its folder that name"),
    "another version": (change_config(version={"a": 1}), "has version"),
    "layout a list": (write_layout("[]"), "cannot be read"),
    "layout of no tree": (write_layout('{"tree_metadata": 3}'), "cannot be read"),
}


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with CheckpointStore(folder) as store:
        store.save(1, make_state(1, model=PLAIN), experiment(model=PLAIN), NAMES)
    return folder


@pytest.mark.parametrize(("change", "phrase"), OF_ANOTHER_SHAPE.values(), ids=OF_ANOTHER_SHAPE.keys())
def test_metadata_of_another_shape_are_a_sentence(
    tmp_path: Path, saved_once: Path, change: Callable[[Path], Any], phrase: str
):
    shutil.copytree(saved_once / "1", tmp_path / "1")
    change(tmp_path / "1")
    like = make_state(2, model=PLAIN)
    with CheckpointStore(tmp_path) as store:
        for read in (store.restore_detector, lambda: store.restore_state(None, like, NAMES)):
            with pytest.raises(InputError, match=re.escape(phrase)) as raised:
                read()
            assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", ["[]", "[" * 100_000, '{"init_timestamp_nsecs": "x"}', '{"item_handlers": [1]}', '{"metrics": 3}']
)
def test_what_orbax_alone_reads_may_be_anything(tmp_path: Path, saved_once: Path, content: str):
    shutil.copytree(saved_once / "1", tmp_path / "1")
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text(content)
    (tmp_path / "1" / "commit_success.txt").unlink(missing_ok=True)
    like = make_state(2, model=PLAIN)
    with CheckpointStore(tmp_path) as store:
        store.restore_state(1, like, NAMES)
        store.save(2, like, experiment(model=PLAIN), NAMES)
        store.wait()
        assert store.steps() == [1, 2]


def test_a_checkpoint_under_a_later_name_is_refused_and_hides_no_save(tmp_path: Path, saved_once: Path):
    shutil.copytree(saved_once / "1", tmp_path / "5")
    like = make_state(2, model=PLAIN)
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(InputError, match=r"of step 5 in .* was saved as that of step 1: give its folder that name"):
            store.restore_state(None, like, NAMES)
        with pytest.raises(UnsavedCheckpointError, match=r"step 3 cannot be saved: .* has one of step 5"):
            store.save(3, like, experiment(model=PLAIN), NAMES)
    # One of version 0.1.0, which names its step among the counters alone.
    rewritten(tmp_path / "5", step=None)
    with CheckpointStore(tmp_path) as store, pytest.raises(InputError, match="was saved as that of step"):
        store.restore_state(None, like, NAMES)


def test_arrays_larger_than_the_memory_are_refused(saved_once: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(integrity, "available_memory", lambda: 1000)
    with CheckpointStore(saved_once) as store, pytest.raises(InputError, match="more than the 1e-06 GB of free memory"):
        store.restore_detector()


def test_too_many_open_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def exhausted(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(ocp.CheckpointManager, "save", exhausted)
    with (
        CheckpointStore(tmp_path) as store,
        pytest.raises(UnsavedCheckpointError, match=r"allow more open files \(ulimit"),
    ):
        store.save(1, make_state(1, model=PLAIN), experiment(model=PLAIN), NAMES)

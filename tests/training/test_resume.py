"""With what a run goes on: the newest checkpoint that can be read, of the same config."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.checkpoint.train_state import TrainState
from h2a2_jax.config import ExperimentConfig, changes
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.documents import evaluation_folder
from h2a2_jax.files import JsonLinesWriter, drop_lines_after, read_json_lines
from h2a2_jax.training.build import restore_newest
from h2a2_jax.training.loop import drop_lost_steps
from tests.checkpoint.test_store import NAMES, PLAIN, assert_equal, experiment, largest_file, make_state

# Orbax stops waiting for the other files when it cannot read one, and TensorStore then reports to a closed event loop.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*loop is closed:pytest.PytestUnraisableExceptionWarning")

CONFIG = experiment(model=PLAIN)


def saved(folder: Path, *steps: int) -> dict[int, TrainState]:
    """Checkpoints of these steps, and their states."""
    states = {step: replace(make_state(step, model=PLAIN), step=np.int32(step)) for step in steps}
    with CheckpointStore(folder, keep=9) as store:
        for step, state in states.items():
            store.save(step, state, CONFIG, NAMES)
    return states


def restored(folder: Path, config: ExperimentConfig = CONFIG, *, accept_changes: bool = False) -> TrainState | None:
    process_layout = MeshLayout(train_mesh(3, jax.devices()[:1]), 3)
    with CheckpointStore(folder) as store:
        return restore_newest(store, make_state(9, model=PLAIN), config, process_layout, accept_changes=accept_changes)


def damage(folder: Path) -> None:
    path = largest_file(folder / "params")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "checkpoints"
    states = saved(folder, 1, 2, 3)
    damage(folder / "3")
    (folder / "2" / "optimizer" / "manifest.ocdbt").unlink()
    state = restored(folder)
    said = capsys.readouterr().out
    assert state is not None
    assert_equal(replace(state, skipped_in_row=states[1].skipped_in_row), states[1])
    assert state.skipped_in_row == 0
    for step in (3, 2):
        place = tmp_path / "checkpoints_damaged" / str(step)
        assert place.is_dir() and f"It is set aside in {place}" in said
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_a_checkpoint_without_an_item_is_damaged_and_not_begun_anew_over(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    saved(folder, 1)
    shutil.rmtree(folder / "1" / "optimizer")
    with CheckpointStore(folder) as store:
        store.tidy()
    with pytest.raises(InputError, match=r"There is no other one in"):
        restored(folder)
    assert (folder / "1" / "params").is_dir()


def test_where_none_can_be_read_nothing_is_begun_anew(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    saved(folder, 1)
    damage(folder / "1")
    with pytest.raises(InputError, match=r"There is no other one in .*remove the folder to begin anew"):
        restored(folder)
    assert (folder / "1").is_dir()
    assert restored(tmp_path / "none") is None


def test_another_config_is_refused_unless_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "checkpoints"
    saved(folder, 1)
    other = replace(CONFIG, optim=replace(CONFIG.optim, lr=5.0), train=replace(CONFIG.train, steps=7, log_every=3))
    with pytest.raises(InputError) as error:
        restored(folder, other)
    assert "optim.lr was 0.001 and is 5.0; train.steps was 0 and is 7. Give the one it was begun with" in str(
        error.value
    )
    assert "log_every" not in str(error.value)
    assert restored(folder, other, accept_changes=True) is not None
    assert "Going on with another config: optim.lr was 0.001 and is 5.0" in capsys.readouterr().out


def test_what_changes_no_result_may_differ():
    train = replace(CONFIG.train, log_every=1, checkpoint_every=2, workers=3, profile=(1, 2), compilation_cache=False)
    assert changes(CONFIG, replace(CONFIG, train=train, eval=replace(CONFIG.eval, batch_size=4))) == []
    root = replace(CONFIG.datasets[1], root="elsewhere")
    other = replace(CONFIG, datasets=(CONFIG.datasets[0], root, CONFIG.datasets[2]))
    assert changes(CONFIG, other) == ["datasets.sunrgbd.root was 'data' and is 'elsewhere'"]
    # In another order they are the same.
    assert changes(CONFIG, replace(CONFIG, datasets=CONFIG.datasets[::-1])) == []


def test_lines_of_steps_that_are_taken_again_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    drop_lines_after(path, 3)
    assert not path.exists()
    writer = JsonLinesWriter(path, 1)
    for step in (1, 2, 4, 3):
        writer.write(step, {"loss": step})
    writer.close()
    path.write_bytes(path.read_bytes() + b'{"step": 2, "ver')
    drop_lines_after(path, 3)
    assert [line["step"] for line in read_json_lines(path, 1)] == [1, 2, 3]
    assert path.read_bytes().endswith(b"}\n") and [child.name for child in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("renew", [False, True])
def test_a_file_of_lines_that_was_removed_is_begun_anew(renew: bool, tmp_path: Path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonLinesWriter(path, 1)
    writer.write(1, {})
    path.unlink()
    if renew:
        path.touch()
    writer.write(2, {})
    writer.write(3, {})
    assert [line["step"] for line in read_json_lines(path, 1)] == [2, 3]
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(FileNotFoundError):  # the folder is not made anew
        writer.write(4, {})
    writer.close()


def test_evaluations_of_steps_that_are_taken_again_are_dropped(tmp_path: Path):
    for name in ("4", "8", "mine"):
        evaluation_folder(tmp_path, 0).with_name(name).mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "evaluations" / "12").symlink_to(elsewhere)
    drop_lost_steps(tmp_path, 4)
    assert elsewhere.is_dir()
    assert sorted(path.name for path in evaluation_folder(tmp_path, 0).parent.iterdir()) == ["4", "mine"]


def test_scans_that_came_or_went_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    like, process_layout = make_state(9, model=PLAIN), MeshLayout(train_mesh(3, jax.devices()[:1]), 3)
    with CheckpointStore(tmp_path) as store:
        store.save(1, like, CONFIG, NAMES, (8, 5, 7))
    with CheckpointStore(tmp_path) as store:
        for scans in ((8, 5, 7), ()):
            assert restore_newest(store, like, CONFIG, process_layout, scans) is not None
        with pytest.raises(InputError, match=r"sunrgbd had 5 training scans and has 4\. Give .*--accept_changes"):
            restore_newest(store, like, CONFIG, process_layout, (8, 4, 7))
        assert restore_newest(store, like, CONFIG, process_layout, (8, 4, 7), accept_changes=True) is not None
    assert "Going on with another config: sunrgbd had 5 training scans and has 4." in capsys.readouterr().out

"""What a run is made of, and what it begins with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs.joint import get_config, tiny
from h2a2_jax.balancers.packing import unpack
from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.checkpoint.train_state import split_model
from h2a2_jax.config import experiment_config
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.loader.workers import WorkerDiedError
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.training.build import _say_unmeasured, build_trainer, initial_detector, steps_of_run
from h2a2_jax.training.callbacks import SaveCheckpoint
from h2a2_jax.training.loop import read_batches
from tests.checkpoint.test_store import NAMES, PLAIN, TINY, assert_equal, experiment, make_state
from tests.training.configs import batch_number, joint_config, part_of_run


def test_the_tiny_variant_is_of_the_demos_kind():
    assert experiment_config(get_config("tiny")) == tiny()
    assert tiny().train.steps <= 50 and tiny().train.evaluate_every % tiny().train.checkpoint_every == 0


def test_epochs_are_counted_in_steps_of_several_batches():
    config = tiny()
    several = replace(
        config, optim=replace(config.optim, accumulate_steps=4), train=replace(config.train, steps=0, epochs=3)
    )
    assert steps_of_run(several, 10) == (3, 9)
    assert steps_of_run(config, 10) == (10, config.train.steps)


def test_a_new_run_begins_with_another_runs_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state = make_state(1, model=PLAIN)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(7, state, experiment(model=PLAIN), NAMES)
    config = experiment(model=PLAIN)
    config = replace(config, train=replace(config.train, init_from=str(tmp_path)))
    detector = initial_detector(config, is_new=True)
    assert detector is not None
    _, exclusive, shared, stats = split_model(detector)
    assert_equal((exclusive, shared, stats), (state.exclusive, state.shared, state.stats))
    assert "Warm start from the checkpoint of step 7" in capsys.readouterr().out

    initial_detector(config, is_new=False)
    assert capsys.readouterr().out == "", "a run that goes on does not load it again"
    gone = replace(config, train=replace(config.train, init_from=str(tmp_path / "gone")))
    assert initial_detector(gone, is_new=False) is None
    with pytest.raises(InputError, match=r"There is no folder .*gone"):
        initial_detector(gone, is_new=True)


def test_what_is_to_be_frozen_must_be_there():
    config = experiment(model=PLAIN)
    detector = initial_detector(config, is_new=True)
    assert detector is not None
    process_layout = MeshLayout(train_mesh(3, jax.devices()[:1]), 3)
    wrong = replace(config, optim=replace(config.optim, freeze=("stm",)))
    with pytest.raises(InputError, match=r"optim.freeze has 'stm', which names no parameter.*did you mean 'stem'"):
        build_trainer(wrong, detector, process_layout, 1, 1)
    options = replace(
        config.optim, freeze=("stem",), ema_decay=0.9, accumulate_steps=2, schedule="cosine", final_lr=0.1
    )
    trainer = build_trainer(replace(config, optim=options), detector, process_layout, 1, 10)
    assert trainer.start.averages is not None and trainer.start.accumulated is not None
    np.testing.assert_allclose(trainer.schedule(10), 0.1 * options.lr, rtol=1e-6)
    average = trainer.start.averages
    assert_equal(average.shared, trainer.start.shared)
    assert_equal(split_model(trainer.detector(trainer.start, process_layout))[2], unpack(trainer.start.shared))


class Dying:
    """A stream whose workers die before some of its steps."""

    def __init__(self, *deaths: int):
        self.deaths = list(deaths)

    def steps(self, first: int, last: int) -> Any:
        for step in range(first, last):
            if step in self.deaths:
                self.deaths.remove(step)
                raise WorkerDiedError("a worker process that loads scans died.")
            yield batch_number(step)


class Saver(SaveCheckpoint):
    """Notes the steps at which it should save."""

    def __init__(self) -> None:
        super().__init__(None)
        self.steps: list[int] = []

    def save(self, training: Any) -> None:
        self.steps.append(training.step)


def fed(stream: Dying, batches: int = 1) -> tuple[list[int], list[int]]:
    """The batches that a run of ten steps is given, and the steps at which it was saved."""
    layout = MeshLayout(train_mesh(3, jax.devices()[:1]), 3)
    config = joint_config(SPECS, accumulate_steps=batches)
    run = part_of_run(config=config, stream=stream, step=0, total=10, process_layout=layout)
    given, saver = [], Saver()
    try:
        for item in read_batches(run, saver):
            given.append(item.step)
            run.step = (item.step + 1) // batches
    except WorkerDiedError:
        pass
    return given, saver.steps


def test_workers_that_die_are_started_again(capsys: pytest.CaptureFixture[str]):
    assert fed(Dying(4, 4, 9)) == (list(range(10)), [])
    assert "They are started again (3 of 3 times)." in capsys.readouterr().out


def test_workers_that_die_too_often_end_the_run_with_what_is_done_saved():
    assert fed(Dying(4, 4, 7, 8)) == (list(range(8)), [8])
    assert fed(Dying(5), batches=2) == (list(range(5)), [2])


def test_a_dataset_whose_batches_hold_all_its_scans_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    config = experiment(model=TINY)
    plain = replace(config, datasets=tuple(replace(source, augment=False) for source in config.datasets))
    size, count = config.train.batch_size, len(config.datasets)
    _say_unmeasured(plain, (size, *[size + 1] * (count - 1)))
    said = capsys.readouterr().out
    assert said.startswith(f"Every batch holds all training scans of {config.dataset_names[0]}, so that")
    _say_unmeasured(config, (size,) * count)  # augmented anew, a scan is another one
    _say_unmeasured(plain, None)
    assert capsys.readouterr().out == ""

"""What is said and kept of a step that is not finite, and when the run ends."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.config import ExperimentConfig, SourceConfig, TrainConfig
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.loader.stream import JointStream
from h2a2_jax.models import DetectorConfig
from h2a2_jax.scans.scan import Scan
from h2a2_jax.scans.specs import S3DIS, SCANNET
from h2a2_jax.training.callbacks import Training
from h2a2_jax.training.loop import drop_lost_steps
from h2a2_jax.training.nonfinite import (
    KeptShard,
    NonFiniteError,
    NonFiniteWatch,
    checkpoint_of,
    kept_batches,
    places_of,
    read_batch,
    replay,
    write_batch,
)
from h2a2_jax.training.step import StepMetrics
from tests.checkpoint.test_store import NAMES, PLAIN, experiment, make_state
from tests.models.scenes import room
from tests.training.configs import part_of_run

TENSORS = [
    "backbone.stem.conv.kernel",
    "backbone.stages.0.0.first.conv.shared",
    "heads.class_bias",
    "statistics",
    "loss",
]
POISONED = 2


class Rooms:
    """Four rooms, one of them with a colour that is not finite."""

    def __init__(self, poisoned: int | None):
        self.poisoned = poisoned
        self.names = [f"room{i}" for i in range(4)]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Scan:
        scan = room(index, points=200, boxes=2)
        if index == self.poisoned:
            scan = replace(scan, colors=np.where(np.arange(3) == 0, np.nan, scan.colors).astype(np.float32))
        return scan


def stream() -> JointStream:
    datasets = tuple(
        SourceConfig(spec.name, kind="synthetic", sample=False, augment=False) for spec in (SCANNET, S3DIS)
    )
    config = ExperimentConfig(datasets, model=DetectorConfig(voxel_size=0.1), train=TrainConfig(batch_size=2))
    return JointStream(config, [Rooms(POISONED), Rooms(None)], MeshLayout(train_mesh(2, jax.devices()[:1]), 2))


def training(workdir: Path, of: JointStream, most_in_row: int = 3) -> Training:
    """A run that is logged after every step."""
    config = replace(of.config, train=replace(of.config.train, max_skipped_steps=most_in_row, log_every=1))
    first, *others = TENSORS[:-2]
    state = replace(make_state(0, model=PLAIN), shared={first: 0}, exclusive=dict.fromkeys(others, 0))
    return part_of_run(workdir=workdir, stream=of, config=config, state=state, step=1, total=99)


def metrics(*bad: tuple[int, int], in_row: int = 0, skipped: int = 0) -> StepMetrics:
    """Of a step in which these columns of these datasets are not finite."""
    found = np.zeros((2, len(TENSORS)), bool)
    for place in bad:
        found[place] = True
    nothing: Any = None
    return StepMetrics(nothing, nothing, nothing, nothing, {}, nothing, found, np.array(skipped), np.array(in_row))


def poisoned_step(of: JointStream) -> int:
    """A step that draws the poisoned room."""
    return next(step for step in range(2) if f"room{POISONED}" in of.step(step).names[0])


def test_a_bad_batch_is_named_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    of = stream()
    run = training(tmp_path, of)
    watch = NonFiniteWatch(run)
    number = poisoned_step(of)
    item = of.step(number)
    watch.after_batch(run, item, metrics((0, 0), (0, 1), (0, 4), in_row=1, skipped=1))
    assert capsys.readouterr().out == "", "looked at when the next step is under way"
    watch.after_batch(run, of.step(number + 1), metrics())
    said = capsys.readouterr().out
    assert said == (
        f"Batch {number} is not finite and is skipped: the loss, the gradients of stem, layer1 of scannet "
        f"(room{POISONED} has values that are not finite). It is kept in {tmp_path / 'nonfinite' / f'{number}.npz'}.\n"
    )
    assert watch.skipped == 1

    kept = read_batch(tmp_path / "nonfinite" / f"{number}.npz")
    assert [shard.dataset for shard in kept] == ["scannet", "s3dis"]
    assert [shard.names for shard in kept] == [tuple(names) for names in item.names]
    assert kept[0].bad_inputs() == (f"room{POISONED}",) and kept[1].bad_inputs() == ()
    for shard, drawn in zip(kept, of.shards(number).values(), strict=True):
        again = shard.batch(of.config.model)
        np.testing.assert_array_equal(again.features, drawn.batch.features)
        np.testing.assert_array_equal(again.tables.ups[0].lateral.rows, drawn.batch.tables.ups[0].lateral.rows)
        for ours, theirs in zip(again.scans, drawn.batch.scans, strict=True):
            assert ours.name == theirs.name
            np.testing.assert_array_equal(ours.boxes, theirs.boxes)
            np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_without_a_bad_input_all_scans_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    of = stream()
    run = training(tmp_path, of)
    watch = NonFiniteWatch(run)
    item = of.step(0)
    watch.after_batch(run, item, metrics((1, 3), in_row=1, skipped=1))
    watch.after_step(run, metrics())
    assert f"the running statistics of s3dis (scans {', '.join(item.names[1])})" in capsys.readouterr().out


def test_many_in_a_row_end_the_run_with_the_last_batches_kept(tmp_path: Path):
    of = stream()
    run = training(tmp_path, of, most_in_row=25)
    watch = NonFiniteWatch(run)
    for number in range(24):
        watch.after_batch(run, of.step(number), metrics((0, 4), in_row=number + 1, skipped=number + 1))
    watch.after_batch(run, of.step(24), metrics((0, 4), in_row=25, skipped=25))
    with pytest.raises(NonFiniteError, match=r"25 steps in a row were not finite.*--mode=replay --workdir="):
        watch.after_step(run, metrics())
    kept = sorted(int(path.stem) for path in (tmp_path / "nonfinite").iterdir())
    assert kept == list(range(5, 25))


def test_of_several_processes_each_keeps_its_part_in_a_folder(tmp_path: Path):
    shards = stream().shards(0)
    for process, shard in enumerate(shards.values()):
        write_batch(tmp_path / "nonfinite" / f"process{process}" / "7.npz", [KeptShard.of("s3dis", shard)])
    write_batch(tmp_path / "nonfinite" / "process1" / "12.npz", [KeptShard.of("s3dis", shards[1, 0])])
    found = kept_batches(tmp_path)
    assert list(found) == [7, 12] and [len(paths) for paths in found.values()] == [2, 1]
    drop_lost_steps(tmp_path, step=3, batches=4)
    assert list(kept_batches(tmp_path)) == [7]


def test_a_skipped_step_is_replayed_with_the_parameters_it_was_met_with():
    assert [checkpoint_of(step, [2, 4]) for step in (0, 1, 2, 3, 9)] == [2, 2, 2, 4, 4]


@pytest.mark.slow
def test_a_poisoned_batch_is_replayed(tmp_path: Path):
    config = experiment(model=PLAIN)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(2, make_state(2, model=PLAIN), config, NAMES)
    of = stream()
    number = next(n for n in range(8) if KeptShard.of("s3dis", of.shards(n)[0, 0]).bad_inputs())
    write_batch(tmp_path / "nonfinite" / f"{number}.npz", [KeptShard.of("s3dis", of.shards(number)[0, 0])])
    found, step, (shard,) = replay(tmp_path)
    assert (found, step) == (number, 2) and not shard.is_finite
    assert shard.bad_inputs == (f"room{POISONED}",) and shard.first is not None
    assert "the running statistics" in shard.places and "the loss" in shard.places


def test_places_are_said_in_few_words():
    assert places_of(["heads.class_bias", "loss", "heads.box_bias"]) == ["the loss", "the gradients of heads"]


def test_a_file_that_is_no_batch_is_refused(tmp_path: Path):
    path = tmp_path / "1.npz"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no batch that a run kept"):
        read_batch(path)
    write_batch(path, [KeptShard.of("s3dis", shard) for shard in stream().shards(0).values()])
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="is no batch that a run kept"):
        read_batch(path)

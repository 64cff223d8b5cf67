from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from h2a2_jax.config import ExperimentConfig, SourceConfig, TrainConfig
from h2a2_jax.distributed import ExchangeFuture, MeshLayout, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.loader.batching import Batch
from h2a2_jax.loader.stream import DatasetSchedule, JointStream, Log
from h2a2_jax.models import DetectorConfig
from h2a2_jax.scans.scan import Scan, ScanError
from tests.loader.test_batching import make_scan


class Memory:
    """A source of given scans; None stands for a scan that cannot be read."""

    def __init__(self, scans: Sequence[Scan | None]):
        self.scans = scans

    @property
    def names(self) -> list[str]:
        return [f"scan{i}" for i in range(len(self.scans))]

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> Scan:
        scan = self.scans[index]
        if scan is None:
            raise ScanError(f"scan{index}", f"scan{index} is damaged.")
        return scan


def layout(devices: int = 1) -> MeshLayout:
    """Of two datasets; four devices are two replicas of each."""
    return MeshLayout(train_mesh(2, jax.devices()[:devices]), 2)


def make_stream(
    scans: Sequence[Scan | None] | None = None,
    process_layout: MeshLayout | None = None,
    *,
    first: Mapping[str, Any] | None = None,
    second: Mapping[str, Any] | None = None,
    voxel_size: float = 0.02,
    **train: Any,
) -> JointStream:
    """Batches of two scans of S3DIS and SUN RGB-D.

    Args:
        scans: scans of S3DIS.
        process_layout: by default of one device.
        first: further fields of S3DIS's config.
        second: further fields of SUN RGB-D's config.
        voxel_size: metres.
        train: fields of `TrainConfig`.
    """
    datasets = (
        SourceConfig("s3dis", kind="synthetic", sample=False, **(first or {})),
        SourceConfig("sunrgbd", kind="synthetic", sample=False, **(second or {})),
    )
    options = TrainConfig(**({"batch_size": 2, "max_bucket": 3} | train))
    config = ExperimentConfig(datasets, model=DetectorConfig(voxel_size=voxel_size), train=options)
    sources = [Memory(scans or [make_scan(i) for i in range(5)]), Memory([make_scan(10 + i) for i in range(3)])]
    return JointStream(config, sources, process_layout or layout())


def test_an_epoch_is_as_long_as_the_dataset_that_needs_most() -> None:
    # 5 scans x 13 repeats in steps of 2, against 3 scans x 5 repeats.
    assert make_stream().steps_per_epoch == 33


def test_a_dataset_is_gone_through_before_it_is_shuffled_again() -> None:
    stream = make_stream()
    names = [name for step in range(5) for name in stream.step(step).names[0]]
    assert sorted(names[:5]) == sorted(names[5:]) == [f"scan{i}" for i in range(5)]
    assert names[:5] != names[5:]


def test_a_step_depends_on_its_number_and_the_seed_alone() -> None:
    stream, again = make_stream(), make_stream()
    for _ in range(2):
        again.step(0)
    for a, b in zip(jax.tree.leaves(stream.step(3).batch), jax.tree.leaves(again.step(3).batch), strict=True):
        np.testing.assert_array_equal(a, b)
    other = make_stream(seed=1)
    assert [stream.step(i).names for i in range(4)] != [other.step(i).names for i in range(4)]


def test_a_scan_of_many_boxes_widens_its_own_step_alone() -> None:
    scans = [make_scan(i) for i in range(60)]
    full = replace(scans[0], boxes=np.resize(scans[0].boxes, (20, 7)), labels=np.resize(scans[0].labels, 20))
    stream = make_stream(scans=scans)  # measured without it
    stream.sources = [Memory([full, *scans[1:]]), stream.sources[1]]
    items = [stream.step(i) for i in range(30)]
    assert [item.batch.boxes.shape[3] for item in items] == [32 if "scan0" in item.names[0] else 16 for item in items]


def test_measuring_is_no_part_of_the_throughput() -> None:
    stream = make_stream(scans=[make_scan(0), None])
    assert (stream.log.scans, stream.log.seconds) == (0, {}) and set(stream.log.skipped) == {"s3dis/scan1"}


def test_prefetched_steps_are_the_steps() -> None:
    stream = make_stream()
    assert [item.names for item in stream.steps(2, 5)] == [stream.step(i).names for i in (2, 3, 4)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_is_the_stream_whatever_the_workers(workers: int) -> None:
    scans = [make_scan(0), None, replace(make_scan(2), notes={"points lost": 4})]
    whole, resumed = make_stream(scans), make_stream(scans, workers=workers)
    resumed.log = Log()
    for item in resumed.steps(3, 6):
        expected = whole.step(item.step)
        assert item.names == expected.names
        for a, b in zip(jax.tree.leaves(item.batch), jax.tree.leaves(expected.batch), strict=True):
            np.testing.assert_array_equal(a, b)
    assert resumed.log.skipped == {"s3dis/scan1": "scan1 is damaged."}
    assert resumed.log.notes == {"s3dis/scan2": {"points lost": 4}} and resumed.log.scans == 3 * 4
    assert set(resumed.log.seconds) == {"load", "sample and augment", "voxelise and build maps", "pad"}
    assert 0 < resumed.scans_per_second_per_core < float("inf")


def test_leading_axes_are_datasets_and_replicas() -> None:
    item = make_stream(process_layout=layout(4), batch_size=4).step(0)
    assert item.batch.features.shape[:2] == (2, 2)
    assert item.batch.boxes.shape[:3] == (2, 2, 2)
    assert item.num_scans == 8


def test_a_damaged_scan_is_left_out_with_its_name_and_another_takes_its_place() -> None:
    stream = make_stream(scans=[make_scan(0), None, make_scan(2)])
    names = {name for step in range(6) for name in stream.step(step).names[0]}
    assert names == {"scan0", "scan2"}
    assert stream.log.skipped == {"s3dis/scan1": "scan1 is damaged."}


def test_no_usable_scan_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="none of the 2 scans of s3dis can be used"):
        make_stream(scans=[None, None])


def test_an_error_in_the_background_reaches_the_loop() -> None:
    stream = make_stream()
    stream.sources = [Memory([None]), stream.sources[1]]
    with pytest.raises(InputError, match="can be used"):
        list(stream.steps(0, 2))


def test_an_empty_dataset_and_an_uneven_batch_are_refused() -> None:
    with pytest.raises(InputError, match="has no scans"):
        JointStream(make_stream().config, [Memory([]), Memory([make_scan(0)])], layout())
    with pytest.raises(InputError, match="choose a multiple of 2"):
        make_stream(process_layout=layout(4), batch_size=3)


def unequal_stream(**second: Any) -> JointStream:
    """Batches of four and of two scans on two devices each; the second dataset takes part in some steps only."""
    second = {"augment": False, "batch_size": 2, **second}
    return make_stream(process_layout=layout(4), first={"augment": False}, second=second, batch_size=4)


def test_unequal_batches_share_one_shape_and_count_their_own_scans() -> None:
    stream = unequal_stream()
    item = stream.step(0)
    assert item.batch.boxes.shape[:3] == (2, 2, 2)
    assert [len(names) for names in item.names] == [4, 2] and item.num_scans == 6
    assert (item.batch.labels >= 0).any(-1).sum((1, 2)).tolist() == [4, 2]
    assert set(item.batch.plan.voxels.coords[1, 0, :, 0].tolist()) == {0, 2}, (
        "the second row is a scan without sites; 2 is padding"
    )
    # 5 scans x 13 repeats in steps of 4, against 3 x 5 in steps of 2.
    assert stream.steps_per_epoch == 17
    seen = [name for step in range(3) for name in stream.step(step).names[1]]
    assert sorted(seen[:3]) == sorted(seen[3:]) == ["scan10", "scan11", "scan12"]


def test_an_absent_dataset_waits_and_the_epoch_is_longer() -> None:
    stream, again = unequal_stream(weight=0.4), unequal_stream(weight=0.4)
    items = [stream.step(i) for i in range(12)]
    present = [bool(item.batch.present[1].all()) for item in items]
    assert 0 < sum(present) < 12 and all(item.batch.present[0].all() for item in items)
    for item, here in zip(items, present, strict=True):
        assert item.batch.present[1].any() == here
        assert (item.num_scans, len(item.names[1])) == ((6, 2) if here else (4, 0))
        assert here or (item.batch.plan.voxels.n[1] == 0).all()
    # Its scans come in the order that they have where it takes part in every step.
    seen = [name for item in items for name in item.names[1]]
    assert seen == [name for i in range(sum(present)) for name in unequal_stream().step(i).names[1]]
    assert again.step(11).names == items[11].names
    assert unequal_stream(weight=0.1, repeats=20).steps_per_epoch == 300


class Half(MeshLayout):
    """Plays one of two processes that each prepare one dataset; the other sends given numbers."""

    def __init__(self, dataset: int, others: list[np.ndarray]):
        super().__init__(train_mesh(2, jax.devices()[:1]), 2)
        self.dataset, self.others, self.sent = dataset, others, []

    def owns(self, dataset: int, replica: int) -> bool:
        return dataset == self.dataset

    def exchange(self, values: np.ndarray) -> ExchangeFuture:
        self.sent.append(values)
        other = self.others.pop(0) if self.others else values
        return ExchangeFuture(np.stack([values, other]), [0, 1])

    def assemble(self, shards: Mapping[tuple[int, int], Batch]) -> Batch:
        return shards[self.dataset, 0]


def test_a_process_draws_its_own_shards_in_the_shape_that_fits_all() -> None:
    whole = make_stream(scans=[make_scan(i, points=400 + 300 * i) for i in range(5)])

    def half(dataset: int, others: list[np.ndarray]) -> JointStream:
        sources = [source if i == dataset else None for i, source in enumerate(whole.sources)]
        return JointStream(whole.config, sources, Half(dataset, others))

    other = half(1, [])
    other.step(3)
    mine = half(0, list(other.process_layout.sent))
    assert (mine.num_scans, mine.ladder) == (whole.num_scans, whole.ladder)
    assert mine.steps_per_epoch == whole.steps_per_epoch
    item, expected = mine.step(3), whole.step(3)
    assert item.names == (expected.names[0], ())
    assert item.num_scans == expected.num_scans == 4
    for a, b in zip(jax.tree.leaves(item.batch), jax.tree.leaves(expected.batch), strict=True):
        np.testing.assert_array_equal(a, b[0, 0])


def test_a_failure_elsewhere_ends_the_steps_here() -> None:
    mine = make_stream(process_layout=Half(0, []))
    mine.process_layout.others.append(np.array([1, 0, 0, 0, 0], np.int32))
    with pytest.raises(InputError, match="process 1 failed to prepare step 5"):
        mine.step(5)


def test_a_failure_here_is_sent_before_it_is_raised() -> None:
    mine = make_stream(process_layout=Half(0, []))
    mine.sources = [Memory([None]), mine.sources[1]]
    with pytest.raises(InputError, match="can be used"):
        list(mine.steps(0, 2))
    assert mine.process_layout.sent[-1][0] == 1


def test_the_schedule_follows_the_weights() -> None:
    schedule = DatasetSchedule(3, [1.0, 0.25])
    present = np.array([schedule.present(i) for i in range(3000)])
    assert present[:, 0].all() and abs(present[:, 1].mean() - 0.25) < 0.03
    assert [schedule.before(1, i) for i in (0, 1023, 1024, 2999)] == [
        present[:i, 1].sum() for i in (0, 1023, 1024, 2999)
    ]
    assert DatasetSchedule(3, [1.0, 0.25]).present(2500) == tuple(present[2500])
    assert any(DatasetSchedule(4, [1.0, 0.25]).present(i) != tuple(present[i]) for i in range(100))


def test_some_dataset_takes_part_in_every_step() -> None:
    schedule = DatasetSchedule(0, [0.02, 0.01])
    present = np.array([schedule.present(i) for i in range(300)])
    assert present.any(1).all() and not present.all(1).any() and present.any(0).all()


def test_shapes_do_not_depend_on_the_seed() -> None:
    scans = [make_scan(i, points=100 + 60 * i) for i in range(40)]
    streams = [make_stream(scans, seed=seed) for seed in (0, 5)]
    assert streams[0].ladder.capacities(0) == streams[1].ladder.capacities(0)
    assert streams[0].step(0).names != streams[1].step(0).names

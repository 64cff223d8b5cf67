from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.inputs.pipeline import JointStream, StreamConfig, StreamDataset
from h2a2_jax.inputs.scan import Scan, ScanError
from h2a2_jax.inputs.specs import S3DIS, SUNRGBD
from tests.inputs.test_batching import make_scan


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


def make_stream(config: StreamConfig | None = None, scans: Sequence[Scan | None] | None = None) -> JointStream:
    first = StreamDataset(S3DIS, Memory(scans or [make_scan(i) for i in range(5)]), sample=False)
    second = StreamDataset(SUNRGBD, Memory([make_scan(10 + i) for i in range(3)]), sample=False)
    return JointStream([first, second], config or StreamConfig(batch_size=2, voxel_size=0.02))


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
    other = make_stream(StreamConfig(batch_size=2, voxel_size=0.02, seed=1))
    assert [stream.step(i).names for i in range(4)] != [other.step(i).names for i in range(4)]


def test_prefetched_steps_are_the_steps() -> None:
    stream = make_stream()
    assert [item.names for item in stream.steps(2, 5)] == [stream.step(i).names for i in (2, 3, 4)]


def test_leading_axes_are_datasets_and_replicas() -> None:
    item = make_stream(StreamConfig(batch_size=4, replicas=2, voxel_size=0.02)).step(0)
    assert item.batch.features.shape[:2] == (2, 2)
    assert item.batch.boxes.shape[:3] == (2, 2, 2)
    assert item.num_scans == 8


def test_a_damaged_scan_is_left_out_with_its_name_and_another_takes_its_place() -> None:
    stream = make_stream(scans=[make_scan(0), None, make_scan(2)])
    names = {name for step in range(6) for name in stream.step(step).names[0]}
    assert names == {"scan0", "scan2"}
    assert stream.skipped == {"s3dis/scan1": "scan1 is damaged."}


def test_no_usable_scan_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="none of the 2 scans of s3dis can be used"):
        make_stream(scans=[None, None])


def test_an_error_in_the_background_reaches_the_loop() -> None:
    stream = make_stream()
    broken = replace(stream.datasets[0], source=Memory([None]))
    stream.datasets = [broken, stream.datasets[1]]
    with pytest.raises(InputError, match="can be used"):
        list(stream.steps(0, 2))


def test_an_empty_dataset_and_an_uneven_batch_are_refused() -> None:
    with pytest.raises(InputError, match="has no scans"):
        JointStream([StreamDataset(S3DIS, Memory([]))], StreamConfig(batch_size=1))
    with pytest.raises(InputError, match="choose a multiple of 2"):
        make_stream(StreamConfig(batch_size=3, replicas=2))

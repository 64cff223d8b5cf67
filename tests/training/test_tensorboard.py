"""Event files as TensorBoard reads them: frames of lengths and checksums around messages."""

import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from h2a2_jax.training.metrics import TensorBoardWriter


def events(path):
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        message = content[12 : 12 + length]
        assert struct.unpack("<I", content[8:12])[0] == masked_crc32c(content[:8])
        assert struct.unpack("<I", content[12 + length : 16 + length])[0] == masked_crc32c(message)
        found.append(Event.FromString(message))
        content = content[16 + length :]
    return found


def scalars(folder):
    """(step, name) to value, as TensorBoard shows them: a start makes it forget the steps from its own on."""
    shown = {}
    for path in sorted(folder.iterdir()):
        for event in events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in shown
                shown[event.step, value.tag] = value.simple_value
    return shown


def test_scalars_are_read_back(tmp_path):
    with TensorBoardWriter(tmp_path / "new" / "tensorboard", 0) as writer:
        writer.write(2, {"loss/scannet": 0.5, "skipped_scans": 3})
        writer.write(4, {"loss/scannet": 0.25})
    found = scalars(tmp_path / "new" / "tensorboard")
    assert found == {(2, "loss/scannet"): 0.5, (2, "skipped_scans"): 3.0, (4, "loss/scannet"): 0.25}


def test_a_file_opens_with_its_version(tmp_path):
    with TensorBoardWriter(tmp_path, 0) as writer:
        pass
    assert events(writer.path)[0].file_version == "brain.Event:2"
    assert ".tfevents." in writer.path.name


def test_what_is_no_finite_number_is_left_out(tmp_path):
    with TensorBoardWriter(tmp_path, 0) as writer:
        writer.write(1, {"a": None, "b": float("nan"), "c": float("inf"), "d": 0.0})
    assert scalars(tmp_path) == {(1, "d"): 0.0}


def test_a_step_is_on_the_disk_before_the_file_is_closed(tmp_path):
    with TensorBoardWriter(tmp_path, 0) as writer:
        writer.write(1, {"a": 1.0})
        assert scalars(tmp_path) == {(1, "a"): 1.0}
    with pytest.raises(ValueError, match="closed"):
        writer.write(2, {"a": 1.0})


def test_steps_after_the_checkpoint_are_not_shown_twice(tmp_path):
    with TensorBoardWriter(tmp_path, 0) as killed:
        for step in (1, 2, 3):
            killed.write(step, {"a": step})
    with TensorBoardWriter(tmp_path, 1) as going_on:
        assert going_on.path != killed.path
        assert scalars(tmp_path) == {(1, "a"): 1.0}
        for step in (2, 3, 4):
            going_on.write(step, {"a": 10 * step})
    assert scalars(tmp_path) == {(1, "a"): 1.0, (2, "a"): 20.0, (3, "a"): 30.0, (4, "a"): 40.0}


def test_tensorflow_and_torch_are_not_imported():
    program = "import sys, h2a2_jax.training.metrics; print({'tensorflow', 'torch'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"

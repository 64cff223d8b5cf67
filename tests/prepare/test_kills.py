"""kill -9 of the command at moments spread over its run; H2A2_KILLS=10 for ten kills instead of two."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.scans.specs import S3DIS
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource
from h2a2_jax.scans.tfds_source import TfdsSource
from tests.prepare.tiny import TinyRaw, assert_equal, tiny_scan

_ROOT = Path(__file__).parents[2]
_KILLS = int(os.environ.get("H2A2_KILLS", "2"))


@contextlib.contextmanager
def _command(*arguments: object):
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _alive(group: int) -> list[str]:
    """Processes of the group that were not killed."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                found.append(stat.parent.name)
    return found


def _wait(done, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.001)


def _wait_for_the_end(group: int) -> None:
    deadline = time.monotonic() + 20
    while _alive(group):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.01)


def test_killed_while_preparing(tmp_path):
    """A kill of the parent or of its group ends the workers, keeps finished scans and leaves nothing half-written."""
    train = 12 * _KILLS
    command = ("data.synthetic_s3dis", f"--train={train}", "--val=2", "--scale=demo", f"--output={tmp_path}")
    command += ("--workers=2", "--keep-cache")
    cache = tmp_path / "synthetic_s3dis.cache"
    done: dict[str, int] = {}
    for kill in range(_KILLS):
        with _command(*command) as process:
            _wait(lambda: len(list(cache.glob("*.scan"))) >= len(done) + 4 + kill % 3, process)  # noqa: B023
            (os.kill if kill % 2 == 0 else os.killpg)(process.pid, signal.SIGKILL)
            process.wait()
            _wait_for_the_end(process.pid)
        now = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.scan")}
        assert done.items() <= now.items(), "finished scans were done again"
        done = now
        with pytest.raises(InputError, match="only half prepared"):
            TfdsSource(tmp_path, "train", S3DIS)
    with _command(*command) as process:
        printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0, printed
    assert f"{train + 2} scans, {len(done)} of them done before" in printed and "damaged" not in printed
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in cache.glob("*.scan")}.items()
    assert not list(tmp_path.rglob("*.writing"))
    for split, size in (("train", train), ("val", 2)):
        found, expected = TfdsSource(tmp_path, split, S3DIS), SyntheticSource(S3DIS, split, size, scale="demo")
        assert len(found) == size
        for index in range(0, size, 5):
            assert_equal(found[index], expected[index])


def test_killed_while_packing(tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    raw = TinyRaw(log, 40, 30_000)
    command = ("tests.prepare.tiny_builder", output, log, raw.train, raw.points)

    def written() -> int:
        return sum(path.stat().st_size for path in output.glob("tiny/incomplete.*/*") if path.exists())

    for kill in range(_KILLS - 1):
        with _command(*command) as process:
            _wait(lambda: written() > kill * 1_000_000, process)  # noqa: B023
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert list(output.glob("tiny/incomplete.*")) and not (output / "tiny" / "1.0.0").exists()
        with pytest.raises(InputError, match="only half prepared"):
            TfdsSource(output, "train", S3DIS)
    with _command(*command) as process:
        printed, _ = process.communicate(timeout=100)
    assert process.returncode == 0, printed
    assert sorted(log.read_text().splitlines()) == sorted([*raw.splits["train"], "b 0"])
    assert [path.name for path in (output / "tiny").iterdir()] == ["1.0.0"]
    source = TfdsSource(output, "train", S3DIS)
    for index in (0, 17, 39):
        assert_equal(source[index], tiny_scan(source.names[index], raw.points))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_with_a_sentence_on_how_to_resume(tmp_path, number):
    command = ("data.synthetic_s3dis", "--train=500", "--val=1", "--scale=demo", f"--output={tmp_path}", "--workers=1")
    with _command(*command) as process:
        _wait(lambda: len(list(tmp_path.glob("*.cache/*.scan"))) >= 2, process)
        os.killpg(process.pid, number)  # as a terminal does with Ctrl-C
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert printed.strip().endswith("The same command goes on from there.") and "Traceback" not in printed
    _wait_for_the_end(process.pid)

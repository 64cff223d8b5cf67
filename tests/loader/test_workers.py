"""Values prepared ahead: the same whatever the number of workers, and nothing left behind by any end."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.loader.workers import pack, prepared_ahead, unpack


@dataclass(frozen=True)
class Squares:
    """What workers prepare here: arrays, one of them twice, and an error at one number."""

    fails_at: int = -1

    def __call__(self, number: int) -> dict:
        if number == self.fails_at:
            raise InputError(f"value {number} cannot be prepared.")
        values = np.full((300, 400), number**2, np.float32)
        return {"number": number, "values": values, "again": values, "none": np.zeros((0, 3)), "process": os.getpid()}


def test_a_packed_value_comes_back_with_its_arrays_once_and_writable():
    value = Squares()(5)
    packed = pack(value)
    assert packed["body"].nbytes < 1.01 * value["values"].nbytes
    again = unpack(packed)
    assert again["number"] == 5 and again["again"] is again["values"]
    np.testing.assert_array_equal(again["values"], value["values"])
    assert again["none"].shape == (0, 3) and again["values"].flags.writeable
    assert again["values"].ctypes.data % 16 == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_order_errors_and_an_early_end(workers):
    seen = []
    with pytest.raises(InputError, match="value 8 cannot be prepared"):
        for value in prepared_ahead(Squares(fails_at=8), 3, 12, workers=workers, ahead=2):
            assert (value["values"] == value["number"] ** 2).all()
            assert (value["process"] == os.getpid()) == (workers == 0)
            seen.append(value["number"])
    assert seen == [3, 4, 5, 6, 7]
    del value  # lies in shared memory, if workers prepared it
    assert list(prepared_ahead(Squares(), 4, 4, workers=workers, ahead=2)) == []
    started = prepared_ahead(Squares(), 0, 1000, workers=workers, ahead=2)
    assert next(started)["number"] == 0
    started.close()
    deadline = time.monotonic() + 30
    while left := [name for name in os.listdir("/dev/shm") if _is_ours(name)]:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.05)  # Grain lets go of them in a thread


class Unportable(Exception):
    """Cannot be made again from its text."""

    def __init__(self, one: str, other: str):
        super().__init__(f"{one} and {other}")


@dataclass(frozen=True)
class Fails:
    error: type[Exception]
    arguments: tuple[str, ...]

    def __call__(self, number: int) -> None:
        raise self.error(*self.arguments)


def test_errors_of_workers_say_where_they_were_raised():
    with pytest.raises(KeyError, match="gone") as known:
        list(prepared_ahead(Fails(KeyError, ("gone",)), 0, 1, workers=1, ahead=1))
    assert "raise self.error" in known.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"raise self\.error(.|\n)*this and that"):
        list(prepared_ahead(Fails(Unportable, ("this", "that")), 0, 1, workers=1, ahead=1))


def _is_ours(name: str) -> bool:
    """Whether a piece of shared memory is mapped by this process."""
    return name.startswith("psm_") and name in Path("/proc/self/maps").read_text()


@dataclass(frozen=True)
class Deadly:
    """Kills the worker that prepares it, as a system does that has no memory left."""

    def __call__(self, number: int) -> int:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def test_a_worker_that_dies_is_said_and_not_waited_for():
    values = prepared_ahead(Deadly(), 0, 9, workers=1, ahead=1)
    with pytest.raises(InputError, match=r"worker process that loads scans died .* fewer"):
        list(values)


_ENDLESS = """
import sys
from h2a2_jax.loader.workers import prepared_ahead
from tests.loader.test_workers import Squares
if __name__ == "__main__":
    for value in prepared_ahead(Squares(), 0, 10**6, workers=2, ahead=2):
        print(value["process"], flush=True)
"""


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(_ENDLESS)
    root = Path(__file__).parents[2]
    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    ) as parent:
        assert parent.stdout is not None
        workers = {int(parent.stdout.readline()) for _ in range(6)}
        parent.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.1)
    while [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")]:
        assert time.monotonic() < deadline, "shared memory is left"
        time.sleep(0.1)

"""Three processes are one device: the same gradients, statistics, norms and losses. `test_step` has three devices.

Each process is given the scans of its own datasets only and one CPU device, or two; they meet over gloo on this
machine. In float64, as in `test_step`, whose scans and detector these are, smaller.
"""

import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.process_step import run_step, smallest_margin, tree_by_name
from tests.xla_flags import xla_flags

pytestmark = pytest.mark.slow  # every process compiles the step

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 400
TOLERANCE = 1e-5


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def slurm(count: int, process: int, port: int) -> dict[str, str]:
    """Variables that SLURM sets for one of the processes of a job on this machine."""
    values = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": count, "PROCID": process, "LOCALID": process}
    return {"JAX_COORDINATOR_PORT": str(port)} | {f"SLURM_{name}": str(value) for name, value in values.items()}


def in_processes(
    folder: Path, devices: tuple[int, ...], *arguments: str, under_slurm: bool = False
) -> tuple[list[int], list[str]]:
    """Exit status and output of processes with so many devices each; none is left running."""
    port = free_port()
    outputs, running = [], []
    for i, count in enumerate(devices):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(count),
            "PYTHONPATH": str(ROOT),
        }
        env |= slurm(len(devices), i, port) if under_slurm else {}
        outputs.append(folder / f"output{i}.txt")
        coordinator = "auto" if under_slurm else f"localhost:{port}"
        command = [sys.executable, "-m", "tests.training.process_step", coordinator, str(len(devices)), str(i)]
        with outputs[-1].open("w") as file:
            running.append(
                subprocess.Popen([*command, *arguments], stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT)
            )
    end = time.monotonic() + TIMEOUT_S
    try:
        codes = [process.wait(max(0.1, end - time.monotonic())) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return codes, [path.read_text() for path in outputs]


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys() and len(theirs) > 100
    tops = {part: max(np.abs(v).max(initial=0) for k, v in theirs.items() if k.startswith(part)) for part in PARTS}
    errors = {
        name: np.abs(ours[name] - value).max(initial=0)
        / max(np.abs(value).max(initial=0), 1e-9 * tops[name.split(".")[0]], 1e-30)
        for name, value in theirs.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE, (worst, errors[worst])


PARTS = ("gradients", "exclusive", "stats", "losses", "norms", "psi", "scales", "selection", "agreement")


@pytest.fixture(scope="module")
def one_device() -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        return tree_by_name(*run_step(jax.devices()[:1]))


@pytest.mark.slow
def test_no_kernel_is_chosen_by_rounding() -> None:
    with jax.enable_x64(True):
        assert smallest_margin() > 1e-5


# One dataset a process; then two devices a dataset, of which one process has five and shares the last dataset.
@pytest.mark.parametrize("devices", [(1, 1, 1), (5, 1)])
def test_processes_are_devices(devices: tuple[int, ...], one_device: dict[str, np.ndarray], tmp_path: Path) -> None:
    codes, outputs = in_processes(tmp_path, devices, str(tmp_path))
    assert codes == [0] * len(devices), "\n".join(outputs)
    told = [pickle.loads((tmp_path / f"process{i}.pickle").read_bytes()) for i in range(len(devices))]
    datasets = [list(part["loaded"]) for part in told]
    assert datasets == ([[0], [1], [2]] if len(devices) == 3 else [[0, 1, 2], [2]])
    for part in told:
        assert_same(part["values"], one_device)


def test_a_failure_in_one_process_ends_all(tmp_path: Path) -> None:
    began = time.monotonic()
    codes, outputs = in_processes(tmp_path, (1, 1), str(tmp_path), "fail", under_slurm=True)
    assert codes == [2, 2], "\n".join(outputs)
    assert "the disk of process 1 is gone" in outputs[1]
    assert "another process failed to open its scans" in outputs[0]
    assert time.monotonic() - began < TIMEOUT_S

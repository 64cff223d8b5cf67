"""Three processes, one dataset each, balance gradients as one device does."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.balancers.process_balancers import GRADS, LOSSES, PRESENT, take_step
from tests.test_processes import free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_processes_balance_as_one_device_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.balancers.process_balancers", f"localhost:{free_port()}"]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([*command, str(i), str(tmp_path)], stderr=subprocess.PIPE, env=env, cwd=ROOT, text=True)
        for i in range(3)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0, 0, 0], "\n".join(errors)
    updates, states = jax.jit(partial(take_step, None))(GRADS, LOSSES, PRESENT)
    for dataset in range(3):
        own = jax.tree.map(lambda leaf, k=dataset: leaf[k : k + 1], updates)
        with np.load(tmp_path / f"process{dataset}.npz") as stored:
            expected = jax.tree.leaves((own, states))
            assert len(stored.files) == len(expected) > 20
            for name, leaf in zip(stored.files, expected, strict=True):
                np.testing.assert_allclose(stored[name], leaf, rtol=1e-5, atol=1e-6)

"""Kill the input of training at random moments: the stream resumes exactly, and nothing is left behind.

    python -m benchmarks.input_kills --kills 10 --workers 2

A child process streams joint steps of procedural scans with worker processes and writes a digest of the arrays of every
step, as a checkpoint would write its step. It is killed (SIGKILL) at random moments, also while it starts, and resumes
behind the last digest on disk; after the last kill it streams to the end. All digests must equal those of an
uninterrupted stream, and neither workers nor shared memory may outlive a kill.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

from h2a2_jax.config import ExperimentConfig, SourceConfig, TrainConfig
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.loader.stream import JointStep, JointStream
from h2a2_jax.models import DetectorConfig
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.scans.synthetic import SyntheticSource

_ENDS_WITHIN_S = 20


def demo_stream(workers: int) -> JointStream:
    """Stream of small procedural scans of the three datasets."""
    datasets = tuple(SourceConfig(spec.name, kind="synthetic") for spec in SPECS)
    train = TrainConfig(batch_size=2, max_bucket=3, workers=workers)
    config = ExperimentConfig(datasets, model=DetectorConfig(voxel_size=0.03), train=train)
    sources = [SyntheticSource(spec, "train", 6, scale="demo") for spec in SPECS]
    return JointStream(config, sources, MeshLayout(train_mesh(len(SPECS), jax.devices()[:1]), len(SPECS)))


def digest(item: JointStep) -> str:
    """Digest of the names and arrays of a step."""
    sha = hashlib.sha256(repr(item.names).encode())
    for leaf in jax.tree.leaves(item.batch):
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def stream_digests(path: Path, steps: int, workers: int) -> None:
    """Append the digests of the steps that the file lacks, and drop a line that a kill cut short."""
    done = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    path.write_text("".join(done))
    with path.open("a") as file:
        for item in demo_stream(workers).steps(len(done), steps):
            file.write(f"{item.step} {digest(item)}\n")
            file.flush()


def descendants(pid: int) -> set[int]:
    """Process ids of all children, grandchildren and so on of a process."""
    children: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children |= {int(child) for child in task.read_text().split()}
    return children.union(*map(descendants, children))


def main() -> int:
    """Kill, resume and compare; exit status 0 if the streams are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        stream_digests(options.child, options.steps, options.workers)
        return 0
    rng = np.random.default_rng(options.seed)
    shared = {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}
    with TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        started = time.monotonic()
        stream_digests(whole, options.steps, workers=0)
        print(f"{options.steps} steps without a kill in {time.monotonic() - started:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.input_kills", f"--steps={options.steps}"]
        command += [f"--workers={options.workers}", f"--child={killed}"]
        for kill in range(options.kills):
            with subprocess.Popen(command) as child:
                time.sleep(rng.uniform(0.5, 9))
                family = descendants(child.pid) if child.poll() is None else set()
                child.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + _ENDS_WITHIN_S
            while alive := [pid for pid in family if Path(f"/proc/{pid}/exe").exists()]:
                if time.monotonic() > deadline:
                    print(f"processes {alive} outlive the kill")
                    return 1
                time.sleep(0.1)
            lines = len(killed.read_text().splitlines()) if killed.exists() else 0
            print(f"kill {kill + 1}: {lines} steps done, {len(family)} processes of the child ended", flush=True)
        subprocess.run(command, check=True)
        if killed.read_text() != whole.read_text():
            print("the stream that was killed differs")
            return 1
    left = {name for name in os.listdir("/dev/shm") if name.startswith("psm_")} - shared
    if left:
        print(f"shared memory is left: {left}")
        return 1
    print(f"{options.steps} steps equal after {options.kills} kills; no process and no shared memory left")
    return 0


if __name__ == "__main__":
    sys.exit(main())

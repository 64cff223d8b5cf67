"""A folder of scans as a job: scans a second against the network's own time, and whether kills change the table.

    python -m benchmarks.prediction_job --scans=200 --kills=5

Procedural rooms are written as files. They are predicted once without a stop, for each choice of --formats, and
once with `kill -9` at random moments, after each of which the same command goes on. Printed: scans a second, the median
seconds of network and boxes for a scan (which the command prints), the share of the time that the network was at work,
and whether boxes.csv and predictions.json of the killed job equal those of the other byte for byte.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.timing import report
from h2a2_jax.scans.specs import SCANNET
from h2a2_jax.scans.synthetic.synthetic_source import SyntheticSource

_SEED = 9
_WARM = 3.0  # s, in which a process does not yet predict


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--weights", default="rooms")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "scans").mkdir()
        source = SyntheticSource(SCANNET, "val", given.scans, seed=_SEED, scale="demo")
        for i in range(given.scans):
            scan = source[i]
            np.savez(folder / "scans" / f"room{i:04}.npz", points=scan.points, colors=scan.colors)
            report(f"scan {i + 1} of {given.scans} made")
        command = [sys.executable, "-m", "h2a2_jax", "predict", str(folder / "scans"), f"--weights={given.weights}"]
        _finish(command, folder / "warm", "csv")  # compiles
        for formats in ("csv", "csv,json", "json,csv,ply,html"):
            started = time.perf_counter()
            last = _finish(command, folder / formats, formats)
            print(f"{formats}: {time.perf_counter() - started:.1f} s with the start of the process; {last}", flush=True)
        _kill(command, folder / "killed", given.kills)
        _finish(command, folder / "killed", "csv,json")
        for name in ("boxes.csv", "predictions.json"):
            same = (folder / "killed" / name).read_bytes() == (folder / "csv,json" / name).read_bytes()
            print(f"{name} after {given.kills} kills: {'the same' if same else 'ANOTHER'}", flush=True)


def _finish(command: list[str], output: Path, formats: str) -> str:
    """Run a job to its end; returns its line of figures."""
    done = subprocess.run([*command, f"--output={output}", f"--formats={formats}"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return next(line for line in done.stdout.splitlines() if re.search("scans a second", line))


def _kill(command: list[str], output: Path, kills: int) -> None:
    """Begin a job and kill it, as often as asked, at random moments of its work."""
    rng, killed = random.Random(_SEED), 0
    while killed < kills:
        process = subprocess.Popen(
            [*command, f"--output={output}", "--formats=csv,json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(_WARM + rng.uniform(0, 6))
            raise RuntimeError("the job ended before it could be killed: give more --scans")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed += 1
        lines = (output / "boxes.csv").read_text().count("\n") if (output / "boxes.csv").exists() else 0
        report(f"killed {killed} times, {lines} lines in the table")


if __name__ == "__main__":
    main()

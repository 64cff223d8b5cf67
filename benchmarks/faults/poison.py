"""`run.py` with NaN in the colours of training scans, which no source of this library lets through.

python -m benchmarks.faults.poison SCAN|all FLAGS_OF_RUN_PY...
"""

import dataclasses
import runpy
import sys
from functools import partial
from typing import Any

import numpy as np

from benchmarks.faults.children import ROOT
from benchmarks.scans import ChangedScans
from h2a2_jax.scans.scan import Scan, ScanSource
from h2a2_jax.training import build

_EVERY = 20  # points: so that every sample of points holds some


def poisoned(chosen: str, scan: Scan) -> Scan:
    """Set colours to NaN in the scan of the chosen name; "all" chooses every scan."""
    if chosen not in (scan.name, "all"):
        return scan
    colors = scan.colors.copy()
    colors[::_EVERY, 0] = np.nan
    return dataclasses.replace(scan, colors=colors)


def main() -> None:
    """Run `run.py` with poisoned sources."""
    poison, plain = partial(poisoned, sys.argv[1]), build.build_source

    def build_source(source: Any, split: Any) -> ScanSource:
        return ChangedScans(plain(source, split), poison)

    build.build_source = build_source  # type: ignore[assignment]
    sys.argv = ["run.py", *sys.argv[2:]]
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()

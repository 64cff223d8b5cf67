"""`run.py` with colours of training scans that are not finite, which no source of this library lets through.

python -m benchmarks.faults.poison SCAN|all FLAGS_OF_RUN_PY...
"""

import dataclasses
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.faults.children import ROOT
from h2a2_jax.inputs.scan import Scan, ScanSource
from h2a2_jax.training import build

_EVERY = 20  # points: some are left, however few are drawn


class Poisoned:
    """A source of which some scans have colours that are NaN.

    Args:
        source: the scans.
        chosen: name of one; "all".
    """

    def __init__(self, source: ScanSource, chosen: str):
        self.source, self.chosen = source, chosen

    @property
    def names(self) -> Sequence[str]:
        """Names of the scans, in order."""
        return self.source.names

    def __len__(self) -> int:
        """Number of scans."""
        return len(self.source)

    def __getitem__(self, index: int) -> Scan:
        """One scan."""
        scan = self.source[index]
        if self.chosen not in (scan.name, "all"):
            return scan
        colors = scan.colors.copy()
        colors[::_EVERY, 0] = np.nan
        return dataclasses.replace(scan, colors=colors)


def main() -> None:
    """Poison, and be `run.py`."""
    chosen = sys.argv[1]
    plain = build.build_source

    def build_source(source: Any, split: Any) -> ScanSource:
        return Poisoned(plain(source, split), chosen)

    build.build_source = build_source  # type: ignore[assignment]
    sys.argv = ["run.py", *sys.argv[2:]]
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()

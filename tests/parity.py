"""Our code against numbers of the reference implementation: `python -m tests.parity FILE...`.

Takes any files of the formats of `tests/fixtures/FORMAT.txt` (ops_*, boxes_*, model_*) and `FORMAT_FCAF3D.txt`
(ops_fcaf3d_*, fcaf3d_*), or folders of them; the weights_* that go with a model are found beside it. Which cases there
are is read from the files. One line a comparison: file and case, largest error, tolerance, "ok" or "FAIL".

Exit status: 0 if all is well, 1 on any failure and on anything that was not run, 2 if a file is missing.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from tests.parity_boxes import run_boxes_file
from tests.parity_case import CaseResult, guarded
from tests.parity_fcaf3d import run_fcaf3d_file, run_fcaf3d_ops_file
from tests.parity_model import run_model_file
from tests.parity_ops import run_ops_file

RUNNERS: dict[str, Callable[[Path], Iterator[CaseResult]]] = {
    "ops_fcaf3d_": run_fcaf3d_ops_file,
    "fcaf3d_": run_fcaf3d_file,
    "ops_": run_ops_file,
    "boxes_": run_boxes_file,
    "model_": run_model_file,
}
"""What runs a file, by the start of its name; the first that fits."""
COMPANIONS = "weights_"
"""Files that are read with others."""


def run_file(path: Path) -> Iterator[CaseResult]:
    """Every comparison of a file; a file that no runner knows, or that cannot be read, fails."""
    runner = next((runner for start, runner in RUNNERS.items() if path.name.startswith(start)), None)
    if runner is None or path.suffix != ".npz":
        yield CaseResult.failed("(not run)", f"unknown file; expected {', '.join(f'{s}*.npz' for s in RUNNERS)}")
    else:
        yield from guarded("(file)", runner(path))


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Files as given, folders replaced by every .npz under them, companions left out."""
    found = [file for path in paths for file in (sorted(path.rglob("*.npz")) if path.is_dir() else [path])]
    return [file for file in found if not (file.suffix == ".npz" and file.name.startswith(COMPANIONS))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.split("\n")[0])
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="reference files, or folders of them")
    paths = parser.parse_args(arguments).files
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        print(f"not found: {', '.join(missing)}", file=sys.stderr)
        return 2
    # Accelerators multiply float32 in fewer bits unless told otherwise.
    with jax.default_matmul_precision("highest"):
        return _report(find_files(paths))


def _report(files: Sequence[Path]) -> int:
    ran, failures = 0, []
    for file in files:
        worst = 0.0
        for result in run_file(file):
            print(f"{file.name} {result.line()}", flush=True)
            ran += 1
            if not result.ok:
                failures.append(f"{file.name} {result.name}")
            elif result.tolerance:
                worst = max(worst, result.error / result.tolerance)
        print(f"{file.name}: largest error of what passed is {worst:.3f} of its tolerance", flush=True)
    if not ran:
        print("nothing was run: no reference file among the arguments")
        return 1
    print(f"{ran} comparisons in {len(files)} files, {len(failures)} failed" + "".join(f"\n  {f}" for f in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

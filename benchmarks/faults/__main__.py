"""Faults that a training must survive: kills, signals, full disks, damaged files, poisoned scans.

    python -m benchmarks.faults [--only kills,disk] [--kills 20] [--seed 0] [--folder DIR]

`run.py` trains `configs/joint.py:tiny` in child processes on CPU devices, once without a fault. Then it is killed,
stopped, robbed of its disk, and so on, and started again with the same command. Its result must equal the result of the
training without a fault, bit by bit. The program prints one line for each event, with the time taken and the time left,
then a table of all faults: survived, ended with one sentence, or at fault; --table writes it as Markdown. It exits with
status 1 if something failed. All files are in a temporary folder, or in --folder, which stays.

    kills      SIGKILL at moments spread over start-up, steps, saving, evaluation and the end; some with a cache of
               compiled programs of their own
    sigterm    SIGTERM, SIGHUP and SIGINT, once and twice: the step is saved, the status is 0 and 130; signals while a
               step compiles
    disk       a disk that is full when a checkpoint or a line is written; a read-only disk (needs root)
    damaged    checkpoints with a file cut in half, a flipped bit or a missing folder
    files      every file of a run and of a pretrained folder, damaged in eight ways and read; some of them resumed
    second     two runs in one workdir, and a run that resumes with another config
    workers    a process that loads scans is killed
    devices    saved on three devices, resumed on one and on six; evaluated on one, three and six
    poison     scans with colours that are not finite
    processes  three processes: one stopped for a while, for good, and by SIGTERM; some that are missing, die at the
               start or disagree; each killed in turn, in a step, while saving and in the evaluation
    output     outputs that are closed, full or not read, a terminal that closes
    vanish     a workdir that is removed, moved or replaced
    hostile    800 damaged and hostile files over all readers: one sentence each, in bounded memory and time
    surroundings  no HOME, TMPDIR that cannot be written to, umask, few open files, a clock that jumps, odd paths,
               links, two trainings at once, a read-only checkout; folders in place of files, files in place of folders
    cache      every file of compiled programs damaged, moved, or signed by another user
"""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.faults.cache import cache
from benchmarks.faults.children import Bench, Report
from benchmarks.faults.damage import damaged, disk
from benchmarks.faults.files import files, resumed_files
from benchmarks.faults.hostile import hostile
from benchmarks.faults.kills import kills, own_cache
from benchmarks.faults.output import output, vanish
from benchmarks.faults.processes import killed, processes, silent, strangers
from benchmarks.faults.stops import compiling, second, sigterm, workers
from benchmarks.faults.surroundings import occupied, surroundings
from benchmarks.faults.values import devices, poison
from h2a2_jax.files import whole_file

SCENARIOS: dict[str, tuple[tuple[Callable[[Bench], None], ...], int]] = {
    "kills": ((kills, own_cache), 6),
    "sigterm": ((sigterm, compiling), 19),
    "disk": ((disk,), 8),
    "damaged": ((damaged,), 5),
    "files": ((files, resumed_files), 13),
    "second": ((second,), 4),
    "workers": ((workers,), 1),
    "devices": ((devices,), 7),
    "poison": ((poison,), 4),
    "processes": ((processes, silent, strangers, killed), 47),
    "output": ((output,), 7),
    "vanish": ((vanish,), 6),
    "hostile": ((hostile,), 0),
    "surroundings": ((surroundings, occupied), 26),
    "cache": ((cache,), 13),
}
"""Functions of a scenario, and the number of trainings that it starts without the kills of --kills."""


def main() -> int:
    """Run the scenarios; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, with commas between")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--table", type=Path, help="file for the table, in Markdown")
    parser.add_argument("--folder", type=Path, help="stays; a finished training without a fault in it is used again")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SCENARIOS):
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    # Shells and nohup may have made this process ignore signals, which its children would ignore, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)  # children handle it, this process goes on
    with TemporaryDirectory(prefix="faults_") as folder:
        report = Report({name: SCENARIOS[name][1] + options.kills * (name == "kills") for name in chosen})
        bench = Bench(options.folder or Path(folder), options.kills, np.random.default_rng(options.seed), report)
        report.scenario = "none"
        bench.make_reference()  # compiles the programs of the other trainings
        for name in chosen:
            report.scenario = name
            for scenario in SCENARIOS[name][0]:
                with report.attempt():
                    scenario(bench)
            report.planned[name] = 0
        report.scenario = ""
        table = report.table()
        print(table)
        if options.table:
            with whole_file(options.table) as part:
                part.write_text(f"{table}\n", encoding="utf-8")
        count = len(report.failures) or "nothing"
        report.event(f"{count} failed in {', '.join(chosen)}")
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())

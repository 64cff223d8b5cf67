"""The job scripts of docs/training.md start the processes of one run, whatever their number."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from h2a2_jax.cli import COMMANDS, parse

ROOT = Path(__file__).parent.parent
STAND_INS = """
scontrol() { printf 'node%s\\n' 7 8 9; }
h2a2() { printf '%s %s\\n' "$JAX_LOCAL_DEVICE_IDS" "$*"; }
srun() {
    while [[ $1 == -* ]]; do shift; done
    for process in 0 1 2; do (export SLURM_NTASKS=3 SLURM_PROCID=$process; "$@"); done
}
export -f h2a2
"""
"""In place of SLURM and the command: the arguments of each process, a line each."""


def scripts() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if "#SBATCH" in block]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections loads configs so
@pytest.mark.parametrize("is_automatic", [True, False])
def test_a_script_starts_the_processes_of_a_run(is_automatic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (script,) = (script for script in scripts() if ("--coordinator=auto" in script) == is_automatic)
    done = subprocess.run(["bash", "-euc", "JAX_LOCAL_DEVICE_IDS= SLURM_JOB_NODELIST=node[7-9]\n" + STAND_INS + script],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    given = [parse(COMMANDS[0], shlex.split(arguments.removeprefix("train "))) for _, _, arguments in lines]
    found = [(v.flags.coordinator, v.flags.num_processes, v.flags.process_id) for v in given]
    ours = [("auto", None, None)] * 3 if is_automatic else [("node7:12345", 3, i) for i in range(3)]
    assert found == ours and {gpus for gpus, _, _ in lines} == {"" if is_automatic else "0,1,2,3"}
    assert {str(v.workdir) for v in given} == {"/shared/runs/joint"} and given[0].experiment().datasets

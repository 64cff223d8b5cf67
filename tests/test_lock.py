"""One program at a time in a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.files import alone_in


def test_a_second_program_is_refused_with_the_number_of_the_first(tmp_path: Path):
    folder = tmp_path / "run"
    with alone_in(folder, "training run"):
        with pytest.raises(InputError, match=rf"Another training run is at work in .*run \(process {os.getpid()}\)"):
            with alone_in(folder, "training run"):
                pytest.fail("both are in")
    with alone_in(folder, "training run"):
        assert (folder / "lock").read_text() == f"process {os.getpid()}\n"


def test_a_killed_program_releases_the_lock(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from h2a2_jax.files import alone_in\n"
        f"with alone_in(Path({str(tmp_path)!r}), 'run'): print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "in\n"
        with pytest.raises(InputError, match=f"process {child.pid}"), alone_in(tmp_path, "run"):
            pytest.fail("both are in")
        child.kill()
    with alone_in(tmp_path, "run"):
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written to .*give another --workdir"):
        with alone_in(tmp_path / "file" / "run", "run"):
            pytest.fail("there is no such folder")

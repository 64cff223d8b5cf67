"""Runs of a sweep: several at once, one after another, failing, killed and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.joint import demo, two
from h2a2_jax.sweeps import sweep_runner
from h2a2_jax.sweeps.ablation import ablation_rows, tau_rows
from h2a2_jax.sweeps.sweep_plan import Row, SweepRun, locate
from h2a2_jax.sweeps.sweep_results import finished, last_metrics
from h2a2_jax.sweeps.sweep_runner import Share, run_all, runs_to_do, shares
from tests.sweeps.finished import write_run
from tests.xla_flags import xla_flags

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_runs_at_once_on_a_cpu_divide_its_cores():
    cores = sorted(os.sched_getaffinity(0))
    assert shares(1) == [Share()]  # alone: all of them
    divided = shares(len(cores)) if len(cores) > 1 else []
    assert [core for share in divided for core in share.cores] == (cores if divided else [])
    assert all(len(share.cores) == 1 for share in divided)
    assert len(shares(None)) == min(4, len(cores))


def test_what_is_finished_is_not_done_again_and_a_cut_evaluation_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = tau_rows(demo(), (0.15, 0.25), (0,))
    folders = locate(rows, tmp_path)
    for run, folder in folders.items():
        write_run(folder, run.config, {"scannet": (0.1, 0.2)})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert run_all(folders, jobs=1) == {}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
    assert "2 of 2 runs are finished" in capsys.readouterr().out

    path = next(iter(folders.values())) / "evaluation.json"
    path.write_text(path.read_text()[:-3])
    assert not finished(path.parent)


def test_all_rows_have_their_first_seed_before_any_has_its_second(tmp_path: Path):
    folders = locate(ablation_rows(demo(), (0, 1), ("naive", "frozen", "single")), tmp_path)
    once = dict.fromkeys(folders, 1)
    rows = ("naive", "frozen", "tr3d_scannet", "tr3d_sunrgbd", "tr3d_s3dis")
    assert [(run.seed, run.name) for run in runs_to_do(folders, once)] == [(s, name) for s in (0, 1) for name in rows]
    # What was done before in another order makes no difference.
    for run, folder in folders.items():
        if run.folder in ("naive_seed1", "frozen_seed0", "tr3d_s3dis_seed0"):
            write_run(folder, run.config, {"scannet": (0.1, 0.2)})
    left = [run.folder for run in runs_to_do(folders, once)]
    assert left[:3] == ["naive_seed0", "tr3d_scannet_seed0", "tr3d_sunrgbd_seed0"]
    assert left[3:] == ["frozen_seed1", "tr3d_scannet_seed1", "tr3d_sunrgbd_seed1", "tr3d_s3dis_seed1"]


def test_a_run_waits_for_the_one_that_it_starts_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, broken, other = (SweepRun(name, 0, demo()) for name in ("first", "broken", "other"))
    waiting = [
        SweepRun("second", 0, demo(), after=first),
        SweepRun("never", 0, demo(), after=broken),
        broken,
        first,
        other,
    ]
    folders = {run: tmp_path / run.folder for run in waiting}
    begun, printed = [], []
    monkeypatch.setattr(sweep_runner._Progress, "print_end", lambda self, text: printed.append(text.partition(":")[0]))

    def start(run, folder, share, *others):
        begun.append(run.name)
        write_run(folder, run.config, None if run is broken else {"scannet": (0.1, 0.2)})
        (folder / sweep_runner.LOG).write_text("it broke")
        command = [sys.executable, "-c", "raise SystemExit(1)" if run is broken else ""]
        return sweep_runner._Job(run, folder, subprocess.Popen(command, stdin=subprocess.PIPE), share, time.monotonic())

    monkeypatch.setattr(sweep_runner, "_start", start)
    failures = run_all(folders, jobs=1)
    assert begun == ["broken", "first", "second", "other"]
    named = ("broken_seed0 failed", "never_seed0 was not begun", "first_seed0", "second_seed0", "other_seed0")
    assert tuple(printed) == named
    assert {run.name: reason.partition(" (all")[0] for run, reason in failures.items()} == {
        "broken": "broken_seed0 failed: it broke",
        "never": "never_seed0 was not begun: it waits for a run that failed.",
    }


def test_a_run_that_fails_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    run = SweepRun("tau0.2", 0, two())  # whose data are not there
    rows = [Row("tau = 0.2", (run,), 0.2)]
    failures = run_all(locate(rows, tmp_path), jobs=1)
    assert re.match(r"tau0.2_seed0 failed: The data of scannet is not there.*log\.txt\)", failures[run])


TINY = """
from dataclasses import replace

from configs.joint import demo
from h2a2_jax.config import config_dict


def get_config():
    config = demo()
    source = replace(config.datasets[2], train_size=2, val_size=1)
    model = replace(config.model, stem_channels=2, stage_channels=(2, 2, 2, 2), neck_channels=2, voxel_size=0.05)
    model = replace(model, selection=replace(model.selection, convolutions=("stem",)))
    train = replace(config.train, batch_size=1, steps=24, log_every=1, checkpoint_every=4)
    return config_dict(replace(config, datasets=(source,), model=model, train=train))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_killed_sweep_leaves_no_process_and_goes_on_from_its_checkpoints(tmp_path: Path):
    (tmp_path / "tiny.py").write_text(TINY)
    workdir = tmp_path / "sweep"
    flags = [f"--config={tmp_path / 'tiny.py'}", f"--workdir={workdir}", "--jobs=1"]
    command = [sys.executable, "run.py", "--mode=tau_sweep", "--taus=0.25", "--seeds=0", *flags]
    environment = {**os.environ, "XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)}

    def workers() -> list[Path]:
        return [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(workdir).encode() in _read(p)]

    with (tmp_path / "first.txt").open("w") as out:
        first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        deadline = time.monotonic() + 120
        while not [*workdir.glob("runs/*/checkpoints/4")]:
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "first.txt").read_text()
            time.sleep(0.05)
        (worker,) = (pid for pid in (int(p.parent.name) for p in workers()) if pid != first.pid)
        os.kill(worker, signal.SIGSTOP)  # it would be finished before another sweep has begun
        other = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert other.returncode == 2 and "Another sweep is at work in" in other.stderr
        first.send_signal(signal.SIGKILL)
        first.wait()
        os.kill(worker, signal.SIGCONT)
    while workers():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not [*workdir.glob("runs/*/evaluation.json")]

    # A budget that ends before the worker has imported anything: the checkpoints stay, the table has the finished runs.
    saved = sorted(workdir.glob("runs/*/checkpoints/*"))
    short = [*command, "--budget_minutes=0.005"]
    budget = subprocess.run(short, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert budget.returncode == 0, budget.stderr
    assert "The budget of 0.005 minutes is used; 1 run is left, the same command goes on." in budget.stdout
    assert "| tau = 0.25 | -" in budget.stdout and not workers()
    assert sorted(workdir.glob("runs/*/checkpoints/*")) == saved

    # The protocol's first training is the same experiment; it is evaluated once more, with other points.
    command = [sys.executable, "run.py", "--mode=protocol", "--trainings=1", "--evaluations=2", *flags]
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    run = workdir / "runs" / "tau0.25_seed0"
    assert re.search(r"Resuming .* after step (4|8|12|16|20|24) of 24", (run / "log.txt").read_text())
    assert last_metrics(run)["step"] == 24 and finished(run, 2) and not finished(run, 3)
    assert "| s3dis @0.25" in second.stdout
    results = {found["kind"]: found for found in json.loads((workdir / "results.json").read_text())["results"]}
    assert list(results) == ["tau_sweep", "protocol"]
    scores = [score for row in results["protocol"]["rows"] for score in row["scores"] if score["dataset"] == "s3dis"]
    assert {score["folder"] for score in scores} == {run.name}
    assert [score["evaluation"] for score in scores if "mAP@0.5" in score["metrics"]] == [0, 1]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""

"""Sweeps: which runs they are made of, where these are kept, their tables, and what a kill leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from configs.joint import demo, two
from h2a2_jax.commands import tau_sweep_command
from h2a2_jax.errors import InputError
from h2a2_jax.sweeps import runner
from h2a2_jax.sweeps.picture import draw_ablation, draw_tau
from h2a2_jax.sweeps.plan import Row, Run, ablation_rows, default_taus, locate, restricted, tau_rows
from h2a2_jax.sweeps.protocol import protocol_rows, protocol_table, summarised
from h2a2_jax.sweeps.results import table, write_protocol, write_results
from h2a2_jax.sweeps.runner import Share, finished, last_metrics, run_all, shares
from h2a2_jax.sweeps.tables import spread
from h2a2_jax.training.build import count_parameters
from h2a2_jax.training.config import ExperimentConfig, to_json

ROOT = Path(__file__).parents[2]
LEVELS = (0.25, 0.5)


def tau_of(run: Run) -> float:
    assert run.config.model.selection is not None
    return run.config.model.selection.tau


def write_run(folder: Path, config: ExperimentConfig, scores: dict[str, Sequence[float | None]] | None) -> None:
    """The files that a run leaves: one that finished, or one that was stopped."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config) + "\n")
    if scores is not None:
        levels = {n: [{"iou": iou, "mAP": x} for iou, x in zip(LEVELS, s, strict=True)] for n, s in scores.items()}
        (folder / "evaluation.json").write_text(json.dumps({n: {"thresholds": t} for n, t in levels.items()}))


def test_the_tau_sweep_changes_tau_and_the_seed_and_nothing_else():
    rows = tau_rows(demo(), (0.15, 0.25), (0, 3))
    assert [run.folder for row in rows for run in row.runs] == [
        "tau0.15_seed0",
        "tau0.15_seed3",
        "tau0.25_seed0",
        "tau0.25_seed3",
    ]
    assert [(tau_of(run), run.config.train.seed) for row in rows for run in row.runs] == [
        (0.15, 0),
        (0.15, 3),
        (0.25, 0),
        (0.25, 3),
    ]
    assert rows[1].runs[0].config == demo()
    again = rows[0].runs[1].config
    model = replace(again.model, selection=demo().model.selection)
    assert replace(again, model=model, train=replace(again.train, seed=0)) == demo()


def test_the_default_taus_have_the_configs_own_among_them():
    assert default_taus(demo()) == (0.15, 0.2, 0.25, 0.3, 0.35)
    model = demo().model
    assert model.selection is not None
    other = replace(demo(), model=replace(model, selection=replace(model.selection, tau=0.1)))
    assert default_taus(other)[0] == 0.1 and len(default_taus(other)) == 6


def test_the_ablation_switches_selection_and_harmonisation():
    base = replace(demo(), harmonize=replace(demo().harmonize, threshold=0.7))
    rows = ablation_rows(base, (0,))
    joint = {run.name: run.config for row in rows[:4] for run in row.runs}
    switches = {name: (c.model.selection is not None, c.harmonize.method) for name, c in joint.items()}
    assert switches == {
        "naive": (False, "mean"),
        "sfks": (True, "mean"),
        "ngh": (False, "ngh"),
        "sfks_ngh": (True, "ngh"),
    }
    assert joint["sfks_ngh"] == base
    assert all(c.harmonize.threshold == 0.7 and c.train == base.train for c in joint.values())
    alone = {run.name: run.config for run in rows[4].runs}
    assert list(alone) == ["tr3d_scannet", "tr3d_sunrgbd", "tr3d_s3dis"]
    for source, config in zip(base.datasets, alone.values(), strict=True):
        assert config == replace(joint["naive"], datasets=(source,))
    chosen = ablation_rows(base, (0, 1), ("sfks_ngh", "tr3d_s3dis"))
    assert [row.label for row in chosen] == ["SF-KS + NGH", "TR3D alone on s3dis"]
    assert chosen[0].runs[0].config == base and [run.seed for run in chosen[1].runs] == [0, 1]
    assert chosen[1].runs[0].config == alone["tr3d_s3dis"]


def test_alone_a_dataset_takes_the_steps_of_joint_training_and_lowers_its_rate_after_as_many():
    # 100 and 30 scans, 4 in a batch: epochs of 25 joint steps, and of 8 alone on the smaller dataset.
    scannet, sunrgbd, _ = demo().datasets
    datasets = (replace(scannet, train_size=100), replace(sunrgbd, train_size=30))
    base = replace(demo(), datasets=datasets, train=replace(demo().train, steps=0, epochs=9))
    large, small = (run.config for run in ablation_rows(base, (0,))[4].runs)
    assert large.train.steps == small.train.steps == 225
    assert large.optim.decay_epochs == base.optim.decay_epochs == (6, 8)
    assert small.optim.decay_epochs == (19, 25)  # 150 and 200 joint steps are 18.75 and 25 of its epochs
    # Of two batches: 13 joint steps are an epoch, 4 alone, and 78 and 104 of 117 joint steps 19.5 and 26 of its epochs.
    base = replace(base, optim=replace(base.optim, batches=2))
    small = restricted(base, ["sunrgbd"])
    assert small.train.steps == 117 and small.optim.decay_epochs == (19, 26)


@pytest.mark.parametrize(
    ("decays", "steps", "expected"),
    [
        ((8, 11), 150, (4, 5)),  # of 6 epochs: 5.5 is nearer to 5 than to the end
        ((8, 9), 50, (1,)),  # 1.33 and 1.5 of 2 epochs: a second one would come at the end
        ((6, 8), 100, (2, 3)),  # 2 and 2.67 of 4
        ((2, 3), 100, (1, 2)),  # 0.67 and 1, of which the second comes an epoch later
        ((8, 11), 25, ()),
    ],
)
def test_a_shorter_training_lowers_its_rate_at_the_same_parts(decays: tuple, steps: int, expected: tuple):
    base = replace(demo(), datasets=tuple(replace(source, train_size=100) for source in demo().datasets))
    base = replace(base, optim=replace(base.optim, decay_epochs=decays), train=replace(base.train, steps=0, epochs=12))
    found = restricted(base, ["s3dis"], steps)
    assert (found.train.steps, found.optim.decay_epochs) == (steps, expected)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (lambda: tau_rows(demo(), (0.2, 0.2), (0,)), "The taus are 0.2, 0.2; expected at least one, each once"),
        (lambda: tau_rows(demo(), (0.2,), ()), "The seeds are none"),
        (lambda: tau_rows(demo(), (1.2,), (0,)), "model.selection.tau is 1.2; expected a number from 0 to 1"),
        (lambda: tau_rows(replace(demo(), model=replace(demo().model, selection=None)), (0.2,), (0,)), "is off"),
        (lambda: ablation_rows(demo(), (-1,)), "train.seed is -1"),
        (lambda: ablation_rows(replace(demo(), datasets=demo().datasets[:1]), (0,)), "only scannet"),
        (lambda: ablation_rows(demo(), (0,), ("both",)), "no row 'both'; its rows are naive, sfks, ngh, sfks_ngh,"),
        (
            lambda: ablation_rows(demo(), (0,), ("ngh", "ngh")),
            "The rows are ngh, ngh; expected at least one, each once",
        ),
        (lambda: protocol_rows(demo(), 0, 5), "--trainings is 0; expected 1 or more, 5 as the field has it"),
        (lambda: protocol_rows(demo(), 5, 0), "--evaluations is 0"),
        (lambda: run_all({}, Path("cache"), budget_minutes=0.0), "--budget_minutes is 0; expected a number above 0"),
        (lambda: shares(0), "--jobs is 0; expected 1 to"),
        (lambda: shares(10**6), "the processor cores here"),
    ],
)
def test_what_makes_no_sense_is_refused(plan, sentence: str):
    with pytest.raises(InputError, match=re.escape(sentence)):
        plan()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_runs_at_once_on_a_cpu_divide_its_cores():
    cores = sorted(os.sched_getaffinity(0))
    assert shares(1) == [Share()]  # alone: all of them
    divided = shares(len(cores)) if len(cores) > 1 else []
    assert [core for share in divided for core in share.cores] == (cores if divided else [])
    assert all(len(share.cores) == 1 for share in divided)
    assert len(shares(None)) == min(4, len(cores))


def test_an_experiment_is_found_under_another_name_and_another_one_is_refused(tmp_path: Path):
    sweep, ablation = tau_rows(demo(), (0.15, 0.25), (0,)), ablation_rows(demo(), (0,))
    own = locate(sweep, tmp_path)
    assert [folder.name for folder in own.values()] == ["tau0.15_seed0", "tau0.25_seed0"]
    for run, folder in own.items():
        write_run(folder, run.config, None)
    assert locate(sweep, tmp_path) == own

    shared = locate(ablation, tmp_path)
    assert {run.name: folder.name for run, folder in shared.items() if folder in own.values()} == {
        "sfks_ngh": "tau0.25_seed0"
    }
    assert len({*shared.values()}) == len(shared) == 7

    longer = replace(demo(), train=replace(demo().train, steps=300))
    with pytest.raises(InputError, match=r"tau0.15_seed0 holds another .*train.steps is 200 there and 300 here"):
        locate(tau_rows(longer, (0.15,), (0,)), tmp_path)


def test_a_config_that_a_kill_cut_short_does_not_bar_the_way(tmp_path: Path):
    rows = tau_rows(demo(), (0.15,), (0,))
    (run,) = rows[0].runs
    folder = tmp_path / "runs" / run.folder
    write_run(folder, run.config, None)
    for length in (0, 100):
        (folder / "config.json").write_text(to_json(run.config)[:length])
        assert locate(rows, tmp_path) == {run: folder}
    (folder / "config.json").write_text("something else")
    with pytest.raises(InputError, match="cannot be read"):
        locate(rows, tmp_path)


def test_means_and_sample_deviations():
    assert spread([None, None]) is None
    assert spread([3.0]) == {"mean": 3.0, "std": None, "n": 1}
    found = spread([1.0, 2.0, None, 6.0])
    assert found is not None and found["mean"] == 3.0 and found["n"] == 3
    assert found["std"] == pytest.approx(7**0.5)  # squares of -2, -1 and 3, over 3 - 1


def test_the_table_has_means_over_seeds_and_over_datasets(tmp_path: Path):
    base = replace(demo(), datasets=demo().datasets[:2])
    rows = ablation_rows(base, (0, 1))
    folders = locate(rows, tmp_path)
    scores = {  # by run: ScanNet at both thresholds, SUN RGB-D at both
        "sfks_ngh_seed0": {"scannet": (0.5, 0.2), "sunrgbd": (0.3, 0.1)},
        "sfks_ngh_seed1": {"scannet": (0.6, 0.2), "sunrgbd": (0.1, None)},
        "naive_seed1": {"scannet": (0.25, 0.125), "sunrgbd": (0.75, 0.375)},
        "tr3d_scannet_seed0": {"scannet": (0.4, 0.1)},
        "tr3d_sunrgbd_seed0": {"sunrgbd": (0.2, 0.0)},
        "tr3d_scannet_seed1": {"scannet": (0.9, 0.9)},
    }
    for run, folder in folders.items():
        write_run(folder, run.config, scores.get(folder.name))
    for name, rates in {
        "sfks_ngh_seed0": (1.0, 8.0, 9.0),
        "sfks_ngh_seed1": (12.0,),
        "tr3d_scannet_seed0": (8.0,),
        "tr3d_sunrgbd_seed0": (16.0,),
    }.items():
        lines = [(0, 100.0), *enumerate(rates)]
        text = "".join(
            json.dumps({"step": step, "version": 1, "scans_per_second": rate}) + "\n" for step, rate in lines
        )
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(text)
    result = write_results("ablation", base, rows, folders, tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(result).splitlines() if "|" in line]
    assert lines[0] == [
        "setting",
        *(f"{name} mAP@{level}" for name in ("scannet", "sunrgbd", "mean") for level in LEVELS),
        "parameters",
        "scans/s",
        "seeds",
    ]
    assert [row["parameters"] for row in result["rows"]] == [
        sum(count_parameters(run.config) for run in row.runs if run.seed == 0) for row in rows
    ]
    counted = {cells[0]: cells[-3:-1] for cells in lines[2:]}
    assert float(counted["SF-KS"][0].removesuffix(" M")) > float(counted["naive joint"][0].removesuffix(" M")) > 0
    # Of the medians 8 and 12, where of two lines of a step the later counts; alone, of as many scans at 8 and at 16.
    assert counted["SF-KS + NGH"][1] == "10.0 ± 2.8" and counted["TR3D alone"][1] == f"{2 / (1 / 8 + 1 / 16):.1f}"
    assert counted["naive joint"][1] == "-"
    by_label = {cells[0]: [*cells[1:-3], cells[-1]] for cells in lines[2:]}
    # Deviations of two values: their difference over the root of 2. The last mean is of one seed, without a spread.
    assert by_label["SF-KS + NGH"] == ["55.0 ± 7.1", "20.0 ± 0.0", "20.0 ± 14.1", "10.0", "37.5 ± 3.5", "15.0", "2"]
    assert by_label["naive joint"] == ["25.0", "12.5", "75.0", "37.5", "50.0", "25.0", "1"]
    assert by_label["NGH"] == ["-"] * 6 + ["0"]
    # Seed 1 has no run on SUN RGB-D yet: a row's seeds are whole or not counted.
    assert by_label["TR3D alone"] == ["40.0", "10.0", "20.0", "0.0", "30.0", "5.0", "1"]
    assert "say nothing about the benchmarks" in table(result)
    draw_ablation(result, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_results_keep_other_sweeps_and_real_data_need_no_warning(tmp_path: Path):
    base = two()
    sweep, ablation = tau_rows(base, (0.2, 0.3), (0,)), ablation_rows(demo(), (0,))
    folders = locate(sweep, tmp_path)
    for i, (run, folder) in enumerate(folders.items()):
        write_run(folder, run.config, {name: (0.1 * i, 0.05 * i) for name in base.dataset_names})
        shares = {f"exclusive_share/{name}": 0.5 + 0.1 * i for name in base.dataset_names}
        (folder / "metrics.jsonl").write_text(
            json.dumps({"step": 9, "version": 1, **shares}) + '\n{"step": 10, "cut sho'
        )
    swept = write_results("tau_sweep", base, sweep, folders, tmp_path)
    write_results("ablation", demo(), ablation, locate(ablation, tmp_path), tmp_path)
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["version"] == 1 and document["tau_sweep"] == swept and len(document["ablation"]["rows"]) == 5
    assert [row["tau"] for row in swept["rows"]] == [0.2, 0.3]
    assert swept["rows"][1]["summary"]["exclusive_share"]["sunrgbd"]["mean"] == pytest.approx(60)
    text = (tmp_path / "table.md").read_text()
    assert text.count("## ") == 2 and "| tau = 0.3" in text and "scannet exclusive" in text
    assert "benchmarks" not in table(swept)

    draw_tau(swept, tmp_path / "tau.png")
    assert (tmp_path / "tau.png").read_bytes().startswith(b"\x89PNG")


def test_the_protocol_has_the_best_the_mean_and_the_spread(tmp_path: Path):
    base = replace(demo(), datasets=demo().datasets[:2], train=replace(demo().train, seed=7))
    rows = protocol_rows(base, 3, 2)
    folders = locate(rows, tmp_path)
    assert [folder.name for folder in folders.values()] == ["training_seed7", "training_seed8", "training_seed9"]
    # SUN RGB-D's points are drawn, so that it has a second evaluation; ScanNet's first counts twice.
    for (run, folder), again in zip(folders.items(), (0.3, 0.5, None), strict=True):
        write_run(folder, run.config, {"scannet": (0.1 * (run.seed - 6), None), "sunrgbd": (0.2, 0.1)})
        if again is not None:
            write_run(folder / "evaluation_draw1", run.config, {"sunrgbd": (again, 0.1)})
    assert [finished(folder, 2) for folder in folders.values()] == [True, True, False]
    result = write_protocol(base, rows, folders, tmp_path, 2)
    assert [run["seed"] for run in result["runs"]] == [7, 8]
    assert result["runs"][0]["mAP"]["sunrgbd"][0] == pytest.approx([20, 30])
    scannet, drawn = result["summary"]["scannet"][0], result["summary"]["sunrgbd"][0]
    assert (scannet["best"], scannet["mean"], scannet["n"]) == pytest.approx((20, 15, 4))
    assert scannet["std_evaluations"] == 0 and scannet["std_trainings"] == pytest.approx(10 / 2**0.5)
    assert (drawn["best"], drawn["worst"], drawn["mean"]) == pytest.approx((50, 20, 30))
    assert drawn["std_trainings"] == pytest.approx(10 / 2**0.5)  # of the means 25 and 35
    assert drawn["std_evaluations"] == pytest.approx(((50 + 450) / 2) ** 0.5)  # of 20, 30 and of 20, 50
    assert result["summary"]["scannet"][1] is None and result["summary"]["mean"][1] is None
    assert result["summary"]["mean"][0]["best"] == pytest.approx(35)

    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in protocol_table(result).splitlines()]
    assert lines[0] == ["mAP", "best", "mean", "± all", "± trainings", "± evaluations", "worst", "n"]
    assert lines[4] == ["sunrgbd @0.25", "50.00", "30.00", "14.14", "7.07", "15.81", "20.00", "4"]
    assert lines[3][1:] == ["-"] * 6 + ["0"]
    for part in ("of scannet uses all points", "after 200 steps; trainings: 2, evaluations of each: 2;"):
        assert part in result["note"]
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["protocol"] == result and "## Trainings and evaluations" in (tmp_path / "table.md").read_text()
    assert summarised([[None], []]) is None and summarised([[1.0]])["std"] is None


def test_what_is_finished_is_not_done_again_and_a_cut_evaluation_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = tau_rows(demo(), (0.15, 0.25), (0,))
    folders = locate(rows, tmp_path)
    for run, folder in folders.items():
        write_run(folder, run.config, {"scannet": (0.1, 0.2)})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert run_all(folders, tmp_path / "cache", jobs=1) == {}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
    assert "2 of 2 runs are finished" in capsys.readouterr().out

    path = next(iter(folders.values())) / "evaluation.json"
    path.write_text(path.read_text()[:-3])
    assert not finished(path.parent)


def test_a_sweep_whose_runs_are_finished_writes_its_table_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for run, folder in locate(tau_rows(demo(), (0.15, 0.25), (0,)), tmp_path).items():
        write_run(folder, run.config, {name: (0.3, 0.2) for name in demo().dataset_names})
    assert tau_sweep_command(demo(), tmp_path, (0.15, 0.25), (0,), 1) == 0
    assert "| tau = 0.25 | 30.0" in capsys.readouterr().out
    assert (tmp_path / "tau.png").exists() and "| tau = 0.15" in (tmp_path / "table.md").read_text()


def test_a_run_waits_for_the_one_that_it_starts_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, broken, other = (Run(name, 0, demo()) for name in ("first", "broken", "other"))
    waiting = [Run("second", 0, demo(), after=first), Run("never", 0, demo(), after=broken), broken, first, other]
    folders = {run: tmp_path / run.folder for run in waiting}
    begun, told = [], []
    monkeypatch.setattr(runner._Progress, "tell", lambda self, what: told.append(what.partition(":")[0]))

    def start(run, folder, share, *others):
        begun.append(run.name)
        write_run(folder, run.config, None if run is broken else {"scannet": (0.1, 0.2)})
        (folder / runner.LOG).write_text("it broke")
        command = [sys.executable, "-c", "raise SystemExit(1)" if run is broken else ""]
        return runner._Job(run, folder, subprocess.Popen(command, stdin=subprocess.PIPE), share, time.monotonic())

    monkeypatch.setattr(runner, "_start", start)
    failures = run_all(folders, tmp_path / "cache", jobs=1)
    assert begun == ["broken", "first", "second", "other"]
    named = ("broken_seed0 failed", "never_seed0 was not begun", "first_seed0", "second_seed0", "other_seed0")
    assert tuple(told) == named
    assert {run.name: reason.partition(" (all")[0] for run, reason in failures.items()} == {
        "broken": "broken_seed0 failed: it broke",
        "never": "never_seed0 was not begun: it waits for a run that failed.",
    }


def test_a_run_that_fails_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    run = Run("tau0.2", 0, two())  # whose data are not there
    rows = [Row("tau = 0.2", (run,), 0.2)]
    failures = run_all(locate(rows, tmp_path), tmp_path / "cache", jobs=1)
    assert re.match(r"tau0.2_seed0 failed: The data of scannet is not there.*log\.txt\)", failures[run])


TINY = """
from dataclasses import replace

from configs.joint import demo
from h2a2_jax.training.config import config_dict


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
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}

    def workers() -> list[Path]:
        return [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(workdir).encode() in _read(p)]

    with (tmp_path / "first.txt").open("w") as out:
        first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        deadline = time.monotonic() + 120
        while not [*workdir.glob("runs/*/checkpoints/4")]:
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "first.txt").read_text()
            time.sleep(0.05)
        assert len(workers()) == 2  # the sweep and its run
        other = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert other.returncode == 2 and "Another sweep is at work in" in other.stderr
        first.send_signal(signal.SIGKILL)
        first.wait()
    while workers():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not [*workdir.glob("runs/*/evaluation.json")]

    # A budget that is over before the run is: what was saved stays, and the table is of what is finished.
    saved = sorted(workdir.glob("runs/*/checkpoints/*"))
    short = [*command, "--budget_minutes=0.05"]
    budget = subprocess.run(short, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert budget.returncode == 0, budget.stderr
    assert "The budget of 0.05 minutes is used; 1 run is left, the same command goes on." in budget.stdout
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
    (found,) = json.loads((workdir / "results.json").read_text())["protocol"]["runs"]
    assert found["folder"] == run.name and len(found["mAP"]["s3dis"][1]) == 2


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""

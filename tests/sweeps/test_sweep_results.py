"""Tables, results.json and pictures of sweeps whose runs are finished."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.joint import demo, two
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.errors import InputError
from h2a2_jax.initialization import count_parameters
from h2a2_jax.sweeps.ablation import ablation_rows, comparison_result, run_ablation, run_tau_sweep, tau_rows
from h2a2_jax.sweeps.protocol import protocol_result, protocol_rows
from h2a2_jax.sweeps.sweep_plan import Row, locate
from h2a2_jax.sweeps.sweep_results import finished, spread, write_results
from h2a2_jax.sweeps.tables import markdown
from tests.sweeps.finished import LEVELS, write_run


def result_of(kind: str, base: ExperimentConfig, rows: list[Row], workdir: Path) -> dict[str, Any]:
    return comparison_result(kind, kind, base, rows, [rows[0].label], locate(rows, workdir))


def cells_of(text: str) -> list[list[str]]:
    """Cells of the lines of the first Markdown table of a text, without the rule below the titles."""
    table = text.partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def test_a_spread_leaves_out_what_is_unknown():
    assert spread({0: [None], 1: []}) == {**dict.fromkeys(spread({}), None), "n": 0}
    one = spread({0: [3.0]})
    assert (one["mean"], one["best"], one["worst"], one["n"]) == (3.0, 3.0, 3.0, 1)
    assert one["std"] is one["std_seeds"] is one["std_evaluations"] is None


def test_a_spread_over_seeds_is_the_sample_deviation():
    found = spread({0: [1.0], 1: [2.0], 2: [None], 3: [6.0]})
    assert found["mean"] == 3.0 and found["n"] == 3
    assert found["std"] == found["std_seeds"] == pytest.approx(7**0.5)  # squares of -2, -1 and 3, over 3 - 1


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
    result = result_of("ablation", base, rows, tmp_path)
    lines = cells_of(markdown(result))
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
    counted = {cells[0]: cells[-3:-1] for cells in lines[1:]}
    assert float(counted["SF-KS"][0].removesuffix(" M")) > float(counted["naive joint"][0].removesuffix(" M")) > 0
    # Of the medians 8 and 12, where of two lines of a step the later counts; alone, of as many scans at 8 and at 16.
    assert counted["SF-KS + NGH"][1] == "10.0 ± 2.8" and counted["TR3D alone"][1] == f"{2 / (1 / 8 + 1 / 16):.1f}"
    assert counted["naive joint"][1] == "-"
    by_label = {cells[0]: [*cells[1:-3], cells[-1]] for cells in lines[1:]}
    # Deviations of two values: their difference over the root of 2. The last mean is of one seed, without a spread.
    assert by_label["SF-KS + NGH"] == ["55.0 ± 7.1", "20.0 ± 0.0", "20.0 ± 14.1", "10.0", "37.5 ± 3.5", "15.0", "2"]
    assert by_label["naive joint"] == ["25.0", "12.5", "75.0", "37.5", "50.0", "25.0", "1"]
    assert by_label["NGH"] == ["-"] * 6 + ["0"]
    # Seed 1 has no run on SUN RGB-D yet: a row's seeds are whole or not counted.
    assert by_label["TR3D alone"] == ["40.0", "10.0", "20.0", "0.0", "30.0", "5.0", "1"]
    assert "say nothing about the benchmarks" in markdown(result)
    write_results([result], tmp_path)
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
    swept = result_of("tau_sweep", base, sweep, tmp_path)
    write_results([swept], tmp_path)
    write_results([result_of("ablation", demo(), ablation, tmp_path)], tmp_path)
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["version"] == 4 and document["results"][0] == swept
    assert [(found["kind"], len(found["rows"])) for found in document["results"]] == [("tau_sweep", 2), ("ablation", 5)]
    assert [row["tau"] for row in swept["rows"]] == [0.2, 0.3]
    assert swept["rows"][1]["summary"]["sunrgbd"]["exclusive_share"]["mean"] == pytest.approx(60)
    folder = {score["dataset"]: score["folder"] for score in swept["rows"][1]["scores"]}
    assert folder == {"scannet": "tau0.3_seed0", "sunrgbd": "tau0.3_seed0", "mean": "", "all": ""}
    text = (tmp_path / "table.md").read_text()
    assert text.count("## ") == 2 and "| tau = 0.3" in text and "scannet exclusive" in text
    assert "benchmarks" not in markdown(swept)
    assert (tmp_path / "tau.png").read_bytes().startswith(b"\x89PNG")


def test_the_ablation_has_differences_from_the_rows_that_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base, names = replace(demo(), datasets=demo().datasets[:2]), ("naive", "modulation", "single")
    gains = {"naive": 0.0, "modulation": 0.1, "tr3d_scannet": 0.2, "tr3d_sunrgbd": 0.0}
    for run, folder in locate(ablation_rows(base, (0, 1, 2), names), tmp_path).items():
        score = 0.3 + 0.1 * run.seed + gains[run.name]
        write_run(folder, run.config, dict.fromkeys(run.config.dataset_names, (score, 0.1)))
    assert run_ablation(base, tmp_path, (0, 1, 2), 1, names=names) == 0
    table = capsys.readouterr().out.split("\n\n")[3]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[0][:3] == ["row", "against", "scannet mAP@0.25"] and lines[0][-2:] == ["over", "seeds"]
    assert lines[2][:2] == ["modulation", "naive joint"] and lines[3][:2] == ["TR3D alone", "naive joint"]
    null = "+0.0 [0.0, 0.0] not told apart"
    # The same gain with every seed, whatever the seed gives.
    assert lines[3][2:] == ["+20.0 [20.0, 20.0]", null, null, null,
                            "+10.0 [10.0, 10.0]", null, "seeds", "3"]  # fmt: skip
    assert run_ablation(base, tmp_path, (0, 1, 2), 1, names=names, against=("single", "naive")) == 0
    (stored,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [(one["row"], one["against"]) for one in stored["differences"]] == [
        ("naive joint", "TR3D alone"),
        ("modulation", "TR3D alone"),
        ("modulation", "naive joint"),
        ("TR3D alone", "naive joint"),
    ]
    with pytest.raises(InputError, match=r"--against is 'sfks'; expected rows of the table: naive, modulation, tr3d\."):
        run_ablation(base, tmp_path, (0,), 1, names=names, against=("sfks",))


def test_the_protocol_has_the_best_the_mean_and_the_spread(tmp_path: Path):
    base = replace(demo(), datasets=demo().datasets[:2], train=replace(demo().train, seed=7))
    rows = protocol_rows(base, 3, 2)
    folders = locate(rows, tmp_path)
    assert [folder.name for folder in folders.values()] == ["training_seed7", "training_seed8", "training_seed9"]
    # SUN RGB-D's points are sampled, so it has a second evaluation; ScanNet's first one counts twice.
    for (run, folder), again in zip(folders.items(), (0.3, 0.5, None), strict=True):
        write_run(folder, run.config, {"scannet": (0.1 * (run.seed - 6), None), "sunrgbd": (0.2, 0.1)})
        if again is not None:
            write_run(folder / "evaluation_draw1", run.config, {"sunrgbd": (again, 0.1)})
    assert [finished(folder, 2) for folder in folders.values()] == [True, True, False]
    result = protocol_result(base, rows, 2, folders)
    assert [row["seeds"] for row in result["rows"]] == [[7, 8]] * 6
    by_name = {row["name"]: row for row in result["rows"]}
    of_draws = [score["metrics"]["mAP@0.25"] for score in by_name["sunrgbd @0.25"]["scores"] if score["seed"] == 7]
    assert of_draws == pytest.approx([20, 30])
    scannet = by_name["scannet @0.25"]["summary"]["scannet"]["mAP@0.25"]
    assert (scannet["best"], scannet["mean"], scannet["n"]) == pytest.approx((20, 15, 4))
    assert scannet["std_evaluations"] == 0 and scannet["std_seeds"] == pytest.approx(10 / 2**0.5)
    sampled = by_name["sunrgbd @0.25"]["summary"]["sunrgbd"]["mAP@0.25"]
    assert (sampled["best"], sampled["worst"], sampled["mean"]) == pytest.approx((50, 20, 30))
    assert sampled["std_seeds"] == pytest.approx(10 / 2**0.5)  # of the means 25 and 35
    assert sampled["std_evaluations"] == pytest.approx(((50 + 450) / 2) ** 0.5)  # of 20, 30 and of 20, 50
    assert by_name["mean @0.25"]["summary"]["mean"]["mAP@0.25"]["best"] == pytest.approx(35)

    lines = cells_of(markdown(result))
    assert lines[0] == ["mAP", "best", "mean", "± all", "± trainings", "± evaluations", "worst", "95 %", "n"]
    assert lines[3] == ["sunrgbd @0.25", "50.00", "30.00", "14.14", "7.07", "15.81", "20.00", "[-15.84, 75.84]", "4"]
    assert [line[0] for line in lines if line[1:] == ["-"] * 7 + ["0"]] == ["scannet @0.5", "mean @0.5"]
    for part in ("of scannet uses all points", "after 200 steps; trainings: 2, evaluations of each: 2;"):
        assert part in result["note"]
    write_results([result], tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["results"] == [result]
    assert "## Trainings and evaluations" in (tmp_path / "table.md").read_text()


def test_a_protocol_without_a_finished_training_has_an_empty_table(tmp_path: Path):
    rows = protocol_rows(demo(), 1, 2)
    result = protocol_result(demo(), rows, 2, locate(rows, tmp_path))
    assert {tuple(line[1:]) for line in cells_of(markdown(result))[1:]} == {(*["-"] * 7, "0")}


def test_a_sweep_whose_runs_are_finished_writes_its_table_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for run, folder in locate(tau_rows(demo(), (0.15, 0.25), (0,)), tmp_path).items():
        write_run(folder, run.config, {name: (0.3, 0.2) for name in demo().dataset_names})
    assert run_tau_sweep(demo(), tmp_path, (0.15, 0.25), (0,), 1) == 0
    assert "| tau = 0.25 | 30.0" in capsys.readouterr().out
    assert (tmp_path / "tau.png").exists() and "| tau = 0.15" in (tmp_path / "table.md").read_text()

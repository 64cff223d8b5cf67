"""Runs of a sweep, their configs and their folders."""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from configs.joint import demo
from h2a2_jax.config import HarmonizeConfig, to_json
from h2a2_jax.errors import InputError
from h2a2_jax.layers import SelectionConfig
from h2a2_jax.sweeps.ablation import CONTROL_ROWS, RIVAL_ROWS, ablation_rows, default_taus, tau_rows
from h2a2_jax.sweeps.protocol import protocol_rows
from h2a2_jax.sweeps.rivals import BALANCERS, SHARING
from h2a2_jax.sweeps.sweep_plan import SweepRun, locate, restricted
from h2a2_jax.sweeps.sweep_runner import run_all, shares
from tests.sweeps.finished import write_run


def tau_of(run: SweepRun) -> float:
    assert run.config.model.selection is not None
    return run.config.model.selection.tau


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


def test_controls_take_one_part_away():
    base = replace(demo(), optim=replace(demo().optim, freeze=("stem",)))
    names = ("naive", "sfks", "sfks_ngh", *CONTROL_ROWS, "single")
    rows = dict(zip(names, ablation_rows(base, (0,), names), strict=True))
    configs = {name: row.runs[0].config for name, row in rows.items()}
    sfks = configs["sfks"]
    drawn = replace(base.model, selection=SelectionConfig(prior="learned", consistency="half_cosine"))
    assert configs["frozen"] == replace(sfks, model=drawn, optim=replace(base.optim, freeze=("stem", "selection")))
    for name, kernels in (("modulation", "shared"), ("exclusive", "exclusive")):
        selection = replace(SelectionConfig(), kernels=kernels)
        assert configs[name] == replace(sfks, model=replace(base.model, selection=selection))
    model = replace(base.model, selection=None, running_statistics="shared")
    assert configs["naive_shared_stats"] == replace(configs["naive"], model=model)
    assert configs["random_labels"] == replace(base, train=replace(base.train, permute_boxes=True))
    assert rows["single"].label == "TR3D alone" and len(rows["single"].runs) == 3
    assert len({run.folder for row in rows.values() for run in row.runs}) == 8 + 3
    # What is frozen already is named once.
    again = ablation_rows(configs["frozen"], (0,), ("frozen", "sfks"))
    assert again[0].runs[0].config == again[1].runs[0].config == configs["frozen"]


def test_rivals_change_one_thing_of_the_naive_detector(tmp_path: Path):
    base = replace(demo(), harmonize=replace(demo().harmonize, weights=(1.0, 2.0, 1.0)))
    names = ("naive", "sfks", *RIVAL_ROWS)
    rows = dict(zip(names, ablation_rows(base, (0, 1), names, tmp_path), strict=True))
    naive = rows["naive"].runs[0].config
    for method in BALANCERS:
        config = rows[method].runs[0].config
        assert config.harmonize.method == method and replace(config, harmonize=naive.harmonize) == naive
    methods = get_args(get_type_hints(HarmonizeConfig)["method"])
    assert {*BALANCERS, "ngh", "mean"} == set(methods)
    for name, (_, changed) in SHARING.items():
        model = rows[name].runs[0].config.model
        assert model == replace(naive.model, **changed) != naive.model
    sfks = rows["sfks"].runs[0].config
    assert rows["sfks_pdnorm"].runs[0].config == replace(sfks, model=replace(sfks.model, norm_affine="prompt"))
    assert len({row.label for row in rows.values()}) == len(rows)
    # Without weights the other rows go on.
    assert ablation_rows(demo(), (0,), ("mgda",))[0].label == "MGDA"
    with pytest.raises(InputError, match=r"harmonize\.weights"):
        ablation_rows(demo(), (0,), ("fixed",))


def test_pretraining_is_on_the_first_dataset_and_tuning_on_each(tmp_path: Path):
    (row,) = ablation_rows(demo(), (0, 1), ("pretrained",), tmp_path)
    assert row.label == "pretrained on scannet" and [run.seed for run in row.runs] == [0, 1] * 3
    assert [run.config.dataset_names for run in row.runs[::2]] == [("scannet",), ("sunrgbd",), ("s3dis",)]
    for run in row.runs:
        start = run.after
        assert start is not None and start.seed == run.seed and start.config.dataset_names == ("scannet",)
        assert start.config.train.steps == run.config.train.steps == 100
        assert run.config.train.init_from == str((tmp_path / "runs" / start.folder).absolute())
        assert run.config.model.selection is None and run.config.harmonize.method == "mean"


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
    base = replace(base, optim=replace(base.optim, accumulate_steps=2))
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
            lambda: ablation_rows(demo(), (0,), ("tr3d", "single")),
            "The rows are tr3d, tr3d; expected at least one, each once",
        ),
        (
            lambda: ablation_rows(
                replace(demo(), model=replace(demo().model, selection=SelectionConfig(kernels="shared"))), (0,)
            ),
            "with kernels that are 'selected'",
        ),
        (
            lambda: ablation_rows(demo(), (0,), ("ngh", "ngh")),
            "The rows are ngh, ngh; expected at least one, each once",
        ),
        (lambda: protocol_rows(demo(), 0, 5), "--trainings is 0; expected 1 or more, 5 as the field has it"),
        (lambda: protocol_rows(demo(), 5, 0), "--evaluations is 0"),
        (lambda: run_all({}, budget_minutes=0.0), "--budget_minutes is 0; expected a number above 0"),
        (lambda: shares(0), "--jobs is 0; expected 1 to"),
        (lambda: shares(10**6), "the processor cores here"),
    ],
)
def test_what_makes_no_sense_is_refused(plan, sentence: str):
    with pytest.raises(InputError, match=re.escape(sentence)):
        plan()


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

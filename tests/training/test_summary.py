"""A run's summary as a reader finds it."""

import platform
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from h2a2_jax.config import ExperimentConfig, from_json
from h2a2_jax.distributed import train_mesh
from h2a2_jax.scans.sources import SourceConfig
from h2a2_jax.training.summary import CheckpointScores, RunFacts, describe_devices, summary, write_summary

CONFIG = ExperimentConfig((SourceConfig("scannet", kind="synthetic"), SourceConfig("s3dis", kind="synthetic")))


def scores(name: str, step: int, first: float, second: float | None) -> CheckpointScores:
    return CheckpointScores(name, step, {"scannet": {0.25: first, 0.5: 0.5}, "s3dis": {0.25: second, 0.5: 0.25}})


FACTS = RunFacts(
    config=CONFIG,
    num_scans={"scannet": 1201, "s3dis": 1},
    steps=12000,
    epochs=12.0,
    results=[scores("last", 12000, 0.715, 0.6), scores("best", 9000, 0.725, None)],
    seconds=3723.4,
    scans_per_second=12.34,
    resumed_after=500,
    skipped_steps=1,
    skipped_scans=2,
    compilations=9,
    loaded_compilations=3,
    compilation_seconds=85.4,
    devices="6 x H100, mesh 3 dataset x 2 replica",
    versions={"python": "3.11.7", "jax": "0.10.2"},
    revision="abc + uncommitted changes",
)


def table(text: str, first: str) -> dict[str, list[str]]:
    """Cells by the first of their row, of the table whose header begins so."""
    block = next(block for block in text.split("\n\n") if block.startswith(f"| {first} |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row[1:] for row in rows}


def test_results_of_the_last_and_the_best_checkpoint_are_side_by_side():
    found = table(summary(Path("run"), FACTS), "dataset")
    last, best = "last (step 12000)", "best (step 9000)"
    assert found["dataset"] == [f"mAP@0.25, {last}", f"mAP@0.5, {last}", f"mAP@0.25, {best}", f"mAP@0.5, {best}"]
    assert found["scannet"] == ["71.5", "50.0", "72.5", "50.0"]
    assert found["s3dis"] == ["60.0", "25.0", "\N{EN DASH}", "25.0"]
    assert found["mean"] == ["65.8", "37.5", "\N{EN DASH}", "37.5"]


def test_a_checkpoint_that_is_both_is_there_once():
    facts = replace(FACTS, results=[scores("last", 12000, 0.7, 0.6), scores("best", 12000, 0.7, 0.6)])
    title = "last and best (step 12000)"
    assert table(summary(Path("run"), facts), "dataset")["dataset"] == [f"mAP@0.25, {title}", f"mAP@0.5, {title}"]


def test_what_the_run_did_is_told():
    text = summary(Path("runs/joint"), FACTS)
    first = (
        "# joint\n\nTrained on scannet (1,201 procedural scans), s3dis (1 procedural scan): 12,000 steps, 12 epochs of"
    )
    assert text.startswith(first)
    real = tuple(replace(source, kind="auto", root="data") for source in FACTS.config.datasets)
    text_of_real = summary(Path("runs/joint"), replace(FACTS, config=replace(FACTS.config, datasets=real)))
    assert "Trained on scannet (1,201 scans), s3dis (1 scan): 12,000 steps" in text_of_real
    assert {name: cells[0] for name, cells in table(text, "").items() if name not in ("", "---")} == {
        "time": "1:02:03, going on after step 500",
        "scans per second": "12.3",
        "skipped steps": "1",
        "skipped scans": "2",
        "compilations": "9 programs, 3 of them from the cache, 85 s",
        "devices": "6 x H100, mesh 3 dataset x 2 replica",
        "versions": "python 3.11.7, jax 0.10.2",
        "revision": "abc + uncommitted changes",
    }
    assert "](curves.png)" in text
    assert platform.node() not in text.replace("\n", " ").split(" ")


def test_a_run_of_one_dataset_without_results_is_told_too():
    config = replace(CONFIG, datasets=CONFIG.datasets[:1])
    facts = replace(FACTS, config=config, num_scans={"scannet": 3}, results=[], scans_per_second=None, epochs=0.02)
    text = summary(Path("run"), facts)
    assert "Nothing was evaluated." in text and "0.02 epochs" in text and "| scans per second | not known |" in text
    assert "--dataset" not in text


def test_the_commands_can_be_pasted():
    text = summary(Path("my runs/joint"), FACTS)
    assert text.split("```bash\n")[1].split("\n```")[0].splitlines() == [
        "python run.py --mode=eval --workdir='my runs/joint'",
        "python run.py --mode=predict --workdir='my runs/joint' --input=FOLDER --output=boxes --dataset=scannet",
        "python run.py --mode=report --workdir='my runs/joint'",
    ]


def test_the_config_can_be_taken_from_it():
    folded = summary(Path("run"), FACTS).split("<details>")[1]
    assert from_json(folded.split("```json\n")[1].split("\n```")[0]) == CONFIG


def test_it_replaces_the_one_from_before_and_leaves_nothing_beside(tmp_path):
    (tmp_path / "summary.md").write_text("old")
    assert write_summary(tmp_path, FACTS).read_text() == summary(tmp_path, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.md"]


def test_scores_are_those_of_an_evaluation():
    documents = {"scannet": {"thresholds": [{"iou": 0.25, "mAP": 0.5}, {"iou": 0.5, "mAP": None}]}}
    assert CheckpointScores.of("best", 3, documents).scores == {"scannet": {0.25: 0.5, 0.5: None}}


@pytest.mark.parametrize("count", [1, 6])
def test_devices_are_those_of_the_mesh(count: int):
    axes = "3 dataset x 2 replica" if count == 6 else "1 dataset x 1 replica"
    assert describe_devices(train_mesh(3, jax.devices()[:count])) == f"{count} x cpu, mesh {axes}"

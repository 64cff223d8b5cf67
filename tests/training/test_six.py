"""The six datasets of UniDet3D, procedural, in one training: mixed box kinds, 5 to 84 classes, shares of an epoch."""

import contextlib
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.joint import UNIDET3D_SHARES, get_config
from h2a2_jax.config import ExperimentConfig, experiment_config
from h2a2_jax.evaluation.documents import read_evaluation
from h2a2_jax.evaluation.evaluate import EvalRequest, evaluate_checkpoint
from h2a2_jax.loader.stream import DatasetSchedule, batches_per_epoch, step_weights
from h2a2_jax.training.loop import train
from h2a2_jax.training.metrics import read_metrics

SIX = experiment_config(get_config("six"))
PUBLISHED = (1201, 204, 174, 1178, 230, 4498)  # training scans, in the order of UNIDET3D_SHARES


def test_six_draws_the_shares_of_unidet3d():
    assert [(d.name, d.share) for d in SIX.datasets] == list(UNIDET3D_SHARES.items())
    weights = step_weights(SIX, PUBLISHED)
    drawn = [share * scans for share, scans in zip(UNIDET3D_SHARES.values(), PUBLISHED, strict=True)]
    np.testing.assert_allclose(weights, np.array(drawn) / 1201)
    # ScanNet's 15 passes, in batches of 16.
    assert batches_per_epoch(SIX, PUBLISHED) == 1126
    schedule = DatasetSchedule(0, weights)
    present = Counter(d for step in range(1126) for d, here in enumerate(schedule.present(step)) if here)
    for dataset, scans in enumerate(drawn):
        assert abs(present[dataset] * 16 / 15 - scans) < 4 * scans / np.sqrt(scans) + 1


def test_weights_repeats_and_batches_count_beside_shares():
    first, second, *others = SIX.datasets
    datasets = (replace(first, share=None, weight=0.5), replace(second, repeats=30, weight=0.5, batch_size=8), *others)
    weights = step_weights(replace(SIX, datasets=datasets), PUBLISHED)
    # ARKitScenes has most to draw, 359.84 of 4498 scans; S3DIS 67.32, twice as often and in half as large batches.
    np.testing.assert_allclose(weights[:2], [0.5, 0.5 * 4 * 67.32 / 359.84])
    assert weights[5] == 1


def small() -> ExperimentConfig:
    config = experiment_config(get_config("six,tiny,no_sfks"))
    return replace(
        config,
        datasets=tuple(replace(d, train_size=2, val_size=1) for d in config.datasets),
        train=replace(config.train, batch_size=1, steps=3, log_every=1, checkpoint_every=3, evaluate_every=0),
    )


@pytest.mark.slow
def test_six_are_trained_saved_restored_and_evaluated(tmp_path: Path):
    config, workdir = small(), tmp_path / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        results = train(config, workdir, jax.devices()[:1])
        lines = read_metrics(workdir)
        evaluate_checkpoint(workdir, EvalRequest(output=tmp_path / "again"), config)
    assert [line["step"] for line in lines] == [1, 2, 3] and np.isfinite(lines[0]["loss/scannet"])
    again = read_evaluation(tmp_path / "again" / "evaluation.json")
    assert again == json.loads(json.dumps(results)) and set(again) >= set(UNIDET3D_SHARES)

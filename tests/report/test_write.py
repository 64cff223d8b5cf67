"""A whole report of a small run: every section, every picture, nothing outside the page."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.report.figures_training import by_group, series_of
from h2a2_jax.report.write import write_report
from h2a2_jax.training.gradients import SelectionMetrics
from h2a2_jax.training.metrics import MetricsWriter, SelectionLog
from tests.report.small_run import small, store

NAMES = ("scannet", "s3dis")


def log(workdir: Path) -> None:
    """Lines of two steps."""
    rng = np.random.default_rng(0)
    selection = SelectionLog(workdir, NAMES, 2, 1)
    layers = [f"layer{s}_0.conv{c}" for s in range(1, 5) for c in (1, 2)]
    with MetricsWriter(workdir) as writer:
        for step in (1, 2):
            parts = [rng.uniform(size=(2, 27)) for _ in range(3)]
            own = SelectionMetrics(*map(jnp.asarray, parts), jnp.zeros(2), jnp.ones(2))
            selection.add(step, [dict.fromkeys(layers, own)])
            values = {f"loss/{name}": 1 / step for name in NAMES}
            values |= {"learning_rate": 1e-3, "psi/mean": 0.9, "psi/min": 0.5, "psi/layer1": 0.7}
            values |= {f"{m}/layer1/{name}": 2.0 * step for m in ("gradient_norm", "scale") for name in NAMES}
            writer.write(step, values | {"psi/harmonized_share": 0.25, "harmonized_share/layer1": 0.5})


@pytest.mark.slow
def test_a_report_is_one_page_with_all_its_pictures(tmp_path: Path) -> None:
    run = tmp_path / "joint"
    joint = small(NAMES, selection=True)
    store(joint, run)
    log(run)
    thresholds = [{"iou": iou, "mAP": 0.125} for iou in joint.eval.iou_thresholds]
    (run / "evaluation.json").write_text(json.dumps({name: {"thresholds": thresholds} for name in NAMES}))

    target = write_report(joint, run, scans=4)

    assert target == run / "report" / "index.html"
    text = target.read_text()
    pictures = {path.stem for path in target.parent.glob("*.png")}
    stages = [f"layer{s}" for s in range(1, 5)]
    assert pictures == {
        *(f"kernels_{s}" for s in stages), *(f"history_{s}" for s in stages), "agreement", "stability", "losses", "psi",
        "gradients", "support",
        "gradient_norm", "scale",
    }  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in target.parent.glob("*.png"))
    for anchor in ("summary", "learnt", "kernels", "history", "agreement", "stability", "balance"):
        assert f'<section id="{anchor}">' in text
    assert "0.125" in text and "0.250" in text
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len([s for s in sources if s.startswith("data:image/png;base64,")]) == len(pictures)
    assert all(s.startswith(("data:image/png;base64,", "#")) for s in sources)
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)
    captions = re.findall(r"<figcaption><b>.+?</b> (.+?)</figcaption>", text)
    assert len(captions) == len(pictures) and min(map(len, captions)) > 80


@pytest.mark.slow
def test_a_run_without_selection_or_logs_gets_what_is_there(tmp_path: Path) -> None:
    config = small(NAMES, selection=False)
    store(config, tmp_path)
    text = write_report(config, tmp_path).read_text()
    for sentence in ("has no kernel selection", "no metrics.jsonl", "no evaluation.json"):
        assert sentence in text
    assert list((tmp_path / "report").glob("*.png")) == []


def test_without_a_checkpoint_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no checkpoint"):
        write_report(small(NAMES, selection=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_series_leave_out_nulls_and_are_found_by_group() -> None:
    lines = [
        {"step": 1, "version": 1, "scale/stem/scannet": None, "loss/scannet": 2.0},
        {"step": 3, "version": 1, "scale/stem/scannet": 1.5, "loss/scannet": 1.0},
    ]
    series = series_of(lines)
    assert series["loss/scannet"].tolist() == [[1, 2], [3, 1]]
    assert by_group(series, "scale", NAMES)["stem"]["scannet"].tolist() == [[3, 1.5]]
    assert by_group(series, "loss", NAMES) == {}

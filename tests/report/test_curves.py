"""The curves of a run: what has a panel, and that a picture comes of little as well."""

import struct
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.report.figures_training import _panels, draw_curves, series_of
from h2a2_jax.training.metrics import MetricsWriter, read_metrics

NAMES = ("scannet", "a_b/$c")


def log(workdir: Path, steps: int, *, full: bool) -> None:
    with MetricsWriter(workdir) as writer:
        for step in range(1, steps + 1):
            values = {f"loss/{name}": 1 / step for name in NAMES} | {"learning_rate": 1e-3, "gradient_norm": 2.0}
            if full:
                for metric in ("loss_box", "loss_class", "exclusive_share"):
                    values |= {f"{metric}/{name}": 0.3 for name in NAMES}
                values |= {"psi/mean": 0.9, "psi/min": 0.5, "scans_per_second": 12.0}
                values |= {"skipped_steps": 0, "skipped_scans": 1, "compilations": 5}
                if step % 2 == 0:
                    values |= {f"mAP@{iou}/{name}": 0.1 * step for name in NAMES for iou in (0.25, 0.5)}
            writer.write(step, values)


def size(path: Path) -> tuple[int, int]:
    """Pixels of a PNG, width and height."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def panels(workdir: Path):
    return _panels(series_of(read_metrics(workdir)), NAMES)


def test_a_whole_run_is_drawn(tmp_path):
    log(tmp_path, 6, full=True)
    assert draw_curves(tmp_path) == tmp_path / "curves.png"
    assert size(tmp_path / "curves.png")[0] > 1200
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "metrics.jsonl"}
    found = {panel.title: panel for panel in panels(tmp_path)}
    assert list(found) == [
        "loss", "mAP@0.25, validation scans", "mAP@0.5, validation scans", "box loss", "classification loss",
        "learning rate", "gradient norm before clipping", "Psi, agreement of gradient norms",
        "share of exclusive kernels", "scans per second", "counts",
    ]  # fmt: skip
    assert found["learning rate"].scale == "log"
    assert list(found["counts"].others) == ["skipped_steps", "skipped_scans", "compilations"]


def test_map_is_drawn_at_the_steps_that_were_evaluated(tmp_path):
    log(tmp_path, 4, full=True)
    scored = next(panel for panel in panels(tmp_path) if panel.title.startswith("mAP@0.5"))
    np.testing.assert_allclose(scored.of_datasets["scannet"], [[2, 0.2], [4, 0.4]])


def test_a_run_of_one_line_and_few_metrics_is_drawn(tmp_path):
    log(tmp_path, 1, full=False)
    assert [panel.title for panel in panels(tmp_path)] == ["loss", "learning rate", "gradient norm before clipping"]
    few = size(draw_curves(tmp_path))
    log(tmp_path, 2, full=True)
    assert size(draw_curves(tmp_path))[1] > few[1]


def test_values_that_no_axis_has_are_left_out(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss/scannet": float("nan"), "learning_rate": 0.0, "gradient_norm": float("inf")})
    assert size(draw_curves(tmp_path))[0] > 400


def test_without_metrics_a_sentence_says_so(tmp_path):
    with pytest.raises(InputError, match="has no metrics to draw"):
        draw_curves(tmp_path)

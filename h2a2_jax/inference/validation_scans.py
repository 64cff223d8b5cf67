"""Predict the validation scans of a run, and write the boxes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.checkpoint.store import checkpoint_place, restore_checkpoint
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.inference.found_boxes import Boxes
from h2a2_jax.inference.input_files import PredictRequest
from h2a2_jax.inference.placement import AUTO
from h2a2_jax.inference.predict_folder import print_line
from h2a2_jax.inference.predictor import build_predictor, predict_scans, skipped_lines
from h2a2_jax.inference.results import document_of
from h2a2_jax.inference.writers import check_output, write_document, write_scan
from h2a2_jax.scans.sources import build_source


def predict_validation_scans(
    workdir: Path,
    request: PredictRequest | None = None,
    config: ExperimentConfig | None = None,
    say: Callable[[str], None] = print_line,
) -> None:
    """Restore a checkpoint and write the boxes of the validation scans, <workdir>/predictions/<dataset>.json.

    The request has no inputs; its formats "ply", "html" and "png" are written scan by scan to <output>/<dataset>/, with
    the annotated boxes beside those found. The checkpoint must agree with `config`, whose data are used; None is the
    config that the checkpoint holds.

    Raises:
        InputError: there is no checkpoint, it is of another architecture than the config, a table is asked for, or the
            results cannot be written.
    """
    request = request or PredictRequest((), formats=())
    if "csv" in request.formats:
        raise InputError("--formats=csv is for files of points (--input); scans of a config have json, ply, html, png.")
    model, stored = restore_checkpoint(workdir, request.step, config)
    config = stored if config is None else config
    predictor = build_predictor(model, config.specs, config.eval)
    output = checkpoint_place(workdir).run / "predictions" if request.output is None else request.output
    check_output(output, (), ())
    if request.dataset != AUTO:
        predictor.spec(request.dataset)  # an error for a dataset that the model does not know
    formats = tuple(name for name in request.formats if name != "json")  # all scans share one JSON file
    for d in MeshLayout(train_mesh(len(config.specs)), len(config.specs)).evaluated:
        spec = config.specs[d]
        if request.dataset not in (AUTO, spec.name):
            continue
        folder, skipped, entries = output / spec.name, dict[str, str](), []
        for scan, _, found in predict_scans(predictor, build_source(config.datasets[d], "val"), spec, skipped):
            boxes = Boxes.of(found, scan, scan.transform.astype(np.float64), spec)
            entries.append(boxes.to_entry())
            if not formats:
                continue
            known = scan.labels >= 0
            truth = GroundTruth(scan.boxes[known], scan.labels[known])
            try:
                write_scan(folder, formats, boxes, truth=truth)
            except OSError as error:
                problem = f"{error.filename or folder} cannot be written ({error.strerror})"
                raise InputError(f"{problem}: choose another --output.") from error
        for line in skipped_lines(skipped):
            say(line)
        path = output / f"{spec.name}.json"
        write_document(path, document_of(entries, spec))
        say(f"{path}: {sum(len(entry['boxes']) for entry in entries)} boxes in {len(entries)} scans")

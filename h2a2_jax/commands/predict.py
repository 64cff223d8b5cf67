"""`--mode=predict`."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from h2a2_jax.boxes.matching import GroundTruth
from h2a2_jax.checkpoint.store import checkpoint_place, restore_checkpoint
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.distributed import MeshLayout, train_mesh
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.evaluate import build_predictor, say_skipped
from h2a2_jax.host import progress_interval
from h2a2_jax.inference.input_files import FoundInputs, PredictRequest, find_inputs, printable
from h2a2_jax.inference.predict_folder import FAINT_SCORE, REPEATED, Outcome, after_name, predict_files
from h2a2_jax.inference.predictor import Predictor, prepare
from h2a2_jax.inference.results import document_of, scan_entry
from h2a2_jax.inference.shape_cache import BucketFile
from h2a2_jax.inference.writers import check_output, write_document, write_scan
from h2a2_jax.scans.scan import ScanError, ScanSource, load_or_skip, some
from h2a2_jax.scans.sources import build_source
from h2a2_jax.scans.specs import DatasetSpec

INTERRUPTED = 130


def predict_files_command(workdir: Path, request: PredictRequest, config: ExperimentConfig | None = None) -> int:
    """Restore a checkpoint and write the boxes of files of points.

    Padded shapes and compiled programs are kept in <run>/cache for the next time, where that can be written to.

    Args:
        workdir: folder of a run, or of its checkpoints, or of one of them.
        request: which files, and how.
        config: that the checkpoint must agree with, and whose `eval` is used; None: the stored one.

    Returns:
        Exit status: 0, 1 if a file could not be predicted, 130 if the user stopped it.

    Raises:
        InputError: nothing can be predicted at all: no input is found, the results cannot be written, there is no
            checkpoint, or the model was not trained on the dataset.
    """
    run = checkpoint_place(workdir).run
    output = run / "boxes" if request.output is None else request.output
    found = find_inputs(request.inputs, output)
    check_output(output, (file.name for file in found.files), request.formats)
    model, stored = restore_checkpoint(workdir, request.step, config)
    config = stored if config is None else config
    lowest = min(request.score, FAINT_SCORE)
    predictor = build_predictor(model, config.specs, replace(config.eval, score_threshold=lowest))
    shapes = _shapes(run)
    if shapes is not None:
        predictor.set_bucket_bases(shapes.read())
    for line in _opening(found, request, predictor, output):
        print(line, flush=True)
    if all(source.is_procedural for source in stored.datasets):
        print(
            "The model has seen procedural scans only: on others its boxes show how things work, no more.", flush=True
        )
    outcome = predict_files(predictor, found, request, output, say=lambda text: tqdm.write(text, file=sys.stdout))
    if shapes is not None:
        shapes.write(predictor.bucket_bases)
    for line in _closing(outcome, found, output):
        print(line, flush=True)
    return INTERRUPTED if outcome.interrupted else 1 if outcome.failed else 0


def _shapes(run: Path) -> BucketFile | None:
    """Where shapes and programs are kept; None where nothing can be, which is no reason not to predict."""
    if not os.access(run, os.W_OK):
        return None
    try:
        return BucketFile.opened(run / "cache")
    except InputError:
        return None


def _opening(found: FoundInputs, request: PredictRequest, predictor: Predictor, output: Path) -> Iterator[str]:
    names = [spec.name for spec in predictor.specs]
    spec = predictor.specs[0] if request.dataset is None else predictor.spec(request.dataset)
    choice = ""
    if request.dataset is None and len(names) > 1:
        choice = f" (the first of {', '.join(names)}; choose with --dataset)"
    kind = "turned about the vertical" if spec.has_yaw else "axis-aligned"
    files = "1 file" if len(found.files) == 1 else f"{len(found.files)} files"
    yield f"{files}, boxes by the head of {spec.name}{choice}: {len(spec.classes)} classes, {kind}."
    yield f"Files are taken as {_frame(request)}, boxes of score {request.score:g} and more go to {printable(output)}."
    if found.passed_over:
        shown = ", ".join(printable(path) for path in found.passed_over[:3])
        texts = "1 text file" if len(found.passed_over) == 1 else f"{len(found.passed_over)} text files"
        yield f"Passed over, as without points: {texts}, {shown}."
    if found.results:
        shown = ", ".join(printable(path) for path in found.results[:3])
        files = "1 file" if len(found.results) == 1 else f"{len(found.results)} files"
        yield f"Passed over, as results of a prediction: {files}, {shown}{', ...' if len(found.results) > 3 else ''}."
    yield from found.problems.values()


def _frame(request: PredictRequest) -> str:
    up = "whatever axis seems to point up" if request.up == "auto" else f"{request.up} up"
    return f"{up}, in {'the unit that seems to be theirs' if request.unit == 'auto' else request.unit}"


def _closing(outcome: Outcome, found: FoundInputs, output: Path) -> Iterator[str]:
    for remark, names in outcome.remarks.values():
        if len(names) > REPEATED:
            yield f"{len(names)} scans ({some(names)}), as the first one: {printable(remark)}."
    boxes = "1 box" if outcome.boxes == 1 else f"{outcome.boxes} boxes"
    scans = "1 scan" if len(found.files) == 1 else f"{len(found.files)} scans"
    done = f"{boxes} in {len(outcome.entries)} of {scans}: {printable(output)}"
    if outcome.interrupted:
        yield f"Stopped. Until then: {done}; the same command begins anew."
    else:
        yield done
    if outcome.entries:
        spent = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in outcome.seconds.items())
        yield f"Seconds by stage, the next scan being read meanwhile: {spent}."
    if outcome.failed:
        yield f"{len(outcome.failed)} failed:"
        yield from (f"  {after_name(name, sentence)}" for name, sentence in outcome.failed.items())


def predict_command(config: ExperimentConfig | None, workdir: Path, request: PredictRequest | None = None) -> None:
    """Restore a checkpoint and write the boxes of the validation scans, <workdir>/predictions/<dataset>.json.

    Args:
        config: that the checkpoint must agree with, and whose data are used; None: the stored one.
        workdir: folder of the run.
        request: without inputs; its formats "ply", "html" and "png" are written scan by scan to
            <output>/<dataset>/, with the annotated boxes beside those found. None: none of them.

    Raises:
        InputError: there is no checkpoint, it is of another architecture than the config, or a table is asked for.
    """
    request = request or PredictRequest((), formats=())
    if "csv" in request.formats:
        raise InputError("--formats=csv is for files of points (--input); scans of a config have json, ply, html, png.")
    model, stored = restore_checkpoint(workdir, request.step, config)
    config = stored if config is None else config
    predictor = build_predictor(model, config.specs, config.eval)
    folder = checkpoint_place(workdir).run / "predictions" if request.output is None else request.output
    check_output(folder, (), ())
    if request.dataset is not None:
        predictor.spec(request.dataset)  # one that the model does not know is said
    for d in MeshLayout(train_mesh(len(config.specs)), len(config.specs)).evaluated:
        spec = config.specs[d]
        if request.dataset not in (None, spec.name):
            continue
        source = build_source(config.datasets[d], "val")
        formats = tuple(name for name in request.formats if name in ("ply", "html", "png"))
        entries, skipped = _predict_source(predictor, source, spec, folder / spec.name, formats)
        say_skipped(skipped)
        path = folder / f"{spec.name}.json"
        write_document(path, document_of(entries, spec))
        print(f"{path}: {sum(len(entry['boxes']) for entry in entries)} boxes in {len(entries)} scans", flush=True)


def _predict_source(
    predictor: Predictor, source: ScanSource, spec: DatasetSpec, folder: Path, formats: tuple[str, ...]
) -> tuple[list[dict], dict[str, str]]:
    """Entries of the scans of a source, one in memory at a time, and why others were left out."""
    entries, skipped = [], dict[str, str]()
    with tqdm(total=len(source), desc=spec.name, unit="scan", mininterval=progress_interval()) as bar:
        for scan in load_or_skip(source, skipped):
            try:
                (found,) = predictor.predict([prepare(scan, spec)], spec.name)
            except ScanError as error:
                skipped[error.scan] = str(error)
                continue
            entry = scan_entry(scan.name, scan.transform, found, spec)
            entries.append(entry)
            if formats:
                known = scan.labels >= 0
                truth = GroundTruth(scan.boxes[known], scan.labels[known])
                matrix = scan.transform.astype(np.float64)
                try:
                    write_scan(folder, formats, entry, scan, matrix, found, spec, truth)
                except OSError as error:
                    raise InputError(
                        f"{error.filename or folder} cannot be written ({error.strerror}): choose another --output."
                    ) from error
            bar.update(len(entries) + len(skipped) - bar.n)
        bar.update(len(source) - bar.n)
    return entries, skipped

"""Report of a run: kernel selection, gradient balance and losses on one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.evaluation.documents import JSON_FILE, read_evaluation
from h2a2_jax.figures import Picture, Section, Table, number, page
from h2a2_jax.layers.kernel_selection import SelectionConfig
from h2a2_jax.report.figures_selection import draw_agreement, draw_history, draw_kernels, draw_stability
from h2a2_jax.report.figures_training import draw_by_group, draw_losses, draw_psi, series_of
from h2a2_jax.report.learning import learnt_section
from h2a2_jax.report.observation import LayerSelection, load_batches, observe_selection
from h2a2_jax.report.offsets import OFFSET_CLASSES, agreement, chance_agreement
from h2a2_jax.scans.sources import build_source
from h2a2_jax.training import metrics

Log = tuple[Int[np.ndarray, " t"], Mapping[str, metrics.SelectionHistory]]
"""Steps of the lines of selection.jsonl, and the history of every layer."""


def write_report(config: ExperimentConfig, workdir: Path, scans: int = 16) -> Path:
    """Write <workdir>/report/index.html, one page with everything in it, and its pictures as PNGs beside it.

    The page holds a summary; what selection has learnt; the offsets that each layer shares or keeps exclusive on
    validation scans; alpha, beta and gamma over training; agreement of selections across datasets and their flips;
    losses, gradient norms and Psi. Where
    a run has no kernel selection or no log, a sentence takes the place of the pictures. The detector runs on at most
    `scans` validation scans of each dataset.

    Raises:
        InputError: there is no checkpoint, or it is of another config; data or files of the run are missing or damaged.
    """
    with CheckpointStore(workdir / "checkpoints") as store:
        model, _ = store.restore_model(expected=config)
        step = store.latest_step()
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()

    names = config.dataset_names
    selections: dict[str, LayerSelection] = {}
    counts = [0] * len(names)
    if config.model.selection is not None:
        batches = [
            load_batches(build_source(source, "val"), source.spec, scans, config.model) for source in config.datasets
        ]
        counts = [len(own) for own in batches]
        selections = observe_selection(model, batches)
    lines = metrics.read_metrics(workdir) if (workdir / metrics.FILE_NAME).exists() else []
    path = workdir / metrics.SELECTION_FILE
    log: Log = metrics.read_selection_log(path, names) if path.exists() else (np.zeros(0, np.int64), {})

    sections = [
        _summary(config, workdir, step, selections, counts, lines),
        *_selection_sections(config, selections, counts, log, folder),
        _balance_section(config, lines, folder),
    ]
    subtitle = f"{', '.join(names)}; checkpoint of step {step}. One file: it can be moved, mailed and printed."
    target = folder / "index.html"
    target.write_text(page(f"Report of {workdir.absolute().name}", subtitle, sections), encoding="utf-8")
    return target


def _summary(
    config: ExperimentConfig,
    workdir: Path,
    step: int | None,
    selections: dict[str, LayerSelection],
    counts: Sequence[int],
    lines: Sequence[dict[str, float | int | None]],
) -> Section:
    path = workdir / JSON_FILE
    results: dict[str, Any] = read_evaluation(path) if path.exists() else {}
    thresholds = config.eval.iou_thresholds
    rows = []
    for d, name in enumerate(config.dataset_names):
        own = {t["iou"]: t["mAP"] for t in results.get(name, {}).get("thresholds", [])}
        exclusive = float(np.mean([1 - s.shared_share[d].mean() for s in selections.values()])) if selections else None
        scores = [number(own.get(iou)) for iou in thresholds]
        loss = lines[-1].get(f"loss/{name}") if lines else None
        scanned = str(counts[d]) if selections else number(None)
        rows.append([name, *scores, number(loss), number(exclusive), scanned])
    columns = ["dataset", *(f"mAP@{iou:g}" for iou in thresholds), "last loss", "exclusive offsets", "scans looked at"]
    per_dataset = Table(
        "Mean average precision as evaluation.json has it; share of (scan, offset) pairs that take the dataset's own "
        "kernel, mean over layers, on validation scans.",
        columns,
        rows,
    )
    last = lines[-1] if lines else {}
    harmonized = last.get("psi/harmonized_share")
    facts = [
        ["training steps", f"{step}"],
        ["data", ", ".join(f"{source.name} ({source.kind})" for source in config.datasets)],
        ["network", f"depth {config.model.depth}, voxels of {100 * config.model.voxel_size:g} cm"],
        ["kernel selection (SF-KS)", _selection_text(config.model.selection)],
        ["gradients", config.harmonize.method],
        ["share of harmonised tensors, last line", number(harmonized)],
        ["mean Psi, last line", number(last.get("psi/mean"))],
        ["learning rate, last line", "\N{EN DASH}" if not last else f"{last.get('learning_rate') or 0:.1e}"],
    ]
    text = [] if results else ["There is no evaluation.json: run --mode=eval for average precision."]
    if any(source.is_procedural for source in config.datasets):
        text.append("Some data are procedural: the numbers say nothing about the benchmarks of these names.")
    return Section("summary", "Summary", text, [per_dataset, Table("The run.", ["", ""], facts)])


def _selection_text(selection: SelectionConfig | None) -> str:
    if selection is None:
        return "off"
    return (
        f"on, tau = {selection.tau:g}" if selection.kernels == "selected" else f"off, all kernels {selection.kernels}"
    )


def _selection_sections(
    config: ExperimentConfig, selections: dict[str, LayerSelection], counts: Sequence[int], log: Log, folder: Path
) -> list[Section]:
    if not selections:
        why = "model.selection is None, or its kernels are all shared or all exclusive"
        text = [f"This detector has no kernel selection ({why}), so there is nothing to show here."]
        return [Section("kernels", "Kernel selection", text)]
    names, (steps, history) = config.dataset_names, log
    shares = {layer: selection.shared_share for layer, selection in selections.items()}
    exclusive = Table(
        "Share of (scan, offset) pairs that take the dataset's own kernel.",
        ["layer", *names],
        [[layer, *(number(float(1 - own.mean()), 2) for own in share)] for layer, share in shares.items()],
    )
    kernels: list[Picture | Table] = [exclusive, *draw_kernels(selections, names, counts, folder)]
    agreeing = Table(
        "The same as numbers.",
        ["layer", *OFFSET_CLASSES, "chance"],
        [[layer, *(number(v, 2) for v in (*agreement(s), chance_agreement(s)))] for layer, s in shares.items()],
    )
    several = len(names) > 1
    missing = [] if history else [f"There is no {metrics.SELECTION_FILE} in the run's folder: training writes it."]
    pictures = draw_history(steps, history, names, folder) if history else []
    across: list[Picture | Table] = [draw_agreement(selections, history, folder), agreeing] if several else []
    alone = [] if several else ["Agreement takes two datasets; this run has one."]
    stability = draw_stability(steps, history, selections, names, folder)
    assert config.model.selection is not None
    return [
        learnt_section(config.model.selection, selections, steps, history, folder),
        Section("kernels", "Shared and exclusive offsets", (), kernels),
        Section("history", "Selection over training", missing, pictures),
        Section("agreement", "Agreement across datasets", alone, across),
        Section("stability", "Flips and disagreement", missing, [stability]),
    ]


def _balance_section(config: ExperimentConfig, lines: Sequence[dict[str, float | int | None]], folder: Path) -> Section:
    title = "Losses and gradient balance"
    if not lines:
        return Section("balance", title, [f"There is no {metrics.FILE_NAME} in the run's folder: training writes it."])
    series, names = series_of(lines), config.dataset_names
    threshold = config.harmonize.threshold if config.harmonize.method == "ngh" else None
    drawn = [
        draw_losses(lines, folder),
        draw_psi(series, threshold, folder),
        draw_by_group(
            series, "gradient_norm", names, folder, "Gradient norms by parameter group", "norm of the gradient",
            "Norm of each dataset's gradient of the shared parameters of a group, before balancing, on a logarithmic "
            "axis. From metrics.jsonl.",
        ),
        draw_by_group(
            series, "scale", names, folder, "Scales of the balancer by parameter group", "factor",
            "By what each dataset's gradient of a group was multiplied, on a logarithmic axis; 1 where the norms "
            "agree. From metrics.jsonl.",
        ),
    ]  # fmt: skip
    text = [] if drawn[1] else ["The metrics hold no Psi: this run's gradients were balanced without norms."]
    return Section("balance", title, text, [picture for picture in drawn if picture is not None])

"""The report of a run: gathers, draws, writes one page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from h2a2_jax import figures as html
from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.config import ExperimentConfig, from_json
from h2a2_jax.errors import InputError
from h2a2_jax.figures import Picture, Section, Table
from h2a2_jax.report.energy import Measured
from h2a2_jax.report.probe import EnergyProbe, LayerSelection, Shape, load_batches, observe_selection, site_class_counts
from h2a2_jax.scans.sources import build_source
from h2a2_jax.training import metrics
from h2a2_jax.training.build import build_detector

OTHER_START = 1000
"""Added to a seed for a control with other kernels."""
HOW_TO_GET_SINGLES = (
    "The premise needs detectors that were each trained on one dataset, without kernel selection. `python run.py "
    "--mode=ablation` trains them into <its workdir>/runs/tr3d_<dataset>_seed<k>; give the folders to the report with "
    "--singles=<folder>,<folder>, or put this run's folder beside them, where they are found by that name. Two seeds "
    "a dataset tell what is learnt from what is left of equal first kernels."
)


@dataclass(frozen=True)
class _Single:
    """A detector of one dataset and where it lies."""

    folder: Path
    config: ExperimentConfig
    dataset: str


def write_report(config: ExperimentConfig, workdir: Path, singles: Sequence[Path] = (), scans: int = 16) -> Path:
    """Write <workdir>/report/index.html, one page with everything in it, and its pictures as PNGs beside it.

    The page holds a summary; which offsets each layer shares or keeps exclusive on validation scans; alpha, beta and
    gamma over training; agreement of selections across datasets; how often they flip; losses, gradient norms and Psi;
    and the correlation of response energies between detectors of single datasets. What a run does not have (kernel
    selection, selection.jsonl, other detectors) is left out with a sentence that says so.

    Args:
        config: of the run; must agree with its newest checkpoint.
        workdir: of the run.
        singles: workdirs of detectors of one dataset each; none: those beside the run are taken, `find_singles`.
        scans: validation scans of each dataset to run, at most; a quarter of them for each single detector.

    Returns:
        Path of the page.

    Raises:
        InputError: there is no checkpoint, or one is of another config; data or files of a run are missing or damaged;
            a folder of `singles` is no run of a plain detector of one dataset; matplotlib is missing.
    """
    _require_matplotlib()
    with CheckpointStore(workdir / "checkpoints") as store:
        model, _ = store.restore_model(expected=config)
        step = store.latest_step()
    chosen = [_read_single(folder) for folder in (singles or find_singles(workdir))]
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()

    names = config.dataset_names
    selections: dict[str, LayerSelection] = {}
    counts = [0] * len(names)
    if config.model.selection is not None:
        batches = [
            load_batches(build_source(source, "val"), source.spec, scans, config.model.voxel_size)
            for source in config.datasets
        ]
        counts = [len(own) for own in batches]
        selections = observe_selection(model, batches)
    lines = metrics.read_metrics(workdir) if (workdir / metrics.FILE_NAME).exists() else []
    path = workdir / metrics.SELECTION_FILE
    log = metrics.read_selection_log(path, names) if path.exists() else (np.zeros(0, np.int64), {})

    sections = [
        _summary(config, workdir, step, selections, counts, lines),
        *_selection_sections(config, selections, counts, log, folder),
        _balance_section(config, lines, folder),
        _premise_section(chosen, max(1, scans // 4), folder),
    ]
    title = f"Report of {workdir.absolute().name}"
    subtitle = f"{', '.join(names)}; checkpoint of step {step}. One file: it can be moved, mailed and printed."
    target = folder / "index.html"
    target.write_text(html.page(title, subtitle, sections), encoding="utf-8")
    return target


def find_singles(workdir: Path) -> list[Path]:
    """Runs of single-dataset detectors near a run: tr3d_* in its runs/, beside it or in runs/ beside it."""
    home = workdir.absolute()
    for place in (home / "runs", home.parent, home.parent / "runs"):
        found = sorted(p for p in place.glob("tr3d_*") if (p / "config.json").exists() and p != home)
        if found:
            return found
    return []


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("The report draws with matplotlib, which is not installed: pip install matplotlib.") from error


def _read_single(folder: Path) -> _Single:
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder} is no run: it has no config.json; --singles takes workdirs of --mode=train.")
    config = from_json(path.read_text())
    if len(config.datasets) != 1 or config.model.selection is not None:
        what = f"of {', '.join(config.dataset_names)}" + (", with kernel selection" if config.model.selection else "")
        raise InputError(
            f"{folder} is a detector {what}; --singles takes detectors of one dataset without kernel selection."
        )
    return _Single(folder, config, config.dataset_names[0])


def _summary(
    config: ExperimentConfig,
    workdir: Path,
    step: int | None,
    selections: dict[str, LayerSelection],
    counts: Sequence[int],
    lines: Sequence[dict[str, float | int | None]],
) -> Section:
    path = workdir / "evaluation.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    thresholds = config.eval.iou_thresholds
    rows = []
    for d, name in enumerate(config.dataset_names):
        own = {t["iou"]: t["mAP"] for t in results.get(name, {}).get("thresholds", [])}
        exclusive = float(np.mean([1 - s.shared_share[d].mean() for s in selections.values()])) if selections else None
        scores = [html.number(own.get(iou)) for iou in thresholds]
        loss = lines[-1].get(f"loss/{name}") if lines else None
        scanned = str(counts[d]) if selections else html.number(None)
        rows.append([name, *scores, html.number(loss), html.number(exclusive), scanned])
    columns = ["dataset", *(f"mAP@{iou:g}" for iou in thresholds), "last loss", "exclusive offsets", "scans looked at"]
    per_dataset = Table(
        "Mean average precision as evaluation.json has it; share of (scan, offset) pairs that take the dataset's own "
        "kernel, mean over layers, on validation scans.",
        columns,
        rows,
    )
    last = lines[-1] if lines else {}
    harmonized = last.get("psi/harmonized_share")
    selection = config.model.selection
    facts = [
        ["training steps", f"{step}"],
        ["data", ", ".join(f"{source.name} ({source.kind})" for source in config.datasets)],
        ["network", f"depth {config.model.depth}, voxels of {100 * config.model.voxel_size:g} cm"],
        ["kernel selection (SF-KS)", "off" if selection is None else f"on, tau = {selection.tau:g}"],
        ["gradients", config.harmonize.method],
        ["share of harmonised tensors, last line", html.number(harmonized)],
        ["mean Psi, last line", html.number(last.get("psi/mean"))],
        ["learning rate, last line", "\N{EN DASH}" if not last else f"{last.get('learning_rate') or 0:.1e}"],
    ]
    text = [] if results else ["There is no evaluation.json: run --mode=eval for average precision."]
    if any(source.is_procedural for source in config.datasets):
        text.append("Some data are procedural: the numbers say nothing about the benchmarks of these names.")
    return Section("summary", "Summary", text, [per_dataset, Table("The run.", ["", ""], facts)])


def _selection_sections(
    config: ExperimentConfig,
    selections: dict[str, LayerSelection],
    counts: Sequence[int],
    log: tuple[Int[np.ndarray, " t"], dict[str, metrics.SelectionHistory]],
    folder: Path,
) -> list[Section]:
    from h2a2_jax.report import figures_selection as figures

    names, (steps, history) = config.dataset_names, log
    titles = {
        "kernels": "Shared and exclusive offsets",
        "history": "Selection over training",
        "agreement": "Agreement across datasets",
        "stability": "Flips and disagreement",
    }
    if not selections:
        text = ["This detector has no kernel selection (model.selection is None), so there is nothing to show here."]
        return [Section(anchor, title, text) for anchor, title in titles.items()]
    told = bool(history)
    missing = [] if told else [f"There is no {metrics.SELECTION_FILE} in the run's folder: training writes it."]
    contents: dict[str, list[Picture | Table]] = {
        "kernels": [_exclusive_table(selections, names), *figures.draw_kernels(selections, names, counts, folder)],
        "history": list(figures.draw_history(steps, history, names, folder)) if told else [],
        "agreement": [figures.draw_agreement(selections, history, folder), _agreement_table(selections)]
        if len(names) > 1
        else [],
        "stability": [figures.draw_stability(steps, history, selections, names, folder)],
    }
    notes = {"history": missing, "stability": missing}
    if len(names) < 2:
        notes["agreement"] = ["Agreement takes two datasets; this run has one."]
    return [Section(a, title, notes.get(a, ()), contents[a]) for a, title in titles.items()]


def _exclusive_table(selections: dict[str, LayerSelection], names: Sequence[str]) -> Table:
    rows = [
        [layer, *(html.number(float(1 - share.mean()), 2) for share in s.shared_share)]
        for layer, s in selections.items()
    ]
    return Table("Share of (scan, offset) pairs that take the dataset's own kernel.", ["layer", *names], rows)


def _agreement_table(selections: dict[str, LayerSelection]) -> Table:
    from h2a2_jax.report.offsets import OFFSET_CLASSES, agreement, chance_agreement

    shares = {layer: s.shared_share for layer, s in selections.items()}
    rows = [
        [layer, *(html.number(v, 2) for v in agreement(share)), html.number(chance_agreement(share), 2)]
        for layer, share in shares.items()
    ]
    return Table("The same as numbers.", ["layer", *OFFSET_CLASSES, "chance"], rows)


def _balance_section(config: ExperimentConfig, lines: Sequence[dict[str, float | int | None]], folder: Path) -> Section:
    from h2a2_jax.report import figures_training as figures

    title = "Losses and gradient balance"
    if not lines:
        return Section("balance", title, [f"There is no {metrics.FILE_NAME} in the run's folder: training writes it."])
    series, names = figures.series_of(lines), config.dataset_names
    threshold = config.harmonize.threshold if config.harmonize.method == "ngh" else None
    drawn = [
        figures.draw_losses(series, names, folder),
        figures.draw_psi(series, threshold, folder),
        figures.draw_by_group(
            series, "gradient_norm", names, folder, "Gradient norms by parameter group", "norm of the gradient",
            "Norm of each dataset's gradient of the shared parameters of a group, before balancing, on a logarithmic "
            "axis. From metrics.jsonl.",
        ),
        figures.draw_by_group(
            series, "scale", names, folder, "Scales of the balancer by parameter group", "factor",
            "By what each dataset's gradient of a group was multiplied, on a logarithmic axis; 1 where the norms "
            "agree. From metrics.jsonl.",
        ),
    ]  # fmt: skip
    text = [] if drawn[1] else ["The metrics hold no Psi: this run's gradients were balanced without norms."]
    return Section("balance", title, text, [picture for picture in drawn if picture is not None])


def _premise_section(singles: Sequence[_Single], scans: int, folder: Path) -> Section:
    title = "The premise: do detectors trained apart respond through the same offsets?"
    if len({single.dataset for single in singles}) < 2:
        return Section("premise", title, [HOW_TO_GET_SINGLES])
    from h2a2_jax.report import figures_premise as figures

    measured, counts = measure_singles(singles, scans)
    used = ", ".join(f"{s.folder.name} (seed {s.config.train.seed}, {s.config.train.steps} steps)" for s in singles)
    text = [
        "The paper's premise is that planes, lines and corners make kernels of different datasets respond through "
        "the same offsets. Here each detector runs on validation scans of its own dataset; for every 3\u00d73\u00d73 "
        "residual convolution the energy of an offset is the mean of |x W|\u00b2 over the sites whose neighbour "
        "there exists, normalised over offsets, and the profiles of two detectors are correlated over offsets.",
        "What this can show: that energy goes through the same offsets. What it cannot: that the kernels compute the "
        "same thing there, for which features would have to be aligned; nor that sharing helps detection. Energy also "
        "depends on the features that reach a layer, which resemble each other wherever rooms do: the untrained "
        "controls have that in common too, and only what exceeds them is learnt.",
        f"Detectors: {used}; {scans} scans each.",
    ]
    pictures = [
        *figures.draw_correlations(measured, folder),
        figures.draw_profiles(measured, folder),
        figures.draw_site_classes(counts, folder),
    ]
    return Section("premise", title, text, pictures)


def measure_singles(singles: Sequence[_Single], scans: int) -> tuple[list[Measured], dict[str, np.ndarray]]:
    """Energy profiles of each detector, trained and as it was drawn from its own seed and from another.

    Raises:
        InputError: the detectors differ in architecture, a checkpoint or data are missing.
    """
    first = singles[0].config
    for single in singles:
        if single.config.model != first.model:
            raise InputError(
                f"{single.folder} and {singles[0].folder} are detectors of different architecture (`model` in their "
                "config.json): profiles of layers can only be compared within one."
            )
    batches, models = [], []
    for single in singles:
        with CheckpointStore(single.folder / "checkpoints") as store:
            models.append(store.restore_model(expected=single.config)[0])
        source = build_source(single.config.datasets[0], "val")
        batches.append(load_batches(source, single.config.datasets[0].spec, scans, first.model.voxel_size))
    probe = EnergyProbe(Shape.of([batch for own in batches for batch in own], first.model))
    measured = []
    for i, (single, model, own) in enumerate(zip(singles, models, batches, strict=True)):
        seed = single.config.train.seed
        for start, trained in ((seed, True), (seed, False), (OTHER_START + i, False)):
            detector = model
            if not trained:
                train = replace(single.config.train, seed=start)
                detector = build_detector(replace(single.config, train=train))
            what = f"{single.folder.name}: {'trained' if trained else 'untrained'}"
            sums = probe.measure(detector, own, what)
            profiles = {layer: total.profile() for layer, total in sums.items()}
            measured.append(Measured(single.dataset, start, trained, profiles))
    own_scans = {single.dataset: own for single, own in zip(singles, batches, strict=True)}
    return measured, {name: site_class_counts(own) for name, own in own_scans.items()}

"""The paper's premise, measured: do detectors trained on different datasets respond through the same kernel offsets?

    python -m benchmarks.premise --workdir=runs/sweep/runs/sfks_ngh_seed0 [--singles=RUN,RUN,...] [--scans=4]

Compares detectors that were each trained on one dataset, without kernel selection, and writes <workdir>/premise/
index.html and its pictures: the response energy of each offset at plane, edge and corner sites, its correlation between
detectors, with untrained detectors as controls, and the share of the classes of sites.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.premise import pictures
from benchmarks.premise.energy import EnergyProbe, Measured, site_class_counts
from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.config import ExperimentConfig, from_json
from h2a2_jax.errors import InputError
from h2a2_jax.figures import Section, page
from h2a2_jax.initialization import build_detector
from h2a2_jax.report.observation import PaddedShape, load_batches
from h2a2_jax.scans.sources import build_source

OTHER_START = 1000
"""First seed of the controls that start with other kernels."""
HOW_TO_GET_SINGLES = (
    "The premise needs detectors of two datasets or more that were each trained on one dataset, without kernel "
    "selection. `python run.py --mode=ablation` trains them into <its workdir>/runs/tr3d_<dataset>_seed<k>; give the "
    "folders with --singles=<folder>,<folder>, or a --workdir beside them, where they are found by that name. Two "
    "seeds a dataset separate what is learnt from what is left of equal first kernels."
)


@dataclass(frozen=True)
class Single:
    """A detector of one dataset.

    Attributes:
        folder: Workdir of its run.
        config: Config of its run.
        dataset: Name of the dataset.
    """

    folder: Path
    config: ExperimentConfig
    dataset: str


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a run or a sweep; the page goes there")
    parser.add_argument("--singles", help="folders of single-dataset runs, with commas between (default: those nearby)")
    parser.add_argument("--scans", type=int, default=4, help="validation scans of each dataset, at most (default 4)")
    arguments = parser.parse_args()
    folders = [Path(folder) for folder in arguments.singles.split(",")] if arguments.singles else None
    try:
        print(f"The page is {write_premise(arguments.workdir, folders, arguments.scans)}.", flush=True)
    except InputError as error:
        sys.exit(str(error))


def write_premise(workdir: Path, folders: Sequence[Path] | None = None, scans: int = 4) -> Path:
    """Write <workdir>/premise/index.html, one page with everything in it, and its pictures as PNGs beside it.

    Args:
        workdir: Folder of a run or a sweep.
        folders: Workdirs of detectors of one dataset each; None: those near the workdir (`find_singles`).
        scans: Number of validation scans of each dataset, at most.

    Returns:
        Path of the page.

    Raises:
        InputError: a folder is no run of a plain detector of one dataset, there are fewer than two datasets, the
            detectors differ in architecture, or a checkpoint or data are missing.
    """
    singles = [read_single(folder) for folder in (find_singles(workdir) if folders is None else folders)]
    if len({single.dataset for single in singles}) < 2:
        raise InputError(HOW_TO_GET_SINGLES)
    measured, counts = measure_singles(singles, scans)
    folder = workdir / "premise"
    folder.mkdir(parents=True, exist_ok=True)
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
    drawn = [
        *pictures.draw_correlations(measured, folder),
        pictures.draw_profiles(measured, folder),
        pictures.draw_site_classes(counts, folder),
    ]
    title = "The premise: do detectors trained apart respond through the same offsets?"
    target = folder / "index.html"
    section = Section("premise", "Response energy by offset", text, drawn)
    target.write_text(page(title, f"Detectors near {workdir}", [section]), encoding="utf-8")
    return target


def find_singles(workdir: Path) -> list[Path]:
    """Runs of single-dataset detectors near a folder: tr3d_* in its runs/, beside it or in runs/ beside it."""
    home = workdir.absolute()
    for place in (home / "runs", home.parent, home.parent / "runs"):
        found = sorted(p for p in place.glob("tr3d_*") if (p / "config.json").exists() and p != home)
        if found:
            return found
    return []


def read_single(folder: Path) -> Single:
    """The detector of one dataset in a folder.

    Raises:
        InputError: the folder is no run, or its detector has several datasets or kernel selection.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder} is no run: it has no config.json; --singles takes workdirs of --mode=train.")
    config = from_json(path.read_text())
    if len(config.datasets) != 1 or config.model.selection is not None:
        what = f"of {', '.join(config.dataset_names)}" + (", with kernel selection" if config.model.selection else "")
        raise InputError(
            f"{folder} is a detector {what}; --singles takes detectors of one dataset without kernel selection."
        )
    return Single(folder, config, config.dataset_names[0])


def measure_singles(singles: Sequence[Single], scans: int) -> tuple[list[Measured], dict[str, np.ndarray]]:
    """Energy profiles of each detector: trained, untrained with its own seed, and untrained with another seed.

    Args:
        singles: Detectors of one dataset each.
        scans: Number of validation scans of each dataset, at most.

    Returns:
        The profiles, and by dataset the number of sites of each stage and class, [4, 4].

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
        batches.append(load_batches(source, single.config.datasets[0].spec, scans, first.model))
    probe = EnergyProbe(PaddedShape.of([batch for own in batches for batch in own], first.model))
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


if __name__ == "__main__":
    main()

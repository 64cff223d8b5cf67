"""Rows of the ablation beside the method's own: other balancers, other ways to share, pretraining.

Every rival is the naive joint detector with one thing changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from h2a2_jax.config import ExperimentConfig
from h2a2_jax.sweeps.sweep_plan import Row, SweepRun, locate, naive_joint, restricted, seeded

BALANCERS: Mapping[str, str] = {
    "pcgrad": "PCGrad",
    "gradvac": "GradVac",
    "gradnorm": "GradNorm",
    "mgda": "MGDA",
    "cagrad": "CAGrad",
    "imtl_g": "IMTL-G",
    "nash_mtl": "Nash-MTL",
    "aligned_mtl": "Aligned-MTL",
    "upgrad": "UPGrad",
    "dual_proj": "DualProj",
    "conflict_free": "ConFIG",
    "uncertainty": "uncertainty weighting",
    "dwa": "DWA",
    "famo": "FAMO",
    "random": "random weights",
    "fixed": "fixed weights",
}
"""Labels of the rows of balancers by name, which is the word of `harmonize.method`."""

SHARING: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "pdnorm": ("prompt-driven norms", {"norm_affine": "prompt"}),
    "adapters": ("residual adapters", {"adapters": True}),
    "exclusive_stage4": ("exclusive stage 4", {"exclusive_stages": (4,)}),
    "exclusive_all": (
        "all exclusive but the stem",
        {"exclusive_stages": (1, 2, 3, 4), "neck": "exclusive", "norm_affine": "exclusive"},
    ),
    "union": ("one label space", {"label_space": "union"}),
}
"""Labels of the rows of ways to share by name, with the values of `DetectorConfig` that make them."""

PRETRAINED = "pretrained"
"""Row of detectors that are trained on the first dataset and fine-tuned on each."""


def balanced(base: ExperimentConfig, method: Any) -> ExperimentConfig:
    """Naive joint training with another balancer."""
    return replace(naive_joint(base), harmonize=replace(base.harmonize, method=method))


def shared_otherwise(base: ExperimentConfig, name: str) -> ExperimentConfig:
    """Naive joint training with another way to share, one of `SHARING`."""
    naive = naive_joint(base)
    return replace(naive, model=replace(naive.model, **SHARING[name][1]))


def pretrained_row(base: ExperimentConfig, seeds: Sequence[int], workdir: Path) -> Row:
    """The detector trained on the first dataset, then on each dataset, half of the joint steps each.

    A dataset is so trained for as many steps as in joint training, or alone. The runs begin after those of the
    pretraining (`SweepRun.after`), whose folders are below the workdir.
    """
    naive, (first, *_) = naive_joint(base), base.dataset_names
    half = max(1, restricted(naive, [first]).train.steps // 2)
    starts = seeded(f"pretraining_on_{first}", restricted(naive, [first], half), seeds)
    folders = locate([Row("pretraining", starts)], workdir)

    def tuned(start: SweepRun, name: str) -> SweepRun:
        config = restricted(naive, [name], half)
        train = replace(config.train, seed=start.seed, init_from=str(folders[start].absolute()))
        return SweepRun(f"pretrained_{name}", start.seed, replace(config, train=train), after=start)

    runs = tuple(tuned(start, name) for name in base.dataset_names for start in starts)
    return Row(f"pretrained on {first}", runs)

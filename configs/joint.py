"""Joint training on ScanNet, SUN RGB-D and S3DIS: the setting of H2A2 (Xie et al., CVPR 2026).

    python run.py --config=configs/joint.py --workdir=runs/joint            data/scannet, data/sun_rgbd, data/s3dis
    python run.py --config=configs/joint.py:synthetic --workdir=runs/synth  data/synthetic_scannet, ..., same setting
    python run.py --config=configs/joint.py:demo --workdir=runs/demo        procedural scans, needs no data
    python run.py --config=configs/joint.py:tiny --workdir=runs/tiny        the same in half a minute, learns nothing
    python run.py --config=configs/joint.py:two --workdir=runs/two          a handful of scans, learnt by heart
    python run.py --config=configs/joint.py:fcaf3d --workdir=runs/fcaf3d    FCAF3D in place of TR3D

Published for this setting, mAP@0.25 / mAP@0.5: ScanNet 77.5 / 63.8, SUN RGB-D 68.0 / 51.4, S3DIS 78.7 / 59.3. These
numbers are the paper's; none of them was measured here. The demo says nothing about them: it shows that all parts work.

Any value can be set from the command line: `--config.optim.lr=3e-4`, `--config.datasets.scannet.root=/data/scannet`,
`--config.train.batch_size=8`. Words after commas change a variant: `--config=configs/joint.py:demo,six,no_sfks`.

`six`: the six datasets of UniDet3D (arXiv 2409.04234) in place of the three: ScanNet, S3DIS, MultiScan, 3RScan,
ScanNet++ and ARKitScenes. `:six` reads the folders that UniDet3D prepares. `:six,demo` and `:six,tiny` are procedural,
as is `:six,synthetic`, from data/synthetic_scannet, data/synthetic_s3dis and data/synthetic. A pass of an epoch draws
the share of each dataset that UniDet3D draws (`UNIDET3D_SHARES`). An epoch has 15 passes, as of ScanNet in the paper's
setting. `SourceConfig.share` says how often a dataset then takes part in a step. Published by UniDet3D, mAP@0.25 /
mAP@0.5: ScanNet 77.0 / 65.9, S3DIS 76.7 / 65.3, MultiScan 62.6 / 52.3, 3RScan 63.6 / 44.9, ScanNet++ 24.0 / 16.8,
ARKitScenes 60.1 / 47.2. None of these was measured here either, and UniDet3D's ScanNet has the class "otherfurniture"
where ours has "garbagebin".

`fcaf3d`: FCAF3D (arXiv 2112.00322) in place of TR3D, with its recipe (`SourceConfig.recipe`). It goes with every base
and with every word but `union`; docs/detectors.md has the two side by side.

`no_sfks`: without kernel selection (SF-KS). `mean`: without gradient harmonisation (NGH). Both: naive joint training.

`mgda`, `pcgrad`, `famo`, ...: another balancer, a word of `--config.harmonize.method` (docs/balancers.md). `pdnorm`,
`adapters`, `exclusive_stage4`, `exclusive_all`: another way to share (docs/sharing.md), most of them with `no_sfks`.
`union`: one label space.

`gap0` makes the three procedural datasets one distribution under three names, `gap2` sets them further apart than they
are (`:demo` is gap 1); any number from 0 to 2 goes, behind `:demo` and `:tiny` (`SourceConfig.gap`).
"""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from h2a2_jax.config import ExperimentConfig, OptimConfig, SourceConfig, TrainConfig, config_dict
from h2a2_jax.errors import InputError
from h2a2_jax.layers.kernel_selection import SelectionConfig
from h2a2_jax.models import DetectorConfig
from h2a2_jax.models.architecture import FCAF3D_STAGES
from h2a2_jax.scans.sources import ROOTS
from h2a2_jax.sweeps.rivals import BALANCERS, SHARING

NAMES = ("scannet", "sunrgbd", "s3dis")

UNIDET3D_SHARES: Mapping[str, float] = {
    "scannet": 1.0,
    "s3dis": 0.33,
    "multiscan": 0.25,
    "3rscan": 0.15,
    "scannetpp": 0.33,
    "arkitscenes": 0.08,
}
"""Share of each dataset's scans that an epoch of UniDet3D draws: `partition` in its published config."""

_FCAF3D_SMALL: Mapping[str, Any] = {"prune_threshold": 8000, "assign_threshold": 9, "center_threshold": 6}
"""Thresholds for the larger voxels of `demo` (1.5 cm), which `tiny` (4 cm) takes too. The levels below the coarsest of
the demo have 500, 4,000 and 30,000 locations a scan: 8,000 keeps the middle one whole and a quarter of the finest (the
published 100,000 half of that of a ScanNet scan). With 2,000 a step is twice as fast, and boxes hold too few locations
to learn from. In voxels of 1.5 cm a box holds a third (1 / 1.5^3) of the locations that it holds in those of 1 cm, and
9 and 6 are a third of the published 27 and 18."""

_GAP = re.compile(r"gap\d+(\.\d+)?")


def get_config(variant: str | None = None) -> ConfigDict:
    """The config of a variant: a key of `BASES` (none: "paper"), changed by keys of `MODIFIERS` and by a gap.

    Words are separated by commas; their order does not matter.

    Raises:
        InputError: an unknown word, two bases, two balancers, two gaps, two ways to share that set the same value, or a
            modifier that does not go with the base.
    """
    words = [word for word in (variant or "").split(",") if word]
    if unknown := [word for word in words if word not in VARIANTS and not _GAP.fullmatch(word)]:
        raise InputError(
            f"configs/joint.py has no variant {unknown[0]!r}; its variants are {', '.join(VARIANTS)}, gap<number>."
        )
    bases = [base for base in BASES if base in words] or ["paper"]
    if len(bases) > 1:
        raise InputError(f"configs/joint.py:{variant} names {' and '.join(bases)}: choose one of {', '.join(BASES)}.")
    gaps = [word for word in words if _GAP.fullmatch(word)]
    for kinds in (_BALANCER_WORDS, gaps, *_RIVAL_WORDS):
        if len(rivals := [word for word in dict.fromkeys(words) if word in kinds]) > 1:
            raise InputError(
                f"configs/joint.py:{variant} names {' and '.join(rivals)}, which exclude one another: choose one."
            )
    config = BASES[bases[0]]()
    for word, change in MODIFIERS.items():
        if word in words:
            config = change(config)
    for word in gaps[:1]:
        config = with_gap(config, float(word.removeprefix("gap")))
    return config_dict(config)


def paper() -> ExperimentConfig:
    """TR3D's schedule and widths, SF-KS and NGH on."""
    return ExperimentConfig(
        datasets=tuple(SourceConfig(name, root=ROOTS[name]) for name in NAMES),
        model=DetectorConfig(selection=SelectionConfig()),
    )


def synthetic() -> ExperimentConfig:
    """The paper's setting on procedural scans of full size, as `python -m data.synthetic_<dataset>` prepares them."""
    return ExperimentConfig(
        datasets=tuple(SourceConfig(name, root=f"data/synthetic_{name}", repeats=1) for name in NAMES),
        model=DetectorConfig(selection=SelectionConfig()),
    )


def demo() -> ExperimentConfig:
    """A small detector on procedural stand-ins of the three datasets; 200 steps are some eight epochs."""
    return ExperimentConfig(
        datasets=tuple(
            SourceConfig(name, kind="synthetic", train_size=96, val_size=16, scale="demo", repeats=1) for name in NAMES
        ),
        model=DetectorConfig(
            depth=10,
            stem_channels=16,
            stage_channels=(16, 16, 32, 32),
            neck_channels=32,
            voxel_size=0.015,
            selection=SelectionConfig(),
        ),
        optim=OptimConfig(decay_epochs=(6, 8), warmup_steps=20),
        # One bucket, for one compilation.
        train=TrainConfig(batch_size=4, steps=200, log_every=10, checkpoint_every=100, max_bucket=0),
    )


def tiny() -> ExperimentConfig:
    """A training of under half a minute once compiled, for trying out what surrounds the steps."""
    config = demo()
    return replace(
        config,
        datasets=tuple(replace(source, train_size=8, val_size=2) for source in config.datasets),
        model=replace(config.model, stem_channels=4, stage_channels=(4, 4, 4, 4), neck_channels=4, voxel_size=0.04),
        train=replace(
            config.train, batch_size=2, steps=40, log_every=2, checkpoint_every=8, evaluate_every=16, max_bucket=0
        ),
    )


def rooms() -> ExperimentConfig:
    """The detector that the package ships: varied procedural rooms, a new one for every step, moving averages."""
    return ExperimentConfig(
        datasets=tuple(
            SourceConfig(name, kind="synthetic", train_size=100_000, val_size=300, scale="varied", repeats=1)
            for name in NAMES
        ),
        model=DetectorConfig(
            depth=10,
            stem_channels=16,
            stage_channels=(24, 32, 48, 64),
            neck_channels=48,
            voxel_size=0.015,
            selection=SelectionConfig(),
        ),
        optim=OptimConfig(schedule="cosine", final_lr=0.01, warmup_steps=100, ema_decay=0.998),
        train=TrainConfig(batch_size=4, steps=3000, log_every=50, checkpoint_every=200, max_bucket=0),
    )


def two() -> ExperimentConfig:
    """ScanNet and SUN RGB-D at reduced width and without augmentation, to fit a handful of real scans.

    Points are drawn as the test protocols say, so that training and evaluation see the same.
    """
    return ExperimentConfig(
        datasets=(
            SourceConfig("scannet", root=ROOTS["scannet"], repeats=1, augment=False, sample=False),
            SourceConfig("sunrgbd", root=ROOTS["sunrgbd"], repeats=1, augment=False, sample=True),
        ),
        model=DetectorConfig(
            depth=18,
            stem_channels=16,
            stage_channels=(16, 32, 32, 32),
            neck_channels=32,
            selection=SelectionConfig(),
        ),
        # Decays after 400 and 500 of 550 steps: an epoch is one step for a scan of each.
        optim=OptimConfig(lr=3e-3, decay_epochs=(400, 500), warmup_steps=20),
        train=TrainConfig(batch_size=1, steps=550, log_every=10, checkpoint_every=100, max_bucket=0),
    )


def six(config: ExperimentConfig) -> ExperimentConfig:
    """The six datasets of UniDet3D in place of the three, drawn in its shares."""
    first, roots = config.datasets[0], dict.fromkeys(UNIDET3D_SHARES, "")
    if config.datasets == paper().datasets:
        first, roots = replace(first, repeats=15), dict(ROOTS)
    elif config.datasets == synthetic().datasets:
        roots = dict.fromkeys(UNIDET3D_SHARES, "data/synthetic") | {s.name: s.root for s in config.datasets}
    elif not first.is_procedural:
        raise InputError("The word six does not go with two, which has a handful of scans of two datasets.")
    sources = (replace(first, name=name, root=roots[name], share=share) for name, share in UNIDET3D_SHARES.items())
    return replace(config, datasets=tuple(sources))


def fcaf3d(config: ExperimentConfig) -> ExperimentConfig:
    """FCAF3D in place of TR3D: with its published widths where the base has TR3D's, else with those of the base."""
    # Its evaluation draws points of all scans: `two`, whose training is to see what evaluation sees, draws them too.
    datasets = tuple(replace(source, recipe="fcaf3d", sample=True) for source in config.datasets)
    model = replace(config.model, kind="fcaf3d")
    if model.stage_channels == DetectorConfig.stage_channels:
        model = replace(model, stage_channels=FCAF3D_STAGES)
    elif model.voxel_size > DetectorConfig.voxel_size:
        model = replace(model, **_FCAF3D_SMALL)
    return replace(config, datasets=datasets, model=model)


def without_selection(config: ExperimentConfig) -> ExperimentConfig:
    """No kernel selection: every kernel is shared."""
    return replace(config, model=replace(config.model, selection=None))


def with_model(changes: Mapping[str, Any], config: ExperimentConfig) -> ExperimentConfig:
    """Another architecture: values of `DetectorConfig`."""
    return replace(config, model=replace(config.model, **changes))


def with_balancer(method: Any, config: ExperimentConfig) -> ExperimentConfig:
    """Another balancer of the datasets' gradients."""
    return replace(config, harmonize=replace(config.harmonize, method=method))


def with_gap(config: ExperimentConfig, gap: float) -> ExperimentConfig:
    """Another gap between the procedural datasets."""
    if not all(source.is_procedural for source in config.datasets):
        raise InputError("The word gap sets apart datasets that are not procedural: use gap with demo or tiny.")
    return replace(config, datasets=tuple(replace(source, gap=gap) for source in config.datasets))


BASES: Mapping[str, Callable[[], ExperimentConfig]] = {
    "paper": paper,
    "synthetic": synthetic,
    "demo": demo,
    "tiny": tiny,
    "rooms": rooms,
    "two": two,
}

_BALANCER_WORDS = ("mean", *(method for method in BALANCERS if method != "fixed"))
"""Words for balancers. Fixed weights are flags: they need numbers."""
_RIVAL_WORDS = [
    tuple(pair)
    for pair in itertools.combinations(SHARING, 2)
    if SHARING[pair[0]][1].keys() & SHARING[pair[1]][1].keys()
]
"""Pairs of ways to share that set the same value of the architecture."""

MODIFIERS: Mapping[str, Callable[[ExperimentConfig], ExperimentConfig]] = {
    "six": six,
    "fcaf3d": fcaf3d,
    "no_sfks": without_selection,
    **{name: partial(with_model, changes) for name, (_, changes) in SHARING.items()},
    **{method: partial(with_balancer, method) for method in _BALANCER_WORDS},
}
"""Changes of a variant by word, in the order in which they apply."""

VARIANTS = (*BASES, *MODIFIERS)

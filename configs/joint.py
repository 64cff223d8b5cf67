"""Joint training on ScanNet, SUN RGB-D and S3DIS: the setting of H2A2 (Xie et al., CVPR 2026).

    python run.py --config=configs/joint.py --workdir=runs/joint            data/scannet, data/sun_rgbd, data/s3dis
    python run.py --config=configs/joint.py:synthetic --workdir=runs/synth  data/synthetic_scannet, ..., same setting
    python run.py --config=configs/joint.py:demo --workdir=runs/demo        procedural scans, needs no data
    python run.py --config=configs/joint.py:tiny --workdir=runs/tiny        the same in half a minute, learns nothing
    python run.py --config=configs/joint.py:two --workdir=runs/two          a handful of scans, learnt by heart

Published for this setting, mAP@0.25 / mAP@0.5: ScanNet 77.5 / 63.8, SUN RGB-D 68.0 / 51.4, S3DIS 78.7 / 59.3. These
numbers are the paper's; none of them was measured here. The demo says nothing about them: it shows that all parts work.

Any value can be set from the command line: `--config.optim.lr=3e-4`, `--config.datasets.scannet.root=/data/scannet`,
`--config.train.batch_size=8`. The paper's ablation: `--config.harmonize.method=mean` turns gradient harmonisation (NGH)
off, `:no_sfks` (after a comma behind another variant: `:demo,no_sfks`) kernel selection (SF-KS).

`:demo,gap0` makes the three procedural datasets one distribution under three names, `:demo,gap2` sets them further
apart than they are (`:demo` is gap 1); any number from 0 to 2 goes, with `:tiny` too (`SourceConfig.gap`).
"""

import re
from dataclasses import replace

from ml_collections import ConfigDict

from h2a2_jax.config import ExperimentConfig, OptimConfig, SourceConfig, TrainConfig, config_dict
from h2a2_jax.errors import InputError
from h2a2_jax.layers.kernel_selection import SelectionConfig
from h2a2_jax.models import DetectorConfig
from h2a2_jax.scans.sources import ROOTS

NAMES = ("scannet", "sunrgbd", "s3dis")
VARIANTS = ("paper", "synthetic", "demo", "tiny", "two", "no_sfks")
_GAP = re.compile(r"gap\d+(\.\d+)?")


def get_config(variant: str | None = None) -> ConfigDict:
    """The config of a variant; see above. None, the paper's setting, is also called "paper"."""
    chosen = [part for part in (variant or "").split(",") if part]
    gaps = [float(part.removeprefix("gap")) for part in chosen if _GAP.fullmatch(part)]
    unknown = [part for part in chosen if part not in VARIANTS and not _GAP.fullmatch(part)]
    if unknown:
        raise InputError(
            f"configs/joint.py has no variant {unknown[0]!r}; its variants are {', '.join(VARIANTS)}, gap<number>."
        )
    base = next((make for name, make in BASES.items() if name in chosen), paper)
    config = base()
    result = config_dict(config)
    if "no_sfks" in chosen:
        result.model.selection = None
    if gaps and not all(source.is_procedural for source in config.datasets):
        raise InputError(
            f"configs/joint.py:{variant} sets the gap of datasets that are not procedural: use gap with demo or tiny."
        )
    for gap in gaps:
        for source in config.datasets:
            result.datasets[source.name].gap = gap
    return result


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


BASES = {"synthetic": synthetic, "demo": demo, "tiny": tiny, "two": two}

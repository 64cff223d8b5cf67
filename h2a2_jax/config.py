"""The configuration of an experiment: frozen values in the library, `ConfigDict` and JSON at its door.

--config=configs/joint.py:demo --config.optim.lr=3e-4   ->   ConfigDict   ->   ExperimentConfig   <->   JSON
(`experiment_config`)            (`to_json`, `from_json`)
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_collections import ConfigDict

from h2a2_jax.balancers import HarmonizeConfig
from h2a2_jax.config_tree import as_config_dict, build, leaves_of, wrong_type
from h2a2_jax.errors import InputError
from h2a2_jax.models.architecture import DetectorConfig
from h2a2_jax.scans.sources import SourceConfig
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.typing import Schedule

__all__ = [
    "EvalConfig",
    "ExperimentConfig",
    "HarmonizeConfig",
    "OptimConfig",
    "SourceConfig",
    "TrainConfig",
    "config_dict",
    "experiment_config",
    "from_json",
    "to_json",
]

CONFIG_VERSION = 1
"""Version of the JSON form."""

RENAMED_KEYS: Mapping[str, str] = {
    "optim.batches": "optim.accumulate_steps",
    "optim.average_decay": "optim.ema_decay",
    "train.max_rung": "train.max_bucket",
    "train.most_skipped": "train.max_skipped_steps",
}
"""Keys of version 0.1.0 by their present names: stored configs and config files that use them keep loading."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate.

    Attributes:
        lr: learning rate after warm-up.
        weight_decay: decoupled.
        clip_norm: global gradient norm, over shared and exclusive parameters together, above which gradients are
            scaled down.
        schedule: of the learning rate after warm-up: "step", multiplied by `decay_factor` after each of `decay_epochs`;
            "cosine", down to `final_lr` at the last step; "constant".
        decay_epochs: see there.
        decay_factor: see there.
        final_lr: of the cosine, as a fraction of `lr`.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        decay_norms_and_biases: whether weight decay pulls at every parameter, or at kernels and other weights only.
        accumulate_steps: batches of a step; their gradients are averaged, dataset by dataset, before they are
            balanced and applied.
        ema_decay: of the moving averages of parameters and running statistics that are then evaluated and predicted
            with, as 0.999; 0: none are kept.
        freeze: parameters that stay as they are: groups, as "backbone", "stem", "layer1", "norms", or beginnings of
            paths (`h2a2_jax.checkpoint.parameter_groups`).
    """

    lr: float = 1e-3
    weight_decay: float = 1e-4
    clip_norm: float = 10.0
    schedule: Schedule = "step"
    decay_epochs: tuple[int, ...] = (8, 11)
    decay_factor: float = 0.1
    final_lr: float = 0.0
    warmup_steps: int = 0
    decay_norms_and_biases: bool = True
    accumulate_steps: int = 1
    ema_decay: float = 0.0
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainConfig:
    """Length and pace of training.

    Attributes:
        batch_size: scans per dataset and step, over all replicas of the dataset; of datasets without a `batch_size` of
            their own.
        epochs: passes through the largest dataset, its repeats included.
        steps: optimiser steps; 0: as many as `epochs` are.
        log_every: steps from one line of metrics to the next; each checkpoint has one too.
        checkpoint_every: steps from one checkpoint to the next; the last step always has one.
        keep_checkpoints: how many of the latest are kept, beside the best that was evaluated.
        evaluate_every: steps from one evaluation to the next, each of a checkpoint; 0: only the last step is.
        precision: type that the network computes in: "float32" or "bfloat16". Parameters, statistics and losses are
            float32 in both.
        rematerialize: whether what a block of the network computes is computed again for the gradient rather than kept:
            takes less memory and more time.
        max_skipped_steps: after so many steps in a row that were skipped because something was not finite,
            the run ends.
        init_from: folder of a run whose checkpoint a new run starts with, for what fits of it; "": none.
        init_step: of that checkpoint; None: the last.
        profile: first and last step that a trace is recorded of; (0, 0): none.
        compilation_cache: whether compiled programs are kept in the workdir for the next start.
        max_bucket: highest bucket of padded shapes that training uses, each 1.25 times the one below; larger
            batches are cropped.
        workers: processes that load scans and build their maps; 0: a thread does, beside the training; None: as many as
            there are cores, less two, where an accelerator trains, and 0 where the CPU does. The scans of a step do not
            depend on it.
        permute_boxes: every scan carries the boxes of another one of its dataset, always of the same: a control that
            shows what is scored without seeing.
        seed: of parameters, order of scans and augmentation.
    """

    batch_size: int = 16
    epochs: int = 12
    steps: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    rematerialize: bool = False
    max_skipped_steps: int = 10
    init_from: str = ""
    init_step: int | None = None
    profile: tuple[int, int] = (0, 0)
    compilation_cache: bool = True
    max_bucket: int = 8
    workers: int | None = None
    permute_boxes: bool = False
    seed: int = 0


@dataclass(frozen=True)
class EvalConfig:
    """How a detector is evaluated.

    Attributes:
        iou_thresholds: volume IoU that a hit must exceed, one average precision each.
        score_threshold: lowest score of a box.
        iou_threshold: bird's-eye-view IoU above which the lower score of a class is suppressed.
        batch_size: scans in one forward pass.
        conditioning: whose embedding, statistics and exclusive kernels a dataset's scans are seen with: its "own",
            those of another dataset by name, or the "mean" of all, as for data that no dataset stands for.
        kernels: "selected" by each scan's structure, or "shared" everywhere.
    """

    iou_thresholds: tuple[float, ...] = (0.25, 0.5)
    score_threshold: float = 0.01
    iou_threshold: float = 0.5
    batch_size: int = 1
    conditioning: str = "own"
    kernels: Literal["selected", "shared"] = "selected"


@dataclass(frozen=True)
class ExperimentConfig:
    """Everything that a run is made of.

    Attributes:
        datasets: those trained jointly, in the order of the dataset axis.
        model: architecture.
        harmonize: of the datasets' gradients.
        optim: optimiser.
        train: length and pace.
        eval: evaluation.

    Raises:
        InputError: a value makes no sense; the sentence names its key.
    """

    datasets: tuple[SourceConfig, ...]
    model: DetectorConfig = field(default_factory=DetectorConfig)
    harmonize: HarmonizeConfig = field(default_factory=HarmonizeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _check_datasets(self.datasets)
        _check_model(self.model)
        _check_training(self)
        _check_evaluation(self.eval, self.dataset_names)

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """Names of the datasets, in the order of the dataset axis."""
        return tuple(source.name for source in self.datasets)

    @property
    def specs(self) -> tuple[DatasetSpec, ...]:
        """What is fixed of the datasets, in the same order."""
        return tuple(source.spec for source in self.datasets)


def config_dict(config: ExperimentConfig) -> ConfigDict:
    """The config in the form that flags can override; the datasets are a sub-dict by name, in order.

    Args:
        config: the values.

    Returns:
        A ConfigDict such that `experiment_config` gives `config` again.
    """
    result = as_config_dict(config)
    del result.datasets
    result.datasets = ConfigDict(sort_keys=False)
    for source in config.datasets:
        entry = as_config_dict(source)
        del entry["name"]
        result.datasets[source.name] = entry
    return result


def experiment_config(values: ConfigDict | Mapping[str, Any]) -> ExperimentConfig:
    """The config from nested values, which must fit it exactly.

    Keys left out take their defaults. Lists stand for tuples, ints for floats. Datasets are a mapping by name, or a
    list of entries with a name.

    Args:
        values: from `config_dict`, a config file or JSON.

    Raises:
        InputError: an unknown key, with the nearest known one; a key without default is missing; a value of another
            type, or one that makes no sense.
    """
    plain = dict(values.to_dict() if isinstance(values, ConfigDict) else values)
    datasets = plain.get("datasets")
    if isinstance(datasets, Mapping):
        plain["datasets"] = [_named(name, entry) for name, entry in datasets.items()]
    _rename_keys(plain)
    return build(ExperimentConfig, plain, "")


def to_json(config: ExperimentConfig) -> str:
    """The config as JSON: its fields, the datasets as a list in order, and "version" (1)."""
    return json.dumps({"version": CONFIG_VERSION, **dataclasses.asdict(config)}, indent=2)


def from_json(text: str) -> ExperimentConfig:
    """The config from `to_json`.

    Raises:
        InputError: not JSON, of another version, or see `experiment_config`.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"The config is no JSON ({error}): expected is the text that a run stored.") from error
    version = values.pop("version", None) if isinstance(values, dict) else None
    if version != CONFIG_VERSION:
        raise InputError(
            f"The config has version {version}, this program reads version {CONFIG_VERSION}: use the program that "
            "stored it, or write the config anew."
        )
    return experiment_config(values)


_FREE = (
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
    "train.workers",
    "train.max_skipped_steps",
    "train.profile",
    "train.compilation_cache",
    "eval",
)


def changes(stored: ExperimentConfig, given: ExperimentConfig) -> list[str]:
    """What differs between the config that a run was begun with and one to go on with, a phrase each.

    What only says how often something is written, looked at or kept, or how scans are evaluated, may differ.
    """
    theirs, ours = (leaves_of(config) for config in (stored, given))
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return [
        f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}"
        for key in keys
        if not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]


def _rename_keys(values: dict[str, Any]) -> None:
    """Give `RENAMED_KEYS` their present names, in place.

    Raises:
        InputError: a key stands there under both names.
    """
    for old, new in RENAMED_KEYS.items():
        group, key = old.split(".")
        part, present = values.get(group), new.partition(".")[2]
        if isinstance(part, Mapping) and key in part:
            if present in part:
                raise InputError(f"The config has {old} and {new}, two names of one value: leave {old} out.")
            values[group] = {present if name == key else name: value for name, value in part.items()}


def _named(name: str, entry: Any) -> dict[str, Any]:
    """An entry of the mapping of datasets as one of the list."""
    if not isinstance(entry, Mapping):
        raise wrong_type(f"datasets.{name}", entry, "a group with the keys of a dataset")
    return {"name": name, **entry}


def _require(ok: bool, path: str, value: Any, expected: str) -> None:
    if not ok:
        raise InputError(f"{path} is {value!r}; expected {expected}.")


def _require_at_least(least: int, path: str, group: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(group, key)
        _require(value >= least, f"{path}.{key}", value, f"{least} or more")


def _require_positive(path: str, group: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(group, key)
        _require(0 < value < math.inf, f"{path}.{key}", value, "a finite number above 0")


def _require_fraction(path: str, group: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(group, key)
        _require(0 <= value <= 1, f"{path}.{key}", value, "a number from 0 to 1")


def _check_datasets(datasets: tuple[SourceConfig, ...]) -> None:
    _require(len(datasets) > 0, "datasets", datasets, "at least one, such as scannet, sunrgbd, s3dis")
    names = [source.name for source in datasets]
    for source in datasets:
        _ = source.spec  # raises for an unknown name without classes
        path = f"datasets.{source.name}"
        _require(names.count(source.name) == 1, "datasets", names, f"every dataset once, not {source.name} twice")
        ok = source.is_procedural or source.root != ""
        _require(ok, f"{path}.root", source.root, "the folder of the scans")
        _require_at_least(1, path, source, "train_size", "val_size")
        _require_at_least(0, path, source, "seed")
        _require(source.repeats is None or source.repeats >= 1, f"{path}.repeats", source.repeats, "1 or more, or None")
        size = source.batch_size
        _require(size is None or size >= 1, f"{path}.batch_size", size, "1 or more, or None for train.batch_size")
        _require(0 < source.weight <= 1, f"{path}.weight", source.weight, "a probability above 0 up to 1")


def _check_model(model: DetectorConfig) -> None:
    _ = model.stage_blocks  # raises for an unknown depth
    _require(model.in_channels == 3, "model.in_channels", model.in_channels, "3, the colours of a voxel")
    _require_at_least(1, "model", model, "stem_channels", "neck_channels")
    _require(min(model.stage_channels) >= 1, "model.stage_channels", model.stage_channels, "widths of 1 or more")
    _require_positive("model", model, "voxel_size")
    if model.selection is not None:
        path = "model.selection"
        _require_fraction(path, model.selection, "tau")
        _require_positive(path, model.selection, "temperature")
        _require_at_least(1, path, model.selection, "projection_dim", "embedding_dim", "hidden")
        parts = model.selection.convolutions
        ok = len(set(parts)) == len(parts) > 0
        _require(ok, f"{path}.convolutions", parts, "at least one of 'residual', 'stem', 'neck', each once")
        ok = model.neck == "shared" or "neck" not in parts
        _require(ok, "model.neck", model.neck, "'shared' where the neck selects its kernels, for it has both then")


def _check_training(config: ExperimentConfig) -> None:
    _require_fraction("harmonize", config.harmonize, "threshold")
    _require(config.harmonize.cap >= 1, "harmonize.cap", config.harmonize.cap, "1 or more")
    alpha = config.harmonize.alpha
    _require(0 <= alpha < math.inf, "harmonize.alpha", alpha, "a finite number from 0")
    _require_positive("harmonize", config.harmonize, "weight_lr")
    optim, train = config.optim, config.train
    _require_positive("optim", optim, "lr", "clip_norm", "decay_factor")
    _require_at_least(0, "optim", optim, "weight_decay", "warmup_steps")
    _require_at_least(1, "optim", optim, "accumulate_steps")
    _require_fraction("optim", optim, "final_lr")
    decay = optim.ema_decay
    _require(0 <= decay < 1, "optim.ema_decay", decay, "a number from 0 to below 1, such as 0.999")
    rising = all(a < b for a, b in itertools.pairwise((0, *optim.decay_epochs)))
    _require(rising, "optim.decay_epochs", optim.decay_epochs, "rising epochs from 1")
    _require_at_least(1, "train", train, "batch_size", "epochs", "log_every", "checkpoint_every", "keep_checkpoints")
    _require_at_least(1, "train", train, "max_skipped_steps")
    _require_at_least(0, "train", train, "steps", "max_bucket", "seed", "evaluate_every")
    first, last = train.profile
    _require((first, last) == (0, 0) or 1 <= first <= last, "train.profile", train.profile, "(first, last) or (0, 0)")
    _require(train.workers is None or train.workers >= 0, "train.workers", train.workers, "0 or more, or None")


def _check_evaluation(config: EvalConfig, names: tuple[str, ...]) -> None:
    thresholds = config.iou_thresholds
    ok = len(thresholds) > 0 and all(0 <= t < 1 for t in thresholds)
    _require(ok, "eval.iou_thresholds", thresholds, "at least one number, each from 0 to below 1")
    _require_fraction("eval", config, "score_threshold", "iou_threshold")
    _require_at_least(1, "eval", config, "batch_size")
    choices = ("own", "mean", *names)
    _require(config.conditioning in choices, "eval.conditioning", config.conditioning, f"one of {', '.join(choices)}")

"""The configuration of an experiment: frozen values in the library, `ConfigDict` for flags, JSON for files.

--config=configs/joint.py:demo --config.optim.lr=3e-4   ->   ConfigDict   ->   ExperimentConfig   <->   JSON
                                                        (`experiment_config`)            (`to_json`, `from_json`)
"""

import dataclasses
import difflib
import itertools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from h2a2_jax.balancers import EXHAUSTIVE_METHODS, HarmonizeConfig
from h2a2_jax.balancers.active_sets import MOST_DATASETS
from h2a2_jax.errors import InputError
from h2a2_jax.layers.kernel_selection import READING_0_1_0, SelectionConfig
from h2a2_jax.models import DetectorConfig, kind_of
from h2a2_jax.scans.label_space import UNION
from h2a2_jax.scans.sources import SourceConfig
from h2a2_jax.scans.specs import DatasetSpec
from h2a2_jax.scans.synthetic.gap import LARGEST_GAP
from h2a2_jax.typing import Schedule

CONFIG_VERSION = 2
"""Version of the JSON form. Version 1 knew no prior of kernel selection but the learned one."""

RENAMED_KEYS: Mapping[str, str] = {
    "optim.batches": "optim.accumulate_steps",
    "optim.average_decay": "optim.ema_decay",
    "train.max_rung": "train.max_bucket",
    "train.most_skipped": "train.max_skipped_steps",
}
"""Keys of version 0.1.0 by their present names: stored configs and config files that use them keep loading."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate of their own.

    Attributes:
        parameters: groups, such as "selection", beginnings of paths, or patterns such as "*.prior", as for
            `OptimConfig.freeze`.
        lr: learning rate as a multiple of `OptimConfig.lr`, at every step.
        warmup_steps: steps over which it rises from zero; None: as `OptimConfig.warmup_steps`.
    """

    parameters: tuple[str, ...]
    lr: float = 1.0
    warmup_steps: int | None = None


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning rate.

    Attributes:
        lr: learning rate after warm-up.
        weight_decay: decoupled weight decay.
        clip_norm: global gradient norm, over shared and exclusive parameters together, above which gradients are
            scaled down.
        schedule: learning rate after warm-up: "step", multiplied by `decay_factor` after each of `decay_epochs`;
            "cosine", down to `final_lr` at the last step; "constant".
        decay_epochs: epochs after which the "step" schedule lowers the learning rate.
        decay_factor: factor of the "step" schedule.
        final_lr: last learning rate of the "cosine" schedule, as a fraction of `lr`.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        decay_norms_and_biases: True applies weight decay to every parameter, False to kernels and other weights only.
        accumulate_steps: batches in a step; their gradients are averaged, dataset by dataset, before they are
            balanced and applied.
        ema_decay: decay of the moving averages of parameters and running statistics, such as 0.999; evaluation and
            prediction use the averages. 0: no averages.
        freeze: parameters without updates: groups, such as "backbone", "stem", "layer1", "norms", or beginnings of
            paths (`h2a2_jax.checkpoint.parameter_groups`).
        groups: groups of parameters with learning rates of their own; the first group that names a parameter counts.
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
    groups: tuple[ParameterGroup, ...] = ()


@dataclass(frozen=True)
class TrainConfig:
    """Length and pace of training.

    Attributes:
        batch_size: scans per dataset and step, over all devices of the dataset; datasets may have their own
            (`SourceConfig.batch_size`).
        epochs: passes through the largest dataset, its repeats included.
        steps: optimiser steps; 0: as many as `epochs` need.
        log_every: steps from one line of metrics to the next; each checkpoint has a line too.
        loggers: where the lines go beside metrics.jsonl: "tensorboard", files in the workdir, and "wandb", Weights &
            Biases, which needs its package.
        checkpoint_every: steps from one checkpoint to the next; the last step always has one.
        keep_checkpoints: number of latest checkpoints to keep, beside the best evaluated one.
        evaluate_every: steps from one evaluation to the next, each with a checkpoint; 0: evaluate the last step only.
        precision: compute type of the network: "float32" or "bfloat16". Parameters, statistics and losses are float32
            in both.
        rematerialize: True computes the activations of a block again for the gradient instead of keeping them, which
            takes less memory and more time.
        max_skipped_steps: the run ends after this many steps in a row that were skipped because a value was not finite.
        init_from: folder of a run; a new run starts from the parameters of its checkpoint that fit. "": none.
        init_step: step of that checkpoint; None: the last.
        profile: first and last step of a recorded trace; (0, 0): no trace.
        compilation_cache: True keeps compiled programs for the next start, signed, in the folder of the user
            (`h2a2_jax.compilation.compilation_cache`).
        max_bucket: highest bucket of padded shapes in training, each 1.25 times the bucket below; larger batches are
            cropped.
        workers: processes that load scans and build their maps; 0: a thread beside the training; None: the number of
            cores less two if an accelerator trains, 0 if the CPU does. The scans of a step do not depend on the number.
        permute_boxes: True gives every scan the boxes of another scan of its dataset, always the same one: a control
            that shows the score of a detector that cannot see.
        seed: random seed of parameters, order of scans and augmentation.
    """

    batch_size: int = 16
    epochs: int = 12
    steps: int = 0
    log_every: int = 50
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
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
    """Evaluation of a detector.

    Attributes:
        iou_thresholds: volume IoU that a hit must exceed, kept in rising order; each gives an average precision, and
            the lowest one chooses the best checkpoint.
        score_threshold: lowest score of a box.
        iou_threshold: bird's-eye-view IoU above which suppression removes the lower score of a class.
        batch_size: scans in one forward pass.
        conditioning: embedding, statistics and exclusive kernels for the scans of a dataset: its "own", those of
            another dataset by name, or the "mean" of all datasets, for data of no dataset.
        kernels: "selected" by each scan's structure, or "shared" everywhere.
    """

    iou_thresholds: tuple[float, ...] = (0.25, 0.5)
    score_threshold: float = 0.01
    iou_threshold: float = 0.5
    batch_size: int = 1
    conditioning: str = "own"
    kernels: Literal["selected", "shared"] = "selected"

    def __post_init__(self) -> None:
        object.__setattr__(self, "iou_thresholds", tuple(sorted(self.iou_thresholds)))


@dataclass(frozen=True)
class ExperimentConfig:
    """The configuration of a run.

    Attributes:
        datasets: datasets that are trained jointly, in the order of the dataset axis.
        model: architecture of the detector.
        harmonize: balancing of the datasets' gradients.
        optim: optimiser and learning rate.
        train: length and pace of training.
        eval: evaluation.

    Raises:
        InputError: a value makes no sense; the message names its key.
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
        _check_label_space(self.model, self.dataset_names)
        _check_training(self)
        _check_evaluation(self.eval, self.dataset_names, self.model.selection)

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """Names of the datasets, in the order of the dataset axis."""
        return tuple(source.name for source in self.datasets)

    @property
    def specs(self) -> tuple[DatasetSpec, ...]:
        """Specs of the datasets, in the same order."""
        return tuple(source.spec for source in self.datasets)


def config_dict(config: ExperimentConfig) -> ConfigDict:
    """The config as a ConfigDict, which flags can override; `experiment_config` is the inverse.

    The datasets are a sub-dict by name, in order.
    """
    result = _as_config_dict(config)
    del result.datasets
    result.datasets = ConfigDict(sort_keys=False)
    for source in config.datasets:
        entry = _as_config_dict(source)
        del entry["name"]
        result.datasets[source.name] = entry
    return result


def experiment_config(values: ConfigDict | Mapping[str, Any]) -> ExperimentConfig:
    """The config from nested values, which must fit exactly.

    Missing keys take their defaults. Lists stand for tuples, ints for floats. Datasets are a mapping by name, or a
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
        plain["datasets"] = [_add_name(name, entry) for name, entry in datasets.items()]
    _rename_keys(plain)
    return _build(ExperimentConfig, plain, "")


def to_json(config: ExperimentConfig) -> str:
    """The config as JSON: its fields, the datasets as a list in order, and "version" (2)."""
    return json.dumps({"version": CONFIG_VERSION, **dataclasses.asdict(config)}, indent=2)


def from_json(text: str) -> ExperimentConfig:
    """The config from `to_json`.

    Raises:
        InputError: not JSON, another version, or an error of `experiment_config`.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
        raise InputError(f"The config is no JSON ({error}): expected is the text that a run stored.") from error
    version = values.pop("version", None) if isinstance(values, dict) else None
    if version == 1:
        _add_old_readings(values)
    elif version != CONFIG_VERSION:
        raise InputError(
            f"The config has version {version}, this program reads versions 1 and {CONFIG_VERSION}: use the program "
            "that stored it, or write the config anew."
        )
    return experiment_config(values)


_FREE = (
    "train.log_every",
    "train.loggers",
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
    """Differences between the config that a run began with and the config to resume with, a phrase each.

    Values in `_FREE`, which change no parameter of the detector, may differ.
    """
    theirs, ours = (leaves_of(config) for config in (stored, given))
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return [
        f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}"
        for key in keys
        if not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]


def _add_old_readings(values: dict[str, Any]) -> None:
    """Give a config of version 1 the readings that it was trained with, where today's defaults are others, in place."""
    model = values.get("model")
    if isinstance(model, Mapping) and isinstance(selection := model.get("selection"), Mapping):
        values["model"] = {**model, "selection": {**READING_0_1_0, **selection}}


def _rename_keys(values: dict[str, Any]) -> None:
    """Give `RENAMED_KEYS` their present names, in place.

    Raises:
        InputError: a key is given under both names.
    """
    for old, new in RENAMED_KEYS.items():
        group, key = old.split(".")
        part, present = values.get(group), new.partition(".")[2]
        if isinstance(part, Mapping) and key in part:
            if present in part:
                raise InputError(f"The config has {old} and {new}, two names of one value: leave {old} out.")
            values[group] = {present if name == key else name: value for name, value in part.items()}


def _add_name(name: str, entry: Any) -> dict[str, Any]:
    """Turn an entry of the mapping of datasets into one of the list."""
    if not isinstance(entry, Mapping):
        raise _wrong_type(f"datasets.{name}", entry, "a group with the keys of a dataset")
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
    # Results are files called by the names, and on some systems "Own" and "own" are one file.
    names = [source.name for source in datasets]
    folded = [name.casefold() for name in names]
    for source in datasets:
        _ = source.spec  # raises for an unknown name without classes
        path = f"datasets.{source.name}"
        _require(
            folded.count(source.name.casefold()) == 1, "datasets", names, f"every dataset once, not {source.name} twice"
        )
        ok = source.is_procedural or source.root != ""
        _require(ok, f"{path}.root", source.root, "the folder of the scans")
        _require_at_least(1, path, source, "train_size", "val_size")
        _require_at_least(0, path, source, "seed")
        _require(0 <= source.gap <= LARGEST_GAP, f"{path}.gap", source.gap, f"a number from 0 to {LARGEST_GAP:g}")
        _require(source.repeats is None or source.repeats >= 1, f"{path}.repeats", source.repeats, "1 or more, or None")
        size = source.batch_size
        _require(size is None or size >= 1, f"{path}.batch_size", size, "1 or more, or None for train.batch_size")
        _require(0 < source.weight <= 1, f"{path}.weight", source.weight, "a probability above 0 up to 1")
        share = source.share
        _require(share is None or 0 < share <= 1, f"{path}.share", share, "a number above 0 up to 1, or None")


def _check_label_space(model: DetectorConfig, names: Sequence[str]) -> None:
    ok = model.label_space == "separate" or UNION not in names
    expected = f"other names than {UNION!r}, which is that of all classes where model.label_space is 'union'"
    _require(ok, "datasets", names, expected)


def _check_model(model: DetectorConfig) -> None:
    _ = model.stage_blocks  # raises for an unknown depth
    _require(model.in_channels == 3, "model.in_channels", model.in_channels, "3, the colours of a voxel")
    _require_at_least(1, "model", model, "stem_channels", "neck_channels")
    _require(min(model.stage_channels) >= 1, "model.stage_channels", model.stage_channels, "widths of 1 or more")
    _require_positive("model", model, "voxel_size")
    _require_at_least(1, "model", model, "prune_threshold", "assign_threshold", "center_threshold")
    kind_of(model).check(model)
    if model.selection is not None:
        path = "model.selection"
        _require_fraction(path, model.selection, "tau")
        _require_positive(path, model.selection, "temperature")
        _require_positive(path, model.selection, "agreement_threshold", "agreement_sharpness")
        _require_fraction(path, model.selection, "exploration")
        views = model.selection.agreement_views
        _require(1 <= views < math.inf, f"{path}.agreement_views", views, "a finite number from 1")
        decay = model.selection.agreement_decay
        _require(0 < decay < 1, f"{path}.agreement_decay", decay, "a number above 0 and below 1, such as 0.98")
        _require_at_least(1, path, model.selection, "projection_dim", "embedding_dim", "hidden")
        parts = model.selection.convolutions
        ok = len(set(parts)) == len(parts) > 0
        _require(ok, f"{path}.convolutions", parts, "at least one of 'residual', 'stem', 'neck', each once")
        ok = model.neck == "shared" or "neck" not in parts
        _require(ok, "model.neck", model.neck, "'shared' where the neck selects its kernels, for it has both then")
    _check_sharing(model)


def _check_sharing(model: DetectorConfig) -> None:
    """Check prompts, adapters and exclusive stages, and that no part has kernels of a dataset in two ways."""
    _require_at_least(1, "model", model, "prompt_dim")
    parts = () if model.selection is None else model.selection.convolutions
    stages, path = model.exclusive_stages, "model.exclusive_stages"
    ok = len(set(stages)) == len(stages) and set(stages) <= set(range(5))
    _require(ok, path, stages, "stages of 1 to 4, or 0 for the stem, each once")
    selecting = [stage for stage in stages if ("stem" if stage == 0 else "residual") in parts]
    _require(not selecting, path, stages, "stages that do not select their kernels (model.selection)")
    shares = set(stages) < set(range(5)) or model.neck == "shared" or model.norm_affine != "exclusive"
    _require(shares, path, stages, "a part that datasets share: with exclusive neck and norms, leave the stem 0 out")
    ok = not model.adapters or "residual" not in parts
    _require(ok, "model.adapters", True, "False where the stages select their kernels (model.selection)")
    ok = not model.adapters or not {1, 2, 3, 4} <= set(stages)
    _require(ok, "model.adapters", True, "False where no stage is shared (model.exclusive_stages)")


def _check_balancer(balancer: HarmonizeConfig, names: tuple[str, ...]) -> None:
    path = "harmonize"
    _require_fraction(path, balancer, "threshold", "gradvac_beta")
    _require(balancer.cap >= 1, f"{path}.cap", balancer.cap, "1 or more")
    for key in ("alpha", "cagrad_c", "nash_max_norm", "famo_decay"):
        value = getattr(balancer, key)
        _require(0 <= value < math.inf, f"{path}.{key}", value, "a finite number from 0")
    _require_positive(path, balancer, "weight_lr", "dwa_temperature")
    _require_at_least(1, path, balancer, "dwa_window")
    weights, are_used = balancer.weights, balancer.method == "fixed"
    ok = all(0 <= weight < math.inf for weight in weights) and (sum(weights) > 0 or not weights)
    _require(ok, f"{path}.weights", weights, "finite numbers from 0, not all of them 0")
    number = f"{len(names)} numbers, one for each of {', '.join(names)}"
    _require(len(weights) == len(names) or not are_used, f"{path}.weights", weights, number)
    most = len(names) <= MOST_DATASETS or balancer.method not in EXHAUSTIVE_METHODS
    expected = f"a method other than {', '.join(EXHAUSTIVE_METHODS)} for more than {MOST_DATASETS} datasets"
    _require(most, f"{path}.method", balancer.method, expected)


def _check_training(config: ExperimentConfig) -> None:
    _check_balancer(config.harmonize, config.dataset_names)
    optim, train = config.optim, config.train
    _require_positive("optim", optim, "lr", "clip_norm", "decay_factor")
    _require_at_least(0, "optim", optim, "weight_decay", "warmup_steps")
    _require_at_least(1, "optim", optim, "accumulate_steps")
    _require_fraction("optim", optim, "final_lr")
    decay = optim.ema_decay
    _require(0 <= decay < 1, "optim.ema_decay", decay, "a number from 0 to below 1, such as 0.999")
    for i, group in enumerate(optim.groups):
        path = f"optim.groups.{i}"
        _require(len(group.parameters) > 0, f"{path}.parameters", group.parameters, "at least one, such as 'selection'")
        _require_positive(path, group, "lr")
        steps = group.warmup_steps
        _require(steps is None or steps >= 0, f"{path}.warmup_steps", steps, "0 or more, or None")
    rising = all(a < b for a, b in itertools.pairwise((0, *optim.decay_epochs)))
    _require(rising, "optim.decay_epochs", optim.decay_epochs, "rising epochs from 1")
    _require_at_least(1, "train", train, "batch_size", "epochs", "log_every", "checkpoint_every", "keep_checkpoints")
    _require_at_least(1, "train", train, "max_skipped_steps")
    _require_at_least(0, "train", train, "steps", "max_bucket", "seed", "evaluate_every")
    first, last = train.profile
    _require((first, last) == (0, 0) or 1 <= first <= last, "train.profile", train.profile, "(first, last) or (0, 0)")
    _require(train.workers is None or train.workers >= 0, "train.workers", train.workers, "0 or more, or None")


def _check_evaluation(config: EvalConfig, names: tuple[str, ...], selection: SelectionConfig | None) -> None:
    thresholds = config.iou_thresholds
    ok = len(thresholds) > 0 and all(0 <= t < 1 for t in thresholds)
    _require(ok, "eval.iou_thresholds", thresholds, "at least one number, each from 0 to below 1")
    _require_fraction("eval", config, "score_threshold", "iou_threshold")
    _require_at_least(1, "eval", config, "batch_size")
    choices = ("own", "mean", *names)
    _require(config.conditioning in choices, "eval.conditioning", config.conditioning, f"one of {', '.join(choices)}")
    trained = selection is None or selection.kernels != "exclusive"
    expected = "'selected' where model.selection.kernels is 'exclusive', which trains no shared ones"
    _require(trained or config.kernels == "selected", "eval.kernels", config.kernels, expected)


def _as_config_dict(config: Any) -> ConfigDict:
    """A dataclass as a ConfigDict; None becomes a placeholder of the field's type, so that a flag can set it."""
    result, hints = ConfigDict(), typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), _without_none(hints[f.name])
        if dataclasses.is_dataclass(value):
            value = _as_config_dict(value)
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            value = tuple(dataclasses.asdict(part) for part in value)
        elif value is None and isinstance(kind, type) and not dataclasses.is_dataclass(kind):
            value = placeholder(kind)
        result[f.name] = value
    return result


def _without_none(kind: Any) -> Any:
    """T for T | None."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _build(kind: Any, value: Any, path: str) -> Any:
    """A value of an annotated type from plain containers, which must fit exactly.

    Args:
        kind: dataclass, tuple, Literal, float (which takes an int), int, str, bool, or a union of one of them and None.
        value: mappings for dataclasses, lists for tuples.
        path: dotted key of the value, for error messages; "" at the top.

    Raises:
        InputError: an unknown key, with the nearest known one; a missing key; a value of another type.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, path)
    if _without_none(kind) is not kind:
        return None if value is None else _build(_without_none(kind), value, path)
    if typing.get_origin(kind) is tuple:
        return _tuple(kind, value, path)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise InputError(f"{path} is {value!r}; expected one of {', '.join(map(repr, choices))}.")
        return value
    if kind is float and isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise _wrong_type(path, value, kind.__name__)


def _dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        keys = ", ".join(f.name for f in dataclasses.fields(kind))
        raise _wrong_type(path, value, f"a group with the keys {keys}")
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            nearest = difflib.get_close_matches(str(key), hints, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
            raise InputError(f"unknown config key '{prefix}{key}'{hint} (keys there: {', '.join(hints)})")
    for f in dataclasses.fields(kind):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise InputError(f"config key '{prefix}{f.name}' is missing; expected {_kind_name(hints[f.name])}.")
    return kind(**{key: _build(hints[key], entry, f"{prefix}{key}") for key, entry in value.items()})


def _tuple(kind: Any, value: Any, path: str) -> tuple:
    kinds = typing.get_args(kind)
    if not isinstance(value, list | tuple):
        raise _wrong_type(path, value, _kind_name(kind))
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise InputError(f"{path} has {len(value)} entries ({list(value)}); expected {_kind_name(kind)}.")

    def key(index: int, entry: Any) -> str:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        return f"{path}.{index if name is None else name}"

    return tuple(_build(part, entry, key(i, entry)) for i, (part, entry) in enumerate(zip(kinds, value, strict=True)))


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        many = "any number of" if parts[-1] is Ellipsis else str(len(parts))
        return f"a list of {many} {_kind_name(parts[0])}"
    return getattr(kind, "__name__", str(kind))


def leaves_of(config: Any) -> dict[str, object]:
    """Values of a dataclass by dotted key; a tuple entry with a name goes by its name, others by number."""

    def leaves(path: str, value: Any) -> dict[str, object]:
        if isinstance(value, tuple) and value and isinstance(value[0], dict):
            value = {str(entry.get("name", i)): entry for i, entry in enumerate(value)}
        if not isinstance(value, dict):
            return {path: value}
        prefix = f"{path}." if path else ""
        return {k: leaf for key, entry in value.items() for k, leaf in leaves(f"{prefix}{key}", entry).items()}

    return leaves("", dataclasses.asdict(config))


def _wrong_type(path: str, value: Any, expected: str) -> InputError:
    """The error for a value of another type."""
    return InputError(f"{path or 'the config'} is {value!r} ({type(value).__name__}); expected {expected}.")

"""From a file of PyTorch to a run's folder with its checkpoint, and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from h2a2_jax.balancers import build_balancer
from h2a2_jax.checkpoint.store import CheckpointStore, restore_checkpoint
from h2a2_jax.checkpoint.train_state import create_state
from h2a2_jax.config import ExperimentConfig, HarmonizeConfig, to_json
from h2a2_jax.convert.torch_file import TorchFile
from h2a2_jax.convert.tr3d_weights import config_of_weights, export_tr3d, load_tr3d, tr3d_slots, without_prefix
from h2a2_jax.distributed import DATASET
from h2a2_jax.errors import InputError
from h2a2_jax.models import TR3D
from h2a2_jax.models.head import NUM_OUTPUTS
from h2a2_jax.scans.sources import ROOTS, SourceConfig
from h2a2_jax.scans.specs import SPECS
from h2a2_jax.training.build import build_optimizer, draw_detector, learning_rate

_HEAD = "bbox_head.conv_"
_OF_FCAF3D = "bbox_head.conv_center.kernel"
_SHOWN = 3


@dataclass(frozen=True)
class Entry:
    """What became of one name.

    Attributes:
        fate: "used", "left over" (in the file, without a place in ours) or "missing" (ours, not in the file).
        name: of the parameter.
        form: its shape and type, as text.
        why: a remark.
    """

    fate: str
    name: str
    form: str
    why: str = ""


@dataclass(frozen=True)
class Conversion:
    """What a file's weights make.

    Attributes:
        config: of a run that they could come from.
        weights: those that have a place in its detector, by TR3D's names.
        entries: what became of every name.
        notes: what else is worth knowing, a sentence each.
    """

    config: ExperimentConfig
    weights: Mapping[str, np.ndarray]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    def of(self, fate: str) -> list[Entry]:
        """The entries of one fate."""
        return [entry for entry in self.entries if entry.fate == fate]

    def build(self) -> TR3D:
        """The detector with the weights; what is missing is drawn from the config's seed."""
        graph, state = nnx.split(_shape_detector(self.config))
        model = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state))
        missing = [entry.name for entry in self.of("missing")]
        load_tr3d(model, {**self.weights, **(_draw(self.config, missing) if missing else {})})
        return model


def convert_file(
    file: TorchFile, dataset: str | None = None, classes: tuple[str, ...] = (), seed: int = 0
) -> Conversion:
    """Finds the detector that a file's weights belong to, and the place of each.

    Args:
        file: as read.
        dataset: whose head it is; None: the built-in one of so many classes and outputs.
        classes: of a dataset that is not built in; empty: as the file says.
        seed: of the parameters that the file lacks.

    Raises:
        InputError: they are no weights of TR3D, their dataset cannot be told, or one of them is not finite.
    """
    whole = without_prefix(file.tensors)
    numbers = {name: value for name, value in whole.items() if not name.endswith("num_batches_tracked")}
    is_fcaf3d = _OF_FCAF3D in numbers
    # FCAF3D's head has names of TR3D's for other things.
    state = {k: v for k, v in numbers.items() if k.startswith("backbone.")} if is_fcaf3d else numbers
    model_config = config_of_weights(state)
    source, note = _source(state, file.classes, dataset, classes)
    config = ExperimentConfig(datasets=(source,), model=model_config, harmonize=HarmonizeConfig(method="mean"))
    config = replace(config, train=replace(config.train, seed=seed))
    shapes = {name: slot.shape for name, slot in tr3d_slots(_shape_detector(config)).items()}
    fitting, reasons = {}, {}
    for name, value in state.items():
        if name not in shapes:
            continue
        if np.squeeze(value).shape != tuple(length for length in shapes[name] if length != 1):
            reasons[name] = f"{_shape(shapes[name])} expected"
        elif value.dtype.kind in "biu":
            reasons[name] = "no floating-point numbers"
        else:
            fitting[name] = np.asarray(value, np.float32).reshape(shapes[name])
            if not np.isfinite(fitting[name]).all():
                raise InputError(f"{name} holds NaN or infinity: the file is damaged, or its training diverged.")
    if is_fcaf3d:
        reasons |= dict.fromkeys((name for name in numbers if name not in state), "of FCAF3D, not of its backbone")
    entries = [Entry("used", name, shape_and_type(state[name])) for name in shapes if name in fitting]
    entries += [
        Entry("left over", k, shape_and_type(v), reasons.get(k, "")) for k, v in numbers.items() if k not in fitting
    ]
    entries += [Entry("left over", name, "no tensor") for name in file.others]
    entries += [Entry("missing", name, _shape(shapes[name]), "initialised") for name in shapes if name not in fitting]
    notes = [note] if note else []
    if len(numbers) < len(whole):
        notes.append(f"{len(whole) - len(numbers)} counters of batches (num_batches_tracked) say nothing of the model.")
    if file.not_read:
        names = ", ".join(file.not_read[:_SHOWN]) + (", ..." if len(file.not_read) > _SHOWN else "")
        notes.append(f"The file names {len(file.not_read)} classes or functions, none was run: {names}.")
    return Conversion(config, fitting, tuple(entries), tuple(notes))


def save_conversion(conversion: Conversion, workdir: Path) -> None:
    """Writes a run's folder: config.json and a checkpoint of step 0, from which training can go on.

    Args:
        conversion: what to write.
        workdir: the folder, without checkpoints yet.

    Raises:
        InputError: it holds checkpoints or cannot be written.
    """
    config = conversion.config
    optimizer = build_optimizer(config.optim, learning_rate(config.optim, steps_per_epoch=1, total_steps=1))
    balancer = build_balancer(config.harmonize, 1, DATASET, config.train.seed)
    _, state = create_state(conversion.build(), optimizer, balancer)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(to_json(config) + "\n")
        with CheckpointStore(workdir / "checkpoints") as store:
            store.save(0, state, config, config.dataset_names)
    except OSError as error:
        raise InputError(f"{workdir} cannot be written: {error.strerror or error}.") from error


def export_checkpoint(path: Path, dataset: str | None = None, step: int | None = None) -> tuple[dict, dict[str, Any]]:
    """Our checkpoint as mmdetection3d's TR3D would hold it.

    Args:
        path: folder of a run.
        dataset: whose statistics and head, of a detector trained on several.
        step: of the checkpoint; None: the last.

    Returns:
        The state dict, by TR3D's names, and what goes beside it.

    Raises:
        InputError: there is no such checkpoint; it selects kernels; the dataset is not told or not its own.
    """
    model, config = restore_checkpoint(path, step)
    if config.model.selection is not None:
        raise InputError(
            f"{path} selects kernels by the dataset and the scan (model.selection), which TR3D cannot express, and its "
            "shared kernels alone are another detector: export one trained with model.selection=None."
        )
    names = config.dataset_names
    if dataset is None and len(names) > 1:
        raise InputError(f"{path} was trained on {', '.join(names)}, TR3D holds one: choose it with --dataset.")
    if dataset is not None and dataset not in names:
        raise InputError(f"{path} was trained on {', '.join(names)}, not on {dataset}.")
    index = 0 if dataset is None else names.index(dataset)
    state: dict[str, np.ndarray] = {}
    for name, value in export_tr3d(model, index).items():
        state[name] = value
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return state, {"dataset_meta": {"classes": list(config.specs[index].classes)}}


def _source(
    state: Mapping[str, np.ndarray], stored: tuple[str, ...], dataset: str | None, classes: tuple[str, ...]
) -> tuple[SourceConfig, str]:
    """The dataset whose head weights are, and a remark on its classes."""
    known = {spec.name: spec for spec in SPECS}
    widths = {
        part: state[f"{_HEAD}{part}.kernel"].shape[-1] for part in ("cls", "reg") if f"{_HEAD}{part}.kernel" in state
    }
    has_head = len(widths) == 2
    num_classes, num_outputs = widths.get("cls", 0), widths.get("reg", 0)
    found = f"{num_classes} classes and {num_outputs} box outputs"
    if has_head and num_outputs not in (6, NUM_OUTPUTS):
        raise InputError(f"The head has {found}; expected 6 outputs (boxes along the axes) or 8 (boxes with yaw).")
    if dataset is None and classes:
        raise InputError("--classes are of a dataset of your own: give it a name with --dataset.")
    if dataset is None:
        fitting = [s.name for s in SPECS if (s.num_classes, s.num_outputs) == (num_classes, num_outputs)]
        if not fitting:
            what = f"The head has {found}, which is none of" if has_head else "There is no head that would tell it from"
            raise InputError(f"{what} {', '.join(known)}: name the dataset with --dataset, another one with --classes.")
        dataset = fitting[0]
    if dataset in known:
        if classes:
            raise InputError(
                f"{dataset} is built in and has its classes: leave --classes out, or call yours otherwise."
            )
        spec = known[dataset]
        if has_head and (spec.num_classes, spec.num_outputs) != (num_classes, num_outputs):
            raise InputError(
                f"The head has {found}, {dataset} has {spec.num_classes} and {spec.num_outputs}: give another "
                "--dataset."
            )
        source, note = SourceConfig(dataset, root=ROOTS[dataset]), ""
        if stored and [_plain(name) for name in stored] != [_plain(name) for name in spec.classes]:
            note = (
                f"Attention: the file calls its classes {', '.join(stored)}; those of {dataset} are "
                f"{', '.join(spec.classes)}. If they are others, convert with --dataset=NAME --classes=..."
            )
        return source, note
    own = classes or stored
    if not own or (has_head and len(own) != num_classes):
        given = f"{len(own)} are given" if own else "none are given"
        raise InputError(
            f"{dataset} is a dataset of your own: name its {num_classes or ''} classes with --classes=a,b,c; {given}."
        )
    source = SourceConfig(dataset, root=f"data/{dataset}", classes=own, has_yaw=num_outputs == NUM_OUTPUTS)
    return source, "" if classes else f"Its classes are those that the file names: {', '.join(own)}."


def _shape_detector(config: ExperimentConfig) -> TR3D:
    """The detector with shapes in place of arrays."""
    return nnx.eval_shape(lambda: draw_detector(config, jax.random.key(0)))


def _draw(config: ExperimentConfig, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Parameters of a new detector, by TR3D's names; compiled for these alone, since all of them take long."""

    def draw(key: PRNGKeyArray) -> dict[str, jax.Array]:
        slots = tr3d_slots(draw_detector(config, key))
        return {name: slots[name].variable[...][slots[name].index].reshape(slots[name].shape) for name in names}

    return jax.device_get(jax.jit(draw)(jax.random.key(config.train.seed)))


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def shape_and_type(array: np.ndarray) -> str:
    """Shape and type of a parameter, as text."""
    return f"{_shape(array.shape)} {array.dtype}"

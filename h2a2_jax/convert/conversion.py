"""Conversion of TR3D and FCAF3D checkpoints: from a file of PyTorch to a run's folder with its checkpoint, and back.

    h2a2 convert tr3d.pth --output=runs/tr3d                    from mmdetection3d; FCAF3D is found by its head
    h2a2 convert runs/tr3d --reverse --output=tr3d.pth          and back

`convert_command` is the command; `convert_file`, `save_conversion` and `export_checkpoint` are its steps.
`python -m h2a2_jax.convert.tr3d` is the same command.
"""

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PRNGKeyArray

from h2a2_jax.balancers import build_balancer
from h2a2_jax.checkpoint.store import CheckpointStore, restore_checkpoint
from h2a2_jax.checkpoint.train_state import create_state
from h2a2_jax.config import ExperimentConfig, HarmonizeConfig, to_json
from h2a2_jax.convert.torch_file import TorchFile, read_torch_file, write_torch_file
from h2a2_jax.distributed import DATASET
from h2a2_jax.errors import InputError
from h2a2_jax.host import quiet_command_line
from h2a2_jax.initialization import draw_detector
from h2a2_jax.models import KINDS, DetectorNetwork, kind_of
from h2a2_jax.models.architecture import Kind
from h2a2_jax.models.head import NUM_OUTPUTS
from h2a2_jax.models.weight_slots import export_slots, load_slots, of_one_dataset, without_prefix
from h2a2_jax.optimizer import build_optimizer, learning_rate
from h2a2_jax.scans.sources import ROOTS, Recipe, SourceConfig
from h2a2_jax.scans.specs import ALL_SPECS, SPECS

_SHOWN = 3
_VERSION = 2
"""Version of the class of both detectors in mmdetection3d, which renames the parameters in files of an earlier one."""
_DESCRIPTION = """Convert TR3D and FCAF3D checkpoints of mmdetection3d into checkpoints of this program, and back.

Only the file's weights are read; nothing in it is imported or run. Detector, depth, widths, classes and the form of the
boxes follow from the weights. --kind makes the other of the two detectors from the backbone of a file (--partial)."""


@dataclass(frozen=True)
class Entry:
    """One line of the table that a conversion prints: a published parameter and what was done with it.

    Its fate is "used", "left over" (in the file, without a place here), "missing" (needed here, not in the file) or
    "written".
    """

    fate: str
    name: str
    form: str  # shape and dtype
    why: str = ""


@dataclass(frozen=True)
class Conversion:
    """A run made from the weights of a file."""

    config: ExperimentConfig  # of a run that the weights could come from
    weights: Mapping[str, np.ndarray]  # those with a place in its detector, by their published names
    entries: tuple[Entry, ...]  # one for every name
    notes: tuple[str, ...] = ()

    def of(self, fate: str) -> list[Entry]:
        """The entries of one fate."""
        return [entry for entry in self.entries if entry.fate == fate]

    def build(self) -> DetectorNetwork:
        """Build the detector with the weights; missing parameters are initialised by the config's seed."""
        graph, state = nnx.split(_shape_detector(self.config))
        model = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state))
        load_slots(kind_of(self.config.model).slots(model, 0), self.weights)
        missing = [entry.name for entry in self.of("missing")]

        def draw(key: PRNGKeyArray) -> dict[str, jax.Array]:
            slots = kind_of(self.config.model).slots(draw_detector(self.config, key), 0)
            return {name: slots[name].variable[...][slots[name].index].reshape(slots[name].shape) for name in missing}

        if missing:  # compiled for the missing parameters alone, since all of them take long
            drawn = jax.device_get(jax.jit(draw)(jax.random.key(self.config.train.seed)))
            load_slots(kind_of(self.config.model).slots(model, 0), drawn)
        return model


def convert_file(
    file: TorchFile,
    dataset: str | None = None,
    classes: tuple[str, ...] = (),
    seed: int = 0,
    kind: Kind | None = None,
) -> Conversion:
    """Find the detector that a file's weights belong to, and the place of each.

    Args:
        file: weights of TR3D or FCAF3D.
        dataset: dataset of the head; None for the built-in one with as many classes and outputs.
        classes: classes of a dataset that is not built in; empty for those that the file names.
        seed: seed of the parameters that the file lacks.
        kind: kind of detector to make; None for that of the file. From a file of the other kind the backbone is taken.

    Raises:
        InputError: the weights are of another network or not finite, or the dataset does not fit them.
    """
    whole = without_prefix(file.tensors)
    # A backbone alone makes a TR3D.
    read = ((word, of_kind.published(whole)) for word, of_kind in KINDS.items())
    found, renamed = next(((word, state) for word, state in read if state is not None), ("tr3d", whole))
    kind = kind or cast(Kind, found)
    numbers = {name: value for name, value in renamed.items() if not name.endswith("num_batches_tracked")}
    # The heads of the two have the same names for other things.
    state = numbers if kind == found else {k: v for k, v in numbers.items() if k.startswith("backbone.")}
    model_config = KINDS[kind].config_of(state)
    source, note = _dataset_of(state, file.classes, dataset, classes)
    source = replace(source, recipe=kind if kind in get_args(Recipe) else "tr3d")
    config = ExperimentConfig(datasets=(source,), model=model_config, harmonize=HarmonizeConfig(method="mean"))
    config = replace(config, train=replace(config.train, seed=seed))
    shapes = {name: slot.shape for name, slot in KINDS[kind].slots(_shape_detector(config), 0).items()}
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
    foreign = f"of {KINDS[found].title}, not of its backbone"
    reasons |= {name: foreign for name in numbers if name not in state}
    entries = [Entry("used", name, _shape_and_dtype(state[name])) for name in shapes if name in fitting]
    entries += [
        Entry("left over", k, _shape_and_dtype(v), reasons.get(k, "")) for k, v in numbers.items() if k not in fitting
    ]
    entries += [Entry("left over", name, "no tensor") for name in file.others]
    entries += [Entry("missing", name, _shape(shapes[name]), "initialised") for name in shapes if name not in fitting]
    notes = [note] if note else []
    if old := len(renamed.keys() - whole.keys()):
        notes.append(
            f"The file has an old name for its head: {old} names begin with head in it and with bbox_head here."
        )
    if len(numbers) < len(whole):
        notes.append(f"{len(whole) - len(numbers)} counters of batches (num_batches_tracked) are not part of a model.")
    if file.not_read:
        names = ", ".join(file.not_read[:_SHOWN]) + (", ..." if len(file.not_read) > _SHOWN else "")
        notes.append(f"The file names {len(file.not_read)} classes or functions, none was run: {names}.")
    return Conversion(config, fitting, tuple(entries), tuple(notes))


def save_conversion(conversion: Conversion, workdir: Path) -> None:
    """Write a run's folder: config.json and a checkpoint of step 0, from which training can go on."""
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
    """Export a run's checkpoint in the form of mmdetection3d, with the statistics and the head of one dataset.

    Returns:
        The state dict, by the published names of its kind of detector, and the metadata stored beside it.

    Raises:
        InputError: there is no such checkpoint or dataset, or no published detector can express what it holds.
    """
    model, config = restore_checkpoint(path, step)
    kind = kind_of(config.model)
    if config.model.selection is not None:
        raise InputError(
            f"{path} selects kernels by the dataset and the scan (model.selection), which {kind.title} cannot express, "
            "and its shared kernels alone are another detector: export one trained with model.selection=None."
        )
    names = config.dataset_names
    if dataset is None and len(names) > 1:
        raise InputError(f"{path} was trained on {', '.join(names)}, {kind.title} holds one: choose it with --dataset.")
    if dataset is not None and dataset not in names:
        raise InputError(f"{path} was trained on {', '.join(names)}, not on {dataset}.")
    index = 0 if dataset is None else names.index(dataset)
    state: dict[str, np.ndarray] = {}
    for name, value in export_slots(kind.slots(of_one_dataset(model, index), index)).items():
        state[name] = value
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return state, {"dataset_meta": {"classes": list(config.specs[index].classes)}}


def _dataset_of(
    state: Mapping[str, np.ndarray], stored: tuple[str, ...], dataset: str | None, classes: tuple[str, ...]
) -> tuple[SourceConfig, str]:
    """The dataset that the head in the weights belongs to, and a remark on its classes."""
    known = {spec.name: spec for spec in ALL_SPECS}
    kernels = [state.get(f"bbox_head.conv_{part}.kernel") for part in ("cls", "reg")]
    has_head = all(kernel is not None for kernel in kernels)
    num_classes, num_outputs = (0 if kernel is None else kernel.shape[-1] for kernel in kernels)
    found = f"{num_classes} classes and {num_outputs} box outputs"
    if has_head and num_outputs not in (6, NUM_OUTPUTS):
        raise InputError(f"The head has {found}; expected 6 outputs (boxes along the axes) or 8 (boxes with yaw).")
    if dataset is None and classes:
        raise InputError("--classes are of a dataset of your own: give it a name with --dataset.")
    if dataset is None:
        # Of the three that both are published for: the head of 3RScan looks like that of ScanNet.
        fitting = [s.name for s in SPECS if (s.num_classes, s.num_outputs) == (num_classes, num_outputs)]
        if not fitting:
            problem = f"The head has {found}, which is none of" if has_head else "No head distinguishes the datasets"
            raise InputError(
                f"{problem} {', '.join(s.name for s in SPECS)}: name the dataset with --dataset, one of your own with "
                "--classes too."
            )
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
        note = ""
        theirs, ours = ([re.sub(r"[\W_]", "", name).lower() for name in names] for names in (stored, spec.classes))
        if stored and theirs != ours:
            note = (
                f"Attention: the file calls its classes {', '.join(stored)}; those of {dataset} are "
                f"{', '.join(spec.classes)}. If they are others, convert with --dataset=NAME --classes=..."
            )
        return SourceConfig(dataset, root=ROOTS[dataset]), note
    own = classes or stored
    if not own or (has_head and len(own) != num_classes):
        given = f"{len(own)} are given" if own else "none are given"
        raise InputError(
            f"{dataset} is a dataset of your own: name its {num_classes or ''} classes with --classes=a,b,c; {given}."
        )
    source = SourceConfig(dataset, root=f"data/{dataset}", classes=own, has_yaw=num_outputs == NUM_OUTPUTS)
    return source, "" if classes else f"Its classes are those that the file names: {', '.join(own)}."


def _shape_detector(config: ExperimentConfig) -> DetectorNetwork:
    """The detector with shapes in place of arrays."""
    return nnx.eval_shape(lambda: draw_detector(config, jax.random.key(0)))


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _shape_and_dtype(array: np.ndarray) -> str:
    return f"{_shape(array.shape)} {array.dtype}"


# The command.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; an example is tr3d.pth --output=runs/tr3d.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `convert_command`."""
    parser.add_argument("input", type=Path, help="a .pth file; with --reverse the folder of a run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; with --reverse a .pth file")
    parser.add_argument("--dataset", help="dataset of the head: built-in, or another name with --classes")
    parser.add_argument(
        "--classes", default="", help="of a dataset that is not built in, with commas between, in order"
    )
    parser.add_argument(
        "--kind",
        choices=tuple(KINDS),
        help="detector to make; by default that of the file, whose backbone alone the other one takes",
    )
    parser.add_argument("--partial", action="store_true", help="initialise parameters that are missing in the file")
    parser.add_argument("--voxel_size", type=float, help="in metres, not stored in weights; by default 0.01")
    parser.add_argument(
        "--prune_threshold",
        type=int,
        help="locations a level of FCAF3D keeps, not stored in weights; by default 100000",
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters that are initialised")
    parser.add_argument("--reverse", action="store_true", help="from our checkpoint to a state dict of mmdetection3d")
    parser.add_argument("--step", type=int, help="with --reverse: of the checkpoint; by default the last")


def convert_command(arguments: argparse.Namespace | Sequence[str]) -> int:
    """Print a table of every parameter; return 0, or 2 after an error message on standard error."""
    quiet_command_line()
    try:
        if not isinstance(arguments, argparse.Namespace):
            parser = _Parser(
                prog="python -m h2a2_jax.convert.tr3d",
                description=_DESCRIPTION,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
            add_arguments(parser)
            arguments = parser.parse_args(arguments)
        _check_arguments(arguments)
        (_to_pytorch if arguments.reverse else _from_pytorch)(arguments)
    except InputError as error:
        print(f"convert: {_printable(str(error))}", file=sys.stderr)
        return 2
    return 0


def _check_arguments(given: argparse.Namespace) -> None:
    numbers = (given.voxel_size, given.prune_threshold)
    if given.reverse and (given.partial or given.classes or given.seed or given.kind or numbers != (None, None)):
        raise InputError(
            "--kind, --partial, --classes, --seed, --voxel_size and --prune_threshold are for the way into this "
            "program, not for --reverse."
        )
    if given.voxel_size is not None and not 0 < given.voxel_size < math.inf:
        raise InputError(f"--voxel_size is {given.voxel_size:g}; expected is a length in metres, as 0.01.")
    if given.prune_threshold is not None and given.prune_threshold < 1:
        raise InputError(f"--prune_threshold is {given.prune_threshold}; expected 1 or more.")
    if given.step is not None and not given.reverse:
        raise InputError("--step chooses a checkpoint of ours, with --reverse; a .pth file holds one.")
    if given.seed < 0:
        raise InputError(f"--seed is {given.seed}; expected 0 or more.")


def _from_pytorch(given: argparse.Namespace) -> None:
    if given.output.exists() and not given.output.is_dir():
        raise InputError(f"--output={given.output} is a file; expected a folder for the run.")
    if (given.output / "checkpoints").exists() or (given.output / "config.json").exists():
        raise InputError(f"{given.output} is the folder of a run already: give another --output.")
    classes = tuple(name.strip() for name in given.classes.split(",")) if given.classes else ()
    conversion = convert_file(read_torch_file(given.input), given.dataset, classes, given.seed, given.kind)
    print(table(conversion.entries))
    for note in conversion.notes:
        print(_printable(note))
    missing = [entry.name for entry in conversion.of("missing")]
    if missing and not given.partial:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise InputError(
            f"{given.input} lacks {', '.join(missing[:_SHOWN])}{more}; nothing was written: --partial initialises "
            "what is missing."
        )
    prunes = conversion.config.model.kind == "fcaf3d"
    if given.prune_threshold is not None and not prunes:
        raise InputError("--prune_threshold is for FCAF3D, and the file becomes a TR3D: leave it out.")
    numbers = {key: value for key in ("voxel_size", "prune_threshold") if (value := getattr(given, key)) is not None}
    model = replace(conversion.config.model, **numbers)
    conversion = replace(conversion, config=replace(conversion.config, model=model))
    save_conversion(conversion, given.output)
    source = conversion.config.datasets[0]
    print(
        f"{given.output}: {kind_of(model).title} of depth {model.depth}, stem {model.stem_channels}, stages "
        f"{'-'.join(map(str, model.stage_channels))}, neck {model.neck_channels}, dataset {source.name}"
        f" ({source.spec.num_classes} classes, {source.spec.num_outputs} box outputs)"
        f", voxels of {model.voxel_size:g} m (not stored in weights: --voxel_size)"
        f"{f', {model.prune_threshold:,} locations a level (--prune_threshold)' if prunes else ''}"
        f"{f'; {len(missing)} parameters are initialised, not trained' if missing else ''}."
    )


def _to_pytorch(given: argparse.Namespace) -> None:
    if given.output.exists():
        raise InputError(f"{given.output} exists: give another --output.")
    state, meta = export_checkpoint(given.input, given.dataset, given.step)
    try:
        write_torch_file(given.output, state, meta, _VERSION)
    except OSError as error:
        raise InputError(f"{given.output} cannot be written: {error.strerror or error}.") from error
    print(table([Entry("written", name, _shape_and_dtype(value)) for name, value in state.items()], ("written",)))


def table(entries: Sequence[Entry], fates: Sequence[str] = ("used", "left over", "missing")) -> str:
    """Format entries as text, grouped by fate, with the number of each."""
    entries = [replace(entry, name=_printable(entry.name)) for entry in entries]
    width, forms = (max((len(getattr(entry, field)) for entry in entries), default=0) for field in ("name", "form"))
    lines = []
    for fate in fates:
        chosen = [entry for entry in entries if entry.fate == fate]
        lines.append(f"{fate}: {len(chosen)}")
        lines += [f"  {e.name:{width}}  {e.form:{forms}}  {e.why}".rstrip() for e in chosen]
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Replace what a terminal could act on or an encoding refuses: names from a file may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)

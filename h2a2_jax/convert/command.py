"""The command `python -m h2a2_jax.convert.tr3d_weights`."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from h2a2_jax.convert.conversion import Entry, convert_file, export_checkpoint, save_conversion, shape_and_type
from h2a2_jax.convert.torch_file import read_torch_file, write_torch_file
from h2a2_jax.errors import InputError

_SHOWN = 3
_DESCRIPTION = """Converts TR3D checkpoints of mmdetection3d into checkpoints of this program, and back.

The file's weights alone are read; nothing in it is imported or run. Depth, widths, classes and the form of the boxes
are read off the weights. Of FCAF3D the backbone's convolutions and norms of the same names are taken (--partial)."""


def table(entries: Sequence[Entry], fates: Sequence[str] = ("used", "left over", "missing")) -> str:
    """Every name with its fate, as text: used ones first."""
    entries = [replace(entry, name=_printable(entry.name)) for entry in entries]
    width = max((len(entry.name) for entry in entries), default=0)
    forms = max((len(entry.form) for entry in entries), default=0)
    lines = []
    for fate in fates:
        chosen = [entry for entry in entries if entry.fate == fate]
        lines.append(f"{fate}: {len(chosen)}")
        lines += [f"  {e.name:{width}}  {e.form:{forms}}  {e.why}".rstrip() for e in chosen]
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Text with names out of a file, which hold anything: no escape sequence, and nothing that no encoding takes."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: of the command line.

    Returns:
        Exit status: 0, or 2 after a sentence on standard error.
    """
    try:
        _run(_parse(arguments))
    except InputError as error:
        print(f"convert: {_printable(str(error))}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; an example is tr3d.pth --output=runs/tr3d.")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m h2a2_jax.convert.tr3d_weights",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("input", type=Path, help="a .pth file; with --reverse the folder of a run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; with --reverse a .pth file")
    parser.add_argument("--dataset", help="whose head it is: scannet, sunrgbd, s3dis or another name with --classes")
    parser.add_argument(
        "--classes", default="", help="of a dataset that is not built in, with commas between, in order"
    )
    parser.add_argument("--partial", action="store_true", help="also if parameters are missing, which are initialised")
    parser.add_argument("--voxel_size", type=float, help="in metres, which weights do not tell; by default TR3D's 0.01")
    parser.add_argument("--seed", type=int, default=0, help="of parameters that are initialised")
    parser.add_argument("--reverse", action="store_true", help="from our checkpoint to a state dict of TR3D")
    parser.add_argument("--step", type=int, help="with --reverse: of the checkpoint; by default the last")
    chosen = parser.parse_args(arguments)
    if chosen.reverse and (chosen.partial or chosen.classes or chosen.seed or chosen.voxel_size is not None):
        raise InputError(
            "--partial, --classes, --seed and --voxel_size are for the way into this program, not for --reverse."
        )
    if chosen.voxel_size is not None and not 0 < chosen.voxel_size < math.inf:
        raise InputError(f"--voxel_size is {chosen.voxel_size:g}; expected is a length in metres, as 0.01.")
    if chosen.step is not None and not chosen.reverse:
        raise InputError("--step chooses a checkpoint of ours, with --reverse; a .pth file holds one.")
    if chosen.seed < 0:
        raise InputError(f"--seed is {chosen.seed}; expected 0 or more.")
    return chosen


def _run(chosen: argparse.Namespace) -> None:
    if chosen.reverse:
        _reverse(chosen)
        return
    if chosen.output.exists() and not chosen.output.is_dir():
        raise InputError(f"--output={chosen.output} is a file; expected a folder for the run.")
    if (chosen.output / "checkpoints").exists() or (chosen.output / "config.json").exists():
        raise InputError(f"{chosen.output} is the folder of a run already: give another --output.")
    classes = tuple(name.strip() for name in chosen.classes.split(",")) if chosen.classes else ()
    conversion = convert_file(read_torch_file(chosen.input), chosen.dataset, classes, chosen.seed)
    print(table(conversion.entries))
    for note in conversion.notes:
        print(_printable(note))
    missing = [entry.name for entry in conversion.of("missing")]
    if missing and not chosen.partial:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise InputError(
            f"{chosen.input} lacks {', '.join(missing[:_SHOWN])}{more}; nothing was written: --partial initialises "
            "what is missing."
        )
    if chosen.voxel_size is not None:
        model = replace(conversion.config.model, voxel_size=chosen.voxel_size)
        conversion = replace(conversion, config=replace(conversion.config, model=model))
    save_conversion(conversion, chosen.output)
    model, source = conversion.config.model, conversion.config.datasets[0]
    print(
        f"{chosen.output}: TR3D of depth {model.depth}, stem {model.stem_channels}, stages "
        f"{'-'.join(map(str, model.stage_channels))}, neck {model.neck_channels}, dataset {source.name}"
        f" ({source.spec.num_classes} classes, {source.spec.num_outputs} box outputs)"
        f", voxels of {model.voxel_size:g} m (weights do not tell: --voxel_size)"
        f"{f'; {len(missing)} parameters are initialised, not trained' if missing else ''}."
    )


def _reverse(chosen: argparse.Namespace) -> None:
    if chosen.output.exists():
        raise InputError(f"{chosen.output} exists: give another --output.")
    state, meta = export_checkpoint(chosen.input, chosen.dataset, chosen.step)
    try:
        chosen.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_torch_file(chosen.output, state, meta)
    except OSError as error:
        raise InputError(f"{chosen.output} cannot be written: {error.strerror or error}.") from error
    print(table([Entry("written", name, shape_and_type(value)) for name, value in state.items()], ("written",)))

"""The command line: the script `h2a2`, `python -m h2a2_jax`, and run.py.

    h2a2 train --config=configs/joint.py:demo --workdir=runs/demo
    h2a2 predict room.ply myscans/ --workdir=runs/demo --output=boxes
    h2a2 sweep ablation --config=configs/joint.py:demo --workdir=runs/sweep

run.py takes the same flags and names the command with `--mode`, inputs with `--input`. Both go through one parser.
"""

import argparse
import difflib
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from h2a2_jax.errors import INTERRUPTED, InputError, Stopped

if TYPE_CHECKING:
    from h2a2_jax.config import ExperimentConfig
    from h2a2_jax.inference.input_files import PredictRequest
from h2a2_jax.files import check_name
from h2a2_jax.host import allow_open_files, keep_output, output_is_lost, quiet_command_line, shortage
from h2a2_jax.rendezvous import CHECKPOINT

_EXAMPLE = "--config=configs/joint.py:demo --workdir=runs/demo"
_CONFIG_HELP = "file of the config, as configs/joint.py:demo; --config.KEY=VALUE sets a value of it"
_PROCESS_FLAGS = ("coordinator", "num_processes", "process_id", "process_timeout")
_OF_MACHINES = (*_PROCESS_FLAGS, "workdir", "output")
"""Flags that may differ between the processes of a run."""
_CONFIG_OF_MACHINES = ("root", "workers", "compilation_cache")
"""Last parts of the config keys that may."""
_FILE_FLAGS = ("up", "unit", "floor", "colors", "columns", "align", "score", "show", "classes", "agnostic_nms", "names",
               "tile", "overwrite")  # fmt: skip
"""Flags of `predict` that are for files of points."""


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        name: of the command, as "predict" or "sweep ablation".
        mode: name after run.py's `--mode`; empty where run.py does not have the command.
        summary: one line for --help.
        add_flags: adds the command's flags to its parser.
        run: does the work; returns the exit status.
        config: True if --config is needed, None if it may be given, False if the command takes none.
        needs_workdir: False if the command works without --workdir; one with a config needs it.
    """

    name: str
    mode: str
    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[["Invocation"], int | None]
    config: bool | None = None
    needs_workdir: bool = True


@dataclass(frozen=True)
class Invocation:
    """A parsed command line.

    Attributes:
        command: the chosen command.
        flags: values of its flags.
        config: the config with the values that flags set; None if none was given.
        spell: name of a command, given its name in `COMMANDS`, as the user would type it.
    """

    command: Command
    flags: argparse.Namespace
    config: ConfigDict | None
    spell: Callable[[Command], str]

    @property
    def workdir(self) -> Path:
        """The folder of the run."""
        return Path(self.flags.workdir)

    def experiment(self) -> Any:
        """Return the config as `ExperimentConfig`, or None."""
        from h2a2_jax.config import experiment_config

        return None if self.config is None else experiment_config(self.config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `h2a2`.

    Args:
        arguments: of the command line without the program's name; None: those of this process.

    Returns:
        Exit status: 0; 1 if part of the work failed, or if output was lost (not of commands that train: what they make
            is files); 2 after one sentence on wrong input; 130 after Ctrl-C.
    """
    return _guarded("h2a2", lambda: _run_h2a2(list(sys.argv[1:] if arguments is None else arguments)))


def run_py(arguments: Sequence[str] | None = None) -> int:
    """Run run.py: the commands of `main`, chosen with `--mode` ("train" by default)."""
    return _guarded("run.py", lambda: _run_mode(list(sys.argv[1:] if arguments is None else arguments)))


def _guarded(program: str, run: Callable[[], int | None]) -> int:
    keep_output()
    allow_open_files()
    logging.use_absl_handler()
    quiet_command_line()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags
    try:
        status = run()
        return int(output_is_lost()) if status is None else status
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if (found := shortage(error)) is None:
            raise
        print(f"{program}: {found}.", file=sys.stderr)
        return 2


def _run_h2a2(arguments: list[str]) -> int | None:
    from h2a2_jax import __version__

    if arguments[:1] == ["--version"]:
        print(__version__)
        return None
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(COMMANDS))
        return None if arguments else 2
    command = next((c for c in COMMANDS if c.name.split() == arguments[: len(c.name.split())]), None)
    if command is None:
        within = [c for c in COMMANDS if c.name.split()[0] == arguments[0]]
        if within and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
            print(_overview(within))
            return None if len(arguments) > 1 else 2
        given = " ".join(arguments[:2] if within else arguments[:1])
        near = difflib.get_close_matches(given, [c.name for c in COMMANDS], 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"there is no command {given!r}; commands are {', '.join(c.name for c in COMMANDS)}.{hint}")
    return _run_command(command, arguments[len(command.name.split()) :], f"h2a2 {command.name}", _spell_command)


def _run_mode(arguments: list[str]) -> int | None:
    modes = {command.mode: command for command in COMMANDS if command.mode}
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--mode", default="train")
    mode, rest = chosen.parse_known_args(arguments)
    if mode.mode not in modes:
        raise InputError(f"--mode is {mode.mode!r}; expected one of {', '.join(modes)}.")
    if {"-h", "--help"} & set(rest) and not any(argument.startswith("--mode") for argument in arguments):
        print(_overview(list(modes.values()), spell=_spell_mode))
        return None
    program = "run.py" if mode.mode == "train" else f"run.py --mode={mode.mode}"
    return _run_command(modes[mode.mode], rest, program, _spell_mode)


def _spell_command(command: Command) -> str:
    return f"h2a2 {command.name}"


def _spell_mode(command: Command) -> str:
    return f"--mode={command.mode}"


def _overview(commands: Sequence[Command], spell: Callable[[Command], str] = _spell_command) -> str:
    width = max(len(spell(command)) for command in commands)
    lines = [f"  {spell(command):{width}}  {command.summary}" for command in commands]
    return "\n".join(["commands (each has its own --help):", *lines])


def _run_command(command: Command, arguments: list[str], program: str, spell: Callable[[Command], str]) -> int | None:
    if {"-h", "--help"} & set(arguments):
        _build_parser(command, program).print_help()
        return None
    invocation = parse(command, arguments, program, spell)
    if workdir := getattr(invocation.flags, "workdir", None):
        check_name(Path(workdir))
    cache: AbstractContextManager[None] = nullcontext()
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        from h2a2_jax.compilation import compilation_cache  # imports JAX

        cache = compilation_cache(lambda sentence: print(f"{program}: {sentence}", file=sys.stderr))
    with cache:
        status = command.run(invocation)
    # None: 0 if all that was printed was read. What a training makes is files.
    return 0 if command.config and not status else status or None


def parse(
    command: Command, arguments: Sequence[str], program: str = "h2a2", spell: Callable[[Command], str] = _spell_command
) -> Invocation:
    """Parse the arguments of a command.

    Args:
        command: the command.
        arguments: its flags and inputs.
        program: name in error messages, as "h2a2 predict" or "run.py".
        spell: spells a command as the user would type it.

    Raises:
        InputError: a flag is unknown or has a wrong value, a needed one is missing, or the config cannot be loaded.
    """
    parser = _build_parser(command, program)
    config_arguments, rest = _split_config(arguments)
    if config_arguments and command.config is False:
        raise InputError(f"--config is not for {spell(command)}; leave it out.")
    values, unknown = parser.parse_known_args(list(_plain_switches(rest, parser)))
    if unknown:
        raise InputError(_unknown_argument(unknown[0], command, parser, spell))
    invocation = Invocation(command, values, _read_config(config_arguments), spell)
    if command.config and (invocation.config is None or not values.workdir):
        example = _EXAMPLE if spell(command) == "--mode=train" else f"{spell(command)} {_EXAMPLE}"
        raise InputError(
            f"{program.split()[0]} needs --config and --workdir, as in {example}; --help lists commands and flags."
        )
    if command.config is None and command.needs_workdir and not values.workdir:
        raise InputError(f"{spell(command)} needs --workdir, the folder of a run with its checkpoints.")
    return invocation


def _build_parser(command: Command, program: str) -> "_Parser":
    parser = _Parser(prog=program, description=command.summary, allow_abbrev=False)
    command.add_flags(parser)
    if command.config is not False:
        parser.add_argument("--config", metavar="FILE[:VARIANT]", help=_CONFIG_HELP)
    return parser


def _plain_switches(arguments: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    """Write --name=true as --name; leave --name=false and --noname out."""
    switches = {action.option_strings[0][2:] for action in parser._actions if action.const is True}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in switches and value.lower() in ("true", "false"):
            if value.lower() == "true":
                yield f"--{name}"
        elif name.removeprefix("no") not in switches or not argument.startswith("--no"):
            yield argument


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `InputError`, in our form: flag, value, expected values."""

    _FORMS = (
        (r"(.*): invalid choice: (.*) \(choose from (.*)\)", r"\1 is \2; expected one of \3"),
        (r"(.*): invalid int value: (.*)", r"\1 is \2; expected a whole number"),
        (r"(.*): invalid float value: (.*)", r"\1 is \2; expected a number"),
        (r"(.*): (is .*; expected .*)", r"\1 \2"),
        (r"(.*): expected one argument", r"\1 has no value"),
    )

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ")
        for pattern, sentence in self._FORMS:
            text = re.sub(f"^{pattern}$", sentence, text)
        raise InputError(f"{text}; --help lists the flags.")


def _unknown_argument(
    argument: str, command: Command, parser: argparse.ArgumentParser, spell: Callable[[Command], str]
) -> str:
    """Sentence on an argument that the command does not take."""
    name = argument.partition("=")[0]
    if not name.startswith("--"):
        return f"{spell(command)} takes flags only, given {argument!r}; an example is {_EXAMPLE}."
    others = [other for other in COMMANDS if other.mode and name in _flag_names(other)]
    if len(others) > 3:
        return f"{name} is not for {spell(command)}; leave it out."
    if others:
        return f"{name} is for {' and '.join(map(spell, others))}, given with {spell(command)}."
    near = difflib.get_close_matches(name, _flag_names(command), 1)
    return f"{spell(command)} has no flag {name}{f'; did you mean {near[0]}?' if near else '; --help lists its flags.'}"


def _flag_names(command: Command) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    command.add_flags(parser)
    config = [] if command.config is False else ["--config"]
    return [option for action in parser._actions for option in action.option_strings] + config


# --- the config ------------------------------------------------------------------------------------------------------


def _split_config(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the arguments --config and --config.KEY, each as "flag=value", from the others."""
    chosen, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if not re.match(r"--(no)?config(=|\.|$)", argument):
            rest.append(argument)
        elif "=" in argument or argument.startswith("--no"):
            chosen.append(argument)
        else:
            value = next(remaining, None)
            if value is None:
                raise InputError(f"{argument} has no value; an example is {_EXAMPLE}.")
            chosen.append(f"{argument}={value}")
    return [_present_name(argument) for argument in chosen], rest


def _present_name(argument: str) -> str:
    """Replace a key that had another name in version 0.1.0, and one that ml_collections cannot read."""
    from h2a2_jax.config import RENAMED_KEYS

    for old, new in RENAMED_KEYS.items():
        argument = re.sub(rf"^--(no)?config\.{re.escape(old)}(?==|$)", rf"--\1config.{new}", argument)
    return _DATASET_KEY.sub(_subscripted, argument)


_DATASET_KEY = re.compile(r"^(--(?:no)?config\.datasets)\.([^.=\[]+)(?=\.)")


def _subscripted(key: re.Match[str]) -> str:
    """Write the name of a dataset as a subscript unless it is an identifier: ml_collections reads keys as Python."""
    return key[0] if key[2].isidentifier() else f"{key[1]}[{key[2]!r}]"


def _read_config(arguments: list[str]) -> ConfigDict | None:
    """Load the config file and set the values that flags name.

    Raises:
        InputError: the file or a key is not there, or a value is of the wrong type.
    """
    if not arguments:
        return None
    if not any(argument.startswith("--config=") for argument in arguments):
        raise InputError(f"{arguments[0].partition('=')[0]} needs --config, the file that it changes: {_EXAMPLE}.")
    values = flags.FlagValues()
    argv = ["h2a2", *arguments]
    holder = config_flags.DEFINE_config_file("config", None, _CONFIG_HELP, flag_values=values, sys_argv=argv)
    try:
        values(argv)
        config = holder.value
        config.to_dict()  # a config file that failed to load says so only when it is used
        return config
    except Exception as error:  # a config file runs any code, and flags wrap what it raises
        raise InputError(_config_sentence(error, arguments)) from error


def _config_sentence(error: BaseException, arguments: Sequence[str]) -> str:
    """Extract one sentence from an error of the flags, which put the text of a traceback into what they raise."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    ours = [link for link in chain if isinstance(link, InputError)]
    if ours:
        return str(ours[-1])
    text = " ".join(str(error.args[0] if error.args else error).replace("\\n", " ").replace("'", "").split())
    if isinstance(error, OSError):
        if missing := re.search(r"No such file or directory: ([^ )]+)", text):
            return f"There is no config file {missing[1]}; an example is {_EXAMPLE}."
        return f"the config file cannot be read ({text}); an example is {_EXAMPLE}."
    if isinstance(error, KeyError | AttributeError):
        text = text.replace("\\", "").replace('"', "'")
        unknown = text.partition(" ")[0].strip("'")
        return f"unknown config key {text}{_keys_beside(unknown, arguments)}"
    return text


def _keys_beside(unknown: str, arguments: Sequence[str]) -> str:
    """List, in brackets, the keys that the config has beside an unknown one; "" where no flag names it."""
    given = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments)
    path = next((flag.split(".")[1:] for flag in given if unknown in flag.split(".")[1:]), None)
    if path is None or not given.get("config"):
        return ""
    file, _, variant = given["config"].partition(":")
    part = runpy.run_path(file)["get_config"](*[variant] * bool(variant))
    for key in path[: path.index(unknown)]:
        part = part[key]
    return f" (keys there: {', '.join(part)})"


# --- flags -----------------------------------------------------------------------------------------------------------


def _numbers(kind: type) -> Callable[[str], list]:
    """Parser of a list of numbers with commas between."""

    def parse(text: str) -> list:
        try:
            return [kind(part) for part in text.split(",")] if text else []
        except ValueError:
            example = "0,1" if kind is int else "0.2,0.3"
            raise argparse.ArgumentTypeError(f"is {text!r}; expected numbers as in {example}") from None

    return parse


def _names(text: str) -> list[str]:
    """Parse names with commas between."""
    return text.split(",") if text else []


def _renamings(text: str) -> dict[str, str]:
    """Parse CLASS=NAME with commas between."""
    pairs = [part.partition("=") for part in _names(text)]
    if not all(old and new for old, _, new in pairs):
        raise argparse.ArgumentTypeError(f"is {text!r}; expected names as in garbagebin=trash can,sofa=couch")
    return {old: new for old, _, new in pairs}


def _number(kind: type, least: int, most: int | None = None) -> Callable[[str], Any]:
    """Parser of a number within bounds."""

    def parse(text: str) -> Any:
        bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"is {text!r}; expected a number {bounds}")
        return value

    return parse


def _add_workdir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", metavar="FOLDER", help="folder of the run: checkpoints, metrics, results")


def _add_step(parser: argparse.ArgumentParser, text: str = "step of the checkpoint: a number, best or last") -> None:
    parser.add_argument("--step", help=f"{text}; the last one by default")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0; auto under a cluster such as SLURM")
    group.add_argument("--num_processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process_id", type=int, metavar="N", help="number of this process, from 0")
    group.add_argument(
        "--process_timeout",
        type=_number(float, 1, 86400),
        metavar="SECONDS",
        help="wait for the other processes at the start, and for their signs of life later (60)",
    )


def _train_flags(parser: argparse.ArgumentParser) -> None:
    _add_workdir(parser)
    parser.add_argument(
        "--accept_changes",
        action="store_true",
        help="resume with a config that differs from the one that the run began with",
    )
    _add_processes(parser)


def _eval_flags(parser: argparse.ArgumentParser) -> None:
    _add_workdir(parser)
    _add_step(parser)
    parser.add_argument("--dataset", help="the one dataset to evaluate; all by default")
    parser.add_argument("--data", metavar="FOLDER", help="scans with boxes to evaluate on instead of the dataset's own")
    parser.add_argument("--split", choices=("val", "train"), default="val", help="split of the scans (val)")
    parser.add_argument("--tta", type=_names, default=[], help="test-time augmentation: of flip_x,flip_y,scales,turns")
    parser.add_argument(
        "--cross",
        action="store_true",
        help="evaluate every dataset's head on every dataset, over the classes they share",
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder of the results; by default in the workdir")
    _add_processes(parser)


def _predict_flags(parser: argparse.ArgumentParser) -> None:
    formats = ".ply .pcd .las .laz .npy .npz .bin .txt .xyz .pts .csv .asc .e57 .ptx .obj .glb .gltf .stl .off"
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help=f"point clouds ({formats}), folders or patterns; none: the validation scans of the run's config",
    )
    parser.add_argument("--input", type=_names, metavar="INPUT,...", help="the inputs as a list with commas between")
    parser.add_argument("--sample", action="store_true", help="predict the sample room that comes with the package")
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="detector: a name that h2a2 weights lists, a folder, a .pth file or org/name of the Hugging Face hub "
        "(rooms, which comes with the package)",
    )
    parser.add_argument(
        "--workdir", metavar="FOLDER", help="folder of a run, in place of --weights: the detector of its checkpoint"
    )
    _add_step(parser)
    parser.add_argument(
        "--dataset",
        help="dataset whose head predicts, and so the classes: scannet, sunrgbd, s3dis or another of the detector's "
        "(auto: scannet for rooms, sunrgbd for single views)",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder of the results (boxes; with --workdir, boxes in that folder)"
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds results")
    parser.add_argument(
        "--formats",
        type=_names,
        metavar="FORMAT,...",
        help="files to write: json, csv, ply, html, png, glb, dxf, rrd (json,csv,ply,html)",
    )
    group = parser.add_argument_group("which boxes")
    group.add_argument("--score", type=_number(float, 0, 1), help="lowest score of a box, 0 to 1 (0.3)")
    group.add_argument("--classes", type=_names, metavar="CLASS,...", help="classes of the boxes (all)")
    group.add_argument(
        "--agnostic_nms", action="store_true", help="where boxes of several classes overlap, keep the best alone"
    )
    group.add_argument(
        "--names", type=_renamings, metavar="CLASS=NAME,...", help="names of your own: sofa=Couch,table=Tisch"
    )
    group = parser.add_argument_group("how files of points are read")
    axes = ("z", "-z", "y", "-y", "x", "-x", "auto")
    group.add_argument("--up", choices=axes, help="axis that points up (auto: as a file says or shows, else z)")
    group.add_argument(
        "--unit",
        choices=("m", "cm", "mm", "ft", "in", "auto"),
        help="unit of the points (auto: as a file says, else by size)",
    )
    group.add_argument(
        "--floor",
        metavar="HEIGHT",
        help="height of the floor in metres (auto: as found; keep: heights stay as they are)",
    )
    ranges = ("auto", "0-1", "0-255", "none", "0-1023", "0-4095", "0-65535")
    group.add_argument("--colors", choices=ranges, help="range of the colours (auto: by type and values)")
    group.add_argument("--columns", metavar="x,y,z,_,r,g,b", help="columns of tables, _ for one that is not used")
    group.add_argument(
        "--align",
        choices=("none", "gravity", "manhattan", "both"),
        help="turn the scan until its floor is level (gravity), its walls lie along x and y (manhattan)",
    )
    group.add_argument(
        "--tile",
        metavar="METRES",
        help="sides of the tiles of large scans (auto: 10 m above 500,000 points; off: one pass)",
    )
    group.add_argument("--show", action="store_true", help="open a window with every scan (needs open3d)")
    _add_processes(parser)


def _report_flags(parser: argparse.ArgumentParser) -> None:
    _add_workdir(parser)


def _check_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="folder of scans")
    parser.add_argument("--data", metavar="FOLDER", help="the same as a flag")
    parser.add_argument("--dataset", help="dataset whose classes count")
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder of the results; runs/check/<name of the folder> by default"
    )


def _replay_flags(parser: argparse.ArgumentParser) -> None:
    _add_workdir(parser)
    _add_step(parser, "number of the batch")


def _sweep_flags(parser: argparse.ArgumentParser, *, seeds: bool = True) -> None:
    _add_workdir(parser)
    if seeds:
        parser.add_argument("--seeds", type=_numbers(int), default=[0, 1], help="seeds of training (0,1)")
    parser.add_argument("--jobs", type=int, help="runs at once; by default one a CPU core, at most 4, and 1 on a GPU")
    parser.add_argument(
        "--budget_minutes", type=float, help="train for this long; the same command goes on with what is left"
    )


def _tau_flags(parser: argparse.ArgumentParser) -> None:
    _sweep_flags(parser)
    parser.add_argument(
        "--taus", type=_numbers(float), default=[], help="thresholds; by default 0.15 to 0.35 in steps of 0.05"
    )


def _ablation_flags(parser: argparse.ArgumentParser) -> None:
    _sweep_flags(parser)
    rows = "naive, sfks, ngh, sfks_ngh, single, frozen, modulation, exclusive, naive_shared_stats, random_labels"
    several = "tr3d_<dataset> or fcaf3d_<dataset>; and the rivals of docs/training.md, as pdnorm, pretrained, mgda"
    parser.add_argument("--rows", type=_names, default=[], help=f"of {rows}, {several}; by default the first five")
    parser.add_argument(
        "--against", type=_names, default=[], help="rows that the differences of the others are from; naive by default"
    )


def _transfer_flags(parser: argparse.ArgumentParser) -> None:
    _sweep_flags(parser)
    parser.add_argument("--held_out", metavar="DATASET", help="dataset to train without, then to predict and fine-tune")
    parser.add_argument("--tuning_steps", type=int, help="steps of fine-tuning; by default half of training's")


def _protocol_flags(parser: argparse.ArgumentParser) -> None:
    _sweep_flags(parser, seeds=False)
    parser.add_argument("--trainings", type=_number(int, 1), default=5, help="trainings, by seeds (5)")
    parser.add_argument("--evaluations", type=_number(int, 1), default=5, help="evaluations of each training (5)")


# --- commands: their modules are imported when a command runs, so that a wrong flag is answered at once ---------------


def _processes(given: Invocation, config: "ExperimentConfig | None") -> AbstractContextManager[None]:
    """Join the processes of a run that the flags name; they must agree on other flags, config, versions, checkpoint."""
    from h2a2_jax.checkpoint.store import CheckpointStore, checkpoint_place
    from h2a2_jax.config import leaves_of
    from h2a2_jax.distributed import processes
    from h2a2_jax.host import versions

    values, facts = given.flags, {}
    if values.coordinator is not None:
        facts = {f"--{name}": str(value) for name, value in vars(values).items() if name not in _OF_MACHINES}
        leaves = {} if config is None else leaves_of(config)
        facts |= {
            f"--config.{key}": str(value)
            for key, value in leaves.items()
            if key.rpartition(".")[2] not in _CONFIG_OF_MACHINES
        }
        facts |= {name: version for name, version in versions().items() if name in ("jax", "jaxlib", "h2a2_jax")}
        newest = CheckpointStore(checkpoint_place(given.workdir).directory).latest_step()
        facts[CHECKPOINT] = "none" if newest is None else str(newest)
    return processes(
        values.coordinator, values.num_processes, values.process_id, timeout=values.process_timeout, facts=facts
    )


def _train(given: Invocation) -> int | None:
    config = given.experiment()
    try:
        with _processes(given, config):
            train_command(config, given.workdir, accept_changes=given.flags.accept_changes)
    except Stopped as stopped:  # the loop printed what is saved
        return stopped.status
    return None


def train_command(config: "ExperimentConfig", workdir: Path, *, accept_changes: bool = False) -> None:
    """Train, evaluate and draw the curves, or resume the run in the workdir; `train` has the arguments and errors."""
    from h2a2_jax.distributed import MeshLayout, is_main, say, train_mesh
    from h2a2_jax.scans.sources import build_source
    from h2a2_jax.training.loop import train
    from h2a2_jax.training.metrics import FILE_NAME
    from h2a2_jax.training.summary import next_commands

    layout = MeshLayout(train_mesh(len(config.datasets)), len(config.datasets))

    def open_data() -> None:
        for dataset in layout.datasets:
            for split in ("train", "val"):
                build_source(config.datasets[dataset], split)

    layout.all_or_raise(open_data, "open its data")  # before anything is written or compiled
    train(config, workdir, accept_changes=accept_changes)
    curves = ""
    if is_main() and (workdir / FILE_NAME).exists():
        from h2a2_jax.report.figures_training import draw_curves

        curves = f", drawn in {draw_curves(workdir)}"
    say(f"Losses are in {workdir / FILE_NAME}{curves}; checkpoints in {workdir / 'checkpoints'}. What may come next:")
    for command in next_commands(workdir, config):
        say(f"    {command}")


def _eval(given: Invocation) -> int | None:
    from h2a2_jax.evaluation.evaluate import EvalRequest, evaluate_checkpoint

    values = given.flags
    request = EvalRequest(
        split=values.split,
        dataset=values.dataset,
        data=values.data,
        tta=tuple(values.tta),
        cross=values.cross,
        output=None if values.output is None else Path(values.output),
        step=_chosen_step(given),
    )
    config = given.experiment()
    with _processes(given, config):
        evaluate_checkpoint(given.workdir, request, config)
    return None


def _predict(given: Invocation) -> int | None:
    from h2a2_jax.inference.input_files import PredictRequest
    from h2a2_jax.inference.sample import sample_scan
    from h2a2_jax.inference.tiles import checked_tiling
    from h2a2_jax.scans.frame import checked_floor

    values = given.flags
    inputs = tuple([*values.inputs, *(values.input or ()), *([str(sample_scan())] if values.sample else [])])
    _check_predict_flags(given, inputs)
    chosen = _file_flags(values)
    if "floor" in chosen:
        chosen["floor"] = checked_floor(chosen["floor"], "--floor")
    if "tile" in chosen:
        chosen["tile"] = checked_tiling(chosen["tile"], "--tile")
    if "classes" in chosen:
        chosen["classes"] = tuple(chosen["classes"])
    if values.dataset is not None:
        chosen["dataset"] = values.dataset
    if values.formats is not None or not inputs:  # scans of a config have only the formats that are asked for
        chosen["formats"] = tuple(values.formats or ())
    output = None if values.output is None else Path(values.output)
    step = _chosen_step(given) if values.workdir else None
    return _predict_request(given, PredictRequest(inputs, output=output, step=step, **chosen))


def _predict_request(given: Invocation, request: "PredictRequest") -> int | None:
    from h2a2_jax.checkpoint.store import StoredDetector, checkpoint_place, read_detector
    from h2a2_jax.inference.predict_folder import predict_inputs, print_line
    from h2a2_jax.inference.validation_scans import predict_validation_scans
    from h2a2_jax.pretrained.load import load_pretrained

    values, config = given.flags, given.experiment()
    if not request.inputs:
        with _processes(given, config):
            predict_validation_scans(given.workdir, request, config)
        return None

    def open_detector() -> StoredDetector:
        if values.workdir:
            return read_detector(given.workdir, request.step, config)
        return load_pretrained(values.weights or "rooms", say=print_line)

    folder = checkpoint_place(given.workdir).run / "boxes" if values.workdir else Path("boxes")
    settings = None if config is None else config.eval
    return predict_inputs(open_detector, request, request.output or folder, settings).status


def _file_flags(values: argparse.Namespace) -> dict[str, Any]:
    """The flags for files of points that were given, by name; a number that is 0 is given."""
    flags = {name: getattr(values, name) for name in _FILE_FLAGS}
    return {name: value for name, value in flags.items() if value is not None and value is not False}


def _check_predict_flags(given: Invocation, inputs: Sequence[str]) -> None:
    """Refuse flags that do not go together."""
    values = given.flags
    if values.input is not None and not inputs:
        raise InputError(
            "--input is empty; expected are files, folders or patterns (leave it out for a run's own scans)."
        )
    if values.workdir and values.weights:
        raise InputError(
            "--workdir and --weights are given, two detectors: leave one out; --weights takes the folder of a run too."
        )
    if not inputs and not values.workdir:
        raise InputError(
            f"{given.spell(given.command)} needs files of points, as in room.ply, or --sample; with --workdir alone it "
            "takes the validation scans of that run."
        )
    if (given.config is not None or values.step is not None) and not values.workdir:
        flag = "--config" if given.config is not None else "--step"
        raise InputError(f"{flag} goes with a checkpoint: name the folder of its run with --workdir.")
    files = [f"--{name}" for name in _file_flags(values)]
    if files and not inputs:
        raise InputError(
            f"{', '.join(files)} is for files of points: name them with --input; the scans of a config have their own."
        )
    processes = [f"--{name}" for name in _PROCESS_FLAGS if getattr(values, name) is not None]
    if processes and inputs:
        raise InputError(
            f"{', '.join(processes)} is for the scans of a config: files of points are predicted by one process; give "
            "each process files and an --output of its own."
        )


def _chosen_step(given: Invocation) -> int | None:
    from h2a2_jax.checkpoint.store import checkpoint_place
    from h2a2_jax.evaluation.documents import chosen_step

    return chosen_step(checkpoint_place(given.workdir).run, given.flags.step)


def _report(given: Invocation) -> int | None:
    from h2a2_jax.checkpoint.store import restore_checkpoint
    from h2a2_jax.report.write import write_report

    config = given.experiment() or restore_checkpoint(given.workdir)[1]
    print(f"The report is {write_report(config, given.workdir)}.", flush=True)
    return None


def _replay(given: Invocation) -> int | None:
    from h2a2_jax.checkpoint.store import checkpoint_place
    from h2a2_jax.training.nonfinite import replay

    step = given.flags.step
    if step is not None and not step.isdecimal():
        raise InputError(f"--step is {step!r}; expected the number of a batch that the run kept.")
    number, saved, shards = replay(checkpoint_place(given.workdir).run, None if step is None else int(step))
    print(f"Batch {number} of {given.workdir}, with the parameters of step {saved}:")
    for shard in shards:
        print(f"  {shard.text()}")
    return int(not all(shard.is_finite for shard in shards))


def _check(given: Invocation) -> int | None:
    folder = given.flags.folder or given.flags.data
    if not folder:
        raise InputError(f"{given.spell(given.command)} needs --data=FOLDER, the folder to look over.")
    from h2a2_jax.check import check

    return 0 if check(folder, given.flags.dataset, given.flags.output).ready else 1


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    from h2a2_jax.convert.conversion import add_arguments

    add_arguments(parser)


def _convert(given: Invocation) -> int | None:
    from h2a2_jax.convert.conversion import convert_command

    return convert_command(given.flags)


def _weights_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show the classes, scores and licence of these weights")
    parser.add_argument("--download", action="store_true", help="fetch the named weights, to load without a network")


def _weights(given: Invocation) -> int | None:
    from h2a2_jax.pretrained.listing import weights_command

    weights_command(given.flags.name, given.flags.download)
    return None


def _table_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="folder of a sweep, with its results.json")
    parser.add_argument("--format", choices=("md", "csv", "tex"), help="print this table; by default, write all three")
    parser.add_argument("--kind", type=_names, default=[], metavar="KIND,...", help="tables, as ablation (all)")
    parser.add_argument("--metric", type=_names, default=[], metavar="METRIC,...", help="metrics, as mAP@0.5 (all)")


def _table(given: Invocation) -> int | None:
    if not given.flags.folder:
        raise InputError(f"{given.spell(given.command)} needs the folder of a sweep, as in runs/sweep.")
    from h2a2_jax.sweeps.sweep_results import make_tables

    values = given.flags
    print(make_tables(Path(values.folder), values.format, values.kind, values.metric), end="")
    return None


def _tau_sweep(given: Invocation) -> int | None:
    from h2a2_jax.sweeps.ablation import run_tau_sweep

    values = given.flags
    return run_tau_sweep(
        given.experiment(), given.workdir, values.taus, values.seeds, values.jobs, values.budget_minutes
    )


def _ablation(given: Invocation) -> int | None:
    from h2a2_jax.sweeps.ablation import run_ablation

    values = given.flags
    return run_ablation(
        given.experiment(), given.workdir, values.seeds, values.jobs, values.budget_minutes, values.rows, values.against
    )


def _transfer(given: Invocation) -> int | None:
    values = given.flags
    if values.held_out is None:
        raise InputError(
            f"{given.spell(given.command)} needs --held_out, the dataset to train without, as in --held_out=s3dis."
        )
    from h2a2_jax.sweeps.transfer import run_transfer

    config, lengths = given.experiment(), (values.tuning_steps, values.jobs, values.budget_minutes)
    return run_transfer(config, given.workdir, values.held_out, values.seeds, *lengths)


def _protocol(given: Invocation) -> int | None:
    from h2a2_jax.sweeps.protocol import run_protocol

    values = given.flags
    numbers = (values.trainings, values.evaluations, values.jobs, values.budget_minutes)
    return run_protocol(given.experiment(), given.workdir, *numbers)


COMMANDS: tuple[Command, ...] = (
    Command("train", "train", "train a detector, or resume its run, then evaluate it", _train_flags, _train, True),
    Command("eval", "eval", "evaluate a checkpoint: average precision, curves, a page", _eval_flags, _eval),
    Command("predict", "predict", "find boxes in files of points", _predict_flags, _predict, needs_workdir=False),
    Command("report", "report", "draw what kernel selection and gradient harmonisation did", _report_flags, _report),
    Command("check", "check", "look over a folder of scans before training on it", _check_flags, _check, False),
    Command("sweep tau", "tau_sweep", "train with several thresholds of selection", _tau_flags, _tau_sweep, True),
    Command("sweep ablation", "ablation", "train naive, SF-KS, NGH, both, single", _ablation_flags, _ablation, True),
    Command("sweep transfer", "transfer", "hold a dataset out, then fine-tune to it", _transfer_flags, _transfer, True),
    Command("sweep protocol", "protocol", "train and evaluate several times", _protocol_flags, _protocol, True),
    Command("table", "", "tables of a sweep as Markdown, CSV and LaTeX", _table_flags, _table, False),
    Command("replay", "replay", "run a batch again that was not finite", _replay_flags, _replay),
    Command("weights", "", "list weights by name, show or download them", _weights_flags, _weights, False),
    Command("convert", "", "published TR3D or FCAF3D to a run, and back", _convert_flags, _convert, False),
)

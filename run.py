"""Train, evaluate, predict, report or sweep: python run.py --config=configs/joint.py:demo --workdir=runs/demo.

Boxes of files of points: python run.py --mode=predict --workdir=runs/demo --input=FOLDER --output=boxes.
Look over a folder of scans before training on it: python run.py --mode=check --data=FOLDER.
"""

import re
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

try:
    from absl import app, flags, logging
    from ml_collections import config_flags
except ModuleNotFoundError as missing:
    print(
        f"run.py: {missing.name} is not installed for {sys.executable}: activate the environment that the README's "
        "first command makes (source .venv/bin/activate), or pip install -e .",
        file=sys.stderr,
    )
    sys.exit(2)

from h2a2_jax.errors import InputError

if TYPE_CHECKING:
    from h2a2_jax.evaluation.evaluate import EvalRequest
    from h2a2_jax.inference.input_files import PredictRequest

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "What to run, as in configs/joint.py:demo; eval, predict and report take the checkpoint's without it.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, results.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "predict", "report", "tau_sweep", "ablation", "transfer", "protocol", "check", "replay"],
    "What to do.",
)
_STEP = flags.DEFINE_string(
    "step", None, "Eval, predict: step of the checkpoint, a number, best or last; by default the last. Replay: batch."
)
_ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Train: go on with a config that differs from the one that the run was begun with."
)
_DATASET = flags.DEFINE_string(
    "dataset", None, "Predict, eval: the dataset whose head predicts. Check: whose classes count."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the results; by default in the workdir, of check runs/check.")
_DATA = flags.DEFINE_string("data", None, "Check, eval: folder of scans with their boxes.")

_INPUT = flags.DEFINE_list("input", [], "Predict: files, folders, patterns of point clouds, with commas between.")
_UP = flags.DEFINE_enum("up", "z", ["z", "-z", "y", "-y", "x", "-x", "auto"], "Predict: axis that points up.")
_UNIT = flags.DEFINE_enum("unit", "m", ["m", "cm", "mm", "auto"], "Predict: unit of the points.")
_COLORS = flags.DEFINE_enum("colors", "auto", ["auto", "0-1", "0-255", "none"], "Predict: range of the colours.")
_ALIGN = flags.DEFINE_enum(
    "align", "none", ["none", "gravity", "manhattan", "both"], "Predict: turn the floor level, walls along x and y."
)
_SCORE = flags.DEFINE_float("score", None, "Predict: lowest score of a box.", lower_bound=0, upper_bound=1)
_FORMATS = flags.DEFINE_list("formats", None, "Predict: what is written, of json, csv, ply, html, png.")
_SHOW = flags.DEFINE_bool("show", False, "Predict: open a window with every scan (open3d).")

_SPLIT = flags.DEFINE_enum("split", "val", ["val", "train"], "Eval: which scans.")
_TTA = flags.DEFINE_list("tta", [], "Eval: test-time augmentation, of flip_x, flip_y, scales, turns.")
_CROSS = flags.DEFINE_bool("cross", False, "Eval: every dataset's head on every dataset, over the classes they share.")

_SINGLES = flags.DEFINE_list("singles", [], "Report: folders of single-dataset runs to compare with.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Sweeps: seeds of training.")
_TAUS = flags.DEFINE_list("taus", [], "Tau sweep: thresholds; by default 0.15 to 0.35 in steps of 0.05.")
_ROWS = flags.DEFINE_list(
    "rows", [], "Ablation: of naive, sfks, ngh, sfks_ngh, tr3d, tr3d_<dataset>; by default the first five."
)
_HELD_OUT = flags.DEFINE_string(
    "held_out", None, "Transfer: dataset to train without, then to predict and fine-tune to."
)
_TUNING_STEPS = flags.DEFINE_integer("tuning_steps", None, "Transfer: of fine-tuning; by default half of training's.")
_JOBS = flags.DEFINE_integer("jobs", None, "Sweeps: runs at once; by default a CPU core each, at most 4; 1 on a GPU.")
_BUDGET_MINUTES = flags.DEFINE_float(
    "budget_minutes", None, "Sweeps: begin and go on with runs for so long; the same command does the rest."
)
_TRAININGS = flags.DEFINE_integer("trainings", 5, "Protocol: trainings, by seeds.", lower_bound=1)
_EVALUATIONS = flags.DEFINE_integer("evaluations", 5, "Protocol: evaluations of each.", lower_bound=1)

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several processes: host:port of process 0; auto where a cluster such as SLURM started them."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: which of them this one is, from 0.")

_OF_PROCESSES = ("coordinator", "num_processes", "process_id")
_ONLY_FOR = {
    "step": ("eval", "predict", "replay"),
    "accept_changes": ("train",),
    "dataset": ("eval", "predict", "check"),
    "output": ("eval", "predict", "check"),
    "data": ("eval", "check"),
    "singles": ("report",),
    "seeds": ("tau_sweep", "ablation", "transfer"),
    "rows": ("ablation",),
    "taus": ("tau_sweep",),
    **dict.fromkeys(("jobs", "budget_minutes"), ("tau_sweep", "ablation", "transfer", "protocol")),
    **dict.fromkeys(("held_out", "tuning_steps"), ("transfer",)),
    **dict.fromkeys(("input", "up", "unit", "colors", "align", "score", "formats", "show"), ("predict",)),
    **dict.fromkeys(("split", "tta", "cross"), ("eval",)),
    **dict.fromkeys(("trainings", "evaluations"), ("protocol",)),
    **dict.fromkeys(_OF_PROCESSES, ("train", "eval", "predict")),
}
_FROM_CHECKPOINT = ("eval", "predict", "replay", "report")
_ONLY_WITH_INPUT = ("up", "unit", "colors", "align", "score", "show")
_EXAMPLE = "--config=configs/joint.py:demo --workdir=runs/demo"


def main(argv: list[str]) -> int | None:
    """Run the chosen mode; the result is the exit status."""
    logging.set_verbosity(logging.WARNING)  # which accelerators JAX did not find is no news
    if len(argv) > 1:
        raise InputError(f"run.py takes flags only, given {argv[1]!r}; an example is {_EXAMPLE}.")
    mode = _MODE.value
    for name, modes in _ONLY_FOR.items():
        if flags.FLAGS[name].present and mode not in modes:
            raise InputError(f"--{name} is for --mode={' and --mode='.join(modes)}, given with --mode={mode}.")
    if mode == "check":
        return _check()
    if mode == "predict" and _INPUT.present and not _INPUT.value:
        raise InputError(
            "--input is empty; expected are files, folders or patterns (leave it out for a run's own scans)."
        )
    alone = [f"--{name}" for name in _ONLY_WITH_INPUT if flags.FLAGS[name].present and not _INPUT.value]
    if alone:
        raise InputError(
            f"{', '.join(alone)} is for files of points: name them with --input; the scans of a config have their own."
        )
    together = [f"--{name}" for name in _OF_PROCESSES if flags.FLAGS[name].present and _INPUT.value]
    if together:
        raise InputError(
            f"{', '.join(together)} is for the scans of a config: files of points are predicted by one process; give "
            "each process files and an --output of its own."
        )
    if mode in _FROM_CHECKPOINT:
        if not _WORKDIR.value:
            raise InputError(f"--mode={mode} needs --workdir, the folder of a run with its checkpoints.")
    elif mode == "transfer" and _HELD_OUT.value is None:
        raise InputError("--mode=transfer needs --held_out, the dataset to train without, as in --held_out=s3dis.")
    elif _CONFIG.value is None or not _WORKDIR.value:
        example = _EXAMPLE if mode == "train" else f"--mode={mode} {_EXAMPLE}"
        raise InputError(f"run.py needs --config and --workdir, as in {example}; --help lists modes and flags.")
    seeds, taus = _numbers("seeds", _SEEDS.value, int), _numbers("taus", _TAUS.value, float)
    # Imported here, so that a wrong flag is answered at once.
    from h2a2_jax import commands
    from h2a2_jax.config import experiment_config
    from h2a2_jax.distributed import processes

    workdir = Path(_WORKDIR.value)
    config = None if _CONFIG.value is None else experiment_config(_CONFIG.value)
    if mode == "replay":
        return commands.replay_command(workdir, _STEP.value)
    if mode == "predict" and _INPUT.value:
        return commands.predict_files_command(workdir, _predict_request(), config)
    if mode == "report":
        commands.report_command(config, workdir, [Path(folder) for folder in _SINGLES.value])
        return None
    if mode in _FROM_CHECKPOINT:
        with processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
            if mode == "eval":
                commands.evaluate_command(config, workdir, _eval_request())
            else:
                commands.predict_command(config, workdir, _predict_request())
        return None
    assert config is not None
    if mode == "tau_sweep":
        return commands.tau_sweep_command(config, workdir, taus, seeds, _JOBS.value, _BUDGET_MINUTES.value)
    if mode == "ablation":
        return commands.ablation_command(config, workdir, seeds, _JOBS.value, _BUDGET_MINUTES.value, _ROWS.value)
    if mode == "transfer":
        assert _HELD_OUT.value is not None
        return commands.transfer_command(
            config, workdir, _HELD_OUT.value, seeds, _TUNING_STEPS.value, _JOBS.value, _BUDGET_MINUTES.value
        )
    if mode == "protocol":
        return commands.protocol_command(
            config, workdir, _TRAININGS.value, _EVALUATIONS.value, _JOBS.value, _BUDGET_MINUTES.value
        )
    from h2a2_jax.errors import Stopped

    try:
        with processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
            commands.train_command(config, workdir, accept_changes=_ACCEPT_CHANGES.value)
    except Stopped as stopped:  # it said what is saved
        return stopped.status
    return None


def _predict_request() -> "PredictRequest":
    from h2a2_jax.inference.input_files import PredictRequest

    chosen: dict[str, Any] = {"align": _ALIGN.value, "colors": _COLORS.value}
    if _SCORE.value is not None:
        chosen["score"] = _SCORE.value
    if _FORMATS.value is not None or not _INPUT.value:  # scan by scan, scans of a config have what is asked for only
        chosen["formats"] = tuple(_FORMATS.value or ())
    return PredictRequest(
        tuple(_INPUT.value),
        output=None if _OUTPUT.value is None else Path(_OUTPUT.value),
        dataset=_DATASET.value,
        up=_UP.value,
        unit=_UNIT.value,
        show=_SHOW.value,
        step=_chosen_step(),
        **chosen,
    )


def _eval_request() -> "EvalRequest":
    from h2a2_jax.evaluation.evaluate import EvalRequest

    return EvalRequest(
        split=cast(Literal["train", "val"], _SPLIT.value),
        dataset=_DATASET.value,
        data=_DATA.value,
        tta=tuple(_TTA.value),
        cross=_CROSS.value,
        output=None if _OUTPUT.value is None else Path(_OUTPUT.value),
        step=_chosen_step(),
    )


def _chosen_step() -> int | None:
    from h2a2_jax.checkpoint.store import checkpoint_place
    from h2a2_jax.evaluation.documents import chosen_step

    return chosen_step(checkpoint_place(Path(_WORKDIR.value or ".")).run, _STEP.value)


def _check() -> int:
    if not _DATA.value:
        raise InputError("--mode=check needs --data=FOLDER, the folder to look over.")
    for name in ("config", "workdir"):
        if flags.FLAGS[name].present:
            raise InputError(f"--{name} is not for --mode=check, which looks over the folder --data; leave it out.")
    from h2a2_jax.check import check

    return 0 if check(_DATA.value, _DATASET.value, _OUTPUT.value).ready else 1


def _numbers(flag: str, texts: list[str], kind: type) -> list:
    """The numbers of a flag that lists them."""
    try:
        return [kind(text) for text in texts]
    except ValueError as error:
        example = "0,1" if kind is int else "0.2,0.3"
        raise InputError(f"--{flag} is {','.join(texts)!r}; expected numbers as in --{flag}={example}.") from error


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse the command line; what is wrong with a flag or a config becomes one sentence."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.to_dict()  # a config file that failed to load says so only when it is used
        return rest
    except Exception as error:  # config files run any code, and flags wrap what it raises
        raise InputError(_sentence(error, argv)) from error


def _sentence(error: BaseException, argv: list[str]) -> str:
    """What went wrong, without the wrapping: flags put the text of a traceback into the error they raise."""
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
        return f"unknown config key {text}{_keys_beside(unknown, argv)}"
    return text


def _keys_beside(unknown: str, argv: list[str]) -> str:
    """The keys that the config has where a flag looked for one that it has not, in brackets; empty where none did."""
    given = dict(argument.lstrip("-").partition("=")[::2] for argument in argv if argument.startswith("-"))
    path = next((flag.split(".")[1:] for flag in given if unknown in flag.split(".")[1:]), None)
    if path is None or not given.get("config"):
        return ""
    file, _, variant = given["config"].partition(":")
    part = runpy.run_path(file)["get_config"](*[variant] * bool(variant))
    for key in path[: path.index(unknown)]:
        part = part[key]
    return f" (keys there: {', '.join(part)})"


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=_parse_flags)
    except InputError as error:
        print(f"run.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("run.py: stopped.", file=sys.stderr)
        sys.exit(130)

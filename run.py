"""Train, evaluate, predict, report or sweep: python run.py --config=configs/joint.py:demo --workdir=runs/demo.

Look over a folder of scans before: python run.py --mode=check --data=FOLDER.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from h2a2_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to run, as in configs/joint.py:demo.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, results.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "predict", "report", "tau_sweep", "ablation", "check"], "What to do."
)
_SINGLES = flags.DEFINE_list("singles", [], "Report: folders of single-dataset runs to compare with.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Sweeps: seeds of training.")
_TAUS = flags.DEFINE_list("taus", [], "Tau sweep: thresholds; by default 0.15 to 0.35 in steps of 0.05.")
_JOBS = flags.DEFINE_integer("jobs", None, "Sweeps: runs at once; by default a CPU core each, at most 4; 1 on a GPU.")
_DATA = flags.DEFINE_string("data", None, "Check: folder of scans with their boxes; needs neither config nor workdir.")
_DATASET = flags.DEFINE_string("dataset", None, "Check: whose classes count: scannet, sunrgbd, s3dis.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Check: folder of check.json and contact_sheet.png, by default runs/check."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several processes: host:port of process 0; auto where a cluster such as SLURM started them."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: which of them this one is, from 0.")
_ONLY_FOR = {"singles": ["report"], "taus": ["tau_sweep"], "seeds": ["tau_sweep", "ablation"]}
_ONLY_FOR["jobs"] = _ONLY_FOR["seeds"]
_ONLY_FOR |= {flag: ["check"] for flag in ("data", "dataset", "output")}
_ONLY_FOR |= {flag: ["train", "eval", "predict"] for flag in ("coordinator", "num_processes", "process_id")}
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
    if _CONFIG.value is None or not _WORKDIR.value:
        raise InputError(f"run.py needs --config and --workdir, as in {_EXAMPLE}.")
    seeds, taus = _numbers("seeds", _SEEDS.value, int), _numbers("taus", _TAUS.value, float)
    # Imported here, so that a wrong flag is answered at once.
    from h2a2_jax import commands
    from h2a2_jax.training.config import experiment_config
    from h2a2_jax.training.distributed import processes

    config, workdir = experiment_config(_CONFIG.value), Path(_WORKDIR.value)
    if mode == "tau_sweep":
        return commands.tau_sweep_command(config, workdir, taus, seeds, _JOBS.value)
    if mode == "ablation":
        return commands.ablation_command(config, workdir, seeds, _JOBS.value)
    if mode == "report":
        commands.report_command(config, workdir, [Path(folder) for folder in _SINGLES.value])
    else:
        command = {
            "train": commands.train_command,
            "eval": commands.evaluate_command,
            "predict": commands.predict_command,
        }[mode]
        with processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value):
            command(config, workdir)
    return None


def _check() -> int:
    if not _DATA.value:
        raise InputError("--mode=check needs --data=FOLDER, the folder to look over.")
    for name in ("config", "workdir"):
        if flags.FLAGS[name].present:
            raise InputError(f"--{name} is not for --mode=check, which looks over the folder --data; leave it out.")
    from h2a2_jax.inputs.check import check

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
        raise InputError(_sentence(error)) from error


def _sentence(error: BaseException) -> str:
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
        return f"the config file cannot be read ({text}); an example is {_EXAMPLE}."
    if isinstance(error, KeyError | AttributeError):
        return f"unknown config key {text.replace(chr(92), '')}"
    return text


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=_parse_flags)
    except InputError as error:
        print(f"run.py: {error}", file=sys.stderr)
        sys.exit(2)

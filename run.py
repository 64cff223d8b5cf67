"""Train, evaluate or predict: python run.py --config=configs/joint.py:demo --workdir=runs/demo [--mode=train]."""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from h2a2_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to run, as in configs/joint.py:demo.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, results.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "predict"], "What to do.")
_EXAMPLE = "--config=configs/joint.py:demo --workdir=runs/demo"


def main(argv: list[str]) -> None:
    """Run the chosen mode."""
    logging.set_verbosity(logging.WARNING)  # which accelerators JAX did not find is no news
    if len(argv) > 1:
        raise InputError(f"run.py takes flags only, given {argv[1]!r}; an example is {_EXAMPLE}.")
    if _CONFIG.value is None or not _WORKDIR.value:
        raise InputError(f"run.py needs --config and --workdir, as in {_EXAMPLE}.")
    # Imported here, so that a wrong flag is answered at once.
    from h2a2_jax.commands import evaluate_command, predict_command, train_command
    from h2a2_jax.training.config import experiment_config

    command = {"train": train_command, "eval": evaluate_command, "predict": predict_command}[_MODE.value]
    command(experiment_config(_CONFIG.value), Path(_WORKDIR.value))


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

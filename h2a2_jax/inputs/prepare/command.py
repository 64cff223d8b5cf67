"""The commands `python -m data.<dataset>`: arguments, what is told at the end, exit status."""

import argparse
import importlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from h2a2_jax.errors import InputError
from h2a2_jax.host import available_cores, sigterm_raises
from h2a2_jax.inputs.raw import PUBLISHED, RawDataset

_Opened = tuple[RawDataset, Mapping[str, Any], Mapping[str, int] | None]
"""The scans, what they depend on, and their published numbers by split."""


def raw_command(
    dataset: str,
    open_raw: Callable[[argparse.Namespace], RawDataset],
    arguments: Sequence[str] | None = None,
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    comparable: Callable[[argparse.Namespace], bool] = lambda options: True,
) -> int:
    """Prepares a dataset from the files that its authors publish.

    Args:
        dataset: the package data.<dataset>.
        open_raw: opens the raw files by the options, `options.raw` the folder.
        arguments: of the command; those of the process by default.
        add_options: adds options of the dataset's own to the parser; their values count as settings.
        comparable: whether the published counts are those of these options.

    Returns:
        Exit status: 0; 1 if scans could not be prepared; 2 for wrong input; 130 or 143 if it was stopped.
    """
    parser = _Parser(dataset)
    parser.add_argument("--raw", type=Path, required=True, metavar="DIR", help="folder of the published files")
    own = _Parser(dataset)
    add_options(parser)
    add_options(own)

    def opened(options: argparse.Namespace) -> _Opened:
        raw = open_raw(options)
        names = vars(own.parse_args([]))
        settings = {"raw": str(options.raw.resolve()), **{name: getattr(options, name) for name in names}}
        return raw, settings, PUBLISHED[raw.spec.name].scans if comparable(options) else None

    return _run(dataset, parser, opened, arguments)


def synthetic_command(dataset: str, stands_for: str, arguments: Sequence[str] | None = None) -> int:
    """Generates a procedural dataset; exit status as of `raw_command`.

    Args:
        dataset: the package data.<dataset>.
        stands_for: "scannet", "sunrgbd" or "s3dis".
        arguments: of the command; those of the process by default.
    """
    from h2a2_jax.inputs.prepare.synthetic import SyntheticRaw, generator_digest

    parser = _Parser(dataset)
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="training scans (1000)")
    parser.add_argument("--val", type=int, default=100, metavar="N", help="validation scans (100)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other scans (0)")
    parser.add_argument("--scale", choices=["full", "demo"], default="full", help="rooms like the real ones, or small")

    def opened(options: argparse.Namespace) -> _Opened:
        raw = SyntheticRaw(stands_for, options.train, options.val, options.seed, options.scale)
        return raw, {"seed": options.seed, "scale": options.scale, "generator": generator_digest()}, None

    return _run(dataset, parser, opened, arguments)


def _run(
    dataset: str, parser: "_Parser", opened: Callable[[argparse.Namespace], _Opened], arguments: Sequence[str] | None
) -> int:
    home = f"data/{dataset}/prepared"
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"where the prepared dataset goes ({home})")
    cores = available_cores()
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"scans at once ({cores}, cores)")
    parser.add_argument("--skip-failed", action="store_true", help="pack without scans that cannot be prepared")
    parser.add_argument("--keep-cache", action="store_true", help="keep the files of single scans after packing")
    again = "The same command goes on from there."
    try:
        options = parser.parse_args(arguments)
        if options.workers < 1:
            raise InputError(f"--workers is {options.workers}; expected at least 1.")
        with sigterm_raises(_TerminatedError):
            module = importlib.import_module(f"data.{dataset}.{dataset}_dataset_builder")
            # Imported late: a wrong argument is answered at once, and TFDS may be missing.
            from h2a2_jax.inputs.prepare.prepare import FailedScansError, prepare

            output = options.output or Path(str(module.__file__)).parent / "prepared"
            raw, settings, published = opened(options)
            try:
                prepare(
                    module.Builder,
                    raw,
                    settings,
                    output,
                    workers=options.workers,
                    published=published,
                    skip_failed=options.skip_failed,
                    keep_cache=options.keep_cache,
                )
            except FailedScansError as error:
                print(error, file=sys.stderr)
                return 1
    except InputError as error:
        print(f"data.{dataset}: {error}", file=sys.stderr)
        return 2
    except _TerminatedError:
        print(f"\nStopped by SIGTERM. {again}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print(f"\nStopped. {again}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage around it."""

    def __init__(self, dataset: str):
        super().__init__(prog=f"python -m data.{dataset}", allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists the arguments.")


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, which unwinds as Ctrl-C does."""

"""Prepare a dataset: raw or procedural scans become a TFDS dataset. Also the commands `python -m data.<dataset>`."""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import importlib
import itertools
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from h2a2_jax.errors import InputError
from h2a2_jax.files import read_json
from h2a2_jax.host import available_cores, progress_interval, sigterm_raises
from h2a2_jax.prepare.builder import STATISTICS_FILE, Packing, ScanDatasetBuilder
from h2a2_jax.prepare.prepared_scan import PrepareScan, ScanSummary, SyntheticRaw, statistics, table
from h2a2_jax.prepare.scan_cache import ScanCache, difference, explain_write_errors, make_folder
from h2a2_jax.prepare.worker_pool import run_in_processes
from h2a2_jax.scans import synthetic
from h2a2_jax.scans.raw import PUBLISHED, RawDataset
from h2a2_jax.scans.synthetic.rooms import SCALES
from h2a2_jax.scans.tfds_source import METADATA_FILE, why_not_whole


class FailedScansError(InputError):
    """Some scans could not be prepared, so that nothing was packed."""


def prepare(
    builder: type[ScanDatasetBuilder],
    raw: RawDataset,
    settings: Mapping[str, Any],
    output: Path,
    *,
    workers: int,
    published: Mapping[str, int] | None = None,
    skip_failed: bool = False,
    keep_cache: bool = False,
) -> Path:
    """Prepare a dataset, or resume where an earlier call stopped; print the progress and the statistics.

    The settings are the values that the scans depend on beside their names, numbers and strings by name; scans of other
    settings are not mixed in. The output folder gets <dataset>/<version>/, which is returned, and, until all is done,
    <dataset>.cache/; `keep_cache` keeps the latter, which otherwise stays only where scans failed. `published` is the
    number of scans by split that the dataset's authors state, to compare with. `skip_failed` packs without the scans
    that cannot be prepared, instead of raising FailedScansError.
    """
    splits = _names_by_split(raw)
    total = sum(map(len, splits.values()))
    with _lock(output, builder.name):
        folder = output / builder.name / str(builder.VERSION)
        cache = ScanCache(output / f"{builder.name}.cache", settings)
        _remove_left_overs(folder.parent)
        if _holds(folder, cache, splits):
            print(f"{folder} holds all {total} scans already.")
            counted_before = read_json(folder / STATISTICS_FILE)
            print(f"There is no {STATISTICS_FILE} beside them." if counted_before is None else table(counted_before))
        else:
            cache.open()
            summaries, failed = _fill(cache, raw, splits, workers)
            cache.write_failures(failed)
            if failed:
                reasons = "".join(f"\n  {reason}" for _, reason in sorted(failed.items()))
                print(f"{len(failed)} of {total} scans cannot be prepared:{reasons}")
            if failed and not skip_failed:
                raise FailedScansError(
                    f"Nothing was packed, as {len(failed)} of {total} scans failed: repair them and give the same "
                    "command again, which tries only those, or pack the others with --skip-failed."
                )
            kept = {split: [name for name in names if name in summaries] for split, names in splits.items()}
            if empty := [split for split, names in kept.items() if not names]:
                raise FailedScansError(f"No scan of {' and '.join(empty)} could be prepared, so nothing was packed.")
            counted = {split: [summaries[name] for name in names] for split, names in kept.items()}
            found = statistics(raw.spec, counted, published, failed, raw.notes)
            if not _holds(folder, cache, kept):
                metadata = {
                    "dataset": raw.spec.name,
                    "classes": list(raw.spec.classes),
                    "has_yaw": raw.spec.has_yaw,
                    "settings": cache.settings,
                    "names": kept,
                    "failed": failed,
                }
                _pack(builder, output, folder, Packing(cache, kept, metadata, found))
            print(table(found))
        if not keep_cache and not cache.read_failures():
            cache.remove()
    print(f"Prepared: {folder}")
    return folder


def _names_by_split(raw: RawDataset) -> dict[str, list[str]]:
    splits = {split: sorted(raw.splits[split]) for split in ("train", "val")}
    if twice := [name for name, count in Counter(itertools.chain(*splits.values())).items() if count > 1]:
        raise InputError(f"Scan {twice[0]} is named twice in the lists of the splits: name each once.")
    if empty := [split for split, names in splits.items() if not names]:
        raise InputError(f"There is no scan in {' and '.join(empty)}: check the raw folder and its lists of scans.")
    return splits


@contextlib.contextmanager
def _lock(output: Path, name: str) -> Iterator[None]:
    """Keep a second preparation out; the system releases the lock however this process ends."""
    make_folder(output)
    lock = output / f"{name}.lock"
    with explain_write_errors(lock):
        file = lock.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{name} is being prepared in {output} already: wait for that, or give another --output."
            ) from error
        yield


def _remove_left_overs(parent: Path) -> None:
    """Remove folders that a kill left half-written; no reader looks at them."""
    for folder in parent.glob("incomplete.*"):
        with explain_write_errors(folder):
            shutil.rmtree(folder)


def _holds(folder: Path, cache: ScanCache, splits: Mapping[str, Sequence[str]]) -> bool:
    """Return True if the folder is a complete dataset of exactly these scans; raise InputError for other settings."""
    metadata = read_json(folder / METADATA_FILE)
    if not isinstance(metadata, dict) or why_not_whole(folder) is not None:
        return False
    settings = metadata.get("settings")
    if settings != cache.settings:
        raise InputError(
            f"{folder} was prepared with other settings ({difference(settings, cache.settings)}): "
            "remove that folder, or give another --output."
        )
    return metadata["names"] == splits


def _fill(
    cache: ScanCache, raw: RawDataset, splits: Mapping[str, Sequence[str]], workers: int
) -> tuple[dict[str, ScanSummary], dict[str, str]]:
    """Prepare the scans that the cache lacks; return summaries, and reasons of the scans that failed, by name."""
    names = [name for split in splits.values() for name in split]
    done_before = {name for name in names if cache.path(name).exists()}
    print(
        f"{raw.spec.name}: {len(names)} scans, {len(done_before)} of them done before; "
        f"{workers} process{'es' * (workers > 1)}.",
        flush=True,
    )
    # Finished scans come first: they are only checked, and the bar, which shows the latest speed, soon forgets them.
    order = sorted(names, key=lambda name: name not in done_before)
    summaries: dict[str, ScanSummary] = {}
    failed: dict[str, str] = {}
    made = 0
    with _progress_bar(len(names), "preparing") as bar:
        for outcome in run_in_processes(PrepareScan(raw, cache), order, workers):
            if outcome.failure is not None:
                failed[outcome.name] = outcome.failure
                bar.write(f"Failed: {outcome.failure}", file=sys.stderr)
                cache.write_failures(failed)
            else:
                summaries[outcome.name], new = outcome.value
                made += new
            bar.update()
    redone = made - (len(summaries) + len(failed) - len(done_before))
    print(f"{made} scans prepared" + (f", {redone} of them since their files were damaged" * (redone > 0)) + ".")
    return summaries, failed


def _pack(builder: type[ScanDatasetBuilder], output: Path, folder: Path, packing: Packing) -> None:
    if folder.exists():
        # Renamed before it is removed: a kill must not leave half of it where it would be read.
        aside = folder.with_name(f"incomplete.old_{folder.name}")
        with explain_write_errors(folder):
            folder.rename(aside)
            shutil.rmtree(aside)
    total = sum(map(len, packing.splits.values()))
    with _progress_bar(total, "packing") as bar, explain_write_errors(folder), _array_record_errors():
        packing = dataclasses.replace(packing, on_scan=bar.update)
        builder(data_dir=output, packing=packing).download_and_prepare(download_dir=folder.parent / "incomplete.none")
        for path in (*folder.iterdir(), folder, folder.parent):  # on disk before the cache is removed
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    _remove_left_overs(folder.parent)


@contextlib.contextmanager
def _array_record_errors() -> Iterator[None]:
    """Turn the RuntimeError that array_record raises when it cannot write into an OSError."""
    try:
        yield
    except RuntimeError as error:
        reason = re.search(r"(?:open|write|close)\(\) failed: ([^;]*)", str(error))
        if reason is None:
            raise
        number = errno.ENOSPC if os.strerror(errno.ENOSPC) in reason[1] else errno.EIO
        raise OSError(number, reason[1]) from error


def _progress_bar(total: int, action: str) -> Any:
    return tqdm(total=total, desc=action, unit="scan", smoothing=0.1, mininterval=progress_interval())


_Opened = tuple[RawDataset, Mapping[str, Any], Mapping[str, int] | None]
"""The scans, the settings that they depend on, and their published numbers by split."""


def raw_command(
    dataset: str,
    open_raw: Callable[[argparse.Namespace], RawDataset],
    arguments: Sequence[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    comparable: Callable[[argparse.Namespace], bool] = lambda options: True,
) -> int:
    """Prepare a dataset from the files that its authors publish.

    Args:
        dataset: the package data.<dataset>.
        open_raw: opens the raw files by the parsed options; `raw` is their folder.
        arguments: arguments of the command; those of the process by default.
        options: flags of this dataset alone, with the arguments of `add_argument`; their values count as settings.
        comparable: returns True if the published counts hold for the parsed options.

    Returns:
        Exit status: 0; 1 if scans could not be prepared; 2 for wrong input; 130 or 143 if it was stopped.
    """
    parser = _Parser(dataset)
    parser.add_argument("--raw", type=Path, required=True, metavar="DIR", help="folder of the published files")
    names = [parser.add_argument(flag, **how).dest for flag, how in (options or {}).items()]

    def open_scans(parsed: argparse.Namespace) -> _Opened:
        raw = open_raw(parsed)
        settings = {"raw": str(parsed.raw.resolve()), **{name: getattr(parsed, name) for name in names}}
        return raw, settings, PUBLISHED[raw.spec.name] if comparable(parsed) else None

    return _run(dataset, parser, open_scans, arguments)


def synthetic_command(dataset: str, stands_for: str | Sequence[str], arguments: Sequence[str] | None = None) -> int:
    """Generate a procedural dataset; return as `raw_command`.

    Args:
        dataset: the package data.<dataset>.
        stands_for: built-in dataset that the scans are like, or several, of which an argument chooses one.
        arguments: arguments of the command; those of the process by default.
    """
    parser = _Parser(dataset)
    if not isinstance(stands_for, str):
        parser.add_argument("dataset", choices=stands_for, help="dataset that the scans are like")
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="training scans (1000)")
    parser.add_argument("--val", type=int, default=100, metavar="N", help="validation scans (100)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other scans (0)")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="full",
        help="rooms as large as real ones, small ones, or varied homes",
    )

    def open_scans(options: argparse.Namespace) -> _Opened:
        name = stands_for if isinstance(stands_for, str) else options.dataset
        raw = SyntheticRaw(name, {"train": options.train, "val": options.val}, options.seed, options.scale)
        # The digest of the generator's code is a setting of the scans: those of different code must not be mixed.
        files = sorted(Path(synthetic.__file__).parent.glob("*.py"))
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
        return raw, {"seed": options.seed, "scale": options.scale, "generator": digest}, None

    return _run(dataset, parser, open_scans, arguments)


def _run(dataset: str, parser: "_Parser", open_scans: Callable[..., _Opened], arguments: Sequence[str] | None) -> int:
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
            raw, settings, published = open_scans(options)
            prepare(
                module.make_builder(options.dataset) if "dataset" in options else module.Builder,
                raw,
                settings,
                options.output or Path(str(module.__file__)).parent / "prepared",
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
    """Parser that raises an InputError of one sentence instead of printing the usage."""

    def __init__(self, dataset: str):
        super().__init__(prog=f"python -m data.{dataset}", allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists the arguments.")


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM was received; unwinds as Ctrl-C does."""

"""Prepare a dataset: raw or procedural scans become a TFDS dataset."""

import argparse
import contextlib
import dataclasses
import errno
import importlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

from h2a2_jax.errors import InputError
from h2a2_jax.files import read_json
from h2a2_jax.host import available_cores, duration, sigterm_raises
from h2a2_jax.prepare.builder import STATISTICS_FILE, Packing, ScanDatasetBuilder
from h2a2_jax.prepare.prepared_scan import PrepareScan, ScanSummary, statistics, table
from h2a2_jax.prepare.scan_cache import ScanCache, difference, make_folder, writing_to
from h2a2_jax.prepare.worker_pool import run_in_processes
from h2a2_jax.scans.raw import PUBLISHED, RawDataset
from h2a2_jax.scans.tfds_source import METADATA_FILE, why_not_whole

_SECONDS_BETWEEN_LINES = 15.0


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
    """Prepares a dataset, or goes on where an earlier call was ended; tells what it does on standard output.

    Args:
        builder: of the dataset.
        raw: the scans.
        settings: what the scans depend on beside their names, numbers and strings by name: scans of other settings are
            not mixed in.
        output: folder for <dataset>/<version>/ and, until all is done, <dataset>.cache/.
        workers: processes at once.
        published: scans by split that the dataset's authors state, to compare with.
        skip_failed: pack without the scans that cannot be prepared.
        keep_cache: keep the cache after packing, as it is kept where scans failed.

    Returns:
        Folder of the prepared dataset.

    Raises:
        FailedScansError: scans failed, and `skip_failed` is not set.
        InputError: the output holds other data, is in use, or cannot be written.
    """
    splits = _names(raw)
    total = sum(map(len, splits.values()))
    with _alone(output, builder.name):
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
            _tell_failures(failed, total, skip_failed)
            kept = {split: [name for name in names if name in summaries] for split, names in splits.items()}
            empty = [split for split, names in kept.items() if not names]
            if empty:
                raise FailedScansError(f"No scan of {' and '.join(empty)} could be prepared, so nothing was packed.")
            counted = {split: [summaries[name] for name in names] for split, names in kept.items()}
            found = statistics(raw.spec, counted, published, failed, raw.notes)
            if not _holds(folder, cache, kept):
                _pack(builder, output, folder, Packing(cache, kept, _metadata(raw, cache, kept, failed), found))
            print(table(found))
        if not keep_cache and not cache.read_failures():
            cache.remove()
    print(f"Prepared: {folder}")
    return folder


def _names(raw: RawDataset) -> dict[str, list[str]]:
    """Names of the scans by split, sorted."""
    splits = {split: sorted(raw.splits[split]) for split in ("train", "val")}
    both = [name for names in splits.values() for name in names]
    if len(set(both)) != len(both):
        twice = next(name for name in both if both.count(name) > 1)
        raise InputError(f"Scan {twice} is named twice in the lists of the splits: name each once.")
    empty = [split for split, names in splits.items() if not names]
    if empty:
        raise InputError(f"There is no scan in {' and '.join(empty)}: check the raw folder and its lists of scans.")
    return splits


@contextlib.contextmanager
def _alone(output: Path, name: str) -> Iterator[None]:
    """Keeps a second preparation out; the system lets go however this one ends."""
    make_folder(output)
    lock = output / f"{name}.lock"
    with contextlib.ExitStack() as stack:
        with writing_to(lock):
            file: TextIO = stack.enter_context(lock.open("w"))
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{name} is being prepared in {output} already: wait for that, or give another --output."
            ) from error
        yield


def _remove_left_overs(parent: Path) -> None:
    """Folders that a kill left half-written; nothing ever reads them."""
    for folder in parent.glob("incomplete.*"):
        with writing_to(folder):
            shutil.rmtree(folder)


def _holds(folder: Path, cache: ScanCache, splits: Mapping[str, Sequence[str]]) -> bool:
    """Whether the folder is a prepared dataset of just these scans.

    Raises:
        InputError: it holds scans of other settings.
    """
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
    """Prepares what the cache lacks; summaries, and reasons of those that failed, by name."""
    names = [name for split in splits.values() for name in split]
    there = {name for name in names if cache.path(name).exists()}
    print(
        f"{raw.spec.name}: {len(names)} scans, {len(there)} of them done before; "
        f"{workers} process{'es' * (workers > 1)}.",
        flush=True,
    )
    # Those that are there come first: checking them is fast, and must not make the rest look fast.
    order = [name for name in names if name in there] + [name for name in names if name not in there]
    summaries: dict[str, ScanSummary] = {}
    failed: dict[str, str] = {}
    made = 0
    with ScanProgress(len(names), "preparing") as progress:
        for outcome in run_in_processes(PrepareScan(raw, cache), order, workers):
            if outcome.failure is not None:
                failed[outcome.name] = outcome.failure
                progress.note(f"Failed: {outcome.failure}")
                progress.update(counts=True)
                cache.write_failures(failed)
            else:
                summaries[outcome.name], new = outcome.value
                made += new
                progress.update(counts=new)
    redone = made - (len(summaries) + len(failed) - len(there))
    print(f"{made} scans prepared" + (f", {redone} of them since their files were damaged" * (redone > 0)) + ".")
    return summaries, failed


def _tell_failures(failed: Mapping[str, str], total: int, skip_failed: bool) -> None:
    if not failed:
        return
    print(f"{len(failed)} of {total} scans cannot be prepared:")
    for _, reason in sorted(failed.items()):
        print(f"  {reason}")
    if not skip_failed:
        raise FailedScansError(
            f"Nothing was packed, as {len(failed)} of {total} scans failed: mend them and give the same command again, "
            "which tries only those, or pack the others with --skip-failed."
        )


def _metadata(
    raw: RawDataset, cache: ScanCache, splits: Mapping[str, Sequence[str]], failed: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "dataset": raw.spec.name,
        "classes": list(raw.spec.classes),
        "has_yaw": raw.spec.has_yaw,
        "settings": cache.settings,
        "names": {split: list(names) for split, names in splits.items()},
        "failed": dict(failed),
    }


def _pack(builder: type[ScanDatasetBuilder], output: Path, folder: Path, packing: Packing) -> None:
    if folder.exists():
        # In one step out of sight: a kill must not leave half of it where it would be read.
        aside = folder.with_name(f"incomplete.old_{folder.name}")
        with writing_to(folder):
            folder.rename(aside)
            shutil.rmtree(aside)
    total = sum(map(len, packing.splits.values()))
    with ScanProgress(total, "packing") as progress, writing_to(folder), _array_record_errors():
        packing = dataclasses.replace(packing, on_scan=lambda: progress.update(counts=True))
        builder(data_dir=output, packing=packing).download_and_prepare(download_dir=folder.parent / "incomplete.none")
        for path in (*folder.iterdir(), folder, folder.parent):  # on disk, before the cache goes
            _sync(path)
    _remove_left_overs(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _array_record_errors() -> Iterator[None]:
    """What array_record says when it cannot write, as the OSError that it is."""
    try:
        yield
    except RuntimeError as error:
        reason = re.search(r"(?:open|write|close)\(\) failed: ([^;]*)", str(error))
        if reason is None:
            raise
        number = errno.ENOSPC if os.strerror(errno.ENOSPC) in reason[1] else errno.EIO
        raise OSError(number, reason[1]) from error


class ScanProgress:
    """Scans done of how many, how fast, time taken and left, on standard error: a bar, or lines in a log.

    Args:
        total: scans.
        what: is done with them.
    """

    def __init__(self, total: int, what: str):
        self._total, self._what = total, what
        self._done = self._counted = 0
        self._begin = self._last = time.monotonic()
        self._bar = tqdm(total=total, desc=what, unit="scan", smoothing=0.1) if sys.stderr.isatty() else None

    def update(self, *, counts: bool) -> None:
        """One more is done; it counts for the speed unless it only had to be checked."""
        now = time.monotonic()
        if counts and not self._counted and self._done:
            self._begin = now  # those before only had to be checked
        self._done += 1
        self._counted += counts
        if self._bar is not None:
            self._bar.update()
        elif self._done == self._total or now - self._last > _SECONDS_BETWEEN_LINES:
            self._last = now
            taken = now - self._begin
            speed = (self._counted or self._done) / max(taken, 1e-9)
            left = (self._total - self._done) / speed
            print(
                f"{self._what}: {self._done}/{self._total} scans  {speed:.1f} scans/s  "
                f"elapsed {duration(taken)}  left {duration(left)}",
                file=sys.stderr,
                flush=True,
            )

    def note(self, line: str) -> None:
        """A line of its own."""
        tqdm.write(line, file=sys.stderr)

    def __enter__(self) -> "ScanProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


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
    from h2a2_jax.prepare.procedural import SyntheticRaw, generator_digest

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

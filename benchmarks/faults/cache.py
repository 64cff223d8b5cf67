"""Compiled programs that are damaged, moved, or of somebody else: part of `benchmarks.faults`.

JAX compresses programs with the package zstandard where it is installed: run the scenario with it and without.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.children import Bench
from benchmarks.faults.compare import differences
from benchmarks.faults.damage import flipped
from h2a2_jax.compilation import SignedFolder

_ANEW = "are compiled anew"
"""Part of the line that a process prints once where programs do not run."""
_STEP = 32
_FLIPS = 8
"""Bits flipped in a file, one after the other: in the signature, at the beginning, the end and between."""

Damage = Callable[[Path, np.random.Generator], object]


def cache(bench: Bench) -> None:
    """Damage every file of the caches of a training and of a prediction; move them; sign them with another key."""
    shutil.rmtree(bench.own_cache, ignore_errors=True)
    room = _room(bench)
    _train(bench, "cache_filled")
    expected = _predict(bench, room, "filled")
    whole = bench.empty("cache_whole")
    shutil.copytree(bench.own_cache, whole)
    names = sorted(path.name for path in whole.iterdir())
    bench.report.event(f"{len(names)} files of compiled programs")
    _every_file(bench, whole, names)

    before = _restore(bench, whole)
    _train(bench, "cache_moved", "the run and its cache are moved", anew=False)
    _same(bench, "a prediction with a cache that was moved", expected, _predict(bench, room, "moved", anew=False))
    if written := {name for name in _inodes(bench) if before.get(name) != _inodes(bench)[name]} - _indices(names):
        bench.report.failed(f"{len(written)} programs were compiled anew in a moved run")

    for shift in (0, 1):
        what = f"every file is damaged, in {len(_DAMAGES)} ways, round {shift + 1}"
        _restore(bench, whole)
        for number, name in enumerate(names):
            list(_DAMAGES.values())[(number + shift) % len(_DAMAGES)](bench.own_cache / name, bench.rng)
        _train(bench, "cache_damaged", what)
        _same(bench, f"a prediction where {what}", expected, _predict(bench, room, f"damaged{shift}"))
        _train(bench, "cache_damaged", f"{what}, second start", anew=False)

    _restore(bench, whole)
    stranger = {"XDG_DATA_HOME": str(bench.empty("cache_stranger"))}  # another key
    _train(bench, "cache_foreign", "the cache is of another user", changed=stranger)
    found = _predict(bench, room, "foreign", changed=stranger)
    _same(bench, "a prediction with the cache of another user", expected, found)


def _every_file(bench: Bench, whole: Path, names: list[str]) -> None:
    """Damage each file in each way; none of them may be read."""
    unseen, tried = [], 0
    for name in names:
        for what, damage in _DAMAGES.items():
            for _ in range(_FLIPS if what == "a bit flipped" else 1):
                folder = bench.empty("cache_one")
                folder.mkdir(mode=0o700)
                for kept in (name, names[names.index(name) - 1]):
                    shutil.copy2(whole / kept, folder / kept)
                damage(folder / name, bench.rng)
                tried += 1
                if SignedFolder(folder, lambda _: None).read(name) is not None:
                    unseen.append(f"{name}: {what}")
    fault = f"{tried} damages, one file at a time"
    if unseen:
        bench.report.failed(f"{len(unseen)} were read, as {unseen[0]}", fault)
    else:
        bench.report.survived(fault, "none was read")


def _train(bench: Bench, name: str, fault: str = "", *, anew: bool | None = None, **how: Any) -> None:
    """Go on with a copy of the reference and compare its end; check whether programs were refused, where it is known.

    `anew` None: programs are refused if there is a fault. `how` is of `Bench.start`.
    """
    child = bench.train(bench.rewound(name, _STEP), own_cache=True, **how)
    child.expect(0, f"after step {_STEP} of")
    _check_said(bench, sum(_ANEW in line for line in child.lines), bool(fault) if anew is None else anew, fault)
    bench.report.equal("the end", differences(bench.reference, bench.folder / name), fault)


def _predict(bench: Bench, room: Path, name: str, *, anew: bool | None = None, **how: Any) -> dict[str, bytes]:
    """Predict with the reference; return the files that it wrote, by name. `how` is of `Bench.start`."""
    output = bench.empty(f"cache_boxes_{name}")
    command = ["run.py", "--mode=predict", f"--workdir={bench.reference}", f"--input={room}", f"--output={output}"]
    child = bench.start([*command, "--dataset=scannet", "--score=0.001", "--formats=csv"], own_cache=True, **how)
    child.expect(0)
    _check_said(bench, sum(_ANEW in line for line in child.lines), name != "filled" if anew is None else anew, name)
    return {path.name: path.read_bytes() for path in output.glob("*.csv")}


def _check_said(bench: Bench, said: int, expected: bool, what: str) -> None:
    if said != expected:
        bench.report.failed(f"{said} lines tell of programs that do not run, expected {int(expected)}", what)


def _same(bench: Bench, what: str, expected: dict[str, bytes], found: dict[str, bytes]) -> None:
    differing = [name for name in expected if expected[name] != found.get(name)]
    bench.report.equal("the table of boxes", differing or ["there are no boxes"] * (not expected), what)


def _room(bench: Bench) -> Path:
    """Write points of a room of 4 x 3 x 2.5 m, with colours."""
    rng = np.random.default_rng(0)
    points = rng.uniform(0, (4, 3, 2.5), (6000, 3))
    points[:4000, 2] = 0
    points[4000:5000] = rng.uniform((1, 1, 0), (2, 2, 0.8), (1000, 3))
    path = bench.folder / "cache_room.txt"
    np.savetxt(path, np.hstack([points, rng.integers(0, 256, (6000, 3))]), "%.4f")
    return path


def _restore(bench: Bench, whole: Path) -> dict[str, int]:
    """Put all files back as they were; return their inodes."""
    shutil.rmtree(bench.own_cache)
    shutil.copytree(whole, bench.own_cache)
    return _inodes(bench)


def _inodes(bench: Bench) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in bench.own_cache.iterdir()}


def _indices(names: list[str]) -> set[str]:
    """Files that list the programs used last: they are written with each use."""
    return {name for name in names if name.endswith(".index")}


def _flip(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    places = (int(rng.integers(32)), 32, int(rng.integers(len(content))), len(content) - 1)
    place = places[int(rng.integers(len(places)))]
    path.write_bytes(flipped(content, 8 * place + int(rng.integers(8))))


def _overwrite(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = rng.bytes(64)
    path.write_bytes(content)


def _take_other(path: Path, rng: np.random.Generator) -> None:
    shutil.copyfile(next(other for other in sorted(path.parent.iterdir()) if other != path and other.is_file()), path)


def _become_folder(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


_DAMAGES: dict[str, Damage] = {
    "a bit flipped": _flip,
    "other machine code": _overwrite,
    "the content of another file": _take_other,
    "cut": lambda path, rng: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, rng: os.truncate(path, 0),
    "bytes appended": lambda path, rng: path.write_bytes(path.read_bytes() + rng.bytes(8)),
    "removed": lambda path, rng: path.unlink(),
    "without its signature": lambda path, rng: path.write_bytes(path.read_bytes()[32:]),
    "a folder": _become_folder,
}

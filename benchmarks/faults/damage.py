"""Full and read-only disks, and damaged checkpoints: part of `benchmarks.faults`."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.children import Bench, Fault, half_saved, newest, saved_steps
from benchmarks.faults.compare import differences, state_differences
from benchmarks.faults.stops import saved_step

_TWO_CHECKPOINTS, _LARGE = "size=4600k", "size=64m"
_BALLAST = "ballast"


class NoDisk(Exception):
    """A disk cannot be mounted here."""


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a disk in memory on a folder."""
    folder.mkdir(parents=True)
    if (problem := _mount("-t", "tmpfs", "-o", size, "tmpfs", str(folder))) is not None:
        raise NoDisk(problem)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def _mount(*arguments: str) -> str | None:
    """Call `mount`; return its error message, None if it succeeds."""
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()


def remount(folder: Path, options: str) -> None:
    """Mount a disk again with another size, or read-only or writable."""
    if (problem := _mount("-o", f"remount,{options}", str(folder))) is not None:
        raise Fault(f"{folder} cannot be mounted again with {options}: {problem}")


def disk(bench: Bench) -> None:
    """Disks that fill up, and one that is read-only."""
    for scenario in (_full_for_a_checkpoint, _full_for_a_line, _read_only):
        try:
            scenario(bench)
        except NoDisk as problem:
            bench.report.event(f"skipped, because no disk can be mounted here: {problem}")
            return


def _full_for_a_checkpoint(bench: Bench) -> None:
    place = bench.folder / "disk_checkpoint"
    workdir = place / "run"
    with small_disk(place, _TWO_CHECKPOINTS):
        child = bench.train(workdir)
        child.wait_for(lambda: newest(workdir) >= 8)
        first = _sizes(workdir / "checkpoints" / "8")
        line = child.expect(2, "A checkpoint could not be written", "No space left on device", "free space there")
        _check_full_disk(bench, workdir, "a disk that is full at a checkpoint", line)
        if 8 in saved_steps(workdir) and _sizes(workdir / "checkpoints" / "8") != first:
            bench.report.failed("the checkpoint before is not what it was")
        remount(place, _LARGE)
        _check_resumed(bench, workdir, saved_step(line), "once there was space")


def _full_for_a_line(bench: Bench) -> None:
    place = bench.folder / "disk_line"
    workdir = place / "run"
    with small_disk(place, _LARGE):
        child = bench.train(workdir)
        child.wait_for(lambda: newest(workdir) >= 8)
        with contextlib.suppress(OSError), (place / _BALLAST).open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        line = child.expect(2, "No space left on device", "free space there")
        _check_full_disk(bench, workdir, "a disk that is full at a line", line)
        (place / _BALLAST).unlink()
        _check_resumed(bench, workdir, newest(workdir), "once there was space")


def _read_only(bench: Bench) -> None:
    place = bench.folder / "disk_read_only"
    workdir = place / "run"
    with small_disk(place, _LARGE):
        remount(place, "ro")
        line = bench.train(workdir).expect(2, "cannot be written to", "give another --workdir")
        bench.report.event(f"a new run on a read-only disk: {line}")
        remount(place, "rw")
        shutil.copytree(bench.rewound("for_read_only", 32), workdir)
        remount(place, "ro")
        line = bench.train(workdir).expect(2, "cannot be written to", "give another --workdir")
        bench.report.event(f"a run that was begun, on a read-only disk: {line}")
        remount(place, "rw")
        _check_resumed(bench, workdir, 32, "once it could be written to")


def _check_full_disk(bench: Bench, workdir: Path, what: str, line: str) -> None:
    """Check the workdir after a run that ended because of a full disk."""
    bench.report.event(f"{what}: {line}")
    if (step := saved_step(line)) != newest(workdir):
        bench.report.failed(f"it printed that step {step} is saved, the newest checkpoint is of step {newest(workdir)}")
    if half := half_saved(workdir):
        bench.report.failed(f"half-written is {', '.join(half)}")
    bench.report.equal("what was saved", state_differences(bench.every, workdir, newest(workdir)))


def _check_resumed(bench: Bench, workdir: Path, step: int, when: str) -> None:
    """Resume a training after a step, and compare its end with the reference."""
    bench.train(workdir).expect(0, f"after step {step} of")
    bench.report.equal(f"the end, {when},", differences(bench.reference, workdir))


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def damaged(bench: Bench) -> None:
    """Damage the newest checkpoint in three ways, then all of them."""
    ways = (("a file cut in half", _cut), ("a flipped bit", _flip_bit), ("a folder gone", _remove_item))
    for what, damage in ways:
        workdir = bench.rewound("damaged", 32)
        damage(bench, workdir / "checkpoints" / "32")
        child = bench.train(workdir)
        line = child.expect(0, "The checkpoint of step 32", "It is set aside in", "the one before it is taken")
        bench.report.event(f"{what}: {line}")
        if child.line_with("after step 24 of") is None:
            bench.report.failed("it did not go on after step 24")
        bench.report.equal("the end after that", differences(bench.reference, workdir))
    for what, damage in (ways[0], ways[2]):
        workdir = bench.rewound("damaged", 32)
        before = saved_steps(workdir)
        for step in before:
            damage(bench, workdir / "checkpoints" / str(step))
        line = bench.train(workdir).expect(2, "run.py: ", "There is no other one in")
        bench.report.event(f"all {len(before)} checkpoints with {what}: {line}")
        if before[0] not in (kept := saved_steps(workdir)):
            bench.report.failed(f"the last of them is gone, there are {kept}")


def flipped(content: bytes, bit: int) -> bytes:
    """Return a content with one bit changed, counted from the lowest bit of the first byte."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _largest(checkpoint: Path) -> Path:
    return max(
        (path for path in checkpoint.glob("params/**/d/*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def _cut(bench: Bench, checkpoint: Path) -> None:
    path = _largest(checkpoint)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_bit(bench: Bench, checkpoint: Path) -> None:
    path = _largest(checkpoint)
    content = path.read_bytes()
    path.write_bytes(flipped(content, int(bench.rng.integers(8 * len(content)))))


def _remove_item(bench: Bench, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "optimizer")

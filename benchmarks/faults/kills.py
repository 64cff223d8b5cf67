"""SIGKILL at moments spread over a training: part of `benchmarks.faults`."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults.children import (
    CHECKPOINT_EVERY,
    STEPS,
    Bench,
    Child,
    half_saved,
    logged_step,
    newest,
    saved_steps,
)
from benchmarks.faults.compare import differences

Condition = Callable[[], object]


class Moment(NamedTuple):
    """Moment of a kill.

    Attributes:
        name: the moment in words.
        condition: makes the condition to wait for, from a child that was just started, its workdir and a random number
            in [0, 1).
        least: shortest delay after that, in seconds.
        most: longest delay after that, in seconds.
    """

    name: str
    condition: Callable[[Child, Path, float], Condition]
    least: float
    most: float


def _at_once(child: Child, workdir: Path, chance: float) -> Condition:
    return lambda: True


def _first_step(child: Child, workdir: Path, chance: float) -> Condition:
    return lambda: child.line_with("First step done")


def _some_step(child: Child, workdir: Path, chance: float) -> Condition:
    last = newest(workdir) + 1 + int(chance * (CHECKPOINT_EVERY - 1))
    return lambda: child.line_with("First step done") and logged_step(workdir) >= min(last, STEPS)


def _saving(child: Child, workdir: Path, chance: float) -> Condition:
    before = set(half_saved(workdir))
    return lambda: set(half_saved(workdir)) - before


def _saved(child: Child, workdir: Path, chance: float) -> Condition:
    before = set(saved_steps(workdir))
    return lambda: set(saved_steps(workdir)) - before


def _evaluating(child: Child, workdir: Path, chance: float) -> Condition:
    return lambda: child.line_with("Evaluating step")


def _evaluated(child: Child, workdir: Path, chance: float) -> Condition:
    began = time.time()
    return lambda: any(path.stat().st_mtime > began for path in workdir.glob("evaluations/*/evaluation.json"))


def _last_evaluation(child: Child, workdir: Path, chance: float) -> Condition:
    return lambda: child.line_with("Input: ") or (workdir / "evaluation.json").exists()


def _compiled(child: Child, workdir: Path, chance: float) -> Condition:
    programs = workdir.parent / "own_compiled"
    before = set(programs.glob("*.compiled"))
    return lambda: len(set(programs.glob("*.compiled")) - before) > 40 * chance


_START = Moment("after the start", _at_once, 0.3, 15)
_FIRST_STEP = Moment("after the first step", _first_step, 0, 2)
_STEP = Moment("after a step was logged", _some_step, 0, 0.6)
_SAVING = Moment("after a checkpoint was begun", _saving, 0, 0.1)
_SAVED = Moment("after a checkpoint was done", _saved, 0, 0.2)
_EVALUATING = Moment("after an evaluation was begun", _evaluating, 0, 8)
_EVALUATED = Moment("after evaluation.json was written", _evaluated, 0, 0.02)
_END = Moment("after the last step", _last_evaluation, 0, 12)
_COMPILED = Moment("after some programs were compiled", _compiled, 0, 0.02)

_MOMENTS = (_START, _STEP, _SAVING, _SAVED, _EVALUATING, _EVALUATED, _FIRST_STEP, _SAVING, _END, _SAVED, _STEP)


def kills(bench: Bench) -> None:
    """Kill and start again; compare each training that reaches its end and begin another one."""
    done, number = 0, 0
    while done < bench.kills:
        workdir, starts = bench.empty(f"killed{number}"), 0
        while done < bench.kills:
            starts += 1
            killed = _kill(bench, workdir, bench.train(workdir), _MOMENTS[done % len(_MOMENTS)], f"kill {done + 1}")
            if not killed:
                break
            done += 1
        else:
            bench.train(workdir).expect(0)
        _compare(bench, workdir, starts + 1)
        number += 1


def own_cache(bench: Bench) -> None:
    """Kill a training that has its own cache of compiled programs, also while entries are written."""
    workdir = bench.empty("own_cache")
    shutil.rmtree(bench.own_cache, ignore_errors=True)
    moments = (_COMPILED, _COMPILED, _START, _STEP)
    for number, moment in enumerate(moments, 1):
        _kill(bench, workdir, bench.train(workdir, own_cache=True), moment, f"own cache, kill {number}")
        bench.report.event(f"the cache holds {len(list(bench.own_cache.glob('*.compiled')))} entries")
    child = bench.train(workdir, own_cache=True)
    child.expect(0)
    if line := child.line_with("are compiled anew"):
        bench.report.failed(f"a kill left a part of an entry: {line}")
    _compare(bench, workdir, len(moments) + 1)


def _kill(bench: Bench, workdir: Path, child: Child, moment: Moment, which: str) -> bool:
    """Kill a training; return False if it reaches its end before."""
    before = newest(workdir)
    condition = moment.condition(child, workdir, bench.rng.uniform())
    delay = bench.rng.uniform(moment.least, moment.most)
    if not child.wait_for(condition) or not child.wait(delay):
        child.expect(0)
        bench.report.event(f"{which} was to be {moment.name}, but the training reached its end")
        return False
    child.kill()
    logged, there, half = logged_step(workdir), newest(workdir), half_saved(workdir)
    bench.report.event(
        f"{which} {delay:.2f} s {moment.name}: step {logged} logged, checkpoint {there} there"
        f"{', another one half-written' if half else ''}; {max(logged - there, 0)} steps to take again"
    )
    if (resumed := child.line_with("Resuming ")) and f"after step {before} " not in resumed:
        bench.report.failed(f"it resumed from another checkpoint than the newest one, of step {before}: {resumed}")
    # Saving a checkpoint begins when the one before it is on disk.
    due = logged // CHECKPOINT_EVERY * CHECKPOINT_EVERY
    if there < due - CHECKPOINT_EVERY * bool(logged - due < CHECKPOINT_EVERY / 2 or half):
        bench.report.failed(f"step {logged} was logged, yet the newest checkpoint is of step {there}")
    return True


def _compare(bench: Bench, workdir: Path, starts: int) -> None:
    found = differences(bench.reference, workdir)
    events = len(list((workdir / "tensorboard").glob("*")))
    if events > starts:
        found.append(f"{events} files of TensorBoard after {starts} starts")
    bench.report.equal(f"the training in {workdir.name}, after {starts} starts,", found)

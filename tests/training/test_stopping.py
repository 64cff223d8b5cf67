"""SIGTERM and Ctrl-C: noted while a run steps, raised at once elsewhere."""

import contextlib
import ctypes
import os
import signal
import threading
from pathlib import Path

import pytest

from h2a2_jax.errors import INTERRUPTED, InputError, Stopped
from h2a2_jax.training import stopping
from h2a2_jax.training.stopping import KeepWorkdir, StopSignals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, INTERRUPTED)])
def test_outside_of_steps_a_signal_ends_the_run_at_once(number: int, status: int):
    with StopSignals().handle(), pytest.raises(Stopped) as stopped:
        send(number)
    assert stopped.value.status == status
    assert str(stopped.value) == f"Stopped by {signal.Signals(number).name}"


def test_while_a_run_steps_a_signal_is_noted():
    with StopSignals().handle() as signals:
        with signals.defer():
            assert not signals.requested
            send(signal.SIGTERM)
            assert signals.requested
            with pytest.raises(Stopped), signals.immediate():
                pytest.fail("what came before is not forgotten")
        assert signals.stopped().status == 0


def test_what_may_be_left_at_any_time_is():
    with StopSignals().handle() as signals, signals.defer(), pytest.raises(Stopped), signals.immediate():
        send(signal.SIGTERM)


def test_a_second_ctrl_c_does_not_wait():
    with StopSignals().handle() as signals, signals.defer():
        send(signal.SIGINT)
        with pytest.raises(Stopped):
            send(signal.SIGINT)


def test_handlers_are_put_back_and_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as below nohup
    try:
        term = signal.getsignal(signal.SIGTERM)
        with StopSignals().handle() as signals:
            assert signal.getsignal(signal.SIGTERM) != term
            send(signal.SIGINT)
            assert not signals.requested
        assert signal.getsignal(signal.SIGTERM) == term and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_handle():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def watch() -> None:
        with StopSignals().handle():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(("compiling", "saves"), [(False, False), (True, True)])
def test_a_signal_ends_a_process_whose_main_thread_is_in_c(
    compiling: bool, saves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    ended: list[tuple[int, str]] = []

    def end_now(stopped: Stopped, sentence: str) -> None:
        ended.append((stopped.status, sentence))
        signals._leaves = True  # in place of the end of the process
        library.pthread_mutex_unlock(mutex)

    monkeypatch.setattr(stopping, "end_now", end_now)
    signals = StopSignals()
    signals._PATIENCE_S = 0.1
    signals.rescue = lambda save: f"step 7 is saved, {save}"
    with contextlib.suppress(Stopped), signals.handle(), signals.defer(compiling):
        signals._compiling = signals._between_steps = compiling
        threading.Timer(0.2, send, (signal.SIGHUP,)).start()
        library.pthread_mutex_lock(mutex)  # as XLA's compiler: no handler of Python runs meanwhile
    assert ended == [(0, f"Stopped by SIGHUP; step 7 is saved, {saves}.")]


def test_a_signal_that_python_drops_ends_a_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dying:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    ended = threading.Event()

    def end_now(stopped: Stopped, sentence: str) -> None:
        signals._leaves = True  # in place of the end of the process
        ended.set()

    monkeypatch.setattr(stopping, "end_now", end_now)
    signals = StopSignals()
    signals._PATIENCE_S = 0.1
    with signals.handle():
        Dying()  # as a function that JAX has called while it collects garbage
        assert signals.requested and ended.wait(10)
    assert "Traceback" not in capsys.readouterr().err


def test_a_step_that_took_the_arrays_is_waited_for() -> None:
    signals = StopSignals()

    def rescue(save: bool) -> str:
        raise RuntimeError("Array has been deleted")

    signals.rescue = rescue
    signals._leave(signal.SIGTERM)  # returns
    assert not signals.requested


def test_a_workdir_that_vanishes_ends_the_run(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    keep = KeepWorkdir(workdir)
    keep.check()  # not begun yet
    workdir.mkdir()
    (workdir / "config.json").touch()
    keep.begin()
    (workdir / "metrics.jsonl").touch()
    keep.check()
    workdir.rename(tmp_path / "moved")
    vanished = pytest.raises(InputError, match="was removed, moved, replaced or unmounted")
    with vanished:
        keep.check()
    workdir.mkdir()
    with vanished, keep.explain():
        raise FileNotFoundError("of a library")
    workdir.rmdir()
    (tmp_path / "moved").rename(workdir)
    keep.check()

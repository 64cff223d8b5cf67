"""SIGTERM and Ctrl-C: noted while a run steps, raised at once elsewhere."""

import os
import signal
import threading

import pytest

from h2a2_jax.errors import INTERRUPTED, Stopped
from h2a2_jax.training.callbacks import StopSignals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)])
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

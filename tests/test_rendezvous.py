"""Processes of a run meet, or each gets a sentence on the one that it misses. All of them are threads here."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from h2a2_jax.errors import InputError
from h2a2_jax.rendezvous import CHECKPOINT, Hub, Link, Loss, Member, Relay, Watch, parse_address


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


def member(port: int, index: int, count: int = 3, timeout: float | int = 20, **facts: str) -> Member:
    return Member("localhost", port, count, index, float(timeout), facts)


def meet(*members: Member) -> list[Watch | str]:
    """What becomes of each process: its watch, or its sentence."""
    outcomes: list[Watch | str] = [""] * len(members)

    def join(i: int) -> None:
        try:
            watch = Link(members[i]) if members[i].index else Hub(members[i])
            watch.meet()
            outcomes[i] = watch
        except InputError as error:
            outcomes[i] = str(error)

    threads = [threading.Thread(target=join, args=(i,)) for i in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


@contextlib.contextmanager
def three() -> Iterator[tuple[list[Watch], list[list[Loss]]]]:
    """Three processes that met, and the losses that each of them notices."""
    port = free_port()
    watches = [watch for watch in meet(*(member(port, i) for i in range(3))) if isinstance(watch, Watch)]
    assert len(watches) == 3
    seen: list[list[Loss]] = [[], [], []]
    for watch, losses in zip(watches, seen, strict=True):
        watch.watch(losses.append)
    try:
        yield watches, seen
    finally:
        for watch in watches:
            watch.close()


def until(condition: Callable[[], object]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.parametrize("dead", [0, 1])
def test_all_learn_of_a_process_that_dies(dead: int) -> None:
    with three() as (watches, seen):
        watches[dead].close()  # as the system does for a process that was killed
        others = [losses for i, losses in enumerate(seen) if i != dead]
        assert until(lambda: all(others)) and {losses[0] for losses in others} == {Loss(dead, "died")}
    assert Loss(dead, "died").text(2, 3) == f"process {dead} of 3 died"


def test_a_process_that_is_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("h2a2_jax.rendezvous._BEAT_S", 0.05)
    monkeypatch.setattr(Link, "_follow", lambda watch: None)  # as if it were stopped once it met the others
    port = free_port()
    hub, link = meet(member(port, 0, count=2, timeout=2), member(port, 1, count=2, timeout=2))
    assert isinstance(hub, Hub) and isinstance(link, Link)
    seen: list[Loss] = []
    hub.watch(seen.append)
    assert until(lambda: seen) and seen == [Loss(1, "silent", detail="2 s")]
    link.close()
    hub.close()
    assert seen[0].text(0, 2) == "process 1 of 2 has not answered for 2 s"
    assert seen[0].text(1, 2) == "process 1 of 2, this one, did not answer for 2 s, so that the others ended"


def test_a_process_that_ends_early_says_why() -> None:
    with three() as (watches, seen):
        stopped = Loss(2, "stopped", 0, "SIGTERM")
        watches[2].leave(stopped)
        assert until(lambda: seen[0] and seen[1]) and seen[0] == seen[1] == [stopped]
    assert stopped.text(0, 3) == "process 2 of 3 was stopped by SIGTERM"


def test_processes_that_finish_together_lose_none() -> None:
    with three() as (watches, seen):
        finishing = [threading.Thread(target=watch.finish) for watch in watches]
        for thread in finishing:
            thread.start()
        for thread in finishing:
            thread.join(10)
            assert not thread.is_alive()
        watches[1].close()
        watches[0].close()
        time.sleep(0.3)
        assert seen == [[], [], []]


def test_processes_that_do_not_come_are_named() -> None:
    port = free_port()
    (alone,) = meet(member(port, 1, timeout=0.5))
    assert isinstance(alone, str) and alone.startswith("process 1 of 3 waited 0.5 s for process 0 at localhost:")
    zero, one = meet(member(port, 0, timeout=0.5), member(port, 1, timeout=5))
    for sentence, own in ((zero, 0), (one, 0)):
        assert str(sentence).startswith(f"process {own} of 3 waited 0.5 s for process 2 at localhost:{port}")
    zero, one = meet(member(port, 0, timeout=1.5), member(port, 1, timeout=0.5))
    assert str(one).startswith(f"process 1 of 3 waited 0.5 s for process 2 at localhost:{port}")
    assert str(zero).startswith("process 0 of 3 waited 1.5 s for processes 1, 2 at")


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (dict(index=1, count=2), "process 1 was given --num_processes=2, process 0 3:"),
        (dict(index=1, lr="2"), "process 1 has lr 2, process 0 has 1: start all processes with the same flags"),
        (dict(index=1), "process 1 has lr missing, process 0 has 1:"),
        (dict(index=1, lr="1", **{CHECKPOINT: "8"}), f"process 1 has {CHECKPOINT} 8, process 0 has missing: give all"),
    ],
)
def test_processes_that_disagree_get_one_sentence(second: dict, sentence: str) -> None:
    port = free_port()
    outcomes = meet(member(port, 0, lr="1"), member(port, **second))
    assert outcomes[0] == outcomes[1] and str(outcomes[0]).startswith(sentence)


def test_a_number_given_twice_is_refused_and_later_the_late_one_alone() -> None:
    port = free_port()
    outcomes = meet(member(port, 0), member(port, 1), member(port, 1))
    assert len(set(map(str, outcomes))) == 1 and "--process_id=1 was given twice" in str(outcomes[0])
    with three() as (watches, seen):
        (late,) = meet(member(watches[0].member.port, 2))
        assert "--process_id=2 was given twice" in str(late) and seen == [[], [], []]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "it sent 'HTTP/1.1 400 Bad Request"),
        (b"\x00" * (1 << 20), "another program than process 0 listens on --coordinator=localhost:"),
        (b'{"h2a2": [', "waited 1 s for process 0 at localhost:"),
        (b"", "waited 1 s for process 0 at localhost:"),
        (None, "nothing that listens there answers as a process of h2a2 does"),
    ],
)
def test_another_service_is_told_from_process_0(answer: bytes | None, sentence: str) -> None:
    with socket.create_server(("localhost", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connected = listening.accept()[0]
                    if answer is not None:
                        with connected, contextlib.suppress(OSError):
                            connected.sendall(answer)
                    else:
                        held.append(connected)

        held: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        (outcome,) = meet(member(listening.getsockname()[1], 1, timeout=1))
        assert sentence in str(outcome)
        for connected in held:
            connected.close()


def test_strangers_cost_a_run_nothing() -> None:
    port = free_port()
    hub = Hub(member(port, 0, count=2))
    strangers = [socket.create_connection(("localhost", port)) for _ in range(4)]
    for stranger, data in zip(
        strangers, (b"GET / HTTP/1.1\r\n\r\n", b'{"h2a2": 1}\n', b'{"h2a2": ' + b"[" * 10**5, b""), strict=True
    ):
        stranger.sendall(data)
    link = Link(member(port, 1, count=2))
    thread = threading.Thread(target=link.meet)
    thread.start()
    assert hub.meet() > 0
    thread.join(10)
    assert not thread.is_alive() and hub.loss is None and link.loss is None
    for one in (*strangers, link, hub):
        one.close()


@pytest.mark.parametrize("text", ["localhost", "localhost:", "localhost:0", "localhost:65536", ":123", "h:-1", "h:x"])
def test_a_wrong_address_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected host:port of process 0 with a port from 1 to 65535"):
        parse_address(text, "--coordinator=localhost:12345")


def test_addresses_are_parted() -> None:
    assert parse_address("node7:12345", "") == ("node7", 12345) and parse_address("[::1]:5", "") == ("::1", 5)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("localhost", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(InputError, match=f"process 0 cannot listen on port {port} .*Address already in use"):
            Hub(member(port, 0))


def test_a_relay_hides_the_end_of_the_other_side() -> None:
    with socket.create_server(("localhost", 0)) as listening:
        relay = Relay("localhost", listening.getsockname()[1], 5.0)
        near = socket.create_connection(("127.0.0.1", relay.port))
        far = listening.accept()[0]
        near.sendall(b"to")
        assert far.recv(10) == b"to"
        far.sendall(b"fro")
        assert near.recv(10) == b"fro"
        far.close()
        near.settimeout(0.3)
        with pytest.raises(TimeoutError):
            near.recv(10)
        near.close()
        relay.close()

"""The processes of a run meet before JAX is started, and watch one another until the end.

Process 0 listens on the coordinator's port. Every other process connects to it and introduces itself; process 0
compares numbers, flags, config and versions, and accepts all or refuses all. The connections stay open. A process that
dies closes its connection; one that hangs sends no beats. Process 0 tells the others.

JAX has a service for this, too, but it ends a process by an abort with a stack. Its service listens on a port of its
own, and each process reaches it through a `Relay`, which hides the end of process 0 from JAX.

Messages are lines of JSON, at most `_LONGEST` bytes each, with the key "h2a2":

    to process 0     hello: {"id", "count", "facts", "name"}; {"beat"}; {"done"}; {"loss"}
    from process 0   {"missing": [ids]}; {"refused": sentence}; {"accepted": port}; {"beat"}; {"loss"}; {"done"}
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from h2a2_jax.errors import InputError

PROTOCOL = 1
"""Version of the messages."""

_LONGEST = 1 << 18
_BEAT_S = 1.0
_PAUSED_S = 5.0
"""A thread that slept for so long was stopped, and cannot blame others for their silence."""
_GREETING_S = 10.0
_SILENCE = 0.75
"""Part of the time limit after which a silent process counts as lost, so that all have ended within the limit."""
_START = b'{"h2a2": '

CHECKPOINT = "as newest checkpoint step"
"""Name of the fact that tells a workdir that not all processes share."""


class Loss(NamedTuple):
    """The early end of a process.

    Attributes:
        process: number of the process.
        kind: "died", "silent", "failed" (an error, which it printed) or "stopped" (by a signal).
        status: exit status of the other processes.
        detail: seconds of silence, or the name of the signal.
    """

    process: int
    kind: str
    status: int = 2
    detail: str = ""

    def text(self, own: int, count: int) -> str:
        """Describe the loss in process `own` of `count`, without a full stop."""
        whom = f"process {self.process} of {count}"
        if self.process == own:
            return f"{whom}, this one, did not answer for {self.detail}, so that the others ended"
        return {
            "died": f"{whom} died",
            "silent": f"{whom} has not answered for {self.detail}",
            "failed": f"{whom} ended with an error, which it printed",
            "stopped": f"{whom} was stopped by {self.detail}",
        }.get(self.kind, f"{whom} ended")


@dataclass(frozen=True)
class Member:
    """A process of a run.

    Attributes:
        host: name or address of the machine of process 0.
        port: port on which process 0 listens.
        count: number of processes.
        index: number of this process, from 0.
        timeout: seconds to wait for the other processes.
        facts: what must be the same in all processes, by name, as "--config.optim.lr".
    """

    host: str
    port: int
    count: int
    index: int
    timeout: float = 60.0
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """The coordinator, as the user gave it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def hello(self) -> dict[str, Any]:
        """The message by which a process introduces itself."""
        return {"id": self.index, "count": self.count, "facts": dict(self.facts), "name": own_name()}


def own_name() -> str:
    """Machine and number of this process."""
    return f"{socket.gethostname()} process {os.getpid()}"


def parse_address(text: str, example: str) -> tuple[str, int]:
    """Part host:port; an IPv6 address stands in brackets.

    Raises:
        InputError: there is no host, or no port from 1 to 65535.
    """
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not host or not port.isdecimal() or not port.isascii() or not 0 < int(port) < 1 << 16:
        raise InputError(
            f"--coordinator is {text!r}; expected host:port of process 0 with a port from 1 to 65535, as in {example}."
        )
    return host, int(port)


def disagreement(member: Member, hello: Mapping[str, Any]) -> str | None:
    """Sentence on the first difference between process 0 and another process that says hello; None if they agree."""
    index, count, facts = hello["id"], hello["count"], hello["facts"]
    if count != member.count:
        return (
            f"process {index} was given --num_processes={count}, process 0 {member.count}: start all processes again "
            "with the same number."
        )
    for name in sorted({*facts, *member.facts}):
        theirs, ours = (str(values.get(name, "missing")) for values in (facts, member.facts))
        if theirs != ours:
            shown = [value if len(value) <= 80 else f"{value[:77]}..." for value in (theirs, ours)]
            advice = "start all processes with the same flags and packages, except for --process_id"
            if name == CHECKPOINT:
                advice = "give all processes a --workdir that they share"
            return f"process {index} has {name} {shown[0]}, process 0 has {shown[1]}: {advice}."
    return None


class ClosedError(Exception):
    """The other end closed the connection."""


class ForeignError(Exception):
    """The other end is no process of this program; the message is what it sent."""


class Connection:
    """Lines of JSON over a socket, which never blocks.

    Attributes:
        index: number of the process at the other end; None before its hello.
        name: its machine and process number.
        heard: time of the last message, of `time.monotonic`.
        done: True if that process has nothing left to do.
    """

    def __init__(self, connected: socket.socket):
        connected.setblocking(False)
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._read, self._unsent = connected, bytearray(), bytearray()
        self.index: int | None = None
        self.name, self.done, self.heard = "", False, time.monotonic()

    def fileno(self) -> int:
        """Number of the socket, for `multiprocessing.connection.wait`."""
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, as much of it as goes; the rest goes with the next one.

        Raises:
            ClosedError: the connection is lost.
        """
        self._unsent += json.dumps({"h2a2": PROTOCOL, **message}).encode() + b"\n"
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise ClosedError from error

    def receive(self) -> list[dict[str, Any]]:
        """The messages that arrived.

        Raises:
            ClosedError: the connection is closed, and all messages were returned before.
            ForeignError: what arrived is no message.
        """
        closed = False
        try:
            while len(self._read) <= _LONGEST:
                got = self._socket.recv(1 << 16)
                if not got:
                    closed = True
                    break
                self._read += got
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        start = bytes(self._read[: len(_START)])
        if not _START.startswith(start) or len(self._read) > _LONGEST:
            raise ForeignError(bytes(self._read[:40]).decode("ascii", "replace"))
        *lines, rest = bytes(self._read).split(b"\n")
        self._read = bytearray(rest)
        if closed and not lines:
            raise ClosedError
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as error:
            raise ForeignError(lines[0][:40].decode("ascii", "replace")) from error
        if not all(isinstance(message, dict) for message in messages):
            raise ForeignError(lines[0][:40].decode("ascii", "replace"))
        if messages:
            self.heard = time.monotonic()
        return messages

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _readable(sources: Sequence[Any], seconds: float) -> list[Any]:
    """Sockets and connections that have something to read, within some seconds."""
    return wait(sources, seconds)


class Watch:
    """One end of the connections between the processes of a run.

    Use `meet`, then `watch`, and `finish` or `leave` at the end.

    Attributes:
        member: this process.
        loss: the process that was lost first; None while all run.
    """

    def __init__(self, member: Member):
        self.member = member
        self.loss: Loss | None = None
        self.lost, self._all_done = threading.Event(), threading.Event()
        self._on_loss: Callable[[Loss], None] = lambda loss: None
        self._lock = threading.Lock()  # of sending

    def meet(self) -> int:
        """Wait until all processes are there and agree; return the port of JAX's service.

        Raises:
            InputError: the time is over, or a process is refused.
        """
        raise NotImplementedError

    def watch(self, on_loss: Callable[[Loss], None]) -> None:
        """From here on call a function, in another thread, when a process is lost."""
        self._on_loss = on_loss
        if self.loss is not None:
            threading.Thread(target=on_loss, args=(self.loss,), name="lost-process", daemon=True).start()

    def finish(self) -> None:
        """Wait until all processes have nothing left to do; after that none can be lost."""
        raise NotImplementedError

    def leave(self, loss: Loss) -> None:
        """Tell the other processes that this one ends early."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the connections."""
        raise NotImplementedError

    @property
    def _silence(self) -> float:
        return max(_SILENCE * self.member.timeout, 3 * _BEAT_S)

    def _lose(self, loss: Loss) -> None:
        if self.loss is None and not self._all_done.is_set():
            self.loss = loss
            self.lost.set()
            self._on_loss(loss)


class Hub(Watch):
    """The watch of process 0, which all others connect to.

    Raises:
        InputError: the port is taken.
    """

    def __init__(self, member: Member):
        super().__init__(member)
        self._peers: dict[int, Connection] = {}
        self._strangers: list[Connection] = []
        self._refusal: str | None = None
        self._complete, self._closing = threading.Event(), threading.Event()
        self._accepted, self._own_done = False, False
        if member.count == 1:
            self._complete.set()
        try:
            if socket.has_dualstack_ipv6():
                self._socket = socket.create_server(
                    ("", member.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=member.count + 64
                )
            else:
                self._socket = socket.create_server(("", member.port), backlog=member.count + 64)
        except OSError as error:
            raise InputError(
                f"process 0 cannot listen on port {member.port} of --coordinator={member.address} "
                f"({os.strerror(error.errno or 0)}): end the program that uses the port, another process 0 perhaps, or "
                "give all processes another port."
            ) from error
        self._socket.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name="watch-processes", daemon=True)
        self._thread.start()

    def meet(self) -> int:
        """Wait for the others; see `Watch`."""
        began = time.monotonic()
        while not self._complete.wait(0.2) and self._refusal is None:
            missing = self._missing()
            if time.monotonic() - began > self.member.timeout and missing:
                with self._lock:
                    self._refuse(waited(self.member, missing))
        if self._refusal is not None:
            self.close()
            raise InputError(self._refusal)
        port = service_port()
        with self._lock:
            self._accepted = True
            for connection in self._peers.values():
                self._send(connection, {"accepted": port})
        return port

    def finish(self) -> None:
        """Wait for the others; see `Watch`."""
        self._own_done = True
        while not self._all_done.wait(0.2):
            if self.lost.is_set():
                threading.Event().wait()  # the function for losses ends this process

    def leave(self, loss: Loss) -> None:
        """Tell the others."""
        with self._lock:
            for connection in self._peers.values():
                self._send(connection, {"loss": loss})

    def wait_for_others(self) -> None:
        """Wait for a while until the others have ended, who may need this process to do so."""
        until = time.monotonic() + _GREETING_S
        while self._peers and time.monotonic() < until:
            time.sleep(0.05)

    def close(self) -> None:
        """Close the connections."""
        self._closing.set()
        self._thread.join(_GREETING_S)

    def _missing(self) -> list[int]:
        return [i for i in range(1, self.member.count) if i not in self._peers]

    def _send(self, connection: Connection, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(ClosedError):  # reading finds it, too
            connection.send(message)

    def _refuse(self, sentence: str) -> None:
        if self._refusal is None and not self._accepted:
            for connection in self._peers.values():
                self._send(connection, {"refused": sentence})
            self._refusal = sentence

    def _serve(self) -> None:
        beat = before = time.monotonic()
        while not self._closing.is_set():
            connections = [*self._peers.values(), *self._strangers]
            ready = _readable([self._socket, *connections], 0.1)
            now = time.monotonic()
            with self._lock:
                if now - before > _PAUSED_S:
                    for connection in connections:
                        connection.heard = now
                before = now
                if self._socket in ready:
                    self._accept()
                for connection in connections:
                    if connection in ready:
                        self._read(connection)
                self._drop_silent(now)
                if now - beat >= _BEAT_S:
                    beat = now
                    message = {"beat": 1} if self._accepted else {"missing": self._missing()}
                    for connection in [*self._peers.values()]:
                        self._send(connection, message)
                if self._own_done and all(peer.done for peer in self._peers.values()) and not self._all_done.is_set():
                    self._all_done.set()
                    for connection in self._peers.values():
                        self._send(connection, {"done": 1})
        self._socket.close()
        for connection in [*self._peers.values(), *self._strangers]:
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it went away again, or there are too many open files
            connected = self._socket.accept()[0]
            self._strangers.append(Connection(connected))

    def _drop_silent(self, now: float) -> None:
        for connection in [c for c in self._strangers if now - c.heard > _GREETING_S]:
            self._strangers.remove(connection)
            connection.close()
        for index, connection in [*self._peers.items()]:
            if self._accepted and now - connection.heard > self._silence and not self._all_done.is_set():
                self._lost_peer(Loss(index, "silent", detail=f"{self._silence:.0f} s"))

    def _read(self, connection: Connection) -> None:
        try:
            messages = connection.receive()
            for message in messages:
                if connection.index is None:
                    self._greet(connection, message)
                elif "loss" in message:
                    connection.done = True  # it may close now
                    self._lost_peer(Loss(*message["loss"]))
                elif "done" in message:
                    connection.done = True
        except (ClosedError, ForeignError, KeyError, TypeError, ValueError):
            connection.close()
            if connection in self._strangers:
                self._strangers.remove(connection)
            elif connection.index is not None and self._peers.get(connection.index) is connection:
                del self._peers[connection.index]
                if self._accepted and not connection.done:
                    self._lost_peer(Loss(connection.index, "died"))

    def _greet(self, connection: Connection, hello: Mapping[str, Any]) -> None:
        index, count, name = int(hello["id"]), int(hello["count"]), str(hello["name"])
        if not isinstance(hello["facts"], dict):
            raise TypeError
        sentence, other = disagreement(self.member, hello), self._peers.get(index)
        if sentence is None and (index == 0 or other is not None):
            holder = own_name() if other is None else other.name
            sentence = (
                f"--process_id={index} was given twice, to {holder} and {name}: give each process its own number."
            )
        if sentence is None and not 0 < index < count:
            sentence = f"--process_id is {index}, expected is one from 0 to {count - 1}."
        if sentence is not None:
            self._send(connection, {"refused": sentence})
            connection.heard = time.monotonic()
            self._refuse(sentence)  # none once the run is at work: then the late one alone
            return
        self._strangers.remove(connection)
        connection.index, connection.name = index, name
        self._peers[index] = connection
        self._send(connection, {"missing": self._missing()})
        if not self._missing():
            self._complete.set()

    def _lost_peer(self, loss: Loss) -> None:
        for connection in self._peers.values():
            self._send(connection, {"loss": loss})
        threading.Thread(target=self._lose, args=(loss,), name="lost-process", daemon=True).start()


class Link(Watch):
    """The watch of a process other than 0, connected to that one."""

    def __init__(self, member: Member):
        super().__init__(member)
        self._connection: Connection | None = None

    def meet(self) -> int:
        """Wait for the others; see `Watch`."""
        try:
            port = self._meet()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._follow, name="watch-processes", daemon=True).start()
        return port

    def _meet(self) -> int:
        until, port = time.monotonic() + self.member.timeout, None
        missing, reason = [0], "it does not answer"
        while port is None:
            if time.monotonic() > until:
                raise InputError(waited(self.member, missing, reason))
            try:
                connected = socket.create_connection((self.member.host, self.member.port), timeout=5)
                self._connection = Connection(connected)
                self._connection.send(self.member.hello())
                for answer in self._answers(until):
                    (missing, port), reason = answer, ""
                reason = reason or "it closed the connection"
            except ClosedError:
                missing, reason = [0], "the connection was closed"
            except socket.gaierror:
                reason = f"the name {self.member.host} does not resolve"
            except TimeoutError:
                missing, reason = [0], "nothing that listens there answers as a process of h2a2 does"
            except OSError as error:
                missing, reason = [0], os.strerror(error.errno or 0)
            if port is None:
                if self._connection is not None:
                    self._connection.close()
                time.sleep(0.3)
        return port

    def _answers(self, until: float) -> Iterator[tuple[list[int], int | None]]:
        """Yield the processes that process 0 still waits for, and at last the port of JAX's service."""
        assert self._connection is not None
        missing = [0]
        while True:
            now = time.monotonic()
            if now > until and missing != [0]:
                raise InputError(waited(self.member, missing))
            if now - self._connection.heard > _GREETING_S or now > until:
                raise TimeoutError
            if not _readable([self._connection], 0.2):
                continue
            try:
                messages = self._connection.receive()
            except ForeignError as error:
                raise InputError(
                    f"another program than process 0 listens on --coordinator={self.member.address}; it sent "
                    f"{str(error)!r}: give all processes a free port of the machine of process 0."
                ) from error
            for message in messages:
                if "refused" in message:
                    raise InputError(str(message["refused"]))
                if "accepted" in message:
                    yield [], int(message["accepted"])
                    return
                missing = [int(index) for index in message.get("missing", [0])]
                yield missing, None

    def finish(self) -> None:
        """Wait for the others; see `Watch`."""
        self._tell({"done": 1})
        while not self._all_done.wait(0.2):
            if self.lost.is_set():
                threading.Event().wait()  # the function for losses ends this process

    def leave(self, loss: Loss) -> None:
        """Tell process 0."""
        self._tell({"loss": loss})

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()

    def _tell(self, message: Mapping[str, Any]) -> None:
        assert self._connection is not None
        with self._lock, contextlib.suppress(ClosedError):
            self._connection.send(message)

    def _follow(self) -> None:
        connection = self._connection
        assert connection is not None
        beat = before = time.monotonic()
        while not self._all_done.is_set():
            try:
                ready = _readable([connection], 0.1)
                now = time.monotonic()
                if now - before > _PAUSED_S:
                    connection.heard = now
                before = now
                for message in connection.receive() if ready else ():
                    if "loss" in message:
                        self._lose(Loss(*message["loss"]))
                        return
                    if "done" in message:
                        self._all_done.set()
            except (ClosedError, ForeignError, TypeError, OSError, ValueError):
                self._lose(Loss(0, "died"))
                return
            if now - connection.heard > self._silence:
                self._lose(Loss(0, "silent", detail=f"{self._silence:.0f} s"))
                return
            if now - beat >= _BEAT_S:
                beat = now
                self._tell({"beat": 1})


def waited(member: Member, missing: list[int], reason: str = "") -> str:
    """Sentence on processes that did not come in time."""
    names = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    own = f"process {member.index} of {member.count}"
    start = f"start {'it' if len(missing) == 1 else 'each'} with --process_id={missing[0]}"
    if len(missing) > 1:
        start = f"start each, with --process_id={' and '.join(map(str, missing))}"
    return (
        f"{own} waited {member.timeout:g} s for {names} at {member.address}{f' ({reason})' * bool(reason)}: {start}, "
        "--num_processes and --coordinator as here; --process_timeout waits longer."
    )


def service_port() -> int:
    """A free port for JAX's service, or the one that JAX_COORDINATOR_BIND_ADDRESS fixes."""
    fixed = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[2]
    if fixed.isdecimal():
        return int(fixed)
    with socket.socket() as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])


class Relay:
    """Hands on connections to JAX's service, and keeps them open if the service ends.

    JAX aborts a process as soon as the connection to its service closes. The watch notices the end, too, and ends the
    process with a sentence.

    Args:
        host: machine of process 0.
        port: port of JAX's service there.
        timeout: seconds to wait until the service listens.

    Attributes:
        port: port on this machine, for this machine alone.
    """

    def __init__(self, host: str, port: int, timeout: float):
        self._target, self._timeout = (host, port), timeout
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._held: list[socket.socket] = []
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def close(self) -> None:
        """Take no further connections, and close those that were kept open."""
        self._socket.close()
        for connected in self._held:
            connected.close()

    def _accept(self) -> None:
        while True:
            try:
                near = self._socket.accept()[0]
            except OSError:  # closed
                return
            threading.Thread(target=self._join, args=(near,), name="relay", daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        until, far = time.monotonic() + self._timeout, None
        while far is None:
            try:
                far = socket.create_connection(self._target, timeout=5)
            except OSError:
                if time.monotonic() > until:
                    near.close()
                    return
                time.sleep(0.2)
        far.settimeout(None)
        self._held += [near, far]
        threading.Thread(target=self._copy, args=(far, near), name="relay", daemon=True).start()
        self._copy(near, far)
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_RDWR)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while got := source.recv(1 << 16):
                target.sendall(got)

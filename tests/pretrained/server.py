"""A server on the loopback address that serves files well or badly."""

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """What a server does; changed by a test while the server runs."""

    files: dict[str, bytes]  # by path
    validators: dict[str, str] = field(default_factory=lambda: {"ETag": '"1"'})
    cuts: list[int] = field(default_factory=list)  # bytes of the body after which each next answer ends
    silent: bool = False  # a cut answer stays open
    ranges: bool = True
    status: int = 200  # of every answer, if it is another
    location: str = ""  # where every answer leads, if anywhere
    length: bool = True  # answers say how long they are
    asked: list[tuple[str, str]] = field(default_factory=list)  # path and Range of each request
    address: str = ""
    closing: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        served: Behaviour = self.server.behaviour  # type: ignore[attr-defined]
        served.asked.append((self.path, self.headers.get("Range", "")))
        body = served.files.get(self.path)
        if served.location:
            self.answer(302, b"", {"Location": served.location})
        elif served.status != 200 or body is None:
            self.answer(served.status if served.status != 200 else 404, b"")
        elif self.headers.get("Range") and served.ranges:
            self.answer_range(served, body)
        else:
            self.answer(200, body, served.validators)

    def answer_range(self, served: Behaviour, body: bytes) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])
        assert found and self.headers["If-Range"] in ("", *served.validators.values(), '"1"', '"2"')
        start = int(found[1])
        if self.headers["If-Range"] not in served.validators.values():
            self.answer(200, body, served.validators)
        elif start >= len(body):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        else:
            span = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            self.answer(206, body[start:], {**served.validators, **span})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        served: Behaviour = self.server.behaviour  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if served.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = served.cuts.pop(0) if body and served.cuts else len(body)
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if cut < len(body) and served.silent:
            served.closing.wait(20)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that has gone


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Behaviour]:
    """Serve files by path, until the block ends."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        behaviour = Behaviour(files, address=f"http://127.0.0.1:{server.server_address[1]}")
        server.behaviour = behaviour  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield behaviour
        finally:
            behaviour.closing.set()
            server.shutdown()
            thread.join()
